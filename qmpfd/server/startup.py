"""``qmpfd.serve``: builds a daemon from its initial, inherited and recovered parts, and runs it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, closing
from functools import partial
from pathlib import Path
from typing import get_args

import trio

from ..commands import Dialect
from ..commands.audit import Audit
from ..fdsets import StoredFd
from ..kernel.binding import OWNER_ONLY, Permissions
from ..kernel.fd import Fd, FileDescriptorLike, close_all
from ..kernel.in_flight import InFlightProbe, in_flight_is_limited
from ..limits import INT64_MAX, Limits
from ..policy import Policy
from .audit import AuditWriter
from .closing import await_closes
from .fdstore.lifespan import mirrored
from .fdstore.recover import Recovered
from .handle import Server
from .lifecycle import Event
from .listen.listener import UnixListener
from .restore import restore_recovered, taking_over
from .server import DaemonServer
from .takeover.receiver import Takeover


async def serve(  # noqa: ASYNC128 - run_daemon does that
    paths: Iterable[str | os.PathLike[str]],
    *,
    dialect: Dialect = "spec",
    limits: Limits | None = None,
    policy: Policy | None = None,
    socket_mode: int = 0o600,
    socket_group: int | None = None,
    metrics_path: str | os.PathLike[str] | None = None,
    audit: FileDescriptorLike | None = None,
    initial_fds: Iterable[tuple[Fd, int | None, str | None]] = (),
    listen_fds: Iterable[Fd] = (),
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hold file descriptors for the clients that connect to *paths*.

    Runs until it is cancelled, :meth:`Server.stop` is called or a client sends ``quit``; then
    every stored descriptor is closed and the socket files are removed.
    ``await nursery.start(qmpfd.serve, [path])`` returns the :class:`Server` once clients can
    connect.

    Args:
        paths: paths of the Unix sockets to listen on, or ``@NAME`` for abstract ones; a stale
            socket file is replaced.
        dialect: ``"spec"``, the published specification of the commands, or ``"qemu"``, today's
            QEMU.
        limits: limits of the daemon and of each client.
        policy: which users may connect, and which commands each may run; by default only the
            daemon's own user and root may connect, and they may run every command.
        socket_mode: permission bits of the socket files.
        socket_group: gid of the socket files; by default the process's own.
        metrics_path: a file to write OpenMetrics text to, every 10 seconds.
        audit: file or pipe to write the audit trail to: a line of JSON for each descriptor that is
            added, removed or handed out, and for each refusal.  The caller keeps its descriptor.
        initial_fds: descriptors to store at the start: each with the id of its fd set, which is
            created if need be, or None for a new one, and its opaque text or None; owned by the
            daemon from here on.
        listen_fds: listening Unix sockets, from a service manager; owned by the daemon from here
            on.

    Raises:
        SocketInUse: another daemon listens on one of *paths*.
        OSError: one of *paths* cannot be bound.
        ValueError: an argument is out of its range: a limit is not above 0, *socket_mode* not from
            0 to 0o777, an id not from 0 to 2**63-1, or an opaque text has surrogates.
        TypeError: *paths* is a single path, or another argument has the wrong type.
    """
    if isinstance(paths, (str, bytes, os.PathLike)):  # a string is an iterable of strings too
        raise TypeError(f"paths is a list of paths, not one path: [{paths!r}]")
    await run_daemon(
        partial(_checked_server, dialect, limits, policy, metrics_path, socket_mode),
        paths,
        Permissions(socket_mode, socket_group),
        audit,
        initial_fds,
        listen_fds,
        task_status=task_status,
    )


def _checked_server(
    dialect: Dialect,
    limits: Limits | None,
    policy: Policy | None,
    metrics_path: str | os.PathLike[str] | None,
    socket_mode: int,
) -> DaemonServer:
    """Check arguments of :func:`serve` that would spoil the daemon later; create the server."""
    dialects = {name: name for name in get_args(Dialect)}  # replies need a str, and no subclass
    if dialect not in dialects:
        raise ValueError(f"dialect is 'spec' or 'qemu', not {dialect!r}")
    limits = limits or Limits()
    for name, limit in limits._asdict().items():
        if not (limit is None and name == "idle_timeout") and not limit > 0:
            raise ValueError(f"limits.{name} has to be above 0, not {limit!r}")
    if not isinstance(policy, Policy | None):
        raise TypeError(f"policy is a Policy, as load_policy() returns it, not {policy!r}")
    if not 0 <= socket_mode <= 0o777:
        raise ValueError(f"socket_mode is 0 to 0o777, not {socket_mode:#o}")
    path = None if metrics_path is None else Path(metrics_path)
    return DaemonServer(dialects[dialect], limits, policy, path)


async def run_daemon(  # noqa: ASYNC128 - DaemonServer.run does that
    make_server: Callable[[], DaemonServer],
    paths: Iterable[str | os.PathLike[str]],
    permissions: Permissions = OWNER_ONLY,
    audit: FileDescriptorLike | None = None,
    initial_fds: Iterable[tuple[Fd, int | None, str | None]] = (),
    listen_fds: Iterable[Fd] = (),
    *,
    takeover: Takeover | None = None,
    recovered: Recovered | None = None,
    task_status: trio.TaskStatus[DaemonServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run the daemon of a ``qmpfd serve`` process: :func:`serve`, after a predecessor.

    The arguments that are not named here are those of :func:`serve`.

    Args:
        make_server: creates the server, within the event loop.
        permissions: permissions of the socket files.
        takeover: the takeover of a running daemon, see
            :func:`qmpfd.server.takeover.receiver.prepare`; owned by the daemon from here on.
        recovered: state and descriptors of a daemon that has crashed, see
            :func:`qmpfd.server.fdstore.recover.recover`; owned by the daemon from here on.
        task_status: ``started`` is called once clients can connect.
    """
    given, inherited = deque(initial_fds), deque(listen_fds)
    listeners: list[UnixListener] = []

    def close_listeners() -> None:
        for listener in listeners:
            listener.close()

    async with AsyncExitStack() as stack:
        if takeover is not None:  # closed last: its EOF tells the predecessor that all is closed
            stack.callback(takeover.close)
        stack.callback(lambda: close_all([*(fd for fd, _, _ in given), *inherited]))
        writer = None if audit is None else stack.enter_context(closing(AuditWriter(audit)))
        server = make_server()
        stack.push_async_callback(await_closes, server.daemon.closer)
        stack.callback(server.close)
        if in_flight_is_limited():
            server.daemon.in_flight_probe = InFlightProbe()
            stack.callback(server.daemon.in_flight_probe.close)
        stack.callback(close_listeners)
        recovered = recovered or Recovered()
        stack.callback(recovered.close)
        restore_recovered(server, recovered, listeners)
        finish: Callable[[], list[UnixListener]] = list
        if takeover is not None:
            finish = stack.enter_context(taking_over(server, takeover))
        for listener in listeners:
            listener.permissions = permissions
        initial = _store_initial(server, given)
        # A generator: close_listeners() has each listener before the next one can fail.
        listeners.extend(UnixListener.bind(path, permissions) for path in paths)
        ours = list(listeners)  # the service manager passes the others to every process it starts
        while inherited:
            listeners.append(UnixListener.inherit(inherited.popleft()))
        if server.mirror is not None and server.mirror.is_parent:
            ours = list(listeners)  # a parent passes them to the first worker only
        # After the mirror has ended: at its end it checks whether the state is HANDED_OVER.
        stack.callback(server.lifecycle.handle, Event.END)
        lifeline = None if takeover is None else takeover.lifeline
        async with mirrored(server, ours, recovered, lifeline=lifeline) as start_mirror:
            taken_over = finish()  # as late as possible: it pauses the predecessor
            listeners[:0] = taken_over
            ours[:0] = taken_over
            await start_mirror(None if takeover is None else takeover.journal)
            if takeover is not None:
                takeover.confirm()
                server.durability.confirm()
                for listener in taken_over:
                    listener.change_permissions(permissions)
            if writer is not None:  # not earlier: the predecessor has audited restored descriptors
                server.daemon.audit = Audit(writer.write)
                for stored in initial:
                    server.daemon.audit.record("added", stored)
            await server.run(listeners, task_status=task_status)


def _store_initial(
    server: DaemonServer, given: deque[tuple[Fd, int | None, str | None]]
) -> list[StoredFd]:
    """Store the initial descriptors, each of which is taken off *given*; return their entries."""
    initial: list[StoredFd] = []
    while given:
        fd, fdset_id, opaque = given[0]
        # What JSON cannot carry, or carries as another type, would spoil every listing.
        if fdset_id is not None:
            if not 0 <= fdset_id <= INT64_MAX:
                raise ValueError(f"an fd set's id is 0 to {INT64_MAX}, not {fdset_id}")
            fdset_id = int(fdset_id)
        if opaque is not None:
            opaque = opaque.encode().decode()
        initial += server.daemon.add([fd], fdset_id, opaque, create=True)
        given.popleft()
    return initial
