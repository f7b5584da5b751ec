"""``qmpfd.testing``: the fixtures, and the examples of their page."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from examples import blocks
from helpers import PATIENCE, ROOT
from supervised import until

import qmpfd
import qmpfd.testing
from qmpfd.client.blocking import BlockingClient
from qmpfd.testing import DaemonProcess

PAGE = (ROOT / "docs/howto/testing.md").read_text()

EXAMPLES = {
    block.text.removeprefix("# ").partition("\n")[0]: block.text
    for block in blocks(PAGE)
    if block.language == "python"
}


def run_pytest(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run pytest as another project, with only the installed package."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "error", "-o", "trio_mode=true", "--rootdir=."],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_the_examples(tmp_path: Path) -> None:
    assert EXAMPLES
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text)
    ran = run_pytest(tmp_path)
    tests = sum(len(re.findall(r"def test_", text)) for text in EXAMPLES.values())
    assert f"= {tests} passed in" in ran.stdout, ran.stdout + ran.stderr


def test_a_failing_example_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "async def test_it(qmpfd_server): assert qmpfd_server.ended.is_set()\n"
    )
    assert "= 1 failed in" in run_pytest(tmp_path).stdout


def test_every_fixture_is_in_the_documentation() -> None:
    fixtures = {
        name for name in vars(qmpfd.testing) if re.fullmatch(r"qmpfd_(path|server|process)", name)
    }
    assert fixtures == set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE))
    assert fixtures == set(re.findall(r"^``(\w+)``$", qmpfd.testing.__doc__ or "", re.MULTILINE))


async def test_the_server_is_in_this_loop(qmpfd_server: qmpfd.Server, qmpfd_path: Path) -> None:
    assert not qmpfd_server.ended.is_set()
    async with qmpfd.connect(qmpfd_path) as client:
        with tempfile.TemporaryFile() as file:
            info = await client.add_fd(file)
            assert os.path.sameopenfile(info.fd, file.fileno())  # the daemon is in this process


@pytest.mark.parametrize("raised", [KeyError("mine"), pytest.skip.Exception("not here")])
async def test_an_exception_leaves_the_block_as_it_is(
    qmpfd_path: Path, raised: BaseException
) -> None:
    with pytest.raises(type(raised)) as caught:
        async with qmpfd.testing.daemon(qmpfd_path):
            raise raised
    assert caught.value is raised
    assert not qmpfd_path.exists()


async def test_a_daemon_that_does_not_start_raises_its_error(
    qmpfd_server: qmpfd.Server, qmpfd_path: Path
) -> None:
    with pytest.raises(qmpfd.SocketInUse):
        async with qmpfd.testing.daemon(qmpfd_path):
            pass


async def test_the_server_may_end_before_the_test(
    qmpfd_server: qmpfd.Server, qmpfd_path: Path
) -> None:
    async with qmpfd.connect(qmpfd_path) as client:
        await client.execute("quit")
    await qmpfd_server.ended.wait()
    assert not qmpfd_path.exists()


def test_the_process_ends_gracefully(qmpfd_process: DaemonProcess) -> None:
    assert qmpfd_process.stop() == 0
    assert not qmpfd_process.path.exists()
    assert any("SIGTERM" in line for line in qmpfd_process.log)
    assert qmpfd_process.stop() == 0


def test_the_process_has_only_its_own_descriptors_at_first(qmpfd_process: DaemonProcess) -> None:
    at_first = qmpfd_process.open_fds()
    with BlockingClient(qmpfd_process.path, PATIENCE) as client:
        client.remove_fd(client.add_fd(0).fdset_id)
    until(lambda: qmpfd_process.open_fds() == at_first, "the descriptors of the start")


def test_the_process_may_be_killed(qmpfd_process: DaemonProcess) -> None:
    qmpfd_process.kill()
    assert qmpfd_process.process.returncode == -signal.SIGKILL


def test_a_stopped_process_is_ended(qmpfd_process: DaemonProcess) -> None:
    os.kill(qmpfd_process.pid, signal.SIGSTOP)
    assert qmpfd_process.stop() == 0


def test_a_daemon_that_does_not_start_says_why(qmpfd_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"does not start: .*max-fds"),
        qmpfd.testing.daemon_process(qmpfd_path, "--max-fds=none"),
    ):
        pass


def test_much_that_it_says_does_not_stop_it(qmpfd_path: Path) -> None:
    """A daemon can log more than a pipe holds."""
    with qmpfd.testing.daemon_process(qmpfd_path, "--log-level=debug") as daemon:
        with BlockingClient(qmpfd_path, PATIENCE) as client:
            for _ in range(2000):
                client.execute("query-name")
        assert daemon.stop() == 0
        assert sum(map(len, daemon.log)) > 1 << 16


def test_a_path_fits_into_a_socket_address(qmpfd_path: Path) -> None:
    assert len(os.fsencode(qmpfd_path)) < 108
    assert not qmpfd_path.exists()
