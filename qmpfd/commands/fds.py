"""The commands that keep descriptors."""

from __future__ import annotations

from msgspec import UNSET

from ..errors import FdNotFound, InvalidParameterValue
from ..protocol.encode import JSONStream, RawJSON
from .context import Context
from .listings import list_fdsets
from .table import Table
from .types import NOTHING, AddFd, AddfdInfo, Arguments, FdName, FdsetInfo, RemoveFd
from .types import Result as Nothing

table = Table()


@table.command("add-fd", AddFd, AddfdInfo, fds=1)
def add_fd(context: Context, arguments: AddFd) -> AddfdInfo:
    """Add the file descriptor that was passed with the command to an fd set."""
    fd = context.first_fd()
    fdset_id = None if arguments.fdset_id is UNSET else arguments.fdset_id
    opaque = None if arguments.opaque is UNSET else arguments.opaque
    check_add(context, fdset_id, opaque, 1)
    shared = context.shared
    creates = shared.dialect == "qemu"
    fdset = shared.store.add(fd, fdset_id, opaque, context.peer, shared.clock(), creates)
    context.fds.pop(0)
    return AddfdInfo(fdset.id, fd.number)


def check_add(
    context: Context,
    fdset_id: int | None,
    opaque: str | None,
    count: int,
    lasting: bool = True,
) -> None:
    """Refuse to add *count* descriptors where the client may not, or where there is no room.

    Args:
        context: the connection.
        fdset_id: the set; None for a new one.
        opaque: the text of each.
        count: how many.
        lasting: they outlive the connection.

    Raises:
        PermissionDenied, GenericError: see :class:`Access` and :meth:`SharedState.check_quota`.
    """
    shared = context.shared
    if not context.access.unlimited:
        target = shared.store.next_id if fdset_id is None else fdset_id
        context.access.require_for("add", target, opaque)
    shared.check_quota(context.peer.uid, count, opaque)
    if lasting and shared.keeper is not None:
        shared.keeper.check_room(count, opaque)


@table.command("remove-fd", RemoveFd, Nothing)
def remove_fd(context: Context, arguments: RemoveFd) -> RawJSON:
    """Remove one file descriptor, or all, from an fd set, and close what was removed."""
    number = None if arguments.fd is UNSET else arguments.fd
    store, access = context.shared.store, context.access
    if not access.unlimited:
        access.require("remove", arguments.fdset_id)
        fds = store.get(arguments.fdset_id, number).fds
        for stored in fds.values() if number is None else [fds[number]]:
            access.require_for("remove", arguments.fdset_id, stored.opaque)
    removed = store.remove(arguments.fdset_id, number)
    context.discard(removed)
    return NOTHING


@table.command("query-fdsets", Arguments, list[FdsetInfo])
def query_fdsets(context: Context, arguments: Arguments) -> JSONStream | RawJSON:
    """List the fd sets, by descending id, and the file descriptors in each, oldest first."""
    context.access.require("query")
    return list_fdsets(context)


@table.command("getfd", FdName, Nothing, fds=1)
def getfd(context: Context, arguments: FdName) -> RawJSON:
    """Keep the file descriptor that was passed with the command under a name of this connection."""
    context.first_fd()
    context.access.require("add")
    if "0" <= arguments.fdname[:1] <= "9":
        raise InvalidParameterValue("Parameter 'fdname' expects a name not starting with a digit")
    if arguments.fdname not in context.names:
        context.shared.check_quota(context.peer.uid, 1, arguments.fdname)
    context.store_named(arguments.fdname)
    return NOTHING


@table.command("closefd", FdName, Nothing)
def closefd(context: Context, arguments: FdName) -> RawJSON:
    """Close a file descriptor that was kept by ``getfd``."""
    if not context.close_named(arguments.fdname):
        raise FdNotFound(f"File descriptor named '{arguments.fdname}' not found")
    return NOTHING
