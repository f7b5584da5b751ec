"""Types of the arguments and results of QEMU's commands, as QAPI would generate them.

Names and members are those of QEMU's schema (``qapi/misc.json``, ``qapi/control.json``).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from ..protocol.arguments import Int64
from ..protocol.encode import RawJSON


class Arguments(Struct, forbid_unknown_fields=True, rename="kebab", omit_defaults=True, gc=False):
    """Arguments of a command; without members here: none.  An absent member is None."""


class Result(Struct, rename="kebab", omit_defaults=True, gc=False):
    """Result of a command; without members here: empty.  A member that is None is left out."""


class Capabilities(Arguments):
    """Arguments of ``qmp_capabilities``.

    Args:
        enable: the capabilities to enable.
    """

    enable: list[Literal["oob"]] | None = None


class AddFd(Arguments):
    """Arguments of ``add-fd``.

    Args:
        fdset_id: the fd set to add to; a new one if absent.
        opaque: the opaque text, a name to find the descriptor by.
    """

    fdset_id: Int64 | None = None
    opaque: str | None = None


class RemoveFd(Arguments):
    """Arguments of ``remove-fd``.

    Args:
        fdset_id: the fd set.
        fd: the descriptor's number in the server; all of the set if absent.
    """

    fdset_id: Int64
    fd: Int64 | None = None


class FdName(Arguments, rename=None):
    """Arguments of ``getfd`` and ``closefd``.

    Args:
        fdname: the descriptor's name on this connection.
    """

    fdname: str


class AddfdInfo(Result):
    """A descriptor, by its fd set and number.

    Args:
        fdset_id: the fd set it is in.
        fd: its number in the server.
    """

    fdset_id: Int64
    fd: Int64


class FdsetFdInfo(Result):
    """A descriptor of a set.

    Args:
        fd: its number in the server.
        opaque: its opaque text, if any.
    """

    fd: Int64
    opaque: str | None = None


class FdsetInfo(Result):
    """An fd set.

    Args:
        fdset_id: its id.
        fds: its descriptors, oldest first.
    """

    fdset_id: Int64
    fds: list[FdsetFdInfo]


class VersionTriple(Result):
    """A version number."""

    micro: Int64
    minor: Int64
    major: Int64


class VersionInfo(Result):
    """The server's version; the member is called ``qemu`` in every QMP server.

    Args:
        qemu: the three numbers of the version.
        package: the program's name and version.
    """

    qemu: VersionTriple
    package: str


class NameInfo(Result):
    """The guest's name; this daemon has no guest."""

    name: str | None = None


class CommandInfo(Result):
    """A command of the server."""

    name: str


class SchemaInfo(Result):
    """A command, an event or a type; ``meta_type`` decides which other members follow.

    Args:
        name: its name.
        meta_type: its kind.
    """

    name: str
    meta_type: Literal["builtin", "enum", "array", "object", "command", "event"]


#: The result of a command without a result: an empty object.
NOTHING = RawJSON(b"{}")
