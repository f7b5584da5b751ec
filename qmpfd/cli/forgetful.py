"""QEMU up to 9.0 closes what nothing in it uses when its last QMP client disconnects."""

from __future__ import annotations

from contextlib import suppress

from ..client.blocking import BlockingClient
from ..client.errors import NoDaemon
from .output import print_error

#: The last version that does so: 9.1 dropped the clean-up of unused descriptors.
_LAST = (9, 0)


def forgets(client: BlockingClient) -> str | None:
    """The version of a QEMU that forgets at disconnect, by its greeting; None for others."""
    match client.greeting.get("version"):
        case {"package": str(package)} if package.startswith("qmpfd "):
            return None
        case {"qemu": {"major": int(major), "minor": int(minor)}} if (major, minor) <= _LAST:
            return f"{major}.{minor}"
    return None


def warn_of_forgetting(client: BlockingClient, stays: bool, advice: str = "") -> None:
    """Warn on standard error that QEMU will close the added descriptors at disconnect."""
    version = forgets(client)
    if version is not None and not stays:
        advice = advice or "keep another QMP client connected until QEMU uses it"
        print_error(
            f"qmpfd: QEMU {version} closes descriptors that it does not use when its last QMP "
            f"client disconnects: {advice}"
        )


def stay_connected(client: BlockingClient) -> None:
    """Return when the server has closed the connection."""
    with suppress(NoDaemon):
        for _ in client.events():
            pass
