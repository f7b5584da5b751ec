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

table: Table[Context] = Table()


@table.command("add-fd", AddFd, AddfdInfo, fds=1)
def add_fd(context: Context, arguments: AddFd) -> AddfdInfo:
    """Add the file descriptor that was passed with the command to an fd set."""
    fd = context.first_fd()
    number = fd.number
    fdset_id = None if arguments.fdset_id is UNSET else arguments.fdset_id
    opaque = None if arguments.opaque is UNSET else arguments.opaque
    check_add(context, fdset_id, opaque, 1)
    shared = context.shared
    create = shared.dialect == "qemu"
    (stored,) = shared.add(context.fds, fdset_id, opaque, context.peer, create=create)
    return AddfdInfo(stored.fdset.id, number)


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
        PermissionDenied, GenericError: see :class:`Access` and :meth:`Quotas.check_quota`.
    """
    shared = context.shared
    if not context.access.unlimited:
        target = shared.store.next_id if fdset_id is None else fdset_id
        context.access.require_for("add", target, opaque)
    shared.quotas.check_quota(context.peer.uid, count, opaque)
    if lasting and shared.keeper is not None:
        shared.keeper.check_room(count, opaque)


@table.command("remove-fd", RemoveFd, Nothing)
def remove_fd(context: Context, arguments: RemoveFd) -> RawJSON:
    """Remove one file descriptor, or all, from an fd set, and close what was removed."""
    number = None if arguments.fd is UNSET else arguments.fd
    shared, access = context.shared, context.access
    fdset = shared.store.get(arguments.fdset_id)
    selected = [] if fdset is None else fdset.select(number)
    if not access.unlimited:
        access.require("remove", arguments.fdset_id)
        for stored in selected:
            access.require_for("remove", arguments.fdset_id, stored.opaque)
    if not selected:
        raise not_found(arguments.fdset_id, number)
    shared.remove(selected, "removed", context.connection.fds_to_close)
    return NOTHING


def not_found(fdset_id: int, number: int | None) -> FdNotFound:
    """The error of QEMU's ``remove-fd`` where there is no such set, or descriptor in it."""
    which = "" if number is None else f", fd:{number}"
    return FdNotFound(f"File descriptor named 'fdset-id:{fdset_id}{which}' not found")


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
        context.shared.quotas.check_quota(context.peer.uid, 1, arguments.fdname)
    context.store_named(arguments.fdname)
    return NOTHING


@table.command("closefd", FdName, Nothing)
def closefd(context: Context, arguments: FdName) -> RawJSON:
    """Close a file descriptor that was kept by ``getfd``."""
    if not context.close_named(arguments.fdname):
        raise FdNotFound(f"File descriptor named '{arguments.fdname}' not found")
    return NOTHING
