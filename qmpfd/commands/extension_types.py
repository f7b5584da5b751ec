"""Types of the arguments and results of the commands that QEMU does not have."""

from __future__ import annotations

from typing import Literal

from ..protocol.arguments import Int64
from .selectors import Selector
from .types import AddFd, AddfdInfo, Arguments, Result


class OpenFdset(Selector):
    """Arguments of ``open-fdset``.

    Args:
        access: the access mode that the descriptor must have; any if absent.
        remove: remove it from its fd set in the same step. The daemon has closed its own duplicate
            when the client reads the reply. If the client refuses descriptors, or disconnects
            before the reply is sent, the descriptor is put back.
    """

    access: Literal["rdonly", "wronly", "rdwr"] | None = None
    remove: bool | None = None


class OpenedFd(AddfdInfo):
    """The descriptor that was handed out.

    Args:
        opaque: its opaque text, if it has one and the client may query it.
    """

    opaque: str | None = None


class AddFds(AddFd):
    """Arguments of ``add-fds``.

    Args:
        lifetime: ``daemon`` (until removed, the default) or ``connection`` (until this connection
            ends).
        expires: the descriptors are removed after so many seconds.
        watch_hangup: remove each socket or pipe when its other end is closed; a socket has to be
            connected, or to listen.
        if_exists: if descriptors with this opaque text are stored already (in the fd set of
            ``fdset-id``, or in any if that is absent): ``add`` these beside them (the default),
            ``fail``, or ``replace`` the older ones.
    """

    lifetime: Literal["daemon", "connection"] | None = None
    expires: Int64 | None = None
    watch_hangup: bool | None = None
    if_exists: Literal["add", "fail", "replace"] | None = None


class PeerInfo(Result):
    """The client that added a descriptor, as the kernel reports it (SO_PEERCRED, unix(7)).

    Args:
        pid: its process when it connected.
        uid: its user.
        gid: its group.
    """

    pid: Int64
    uid: Int64
    gid: Int64


class FdInfo(Result):
    """What the daemon knows about a stored descriptor.

    Args:
        fdset_id: the fd set it is in.
        fd: its number in the server.
        access: its access mode; ``path`` for a descriptor opened with O_PATH (open(2)).
        kind: the kind of file: file, dir, chr, blk, pipe, socket, memfd, eventfd, epoll, net, mnt
            (namespaces) and others.
        target: what it refers to, as /proc/PID/fd shows it.
        flags: its file status flags (open(2)): append, direct, nonblock and others.
        age: seconds since it was added.
        lifetime: ``daemon`` (until removed) or ``connection`` (until its connection ends).
        watch_hangup: whether it is removed when its other end is closed.
        opaque: its opaque text, if any.
        size: the size in bytes of a regular file or a memfd.
        address: the address of a socket: HOST:PORT, [V6]:PORT, unix:PATH, unix:@NAME,
            vsock:CID:PORT, netlink:PORT:GROUPS or packet:INTERFACE:PROTOCOL.
        peer: the address of a socket's other end.
        listening: whether a socket accepts connections.
        expires: seconds until it is removed, if it expires.
        added_by: the client that added it; absent if the daemon inherited it.
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
        opaque: its opaque text, if any.
    """

    reason: str
    opaque: str | None = None


class FdEventsLost(Result):
    """Events are missing here: the client did not read them in time.

    Args:
        count: the number of lost events.
    """

    count: Int64


class Takeover(Arguments):
    """Arguments of ``takeover``.

    Args:
        format: the newest format of a daemon's state that the new daemon can read; the new daemon
            must be able to read all older formats too.
    """

    format: Int64


class Count(Result):
    """A counter of ``query-stats``.

    Args:
        name: what is counted: a command or an error class.
        count: the number.
    """

    name: str
    count: Int64


class LimitsInfo(Result):
    """The limits of the daemon; times are in seconds.

    Args:
        max_connections: connections at a time.
        max_connections_per_uid: connections of one user at a time.
        max_fds: stored descriptors at a time, those of ``getfd`` included.
        max_fds_per_uid: stored descriptors at a time of the user who asks.
        max_request_bytes: the size of one request, in bytes.
        max_open_files: descriptors that the process may have open (RLIMIT_NOFILE).
        write_timeout: the time after which a client that reads no reply is disconnected.
        drain_timeout: the time within which the daemon stops after a request to stop.
        idle_timeout: the time without a request after which a client is disconnected; absent:
            never.
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


class PeerStats(PeerInfo):
    """A connected process, as the kernel reports it (SO_PEERCRED, unix(7)).

    Args:
        pid: its number when it connected; 0 if the daemon's pid namespace has none for it.
        connections: its connections.
        age: seconds since it connected, or since this daemon took over.
        idle: seconds since its last request, or since it connected; at times one less.
        fds: its descriptors that are closed when its connections end.
        watching: whether it receives events (``watch-fdsets``).
    """

    connections: Int64
    age: Int64
    idle: Int64
    fds: Int64
    watching: bool


class StatsInfo(Result):
    """Counters and gauges of the daemon.  Those about stored descriptors and about commands are
    only there for clients with the right ``query`` for everything.

    Args:
        pid: its process.
        uptime: seconds since the start.
        dialect: the dialect that the daemon follows.
        connections: connections open now.
        connections_accepted: connections accepted since the start.
        connections_refused: connections turned away since the start.
        kept_safe: whether stored descriptors survive a crash of the daemon: the fd store has
            duplicates of them.
        limits: the limits of the daemon.
        peers: the connected processes, at most 256, the first to connect first; without the right
            ``admin``, only those of the user who asks.
        fdsets: the number of fd sets.
        fds: descriptors in fd sets.
        fds_kept: descriptors in fd sets, and those of ``getfd``.
        closes_pending: removed descriptors whose close(2) has not returned yet.
        commands: commands executed since the start, by name; failed ones are counted too.
        errors: error replies since the start, by the class that they have in the dialect ``spec``.
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
