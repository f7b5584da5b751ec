"""``qmpfd ls --long``: kind and owner of each descriptor."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from helpers import PATIENCE, Pipe

from qmpfd.client.blocking import BlockingClient

from .command import Cli


def test_ls_long(cli: Cli, tmp_path: Path) -> None:
    name = "file\x1b[31m"
    cli.add(tmp_path / name, os.O_RDWR, opaque="o")
    with Pipe() as pipe, BlockingClient(cli.path, PATIENCE) as client:
        terms = {"lifetime": "connection", "expires": 90, "watch-hangup": True}
        client.execute("add-fds", {"fdset-id": 0, **terms}, [pipe])
        header, first, second = cli.done("ls", "--long").splitlines()
        columns = "FDSET FD ACCESS KIND SIZE AGE KEPT PID UID NAME TARGET"
        assert header.split() == columns.split()
        one = dict(zip(header.split(), first.split(), strict=True))
        assert (one["ACCESS"], one["KIND"], one["KEPT"], one["NAME"]) == (
            "rdwr",
            "file",
            "-",
            "o",
        )
        assert one["PID"] == str(os.getpid())
        assert one["UID"] == str(os.geteuid())
        assert one["TARGET"] == f"{tmp_path}/file\\x1b[31m"
        two = dict(zip(header.split(), second.split(), strict=True))
        assert (two["ACCESS"], two["KIND"], two["NAME"]) == ("wronly,nonblock", "pipe", "-")
        assert re.fullmatch(r"connection,1m(30|29|28)s,hangup", two["KEPT"])
        assert cli.done("ls", "-l").splitlines()[0] == header
        described = json.loads(cli.done("ls", "--long", "--json"))
        assert described[0]["target"] == f"{tmp_path}/{name}"
        assert described[1]["watch-hangup"] is True


def test_ls_long_of_nothing(cli: Cli) -> None:
    assert cli.done("ls", "--long") == "no fd sets\n"
    assert cli.done("ls", "--long", "--json") == "[]\n"
