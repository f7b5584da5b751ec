"""The commands that keep descriptors."""

from __future__ import annotations

from msgspec import UNSET

from ..errors import FdNotFound, InvalidParameterValue
from .context import Context
from .table import Table
from .types import NOTHING, AddFd, AddfdInfo, Arguments, FdName, FdsetFdInfo, FdsetInfo, RemoveFd
from .types import Result as Nothing

table = Table()


@table.command("add-fd", AddFd, AddfdInfo, fds=1)
def add_fd(context: Context, arguments: AddFd) -> AddfdInfo:
    """Add the file descriptor that was passed with the command to an fd set."""
    fd = context.first_fd()
    fdset_id = arguments.fdset_id
    opaque = arguments.opaque
    daemon = context.daemon
    fdset = daemon.store.add(
        fd,
        None if fdset_id is UNSET else fdset_id,
        None if opaque is UNSET else opaque,
        create=daemon.dialect == "qemu",
        added_by=context.peer,
        now=daemon.clock(),
    )
    context.fds.pop(0)
    return AddfdInfo(fdset.id, fd.fileno())


@table.command("remove-fd", RemoveFd, Nothing)
def remove_fd(context: Context, arguments: RemoveFd) -> Nothing:
    """Remove one file descriptor, or all, from an fd set, and close what was removed."""
    number = arguments.fd
    removed = context.daemon.store.remove(arguments.fdset_id, None if number is UNSET else number)
    context.discard(removed)
    return NOTHING


@table.command("query-fdsets", Arguments, list[FdsetInfo])
def query_fdsets(context: Context, arguments: Arguments) -> list[FdsetInfo]:
    """List the fd sets, by descending id, and the file descriptors in each, oldest first."""
    return [
        FdsetInfo(
            fdset.id,
            [FdsetFdInfo(number, stored.opaque) for number, stored in fdset.fds.items()],
        )
        for fdset in context.daemon.store
    ]


@table.command("getfd", FdName, Nothing, fds=1)
def getfd(context: Context, arguments: FdName) -> Nothing:
    """Keep the file descriptor that was passed with the command under a name of this connection."""
    fd = context.first_fd()
    if arguments.fdname[:1] in set("0123456789"):
        raise InvalidParameterValue("Parameter 'fdname' expects a name not starting with a digit")
    replaced = context.names.pop(arguments.fdname, None)
    if replaced is not None:
        context.connection.garbage.append(replaced)
    context.names[arguments.fdname] = fd
    context.fds.pop(0)
    return NOTHING


@table.command("closefd", FdName, Nothing)
def closefd(context: Context, arguments: FdName) -> Nothing:
    """Close a file descriptor that was kept by ``getfd``."""
    fd = context.names.pop(arguments.fdname, None)
    if fd is None:
        raise FdNotFound(f"File descriptor named '{arguments.fdname}' not found")
    context.connection.garbage.append(fd)
    return NOTHING
