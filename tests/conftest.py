"""Fixtures and hooks for every test: no descriptor leaks, and no test hangs."""

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
_SLOW_DEADLINE = 100.0  # below the timeout of pytest-timeout, which ends the whole process


@pytest.fixture(autouse=True)
def no_leaked_descriptors() -> Iterator[None]:
    """Fail a test that leaves descriptors open, or closes descriptors that it did not open."""
    before = open_fds()
    yield
    after = open_fds()
    if after != before:
        gc.collect()  # a lost owner raises a ResourceWarning, which is an error here
        after = open_fds()
    gone = {number: before[number] for number in before.keys() - after.keys()}
    left = {n: link for n, link in after.items() if before.get(n) != link}
    assert not left, f"left open: {left}"
    assert not gone, f"closed, though not the test's own: {gone}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Path of the daemon's socket."""
    return tmp_path / "q.sock"


def _run_with(deadline: float) -> Callable[..., None]:
    """Return a trio.run with a deadline: a test that hangs fails alone, with a traceback.

    With a clock of the test's own, a MockClock, the deadline is 1e6 s of that clock.
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
    # A shell starts background jobs with SIGINT and SIGQUIT ignored (POSIX, sh, 2.11), nohup(1)
    # with SIGHUP ignored, and the processes that the tests start would inherit that.  A handler
    # becomes the default action in another program (execve(2)).
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # Python ignores both
        if signal.getsignal(number) is signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    config.addinivalue_line("markers", "root: needs to be root")


def pytest_report_header() -> list[str]:
    return [f"skipped here: {each}" for each in will_be_skipped()]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With QMPFD_REQUIRE_PEERS set, fail the run if a test outside of EXPECTED_SKIPS is skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not required() or reporter is None:
        return
    reasons = [str(report.longrepr) for report in reporter.stats.get("skipped", [])]
    for reason in reasons:
        if not any(expected in reason for expected in EXPECTED_SKIPS):
            reporter.write_line(f"skipped, and should not be: {reason}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


# pytest-trio has marked the async tests by now; it uses the run function of the first mark.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        if item.get_closest_marker("root") is not None and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs to be root"))
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            run = _run_with(_SLOW_DEADLINE if slow else _DEADLINE)
            item.add_marker(pytest.mark.trio(run=run), append=False)
