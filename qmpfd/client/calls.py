"""Methods of both clients: the request that each sends, and the conversion of its reply.

Each method is described once, by a function with the method's name and arguments that returns a
:class:`Call`.  :func:`as_method` makes it a method: one that blocks, or one that is awaited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    NamedTuple,
    ParamSpec,
    TypedDict,
    TypeVar,
)

from ..errors import QMPError
from ..kernel.fd import Fd, FileDescriptorLike, close_all
from ..protocol.connection import ProtocolError

if TYPE_CHECKING:
    from typing import Unpack

    from ..commands import AddfdInfo, FdInfo, FdsetInfo

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


class Selector(TypedDict, total=False):
    """Conditions that select stored descriptors; all that are given must be met.

    Args:
        opaque: the opaque text is equal to this.
        name: the same as *opaque*; the command line calls it so.
        opaque_prefix: the opaque text begins with this.
        added_by_pid: the process with this number added the descriptor.
        added_by_uid: the user with this uid added the descriptor.
    """

    opaque: str
    name: str
    opaque_prefix: str
    added_by_pid: int
    added_by_uid: int


class Call(NamedTuple, Generic[ResultT]):
    """One command to the server.

    Args:
        command: name of the command.
        arguments: its arguments, as on the wire.
        result: converts the ``return`` member of the reply, and the descriptors that came with it,
            to the result of the method; it owns the descriptors.
        fds: descriptors to pass with it; the caller keeps them.
    """

    command: str
    arguments: Mapping[str, Any] | None
    result: Callable[[Any, list[Fd]], ResultT]
    fds: Sequence[FileDescriptorLike] = ()


MethodT = TypeVar("MethodT", bound=Callable[..., Any])


def as_method(method: MethodT, description: Callable[..., Call[Any]]) -> MethodT:
    """Give *method* the name, docstring and signature of *description*.

    The return annotation becomes that of the method: ``X`` for a ``Call[X]``.
    """
    annotations = description.__annotations__  # inspect.signature() reads these
    if annotations["return"].startswith("Call["):
        annotations["return"] = annotations["return"][len("Call[") : -1]
    update_wrapper(method, description)
    method.__annotations__ = annotations  # update_wrapper leaves them alone since Python 3.14
    return method


def members(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that are not None, under their names on the wire.

    Raises:
        TypeError: both *name* and *opaque* are given, which mean the same.
    """
    if (name := arguments.pop("name", None)) is not None:
        if arguments.get("opaque") is not None:
            raise TypeError("name and opaque mean the same: give one of them")
        arguments["opaque"] = name
    return {k.replace("_", "-"): v for k, v in arguments.items() if v is not None}


def typed(name: str, *, many: bool = False) -> Callable[[Any, list[Fd]], Any]:
    """Make a function that converts a ``return`` member to the type *name* of
    :mod:`qmpfd.commands`, or to a list of them, and closes unexpected descriptors.

    The function raises ProtocolError if the member has another type.
    """

    def convert(value: Any, fds: list[Fd]) -> Any:
        import msgspec

        from .. import commands  # imported on use: that takes as long as a short verb runs

        close_all(fds)
        kind: Any = getattr(commands, name)
        try:
            return msgspec.convert(value, list[kind] if many else kind)
        except (msgspec.MsgspecError, UnicodeError, OverflowError) as exc:
            raise ProtocolError(
                f"the server's reply has another type than the command returns: {exc}"
            ) from exc

    return convert


def any_value(value: Any, fds: list[Fd]) -> Any:
    """Return the ``return`` member unchanged, and close unexpected descriptors."""
    close_all(fds)
    return value


def is_missing(error: QMPError) -> bool:
    """Return whether an error says that no stored descriptor is selected, or none of the access
    mode: by its text, because the dialect ``qemu`` has no class of its own for that.
    """
    return "' not found" in error.desc or error.desc.startswith("No file descriptor with access")


def one_fd(_: Any, fds: list[Fd]) -> Fd:
    """Return the one descriptor that came with a reply.

    Raises:
        ProtocolError: the reply had no descriptor, or more than one.
    """
    if len(fds) != 1:
        close_all(fds)
        raise ProtocolError("the server sent no descriptor with its reply")
    return fds[0]


# -- commands --------------------------------------------------------------------------------------


def execute(
    self: object,
    command: str,
    arguments: Mapping[str, Any] | None = None,
    fds: Sequence[FileDescriptorLike] = (),
) -> Call[Any]:
    """Execute any QMP command.

    Args:
        command: name of the command.
        arguments: its arguments, as on the wire.
        fds: descriptors to pass with it (SCM_RIGHTS); the caller keeps them.

    Returns:
        The ``return`` member of the reply.

    Raises:
        QMPError: the server's error reply; the exception is named after the error's class.
        ReplyLost: the connection was lost before the reply; the server may have executed the
            command or not.  The next call makes a new connection.
        NoDaemon: the server does not answer in time, or the connection is lost; from a Trio client
            it is a trio.BrokenResourceError too.
        ClientClosed: this client is closed; from a Trio client it is a trio.ClosedResourceError
            too.
        ProtocolError: the server's answer is not QMP.
        ValueError: JSON cannot carry the arguments.
        OSError: *fds* cannot be passed.
    """
    return Call(command, arguments, any_value, fds)


def add_fd(
    self: object,
    fd: FileDescriptorLike,
    fdset_id: int | None = None,
    opaque: str | None = None,
) -> Call[AddfdInfo]:
    """Add a duplicate of *fd* to an fd set (``add-fd``).

    Args:
        fd: an int or anything with ``fileno()``; the caller keeps it.
        fdset_id: the fd set; a new one if None.
        opaque: the opaque text, a name to find the descriptor by.

    Returns:
        The fd set's id, and the descriptor's number in the server.

    Raises:
        InvalidParameterValue: the fd set does not exist (dialect ``spec``).
        Exception: what :meth:`execute` raises.
    """
    return Call("add-fd", members(fdset_id=fdset_id, opaque=opaque), typed("AddfdInfo"), [fd])


def remove_fd(self: object, fdset_id: int, fd: int | None = None) -> Call[None]:
    """Remove a descriptor from an fd set (``remove-fd``).

    Args:
        fdset_id: the fd set.
        fd: the descriptor's number in the server; all of the set if None.

    Raises:
        FdNotFound: the fd set does not exist, or has no such descriptor.
        Exception: what :meth:`execute` raises.
    """
    return Call("remove-fd", members(fdset_id=fdset_id, fd=fd), lambda _, fds: close_all(fds))


def query_fdsets(self: object) -> Call[list[FdsetInfo]]:
    """List the fd sets, by descending id (``query-fdsets``)."""
    return Call("query-fdsets", {}, typed("FdsetInfo", many=True))


# -- commands that only qmpfd has ------------------------------------------------------------------


def open_fdset(
    self: object,
    fdset_id: int | None = None,
    access: Literal["rdonly", "wronly", "rdwr"] | None = None,
    fd: int | None = None,
    *,
    remove: bool = False,
    **selector: Unpack[Selector],
) -> Call[Fd]:
    """Get a duplicate of the newest stored descriptor that is selected (``open-fdset``).

    Use it as ``with await client.open_fdset(...) as fd`` (with a blocking client without
    ``await``) and, for a call that wants a number, ``fd.fileno()``: it is closed at the end of the
    block, unless ``fd.detach()`` has given it to another owner.

    Args:
        fdset_id: the fd set.
        access: the access mode that the descriptor must have; any if None.
        fd: its number in the server; the newest that matches if None.
        remove: remove it from its fd set in the same step.
        selector: further conditions: *opaque* (or *name*), *opaque_prefix*,
            *added_by_pid*, *added_by_uid*.

    Raises:
        FdNotFound: no stored descriptor is selected, or none of this access mode.
        Exception: what :meth:`execute` raises.
    """
    arguments = members(fdset_id=fdset_id, access=access, fd=fd, remove=remove or None, **selector)
    return Call("open-fdset", arguments, one_fd)


def add_fds(
    self: object,
    fds: Sequence[FileDescriptorLike],
    fdset_id: int | None = None,
    opaque: str | None = None,
    *,
    lifetime: Literal["daemon", "connection"] = "daemon",
    expires: int | None = None,
    watch_hangup: bool = False,
    if_exists: Literal["add", "fail", "replace"] = "add",
) -> Call[FdsetInfo]:
    """Add duplicates of up to 253 descriptors to an fd set, or none of them (``add-fds``).

    Args:
        fds: ints or anything with ``fileno()``; the caller keeps them.
        fdset_id: the fd set; a new one if None.
        opaque: the opaque text, a name to find the descriptors by.
        lifetime: ``"connection"``: the server removes them when this connection ends.
        expires: seconds after which the server removes them.
        watch_hangup: remove each when the other end of the socket or pipe is closed.
        if_exists: what to do if descriptors with this opaque text are stored already (in the fd set
            *fdset_id*, or in any if that is None): add these beside them, refuse, or remove the
            older ones in the same step.

    Returns:
        The fd set's id, and the new descriptors in the order of *fds*.

    Raises:
        InvalidParameterValue: the fd set does not exist, or *watch_hangup* is set for a
            descriptor that is neither a socket nor a pipe.
        FdExists: *if_exists* is ``"fail"``, and descriptors with this opaque text are stored.
        Exception: what :meth:`execute` raises.
    """
    arguments = members(
        fdset_id=fdset_id,
        opaque=opaque,
        lifetime=None if lifetime == "daemon" else lifetime,
        expires=expires,
        watch_hangup=watch_hangup or None,
        if_exists=None if if_exists == "add" else if_exists,
    )
    return Call("add-fds", arguments, typed("FdsetInfo"), fds)


def query_fds(
    self: object, fdset_id: int | None = None, fd: int | None = None, **selector: Unpack[Selector]
) -> Call[list[FdInfo]]:
    """Describe the stored descriptors (``query-fds``).

    Args:
        fdset_id: only this fd set.
        fd: only the descriptor with this number in the server.
        selector: further conditions: *opaque* (or *name*), *opaque_prefix*,
            *added_by_pid*, *added_by_uid*.

    Raises:
        Exception: what :meth:`execute` raises.
    """
    arguments = members(fdset_id=fdset_id, fd=fd, **selector)
    return Call("query-fds", arguments, typed("FdInfo", many=True))


def remove_fds(
    self: object, fdset_id: int | None = None, fd: int | None = None, **selector: Unpack[Selector]
) -> Call[list[FdsetInfo]]:
    """Remove all stored descriptors that are selected (``remove-fds``).

    Args:
        fdset_id: only of this fd set.
        fd: only the descriptor with this number in the server.
        selector: further conditions, as for :meth:`query_fds`.

    Returns:
        The removed descriptors, by fd set.

    Raises:
        FdNotFound: no stored descriptor is selected.
        Exception: what :meth:`execute` raises.
    """
    arguments = members(fdset_id=fdset_id, fd=fd, **selector)
    return Call("remove-fds", arguments, typed("FdsetInfo", many=True))
