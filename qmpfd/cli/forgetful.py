"""QEMU up to 9.0 closes unused descriptors of its fd sets when its last QMP client disconnects."""

from __future__ import annotations

from contextlib import suppress

from ..client.blocking import BlockingClient
from ..client.errors import NoDaemon
from .output import print_error

#: The last such version: 9.1 dropped the clean-up of unused descriptors.
_LAST = (9, 0)


def stay_or_warn(client: BlockingClient, stay: bool, advice: str) -> None:
    """If *stay*, stay connected until the server closes the connection; else warn on standard
    error that such a QEMU closes the added descriptors.
    """
    if stay:
        with suppress(NoDaemon):
            for _ in client.events():
                pass
        return
    match client.greeting.get("version"):
        case {"package": str(package)} if package.startswith("qmpfd "):
            return
        case {"qemu": {"major": int(major), "minor": int(minor)}} if (major, minor) <= _LAST:
            print_error(
                f"qmpfd: QEMU {major}.{minor} closes descriptors that it does not use when its "
                f"last QMP client disconnects: {advice}"
            )
