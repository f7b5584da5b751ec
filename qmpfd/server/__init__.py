"""The daemon: listeners, a session per connection, and the end of both.

The names are loaded when first used: a restart and a takeover give descriptors their numbers before
Trio is imported, which opens some of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._facade import lazily

if TYPE_CHECKING:
    from .handle import Server as Server
    from .listen.binding import SocketInUse as SocketInUse
    from .startup import serve as serve

_HOMES = {"SocketInUse": ".listen.binding", "Server": ".handle", "serve": ".startup"}

__all__ = [*_HOMES]  # noqa: PLE0604 - a test compares it with the imports above

__getattr__ = lazily(__name__, _HOMES)
