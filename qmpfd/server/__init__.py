"""The daemon: listeners, a session per connection, and the end of both."""

from .server import Server, serve

__all__ = ["Server", "serve"]
