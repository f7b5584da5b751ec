"""SIGHUP: whatever the policy file contains, the daemon serves on, and ends on SIGTERM.

Tests of cli/daemon.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers import Wire, daemon_process, value

GOOD = b'[[rule]]\nuid = 12345\nallow = ["query"]\n'

#: Contents for which parsers and name services raise unusual exceptions.
ODD = {
    "not UTF-8": b'[[rule]]\nuser = "caf\xe9"\nallow = []\n',
    "a NUL in a user's name": b'[[rule]]\nuser = "a\\u0000b"\nallow = []\n',
    "a NUL in a group's name": b'[[rule]]\ngroup = "a\\u0000b"\nallow = []\n',
    "a name that cannot be encoded": b'[[rule]]\nuser = "a\\ud800"\nallow = []\n',
    "a long name": b'[[rule]]\nuser = "' + b"n" * 200_000 + b'"\nallow = []\n',
    "brackets": b"rule = " + b"[" * 20_000,
    "tables": b"rule = " + b"{a=" * 20_000,
    "dots": b".".join([b"a"] * 1_500) + b" = 1",
    "a number of 5,000 digits": b"[[rule]]\nuid = " + b"9" * 5000 + b"\nallow = []\n",
    "a large uid": b"[[rule]]\nuid = 18446744073709551616\nallow = []\n",
    "a date": b"[[rule]]\nuid = 2026-13-45\nallow = []\n",
    "no TOML": b"\x00\x01\x02",
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
async def test_a_policy_file_that_is_odd(path: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "policy.toml"
    file.write_bytes(GOOD)
    with daemon_process(path, "--policy", os.fspath(file)) as process:
        file.write_bytes(content)
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "the policy stays as it was" in line)
        assert "Traceback" not in "".join(process.log)
        file.write_bytes(GOOD)
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "the policy is read again" in line)
        with await Wire.session(path) as wire:
            assert value(await wire.call("query-fdsets")) == []
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


@pytest.mark.parametrize("kind", ["folder", "loop", "missing", "forbidden"])
async def test_a_policy_path_that_is_odd(path: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "policy.toml"
    file.write_bytes(GOOD)
    with daemon_process(path, "--policy", os.fspath(file)) as process:
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "loop":
            file.symlink_to(file)
        elif kind == "forbidden":
            file.symlink_to("/proc/self/mem")
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "the policy stays as it was" in line)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


async def test_a_reload_that_hangs(path: Path, tmp_path: Path) -> None:
    """open(2) of a FIFO as policy file hangs: later SIGHUP and SIGTERM still work."""
    file = tmp_path / "policy.toml"
    file.write_bytes(GOOD)
    with daemon_process(path, "--policy", os.fspath(file)) as process:
        file.unlink()
        os.mkfifo(file)
        for _ in range(50):  # more than Trio's limit of threads
            process.signal(signal.SIGHUP)
            with await Wire.session(path) as wire:
                assert value(await wire.call("query-fdsets")) == []
        file.unlink()
        file.write_bytes(GOOD)
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "the policy is read again" in line)
        file.unlink()
        os.mkfifo(file)
        process.signal(signal.SIGHUP)
        process.signal(signal.SIGTERM)
        process.await_line(lambda line: "stopping after the received requests" in line)
        assert process.wait() == 0
        assert not path.exists()
