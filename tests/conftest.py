"""What holds for every test: no descriptor leaks, and nothing takes forever."""

from __future__ import annotations

import gc
import inspect
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import open_fds
from installed import EXPECTED_SKIPS, required, will_be_skipped
from trio.abc import Clock, Instrument

_DEADLINE = 30.0
_SLOW_DEADLINE = 100.0  # below pytest-timeout's, which ends the whole process


@pytest.fixture(autouse=True)
def no_leaked_descriptors() -> Iterator[None]:
    """Fails a test that leaves descriptors open, or closes one that is not its own."""
    before = open_fds()
    yield
    after = open_fds()
    if after != before:
        gc.collect()  # an owner that was forgotten says so in a ResourceWarning: an error here
        after = open_fds()
    gone = {number: before[number] for number in before.keys() - after.keys()}
    left = {n: link for n, link in after.items() if before.get(n) != link}
    assert not left, f"left open: {left}"
    assert not gone, f"closed, though not the test's own: {gone}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the daemon of this test listens."""
    return tmp_path / "q.sock"


def _run_with(deadline: float) -> Callable[..., None]:
    """trio.run with a deadline: a test that hangs fails alone, and says where it was.

    With a clock of its own a test has its own time, and a good deal of it.
    """

    def run(
        test: Callable[[], Awaitable[None]],
        *,
        clock: Clock | None = None,
        instruments: Sequence[Instrument] = (),
    ) -> None:
        async def main() -> None:
            with trio.fail_after(deadline if clock is None else 1e6):
                await test()

        trio.run(main, clock=clock, instruments=list(instruments))

    return run


def pytest_configure(config: pytest.Config) -> None:
    # A script's background job has these ignored (POSIX, sh, 2.11), a job of nohup(1) SIGHUP, and
    # so would all that the tests start and send them to.  A handler is back to the default in
    # another program (execve(2)).
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # Python's own
        if signal.getsignal(number) is signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    config.addinivalue_line("markers", "root: needs to be root")


def pytest_report_header() -> list[str]:
    return [f"skipped here: {each}" for each in will_be_skipped()]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where nothing may be lacking, a test that is skipped without being expected is an error."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not required() or reporter is None:
        return
    reasons = [str(report.longrepr) for report in reporter.stats.get("skipped", [])]
    for reason in reasons:
        if not any(expected in reason for expected in EXPECTED_SKIPS):
            reporter.write_line(f"skipped, and should not be: {reason}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


# Before the rest is sorted out pytest-trio marks the async tests; the first mark's runner is used.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        if item.get_closest_marker("root") is not None and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs to be root"))
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            run = _run_with(_SLOW_DEADLINE if slow else _DEADLINE)
            item.add_marker(pytest.mark.trio(run=run), append=False)
