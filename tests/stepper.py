"""Run qmpfd in processes that send themselves a signal at the n-th line executed of some files.

As a program, this file reads one order a line, as JSON, and answers each with a line.  The program
has imported qmpfd and forks for each daemon: hundreds of daemons take seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

ROOT = Path(__file__).resolve().parents[1]


class Stepper:
    """Starts the program, and sends it orders."""

    def __init__(self) -> None:
        self._program = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def start(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        where: Mapping[str, Sequence[str]] | None = None,
        step: int = 0,
        number: signal.Signals = signal.SIGKILL,
        patches: Mapping[str, Any] | None = None,
        most_files: int = 0,
    ) -> Stepped:
        """Start ``qmpfd`` with *argv*.

        Args:
            argv: arguments of ``qmpfd``.
            log: file for its standard error.
            where: files whose executed lines count, by path below qmpfd/server, each with the
                functions that count, or with none if all do.
            step: number of the executed line at which the process sends itself the signal; 0 for
                never.
            number: the signal.
            patches: values for names in modules, such as constants.
            most_files: RLIMIT_NOFILE of the process; 0 to leave it.
        """
        log.write_bytes(b"")  # a process before may have written to the same file
        order = {
            "argv": list(argv),
            "log": str(log),
            "where": {name: list(functions) for name, functions in (where or {}).items()},
            "step": step,
            "number": int(number),
            "patches": dict(patches or {}),
            "most_files": most_files,
        }
        return Stepped(self, self.ask(order), log)

    def ask(self, order: Mapping[str, Any]) -> Any:
        """Send an order; return the answer."""
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(json.dumps(order).encode() + b"\n")
        self._program.stdin.flush()
        return json.loads(self._program.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._program.communicate()


class Stepped:
    """A qmpfd process started by a Stepper.

    Args:
        stepper: its parent.
        pid: its process id.
        log: file of its standard error.
    """

    def __init__(self, stepper: Stepper, pid: int, log: Path) -> None:
        self._stepper = stepper
        self._log = log
        self._status: int | None = None
        self.pid = pid
        #: Peak memory in MiB (ru_maxrss, getrusage(2)); known when the process has ended.
        self.peak = 0

    @property
    def said(self) -> str:
        """Standard error of the process."""
        return self._log.read_text()

    @property
    def place(self) -> str:
        """File, line and function at which the process signalled itself; empty if it did not."""
        lines = self.said.splitlines()
        return next((line.removeprefix("STEP ") for line in lines if line[:5] == "STEP "), "")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the process runs."""
        if self._status is None:
            self._status, self.peak = self._stepper.ask({"poll": self.pid})
        return self._status

    def wait(self, seconds: float = 20.0) -> int:
        """Wait for the end of the process; return the exit status."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"it does not end: {self.said}"
            time.sleep(0.002)
        return status

    def until(self, *texts: str, seconds: float = 20.0) -> None:
        """Wait until the log contains one of *texts*, or the process has ended."""
        deadline = time.monotonic() + seconds
        while not any(text in self.said for text in texts) and self.poll() is None:
            assert time.monotonic() < deadline, f"it does not say {texts}: {self.said}"
            time.sleep(0.002)

    def end(self) -> None:
        """End the process with SIGTERM if it still runs."""
        if self.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            self.wait()


# -- the program -------------------------------------------------------------------------------


def _tracer(where: Mapping[str, Sequence[str]], step: int, number: int) -> Callable[..., Any]:
    left = step

    def at_line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                code = frame.f_code
                place = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
                os.write(2, f"STEP {place}\n".encode())
                os.kill(os.getpid(), number)
        return at_line if left > 0 else None

    def at_call(frame: FrameType, event: str, argument: object) -> Any:
        if left <= 0:
            return None
        _, _, file = frame.f_code.co_filename.rpartition("/qmpfd/server/")
        functions = where.get(file)
        if functions is None:
            return None
        return at_line if not functions or frame.f_code.co_name in functions else None

    return at_call


def _run(order: Mapping[str, Any]) -> NoReturn:
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.dup2(log, 2)
    os.close(log)
    os.close(nothing)
    main = importlib.import_module("qmpfd.cli.main").main  # of this checkout
    for name, value in order["patches"].items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    if order["most_files"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (order["most_files"],) * 2)
    if order["step"]:
        sys.settrace(_tracer(order["where"], order["step"], order["number"]))
    status = 1
    try:
        status = main(order["argv"])
    except (Exception, BaseExceptionGroup, KeyboardInterrupt):  # noqa: BLE001 - the test reads it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # skip the clean-up inherited from the parent


def _obey() -> None:
    # Import what a daemon imports, once for all.
    for name in ("cli.serve", "cli.daemon", "cli.logs", "cli.takeover", "protocol.parser"):
        importlib.import_module(f"qmpfd.{name}")
    for line in sys.stdin.buffer:
        order = json.loads(line)
        answer: Any
        if "poll" in order:
            answer = None, 0
            with suppress(ChildProcessError):
                pid, status, usage = os.wait4(order["poll"], os.WNOHANG)
                if pid:
                    answer = os.waitstatus_to_exitcode(status), usage.ru_maxrss >> 10
        else:
            answer = os.fork()
            if not answer:
                _run(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    _obey()
