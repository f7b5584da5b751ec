"""``qmpfd watch``: prints events when they arrive."""

from __future__ import annotations

import argparse
import time
from typing import Any, NoReturn

from ..client.errors import NoDaemon
from ..protocol.client import QMPEvent
from .options import CONNECTION, JSON, RETRY, client_of, client_within
from .output import print_error, print_json, printable
from .targets import described

_WORDS = {"FD_ADDED": "added", "FD_REMOVED": "removed"}

SUMMARY = "show each descriptor that is added or removed"
DESCRIPTION = (
    "Show each descriptor that is added or removed, when it happens, until "
    "interrupted. If the connection is lost, try for --timeout seconds to connect again. "
    "With --json, each event is one line."
)
EXAMPLES = ["qmpfd watch", "qmpfd watch --json | jq --unbuffered .data"]
EXIT_STATUS = (
    "  1 the daemon refused, 2 usage, 3 no daemon, or no new connection in time,\n  130 interrupted"
)
OPTIONS = [
    *CONNECTION,
    JSON,
]


def run(arguments: argparse.Namespace) -> NoReturn:
    client = client_of(arguments)
    while True:
        with client:
            client.execute("watch-fdsets", {"enable": True})
            try:
                for event in client.events():
                    _show(event, arguments.json)
            except NoDaemon as exc:
                print_error(f"qmpfd: {printable(str(exc))}: connecting again")
        time.sleep(RETRY)  # no busy loop if the next connection is lost at once as well
        client = client_within(arguments, arguments.timeout)
        print_error("qmpfd: connected again; events of the meantime are lost")


def _show(event: QMPEvent, as_json: bool) -> None:
    if as_json:
        print_json(event_members(event))
    else:
        when = time.strftime("%H:%M:%S", time.localtime(event.seconds))
        print(f"{when}  {formatted(event.name, event.data)}", flush=True)


def event_members(event: QMPEvent) -> dict[str, Any]:
    """Return an event as JSON; its time in seconds since 1970, as a number."""
    return {"event": event.name, "data": event.data, "timestamp": event.seconds}


def formatted(name: str, data: dict[str, Any]) -> str:
    """Describe an event in words."""
    if name not in _WORDS:
        return f"{printable(name)} {printable(str(data))}"
    words = f"{_WORDS[name]:<8} {described(data['fdset-id'], data)}"
    if data.get("reason", "removed") != "removed":
        words += f"  ({printable(str(data['reason']))})"
    return words
