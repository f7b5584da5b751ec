"""A daemon, and the command line that asks it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import daemon_thread

from .command import Cli


@pytest.fixture
def running(path: Path) -> Iterator[None]:
    """A daemon in a thread."""
    with daemon_thread(path):
        yield


@pytest.fixture
def cli(path: Path, running: None) -> Cli:
    """With a daemon that runs."""
    return Cli(path)


@pytest.fixture
def file(cli: Cli, tmp_path: Path) -> Path:
    """A file that is in set 0, first to read and then to read and write."""
    found = tmp_path / "file"
    found.write_text("content\n")
    cli.add(found, os.O_RDONLY)
    cli.add(found, os.O_RDWR, 0)
    return found
