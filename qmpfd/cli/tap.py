"""``qmpfd tap``: shows the lines between QMP clients and a server."""

from __future__ import annotations

import argparse

from .options import option, socket_path

SUMMARY = "show the lines between QMP clients and a server"
DESCRIPTION = (
    "Listen on the Unix socket LISTEN, and connect each of its clients to "
    "SERVER, a qmpfd or a QEMU. Pass on bytes and descriptors in both directions, and print "
    "every line, until interrupted. The server sees this process as its client, so only this "
    "user may connect to LISTEN."
)
EXAMPLES = ["qmpfd tap /tmp/tap.sock /run/qmpfd.sock"]
EXIT_STATUS = "  1 cannot listen on LISTEN, 2 usage, 130 interrupted"
OPTIONS = [
    option("listen", "the socket to make", socket_path, metavar="LISTEN"),
    option("server", "the server's socket", socket_path, metavar="SERVER"),
]


def run(arguments: argparse.Namespace) -> None:
    from .tapping import run  # Trio takes longer to import than a short verb runs

    run(arguments.listen, arguments.server)
