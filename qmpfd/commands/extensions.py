"""The commands that QEMU does not have: handing descriptors out again, and watching them."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping

from msgspec import UNSET

from ..errors import FdNotFound, GenericError, InvalidParameterValue
from ..fdsets import PERMANENT, FdSet, Lifetime, StoredFd
from ..kernel.fdinfo import access_mode
from ..limits import SCM_MAX_FD
from ..protocol.encode import JSONStream, RawJSON
from .context import Context
from .extension_types import (
    AddFds,
    Count,
    FdInfo,
    LimitsInfo,
    OpenedFd,
    OpenFdset,
    QueryFds,
    StatsInfo,
    WatchFdsets,
)
from .fds import check_add, not_found
from .listings import added, list_fds
from .peers import peers
from .table import Table
from .types import NOTHING, Arguments, FdsetInfo
from .types import Result as Nothing

table: Table[Context] = Table()

#: Descriptors in a set that take a while to go through.
_MANY = 100


@table.command("open-fdset", OpenFdset, OpenedFd)
def open_fdset(context: Context, arguments: OpenFdset) -> OpenedFd:
    """Hand out a duplicate of a file descriptor, attached to the reply.

    As QEMU does for ``/dev/fdset/N``, the access mode must be equal, and the newest file
    descriptor that matches is taken.
    """
    number = None if arguments.fd is UNSET else arguments.fd
    wanted = None if arguments.access is UNSET else arguments.access
    access = context.access
    access.require("open", arguments.fdset_id)
    fdset = context.shared.store.get(arguments.fdset_id)
    if fdset is None or not fdset.select(number):
        raise not_found(arguments.fdset_id, number)
    refused: StoredFd | None = None
    there: set[str] = set()
    for stored in reversed(fdset.fds.values()) if number is None else (fdset.fds[number],):
        if not access.may("open", fdset.id, stored.opaque):
            refused = stored
            continue
        if stored.access is None:
            stored.access = access_mode(stored.fd.fileno())
        if wanted is None or stored.access == wanted:
            break
        there.add(stored.access)
    else:
        # What the client may not open is no answer to what there is.
        if refused is not None and not there:
            access.require_for("open", fdset.id, refused.opaque)
        raise FdNotFound(_no_such_access(fdset, number, wanted, there))
    context.shared.quotas.check_waiting(context.peer.uid, 1)
    if context.shared.in_flight_probe is not None and context.shared.in_flight_probe.exhausted():
        raise GenericError(
            "The file descriptor cannot be handed out: too many that processes of "
            f"uid {os.geteuid()} have sent are not received yet"
        )
    try:
        context.reply_fds.append(stored.fd.dup())
    except OSError as exc:
        raise GenericError(f"The file descriptor cannot be handed out: {exc.strerror}") from None
    return OpenedFd(fdset.id, stored.fd.fileno(), stored.opaque)


def _no_such_access(fdset: FdSet, number: int | None, wanted: str | None, there: set[str]) -> str:
    where = f"fdset-id:{fdset.id}" + ("" if number is None else f", fd:{number}")
    modes = ", ".join(f"'{mode}'" for mode in sorted(there))
    return f"No file descriptor with access mode '{wanted}' in '{where}', only {modes}"


@table.command("add-fds", AddFds, FdsetInfo, fds=SCM_MAX_FD)
def add_fds(context: Context, arguments: AddFds) -> FdsetInfo | JSONStream:
    """Add all the file descriptors that were passed with the command to an fd set, or none."""
    context.first_fd()
    shared = context.shared
    fdset_id = None if arguments.fdset_id is UNSET else arguments.fdset_id
    opaque = None if arguments.opaque is UNSET else arguments.opaque
    lasting = arguments.lifetime != "connection"
    check_add(context, fdset_id, opaque, len(context.fds), lasting=lasting)
    entries = shared.add(
        context.fds,
        fdset_id,
        opaque,
        context.peer,
        _lifetime(context, arguments, shared.clock()),
        create=shared.dialect == "qemu",
    )
    return added(entries)


def _lifetime(context: Context, arguments: AddFds, now: float) -> Lifetime:
    expires = arguments.expires
    if expires is not UNSET and expires <= 0:
        raise InvalidParameterValue("Parameter 'expires' expects a positive number of seconds")
    lifetime = Lifetime(
        owner=context if arguments.lifetime == "connection" else None,
        expires_at=None if expires is UNSET else now + expires,
        watch_hangup=arguments.watch_hangup is True,
    )
    return PERMANENT if lifetime == PERMANENT else lifetime


@table.command("query-fds", QueryFds, list[FdInfo])
def query_fds(context: Context, arguments: QueryFds) -> JSONStream | RawJSON:
    """List the stored file descriptors, with what each is and where it came from.

    A long listing is made bit by bit, and others are served meanwhile: what they remove before its
    turn comes is left out.
    """
    store = context.shared.store
    fdset_id = None if arguments.fdset_id is UNSET else arguments.fdset_id
    context.access.require("query", fdset_id)
    if fdset_id is not None and store.get(fdset_id) is None:
        raise not_found(fdset_id, None)
    return list_fds(context, arguments)


@table.command("watch-fdsets", WatchFdsets, Nothing)
def watch_fdsets(context: Context, arguments: WatchFdsets) -> RawJSON:
    """Begin, or cease, to send FD_ADDED and FD_REMOVED events to this connection."""
    context.access.require("query")
    context.watch(arguments.enable)
    return NOTHING


@table.command("query-stats", Arguments, StatsInfo)
def query_stats(context: Context, arguments: Arguments) -> StatsInfo:
    """Return the daemon's counters and gauges, its limits, and who is connected."""
    context.access.require("query")
    shared = context.shared
    stats, limits = shared.stats, shared.limits
    return StatsInfo(
        pid=os.getpid(),
        uptime=int(shared.clock() - stats.started_at),
        dialect=shared.dialect,
        connections=stats.connections,
        connections_accepted=stats.accepted,
        connections_refused=stats.turned_away,
        fdsets=len(shared.store),
        fds=shared.store.fd_count,
        fds_kept=shared.quotas.fds_total,
        closes_pending=shared.closer.pending,
        kept_safe=shared.keeper is not None and not shared.keeper.is_over,
        commands=_counts(stats.commands),
        errors=_counts(stats.errors),
        limits=LimitsInfo(
            max_connections=limits.max_connections,
            max_connections_per_uid=limits.max_connections_per_uid,
            max_fds=limits.max_fds,
            max_fds_per_uid=limits.max_fds_per_uid,
            max_request_bytes=limits.max_request_bytes,
            max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            write_timeout=int(limits.write_timeout * 1000),
            drain_timeout=int(limits.drain_timeout * 1000),
            idle_timeout=None if limits.idle_timeout is None else int(limits.idle_timeout * 1000),
        ),
        peers=peers(context),
    )


def _counts(counter: Mapping[str, int]) -> list[Count]:
    return [Count(name, count) for name, count in sorted(counter.items())]
