"""The three stories run, and fail if one of their checks is false."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE, ROOT
from installed import QEMU, need

SCRIPTS = ROOT / "scripts"
STORIES = sorted(path.name for path in SCRIPTS.glob("story_*.py"))
PAGE = ROOT / "docs" / "stories.md"


def run(script: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{SCRIPTS}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
        check=False,
    )


@pytest.mark.parametrize(
    "name",
    [
        "story_unprivileged.py",
        "story_restart.py",
        pytest.param("story_qemu.py", marks=pytest.mark.qemu),
    ],
)
def test_it_runs(name: str) -> None:
    if "qemu" in name:
        need(QEMU)
    output = run(SCRIPTS / name)
    assert (output.returncode, output.stderr) == (0, "")
    assert output.stdout.count("  ok: ") >= 5


@pytest.mark.parametrize(
    "name, true, false, complaint",
    [
        pytest.param(
            *("story_unprivileged.py", "become(user[0])", "pass", "may not open the image"),
            marks=pytest.mark.root,
        ),
        ("story_unprivileged.py", "SECTOR, 512)", "SECTOR, 513)", "is in the image"),
        ("story_restart.py", "add_fd(listener", "add_fd(socket.socket()", "attempts to connect"),
    ],
)
def test_it_can_fail(name: str, true: str, false: str, complaint: str, tmp_path: Path) -> None:
    """A story with an error fails with one message."""
    text = (SCRIPTS / name).read_text()
    assert text.count(true) == 1
    flawed = tmp_path / name
    flawed.write_text(text.replace(true, false))
    output = run(flawed)
    assert output.returncode == 1
    assert re.search(rf"^FAILED: .*{complaint}", output.stderr, re.MULTILINE), output.stderr


def test_all_are_told_of() -> None:
    page = PAGE.read_text()
    assert sorted(set(re.findall(r"story_\w+\.py", page))) == STORIES
    assert all(len((SCRIPTS / name).read_text().splitlines()) < 150 for name in STORIES)
