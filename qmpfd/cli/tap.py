"""``qmpfd tap``: the lines between QMP clients and a server."""

from __future__ import annotations

import argparse

from .exit_codes import DONE
from .options import Subparsers, add_examples, socket_path


def add_parsers(verbs: Subparsers) -> None:
    """Add ``tap`` to the command line."""
    parser = verbs.add_parser(
        "tap",
        help="show the lines between QMP clients and a server",
        description="Listen on the Unix socket LISTEN, and connect each of its clients to "
        "SERVER, a qmpfd or a QEMU. Pass on bytes and descriptors in both directions, and print "
        "every line, until interrupted. The server sees this process as its client, so only this "
        "user may connect to LISTEN.",
    )
    parser.add_argument("listen", type=socket_path, metavar="LISTEN", help="the socket to make")
    parser.add_argument("server", type=socket_path, metavar="SERVER", help="the server's socket")
    add_examples(
        parser,
        "qmpfd tap /tmp/tap.sock /run/qmpfd.sock",
        status="  1 cannot listen on LISTEN, 2 usage, 130 interrupted",
    )
    parser.set_defaults(run=_tap)


def _tap(arguments: argparse.Namespace) -> int:
    from .tapping import run  # Trio takes longer to import than a short verb runs

    run(arguments.listen, arguments.server)
    return DONE
