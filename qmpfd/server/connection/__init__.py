"""One client: its session, its requests, its replies."""
