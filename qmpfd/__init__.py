"""qmpfd holds open file descriptors for other programs, over QEMU's QMP.

The names below are the public ones.  They are loaded when first used: the command line's short
verbs start four times faster without Trio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._facade import lazily
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .client import BlockingClient as BlockingClient
    from .client import Client as Client
    from .client import ClientClosed as ClientClosed
    from .client import NoDaemon as NoDaemon
    from .client import ReplyLost as ReplyLost
    from .client import Selector as Selector
    from .client import connect as connect
    from .client import connect_blocking as connect_blocking
    from .client import fdset_opener as fdset_opener
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
    from .kernel.fd import Fd as Fd
    from .kernel.fd import FileDescriptorLike as FileDescriptorLike
    from .limits import Limits as Limits
    from .policy import BadPolicy as BadPolicy
    from .policy import Policy as Policy
    from .policy import Rule as Rule
    from .policy import load_policy as load_policy
    from .protocol import ProtocolError as ProtocolError
    from .protocol import QMPEvent as QMPEvent
    from .server import Server as Server
    from .server import SocketInUse as SocketInUse
    from .server import serve as serve

_HOMES = {
    "BlockingClient": ".client",
    "Client": ".client",
    "ClientClosed": ".client",
    "NoDaemon": ".client",
    "ReplyLost": ".client",
    "Selector": ".client",
    "connect": ".client",
    "connect_blocking": ".client",
    "fdset_opener": ".client",
    "AddfdInfo": ".commands",
    "FdInfo": ".commands",
    "FdsetFdInfo": ".commands",
    "FdsetInfo": ".commands",
    "PeerInfo": ".commands",
    "Dialect": ".commands",
    "CommandNotFound": ".errors",
    "FdExists": ".errors",
    "FdNotFound": ".errors",
    "FdNotSupplied": ".errors",
    "GenericError": ".errors",
    "InvalidParameterValue": ".errors",
    "PermissionDenied": ".errors",
    "QMPError": ".errors",
    "Fd": ".kernel.fd",
    "FileDescriptorLike": ".kernel.fd",
    "Limits": ".limits",
    "BadPolicy": ".policy",
    "Policy": ".policy",
    "Rule": ".policy",
    "load_policy": ".policy",
    "ProtocolError": ".protocol",
    "QMPEvent": ".protocol",
    "Server": ".server",
    "SocketInUse": ".server",
    "serve": ".server",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - a test compares it with the imports above


__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
