"""The arguments and results of the commands that QEMU does not have, in the same style."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from ..protocol import Int64
from .selectors import Selector
from .types import AddFd, AddfdInfo, Arguments, Result


class OpenFdset(Selector):
    """Arguments of ``open-fdset``.

    Args:
        access: the access mode that the descriptor must have; any if absent.
        remove: take it out of the store in the same step.
    """

    access: Literal["rdonly", "wronly", "rdwr"] | UnsetType = UNSET
    remove: bool | UnsetType = UNSET


class OpenedFd(AddfdInfo):
    """Which descriptor was handed out.

    Args:
        opaque: the text it was added with, if any.
    """

    opaque: str | None = None


class AddFds(AddFd):
    """Arguments of ``add-fds``.

    Args:
        lifetime: kept until removed, or until the connection that adds them ends.
        expires: seconds after which they are removed.
        watch_hangup: remove each when the other end of the socket or pipe is gone.
        if_exists: where there are descriptors of the same opaque text already, in the fd set that
            is named or anywhere: add these beside them, fail, or replace the older ones.
    """

    lifetime: Literal["daemon", "connection"] | UnsetType = UNSET
    expires: Int64 | UnsetType = UNSET
    watch_hangup: bool | UnsetType = UNSET
    if_exists: Literal["add", "fail", "replace"] | UnsetType = UNSET


class PeerInfo(Result):
    """Who added a descriptor, as the kernel vouches (SO_PEERCRED).

    Args:
        pid: its process, at the time of its connection.
        uid: its user.
        gid: its group.
    """

    pid: Int64
    uid: Int64
    gid: Int64


class FdInfo(Result):
    """All there is to know of a stored descriptor.

    Args:
        fdset_id: the fd set it is in.
        fd: its number in the server.
        access: how it was opened; ``path`` for what can be neither read nor written.
        kind: what it is: file, dir, chr, blk, pipe, socket, memfd, eventfd, epoll and others.
        target: what it refers to, as /proc/PID/fd shows it.
        flags: its file status flags (open(2)): append, direct, nonblock and others.
        age: seconds since it was added.
        lifetime: whether it is kept until removed, or until its connection ends.
        watch_hangup: whether it is removed when the other end is gone.
        opaque: the text it was added with, if any.
        size: the bytes of a regular file, or of one in memory.
        address: the address of a socket: HOST:PORT, [V6]:PORT, unix:PATH, unix:@NAME.
        peer: the address of a socket's other end.
        listening: whether a socket accepts connections.
        expires: seconds until it is removed, if it expires.
        added_by: who added it; absent if it was there from the start.
    """

    fdset_id: Int64
    fd: Int64
    access: Literal["rdonly", "wronly", "rdwr", "path"]
    kind: str
    target: str
    flags: list[str]
    age: Int64
    lifetime: Literal["daemon", "connection"]
    watch_hangup: bool
    opaque: str | None = None
    size: Int64 | None = None
    address: str | None = None
    peer: str | None = None
    listening: bool | None = None
    expires: Int64 | None = None
    added_by: PeerInfo | None = None


class WatchFdsets(Arguments):
    """Arguments of ``watch-fdsets``.

    Args:
        enable: whether to send events to this connection.
    """

    enable: bool


class FdAdded(OpenedFd):
    """A descriptor was added."""


class FdRemoved(AddfdInfo):
    """A descriptor was removed.

    Args:
        fdset_id: the fd set it was in.
        fd: the number it had in the server.
        reason: ``removed`` or ``replaced`` by a command, ``connection`` ended, ``expired`` or
            ``hangup``.
        opaque: the text it was added with, if any.
    """

    reason: str
    opaque: str | None = None


class FdEventsLost(Result):
    """Events were not sent, because too many waited for a client that did not read.

    Args:
        count: how many.
    """

    count: Int64


class Takeover(Arguments):
    """Arguments of ``takeover``.

    Args:
        format: the newest format of a daemon's state that the new daemon can read; it has to be
            able to read all older ones as well.
    """

    format: Int64


class Count(Result):
    """How often something happened.

    Args:
        name: what.
        count: how often.
    """

    name: str
    count: Int64


class LimitsInfo(Result):
    """What each client is allowed; the times in seconds.

    Args:
        max_connections: clients at a time.
        max_connections_per_uid: clients of one user at a time.
        max_fds: descriptors kept at a time.
        max_fds_per_uid: descriptors that clients of the asking client's user may have kept at a
            time.
        max_request_bytes: bytes of one request.
        max_open_files: descriptors that the process may have open (RLIMIT_NOFILE).
        write_timeout: time that a client may take to accept a reply.
        drain_timeout: time that ending takes at most.
        idle_timeout: time that a client may ask nothing, if that is limited.
    """

    max_connections: Int64
    max_connections_per_uid: Int64
    max_fds: Int64
    max_fds_per_uid: Int64
    max_request_bytes: Int64
    max_open_files: Int64
    write_timeout: float
    drain_timeout: float
    idle_timeout: float | None = None


class PeerStats(Result):
    """A process that is connected, as the kernel vouches (SO_PEERCRED).

    Args:
        pid: its number, when it connected; 0 for one in a pid namespace that is not ours.
        uid: its user.
        gid: its group.
        connections: how many it has.
        age: seconds since it connected, or since this daemon took over.
        idle: seconds since it asked something, or connected; one less at times.
        fds: descriptors that are kept until its connections end.
        watching: whether it is told of changes.
    """

    pid: Int64
    uid: Int64
    gid: Int64
    connections: Int64
    age: Int64
    idle: Int64
    fds: Int64
    watching: bool


class StatsInfo(Result):
    """Counters and gauges of the daemon.  Those of what is stored, and of commands, are there only
    for clients that may query everything.

    Args:
        pid: its process.
        uptime: seconds since the start.
        dialect: which the daemon speaks.
        connections: clients connected now.
        connections_accepted: clients ever served.
        connections_refused: clients turned away.
        kept_safe: whether what is stored survives a crash of the daemon: somebody has a copy.
        limits: what each client is allowed.
        peers: the processes that are connected, at most 256, the first to connect first; without
            the right ``admin``, only those of the asking client's user.
        fdsets: fd sets now.
        fds: descriptors stored now.
        fds_kept: descriptors kept for clients now: stored, or under a name of a connection.
        closes_pending: descriptors whose close takes its time.
        commands: commands carried out, by name, failed ones included.
        errors: error replies, by class.
    """

    pid: Int64
    uptime: Int64
    dialect: Literal["spec", "qemu"]
    connections: Int64
    connections_accepted: Int64
    connections_refused: Int64
    kept_safe: bool
    limits: LimitsInfo
    peers: list[PeerStats]
    fdsets: Int64 | None = None
    fds: Int64 | None = None
    fds_kept: Int64 | None = None
    closes_pending: Int64 | None = None
    commands: list[Count] | None = None
    errors: list[Count] | None = None
