"""The daemon: listeners, a session per connection, and the end of both."""

from .server import Server
from .startup import serve

__all__ = ["Server", "serve"]
