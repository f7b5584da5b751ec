"""The two ends of a takeover: the old daemon sends, the newcomer receives."""
