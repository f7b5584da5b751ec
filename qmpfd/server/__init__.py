"""The daemon: listeners, a session per connection, and the end of both."""

from .startup import serve
from .server import Server

__all__ = ["Server", "serve"]
