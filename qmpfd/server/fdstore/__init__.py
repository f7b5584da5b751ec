"""The second copy of what is stored: at systemd, or at the parent of ``serve --supervise``."""
