"""Commands that QEMU does not have: opening, adding, querying and watching descriptors."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby

from ..errors import FdExists, FdNotFound, GenericError, InvalidParameterValue
from ..fdsets import PERMANENT, Lifetime, Peer, StoredFd
from ..kernel.close_pool import Duplicate
from ..kernel.fd import open_files_limit
from ..kernel.fdinfo import access_mode
from ..kernel.hangups import require_peer
from ..limits import MAX_PEERS, SCM_MAX_FD
from ..policy import Access
from ..protocol.encode import JSONStream, RawJSON
from .context import Context
from .extension_types import (
    AddFds,
    Count,
    FdInfo,
    LimitsInfo,
    OpenedFd,
    OpenFdset,
    PeerStats,
    StatsInfo,
    WatchFdsets,
)
from .fds import check_add
from .listings import FEW_CHARACTERS, FEW_FDS, listing
from .selectors import Selector, choose, denied, rights, visible_opaque
from .shared import Client
from .table import Table
from .types import Arguments, FdsetFdInfo, FdsetInfo
from .types import Result as Nothing

table: Table[Context] = Table()


@table.command("open-fdset", OpenFdset, OpenedFd)
def open_fdset(context: Context, arguments: OpenFdset) -> OpenedFd:
    """Hand out a duplicate of a file descriptor, attached to the reply.

    The newest file descriptor that matches is opened; its access mode must be equal to the one
    requested, as for QEMU's ``/dev/fdset/N``.
    """
    access, shared = context.access, context.shared
    access.require("open", arguments.fdset_id)
    arguments.check()
    stored = _newest(context, arguments)
    if arguments.remove is True:
        access.require_for("remove", stored.fdset.id, stored.opaque)
    shared.quotas.check_waiting(context.peer.uid, 1)
    shared.check_in_flight("handed out")
    opaque = visible_opaque(access, stored)
    opened = OpenedFd(stored.fdset.id, stored.fd.fileno(), opaque)
    if arguments.remove is not True:
        try:
            context.reply_fds.append(Duplicate(stored.fd))
        except OSError as exc:
            reason = f"The file descriptor cannot be handed out: {exc.strerror}"
            raise GenericError(reason) from None
    if shared.audit is not None:
        shared.audit.record("opened", stored)
    if arguments.remove is True:
        shared.remove([stored], "removed", context.reply_fds)
        context.taken = stored
    return opened


def _newest(context: Context, arguments: OpenFdset) -> StoredFd:
    """Return the newest selected descriptor with the access mode.

    Raises:
        FdNotFound: none is visible to the client.
        PermissionDenied: some are visible, but the client may open none of them.
    """
    wanted, by_number = arguments.access, arguments.by_number
    newest: StoredFd | None = None
    modes: set[str] = set()
    refused = False
    for fdset in arguments.sets(context.shared.store):
        for stored in reversed(fdset.select(arguments.fd)):
            if newest is not None and stored.added_at <= newest.added_at:
                break
            if not arguments.matches(stored):
                continue
            known, may_open = rights(context.access, stored, "open", by_number)
            if not known:
                continue
            if stored.access is None:
                stored.access = access_mode(stored.fd.fileno())
            if wanted is not None and stored.access != wanted:
                modes.add(stored.access)
            elif may_open:
                newest = stored
                break
            else:
                refused = True
    if newest is not None:
        return newest
    if refused:
        raise denied("open", arguments)
    if not modes:
        raise arguments.not_found()
    available = ", ".join(f"'{mode}'" for mode in sorted(modes))
    raise FdNotFound(
        f"No file descriptor with access mode '{wanted}' in '{arguments}', only {available}"
    )


@table.command("add-fds", AddFds, FdsetInfo, fds=SCM_MAX_FD)
def add_fds(context: Context, arguments: AddFds) -> FdsetInfo | JSONStream:
    """Add all the file descriptors that were passed with the command to an fd set, or none."""
    context.first_fd()
    shared = context.shared
    fdset_id, opaque = arguments.fdset_id, arguments.opaque
    older = _replaced(context, arguments)
    if fdset_id is None:
        fdset_id = _freed_id(older, shared.store.next_id)
    lasting = arguments.lifetime != "connection"
    if not lasting:
        shared.check_no_client_end(context.fds)
    if arguments.watch_hangup:
        for fd in context.fds:
            require_peer(fd)
    check_add(context, fdset_id, opaque, len(context.fds), lasting=lasting, replaced=older)
    entries = shared.add(
        context.fds,
        fdset_id,
        opaque,
        context.peer,
        _lifetime(context, arguments, shared.clock()),
        create=shared.dialect == "qemu",
    )
    shared.remove(older, "replaced", context.connection.fds_to_close)
    (info,) = _infos(entries)
    return JSONStream(info) if _is_long(entries) else info


def _replaced(context: Context, arguments: AddFds) -> list[StoredFd]:
    """Return the stored descriptors that ``if-exists`` replaces.

    Raises:
        FdExists: some exist, and ``if-exists`` is ``fail``.
        PermissionDenied: the client may not remove one of them.
    """
    if arguments.if_exists in (None, "add"):
        return []
    if arguments.opaque is None:
        raise GenericError("Parameter 'if-exists' expects 'opaque' as well")
    selector = Selector(fdset_id=arguments.fdset_id, opaque=arguments.opaque)
    found, refused = choose(context.shared.store, selector, context.access, "remove")
    if arguments.if_exists == "fail" and (found or refused):
        raise FdExists(f"File descriptor named '{selector}' exists already")
    if refused:
        raise denied("remove", selector)
    return found


def _freed_id(older: list[StoredFd], next_id: int) -> int | None:
    """Return the lowest id of the sets that become empty without *older*, if it is below *next_id*.

    So a descriptor that replaces all of a set gets the set's id.
    """
    counts = Counter(stored.fdset for stored in older)
    ids = [fdset.id for fdset, count in counts.items() if count == len(fdset.fds)]
    lowest = min(ids, default=next_id)
    return lowest if lowest < next_id else None


@table.command("remove-fds", Selector, list[FdsetInfo])
def remove_fds(context: Context, arguments: Selector) -> list[FdsetInfo] | JSONStream:
    """Remove the file descriptors that are selected, all or none, and close them."""
    context.access.require("remove", arguments.fdset_id)
    arguments.check()
    found, refused = choose(context.shared.store, arguments, context.access, "remove")
    if refused:
        raise denied("remove", arguments)
    if not found:
        raise arguments.not_found()
    infos = _infos(found, context.access)
    context.shared.remove(found, "removed", context.connection.fds_to_close)
    if not _is_long(found):
        return infos
    result = JSONStream(infos)
    texts = (fd.opaque or "" for info in infos for fd in info.fds)
    context.shared.quotas.charge_until_freed(result, context.peer, texts)
    return result


def _infos(entries: list[StoredFd], access: Access | None = None) -> list[FdsetInfo]:
    """Return *entries* grouped by set; with *access*, only with opaque texts that it may query."""

    def info(stored: StoredFd) -> FdsetFdInfo:
        opaque = stored.opaque if access is None else visible_opaque(access, stored)
        return FdsetFdInfo(stored.fd.fileno(), opaque)

    return [
        FdsetInfo(fdset_id, [info(stored) for stored in together])
        for fdset_id, together in groupby(entries, key=lambda stored: stored.fdset.id)
    ]


def _is_long(entries: list[StoredFd]) -> bool:
    """Whether a reply with *entries* is encoded in steps; it repeats the opaque text of each."""
    size = sum(len(stored.opaque or "") for stored in entries)
    return size > FEW_CHARACTERS or len(entries) > FEW_FDS


def _lifetime(context: Context, arguments: AddFds, now: float) -> Lifetime:
    expires = arguments.expires
    if expires is not None and expires <= 0:
        raise InvalidParameterValue("Parameter 'expires' expects a positive number of seconds")
    lifetime = Lifetime(
        owner=context if arguments.lifetime == "connection" else None,
        expires_at=None if expires is None else now + expires,
        watch_hangup=arguments.watch_hangup is True,
    )
    return PERMANENT if lifetime == PERMANENT else lifetime


@table.command("query-fds", Selector, list[FdInfo])
def query_fds(context: Context, arguments: Selector) -> JSONStream | RawJSON:
    """List the selected file descriptors, or all, with what each is and where it came from.

    A long listing is produced in parts while other clients are served: it leaves out descriptors
    that they remove before it has reached them.
    """
    fdset_id, access = arguments.fdset_id, context.access
    access.require("query", fdset_id)
    # For a client that may not query everything, a missing set is as a hidden one: an empty list.
    if fdset_id is not None and access.unlimited and context.shared.store.get(fdset_id) is None:
        raise Selector(fdset_id=fdset_id).not_found()
    return listing(context, arguments)


@table.command("watch-fdsets", WatchFdsets, Nothing)
def watch_fdsets(context: Context, arguments: WatchFdsets) -> None:
    """Start or stop sending FD_ADDED and FD_REMOVED events to this connection."""
    context.access.require("query")
    context.watch(arguments.enable)


@table.command("query-stats", Arguments, StatsInfo)
def query_stats(context: Context, arguments: Arguments) -> StatsInfo:
    """Return the daemon's counters and gauges, its limits, and who is connected.

    A client that may not query everything gets no counts of descriptors and commands.
    """
    context.access.require("query")
    shared, uid = context.shared, context.peer.uid
    stats, clients = shared.stats, shared.clients()
    info = StatsInfo(
        pid=os.getpid(),
        uptime=int(shared.clock() - stats.started_at),
        dialect=shared.dialect,
        connections=len(clients),
        connections_accepted=stats.accepted,
        connections_refused=stats.turned_away,
        kept_safe=shared.mirror is not None and not shared.mirror.is_over,
        limits=LimitsInfo(
            **shared.limits._replace(max_fds_per_uid=shared.quotas.fds_limit(uid))._asdict(),
            max_open_files=open_files_limit(),
        ),
        peers=_peers(context, clients),
    )
    if context.access.sees_set():
        info.fdsets = len(shared.store)
        info.fds = shared.store.fd_count
        info.fds_kept = shared.quotas.fds_total
        info.closes_pending = shared.closer.pending
        info.commands = _counts(stats.commands)
        info.errors = _counts(stats.errors)
    return info


def _counts(counter: Mapping[str, int]) -> list[Count]:
    return [Count(name, count) for name, count in sorted(counter.items())]


def _peers(context: Context, clients: Iterable[Client]) -> list[PeerStats]:
    """Return the connected processes, the longest connected first.

    A client with the right ``admin`` sees all, others only those of their own user.
    """
    sees_all = any("admin" in grant.rights for grant in context.access.grants)
    found: dict[Peer, list[Client]] = {}
    for client in clients:
        if sees_all or client.peer.uid == context.peer.uid:
            found.setdefault(client.peer, []).append(client)
    longest_first = sorted(found, key=lambda peer: -max(client.age for client in found[peer]))
    return [
        PeerStats(
            *peer,
            connections=len(found[peer]),
            age=int(max(client.age for client in found[peer])),
            idle=int(min(client.idle for client in found[peer])),
            fds=sum(client.fds for client in found[peer]),
            watching=any(client.watching for client in found[peer]),
        )
        for peer in longest_first[:MAX_PEERS]
    ]
