"""The two sides of a takeover: the predecessor sends, the successor receives."""
