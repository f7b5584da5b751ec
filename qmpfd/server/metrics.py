"""The daemon's counters in a file of OpenMetrics text.

The format is that of the OpenMetrics 1.0 specification; the textfile collector of Prometheus' node
exporter reads such files.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import trio

from ..commands import SharedState
from ..limits import METRICS_INTERVAL

_log = logging.getLogger("qmpfd")


def render(daemon: SharedState) -> str:
    """Render all counters and gauges as OpenMetrics text."""
    return "".join(f"{line}\n" for line in _lines(daemon))


def _lines(daemon: SharedState) -> Iterator[str]:
    stats, limits, quotas = daemon.stats, daemon.limits, daemon.quotas
    pending, uptime = daemon.closer.pending, daemon.clock() - stats.started_at
    commands, errors = _labelled("command", stats.commands), _labelled("class", stats.errors)
    for name, text, value in (
        ("connections", "Connections open now.", len(daemon.clients())),
        ("fdsets", "Number of fd sets.", len(daemon.store)),
        ("fds", "Descriptors stored in fd sets.", daemon.store.fd_count),
        ("fds_kept", "Descriptors stored in fd sets or by getfd.", quotas.fds_total),
        ("closes_pending", "Descriptors whose close(2) has not returned yet.", pending),
        ("connections_limit", "Limit of connections at a time.", limits.max_connections),
        ("fds_limit", "Limit of stored descriptors.", limits.max_fds),
        ("uptime_seconds", "Time since the start.", round(uptime, 3)),
    ):
        yield f"# TYPE qmpfd_{name} gauge"
        if name == "uptime_seconds":
            yield f"# UNIT qmpfd_{name} seconds"
        yield f"# HELP qmpfd_{name} {text}"
        yield f"qmpfd_{name} {value}"
    for name, text, values in (
        ("accepted", "Connections accepted since the start.", {"": stats.accepted}),
        ("refused", "Connections turned away since the start.", {"": stats.turned_away}),
        ("commands", "Commands executed since the start.", commands),
        ("errors", "Error replies sent since the start.", errors),
    ):
        yield f"# TYPE qmpfd_{name} counter"
        yield f"# HELP qmpfd_{name} {text}"
        for labels, count in values.items():
            yield f"qmpfd_{name}_total{labels} {count}"
    yield "# EOF"


def _labelled(label: str, counts: Mapping[str, int]) -> dict[str, int]:
    # Label values are names of commands and of error classes: no character needs escaping.
    return {f'{{{label}="{name}"}}': count for name, count in sorted(counts.items())}


def _write(path: Path, text: str) -> None:
    """Replace the file by rename(2): no reader sees half of it.

    Raises:
        OSError: the file cannot be written, or is not a regular file (/dev/null must stay).
    """
    path = path.resolve()  # from Python 3.13 on, only a link to itself is a link afterwards
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise FileExistsError(errno.EEXIST, "not a regular file", os.fspath(path))
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.unlink(missing_ok=True)
        with new.open("x", encoding="ascii") as file:  # "x" does not follow a planted link
            file.write(text)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


async def write_metrics(shared: SharedState, path: Path) -> None:
    """Write the metrics to *path* every METRICS_INTERVAL seconds, in a thread: a disk that is full
    or hangs costs metrics only.  A failed write is tried again at the next interval.
    """
    failing = False
    while True:
        try:
            await trio.to_thread.run_sync(_write, path, render(shared), abandon_on_cancel=True)
        # RuntimeError: a link to itself (pathlib before Python 3.13), or no thread can be started.
        except (OSError, RuntimeError, ValueError) as exc:
            if not failing:
                _log.error("cannot write the metrics to %s: %s", path, exc)
            failing = True
        else:
            if failing:
                _log.warning("the metrics are written again")
            failing = False
        await trio.sleep(METRICS_INTERVAL)
