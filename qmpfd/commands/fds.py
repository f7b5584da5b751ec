"""QEMU's commands for descriptors."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import FdNotFound, InvalidParameterValue, PermissionDenied
from ..fdsets import FdSet, StoredFd
from ..policy import Access
from ..protocol.encode import JSONStream, RawJSON
from .context import Context
from .listings import listing
from .selectors import Selector, denied, rights
from .shared import Dialect, SharedState
from .table import Table
from .types import AddFd, AddfdInfo, Arguments, FdName, FdsetInfo, RemoveFd
from .types import Result as Nothing

table: Table[Context] = Table()


@table.command("add-fd", AddFd, AddfdInfo, fds=1)
def add_fd(context: Context, arguments: AddFd) -> AddfdInfo:
    """Add the file descriptor passed with the command to an fd set."""
    number = context.fds[0].number if context.fds else context.first_fd().number
    fdset_id, opaque = arguments.fdset_id, arguments.opaque
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
    *,
    lasting: bool = True,
    replaced: Collection[StoredFd] = (),
) -> None:
    """Check rights and quotas for the addition of *count* descriptors.

    Args:
        context: the client's context.
        fdset_id: the set; None for a new one.
        opaque: the opaque text of each.
        count: number of descriptors.
        lasting: whether they outlive the connection.
        replaced: the entries that are removed in the same step.

    Raises:
        PermissionDenied: the client may not add to the set.
        GenericError: a quota is exceeded, see :meth:`Quotas.check_quota`; or the fd store cannot
            take the descriptors.
        InvalidParameterValue: the set is hidden from the client.
    """
    shared = context.shared
    if not context.access.unlimited:
        _require_add(shared, context.access, fdset_id, opaque)
    if context.fds[-1].number >= shared.quotas.others_table:  # no call in the usual case
        shared.quotas.check_table(context.peer.uid, context.fds[-1].number)
    shared.quotas.check_quota(context.peer.uid, count, opaque, replaced)
    if lasting and shared.mirror is not None:
        shared.check_in_flight("kept safe")
        shared.mirror.check_quota(count, opaque)


def _require_add(
    shared: SharedState, access: Access, fdset_id: int | None, opaque: str | None
) -> None:
    if fdset_id is not None:
        access.require_for("add", fdset_id, opaque)
        fdset = shared.store.get(fdset_id)
        if fdset is not None:
            _require_sight(access, fdset, opaque, shared.dialect)
    elif not access.may("add", shared.store.next_id, opaque):  # the id may tell of hidden sets
        raise PermissionDenied(
            "The right 'add' is needed for a file descriptor of this name in a new set"
        )


def _require_sight(access: Access, fdset: FdSet, opaque: str | None, dialect: Dialect) -> None:
    """Refuse to add to a set with descriptors hidden from the client, unless a rule names the set.

    ``open-fdset`` opens the newest descriptor of a set: the client's would take the place of one
    that it does not know of.
    """
    if access.names_set("add", fdset.id, opaque) or access.sees_set(fdset.id):
        return
    seen = {access.may("query", fdset.id, stored.opaque) for stored in fdset.fds.values()}
    if False not in seen:
        return
    if True not in seen and dialect == "spec":  # a hidden set has the same error as a missing one
        raise InvalidParameterValue("Parameter 'fdset-id' expects an existing fdset-id")
    raise PermissionDenied(
        f"The right 'query' is needed for all file descriptors in fdset-id:{fdset.id}, to add to it"
    )


@table.command("remove-fd", RemoveFd, Nothing)
def remove_fd(context: Context, arguments: RemoveFd) -> None:
    """Remove one file descriptor, or all, from an fd set, and close what was removed."""
    fdset_id, number = arguments.fdset_id, arguments.fd
    shared, access = context.shared, context.access
    fdset = shared.store.get(fdset_id)
    chosen = [] if fdset is None else fdset.select(number)
    if not access.unlimited:
        access.require("remove", fdset_id)
        known = [rights(access, stored, "remove", by_number=True) for stored in chosen]
        if (True, True) in known or (True, False) in known:
            if any(not may_remove for _, may_remove in known):
                raise denied("remove", Selector(fdset_id=fdset_id, fd=number))
        else:  # hidden descriptors have the same error as missing ones
            chosen = []
    if not chosen:
        raise Selector(fdset_id=fdset_id, fd=number).not_found()
    shared.remove(chosen, "removed", context.connection.fds_to_close)


@table.command("query-fdsets", Arguments, list[FdsetInfo])
def query_fdsets(context: Context, arguments: Arguments) -> JSONStream | RawJSON:
    """List the fd sets, by descending id, and the file descriptors in each, oldest first."""
    context.access.require("query")
    return listing(context, None)


@table.command("getfd", FdName, Nothing, fds=1)
def getfd(context: Context, arguments: FdName) -> None:
    """Store the file descriptor passed with the command under a name of this connection."""
    context.first_fd()
    context.access.require("add")
    if "0" <= arguments.fdname[:1] <= "9":
        raise InvalidParameterValue("Parameter 'fdname' expects a name not starting with a digit")
    context.shared.check_no_client_end(context.fds[:1])
    context.shared.quotas.check_table(context.peer.uid, context.fds[0].number)
    if arguments.fdname not in context.names:
        context.shared.quotas.check_quota(context.peer.uid, 1, arguments.fdname)
    context.store_named(arguments.fdname)


@table.command("closefd", FdName, Nothing)
def closefd(context: Context, arguments: FdName) -> None:
    """Close a file descriptor that ``getfd`` has stored."""
    if not context.close_named(arguments.fdname):
        raise FdNotFound(f"File descriptor named '{arguments.fdname}' not found")
