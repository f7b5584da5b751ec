"""qmpfd holds open file descriptors for other programs, over QEMU's QMP.

The public names are those below.  Each is imported at its first use: the command line's short verbs
start four times faster without Trio.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .client.blocking import BlockingClient as BlockingClient
    from .client.blocking import connect_blocking as connect_blocking
    from .client.calls import Selector as Selector
    from .client.client import Client as Client
    from .client.client import ReplyLost as ReplyLost
    from .client.client import connect as connect
    from .client.errors import ClientClosed as ClientClosed
    from .client.errors import NoDaemon as NoDaemon
    from .client.opener import fdset_opener as fdset_opener
    from .commands import AddfdInfo as AddfdInfo
    from .commands import Dialect as Dialect
    from .commands import FdInfo as FdInfo
    from .commands import FdsetFdInfo as FdsetFdInfo
    from .commands import FdsetInfo as FdsetInfo
    from .commands import PeerInfo as PeerInfo
    from .errors import CommandNotFound as CommandNotFound
    from .errors import FdExists as FdExists
    from .errors import FdNotFound as FdNotFound
    from .errors import FdNotSupplied as FdNotSupplied
    from .errors import GenericError as GenericError
    from .errors import InvalidParameterValue as InvalidParameterValue
    from .errors import PermissionDenied as PermissionDenied
    from .errors import QMPError as QMPError
    from .kernel.binding import SocketInUse as SocketInUse
    from .kernel.fd import Fd as Fd
    from .kernel.fd import FileDescriptorLike as FileDescriptorLike
    from .limits import Limits as Limits
    from .policy import BadPolicy as BadPolicy
    from .policy import Policy as Policy
    from .policy import Rule as Rule
    from .policy import load_policy as load_policy
    from .protocol.client import QMPEvent as QMPEvent
    from .protocol.connection import ProtocolError as ProtocolError
    from .server.handle import Server as Server
    from .server.startup import serve as serve

#: The public names, by module.
_NAMES = {
    ".client.blocking": "BlockingClient connect_blocking",
    ".client.calls": "Selector",
    ".client.client": "Client ReplyLost connect",
    ".client.errors": "ClientClosed NoDaemon",
    ".client.opener": "fdset_opener",
    ".commands": "AddfdInfo Dialect FdInfo FdsetFdInfo FdsetInfo PeerInfo",
    ".errors": "CommandNotFound FdExists FdNotFound FdNotSupplied GenericError "
    "InvalidParameterValue PermissionDenied QMPError",
    ".kernel.binding": "SocketInUse",
    ".kernel.fd": "Fd FileDescriptorLike",
    ".limits": "Limits",
    ".policy": "BadPolicy Policy Rule load_policy",
    ".protocol.client": "QMPEvent",
    ".protocol.connection": "ProtocolError",
    ".server.handle": "Server",
    ".server.startup": "serve",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - a test compares it with the imports above


def _load(name: str) -> object:
    """Import a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
    return value


__getattr__ = _load


def __dir__() -> list[str]:
    return __all__
