"""The second copy of the store: in systemd's fd store, or the parent's of ``serve --supervise``."""
