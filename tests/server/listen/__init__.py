"""Where clients connect."""
