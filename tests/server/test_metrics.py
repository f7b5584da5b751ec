"""The metrics file, read with the parser of the Prometheus client library."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import Wire, daemon, daemon_process, pipes, value
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from trio.testing import MockClock

from qmpfd.limits import METRICS_INTERVAL
from qmpfd.server.metrics import _write, render


def _read(text: str) -> dict[str, float]:
    """Parse a complete metrics file; return its samples by name and labels."""
    samples = {}
    for family in text_string_to_metric_families(text):  # type: ignore[no-untyped-call]
        assert family.documentation
        for sample in family.samples:
            labels = "".join(f" {each}" for each in sample.labels.values())
            samples[sample.name + labels] = sample.value
    return samples


async def test_the_file_has_the_values_of_query_stats(path: Path) -> None:
    async with daemon(path) as server:
        with pipes(1) as made, await Wire.session(path) as wire:
            for _ in range(3):
                value(await wire.call("add-fd", None, made))
            value(await wire.call("getfd", {"fdname": "n"}, made))
            await wire.call("remove-fd", {"fdset-id": 99})
            wire.send(b"]")
            await wire.reply()
            stats = value(await wire.call("query-stats"))
            samples = _read(render(server.daemon))
    for name, member in {
        "connections": "connections",
        "fdsets": "fdsets",
        "fds": "fds",
        "fds_kept": "fds-kept",
        "closes_pending": "closes-pending",
        "accepted_total": "connections-accepted",
        "refused_total": "connections-refused",
    }.items():
        assert samples[f"qmpfd_{name}"] == stats[member], name
    assert samples["qmpfd_fds"] == 3
    assert samples["qmpfd_fds_kept"] == 4
    for count in stats["commands"]:
        assert samples[f"qmpfd_commands_total {count['name']}"] >= count["count"]
    for count in stats["errors"]:
        assert samples[f"qmpfd_errors_total {count['name']}"] == count["count"]
    assert samples["qmpfd_errors_total GenericError"] == 1
    assert samples["qmpfd_connections_limit"] == stats["limits"]["max-connections"]
    assert samples["qmpfd_fds_limit"] == stats["limits"]["max-fds"]
    assert samples["qmpfd_uptime_seconds"] >= 0


async def test_written_at_the_start_and_at_intervals(path: Path, tmp_path: Path) -> None:
    """Written at the start and after each interval: always whole, without temporary files."""
    file = tmp_path / "metrics"
    async with daemon(path, metrics_path=file):
        with await Wire.session(path) as wire:
            while not file.exists():  # a thread writes the file
                await wire.call("query-name")
            assert _read(file.read_text())["qmpfd_fdsets"] == 0
    assert sorted(os.listdir(tmp_path)) == ["metrics"]


async def test_written_again(path: Path, tmp_path: Path, mock_clock: MockClock) -> None:
    file = tmp_path / "metrics"
    async with daemon(path, metrics_path=file):
        with await Wire.session(path) as wire:
            while not file.exists():
                await wire.call("query-name")
            file.unlink()
            while not file.exists():  # the task sleeps only once its thread has returned
                mock_clock.jump(METRICS_INTERVAL)
                await wire.call("query-name")
        assert _read(file.read_text())["qmpfd_uptime_seconds"] >= METRICS_INTERVAL


def test_the_option_metrics(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "metrics"
    with daemon_process(path, "--metrics", os.fspath(file)):
        while not file.exists():
            pass
        assert _read(file.read_text())["qmpfd_connections"] == 0


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_path_that_is_no_regular_file_is_not_replaced(
    path: Path, tmp_path: Path, through_a_link: bool
) -> None:
    """A path that is no regular file is not replaced: root could replace /dev/null."""
    fifo = file = tmp_path / "fifo"
    os.mkfifo(fifo)
    if through_a_link:
        file = tmp_path / "link"
        file.symlink_to(fifo)
    with daemon_process(path, "--metrics", os.fspath(file)) as process:
        process.await_line(lambda line: "not a regular file" in line)
    assert fifo.is_fifo()
    assert file.is_symlink() == through_a_link


def test_the_target_of_a_link_is_replaced(path: Path, tmp_path: Path) -> None:
    """The file is replaced, and the link stays."""
    file, link = tmp_path / "metrics", tmp_path / "link"
    link.symlink_to(file)
    with daemon_process(path, "--metrics", os.fspath(link)):
        while not file.exists():
            pass
    assert link.is_symlink()


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    """A symbolic link at the name of the temporary file is not followed."""
    victim, file = tmp_path / "victim", tmp_path / "metrics"
    victim.write_text("precious")
    (tmp_path / f".metrics.{os.getpid()}").symlink_to(victim)
    _write(file, "# EOF\n")
    assert victim.read_text() == "precious"
    assert file.read_text() == "# EOF\n"
    assert sorted(os.listdir(tmp_path)) == ["metrics", "victim"]
