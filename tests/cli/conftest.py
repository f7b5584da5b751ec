"""Fixtures: a daemon, and the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import daemon_thread

from .command import Cli


@pytest.fixture
def running(path: Path) -> Iterator[None]:
    """Run a daemon in a thread."""
    with daemon_thread(path):
        yield


@pytest.fixture
def cli(path: Path, running: None) -> Cli:
    """Command line for a running daemon."""
    return Cli(path)


@pytest.fixture
def file(cli: Cli, tmp_path: Path) -> Path:
    """File with two descriptors in set 0: the first O_RDONLY, the second O_RDWR."""
    found = tmp_path / "file"
    found.write_text("content\n")
    cli.add(found, os.O_RDONLY)
    cli.add(found, os.O_RDWR, 0)
    return found
