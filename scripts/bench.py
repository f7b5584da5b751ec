"""Compare the daemon's CPU time, latency and memory with other servers': ``make bench``.

One run starts all servers and measures each with the same work in every round.  The results are
medians over the rounds, and ratios between them.  CPU time is that of the server processes alone
(/proc/PID/schedstat).  The clients, a C program, run once on the server's CPU, where the server
hardly ever sleeps, and once on another CPU, where each request wakes the server up.  Servers that
are not installed are skipped; the output names the command that installs each.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType

from benchmark import plots
from benchmark.goals import goals
from benchmark.plan import Scale, measure_all, timed
from benchmark.report import as_json, format_goals, format_results, goals_page
from benchmark.servers import KINDS, OTHER, Failed, Servers, missing, placement

_CLIENTS = (20, 200, 1000)
_WHOLE = Scale(5, 300, 1_000_000, (0, 1000, 5000, 15000), _CLIENTS, 5, 15000, 10000, 99, 1.0)
_QUICK = Scale(2, 80, 1_000_000, (0, 1000, 15000), _CLIENTS, 3, 1000, 10000, 99, 0.1)
_PAIRS = Scale(3, 200, 1_000_000, (0,), _CLIENTS, 0, 0, 0, 0, 0)

#: The servers that the goals of ``--pairs`` compare.
_COMPARED = ("loop", "trio", "strict", "qmpfd", "supervised")

#: Descriptors that a server needs beside the stored ones: client sockets and its own files.
_SPARE = 1200


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description="What the daemon costs.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument(
        "--pairs",
        action="store_true",
        help=f"add-fd and remove-fd only, of {', '.join(_COMPARED)} only: under a minute",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw plots there")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="all three there: results.txt, .json, plots"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the goals into its table")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often to measure everything")
    parser.add_argument("--commands", type=int, metavar="N", help="in one run, at most")
    parser.add_argument("--stored", type=int, metavar="N", help="descriptors, at most")
    parser.add_argument("--clients", type=int, metavar="N", help="at a time, at most")
    parser.add_argument("--attacks", type=int, metavar="N", help="kinds of attacks, at most")
    parser.add_argument(
        "--only", nargs="+", choices=KINDS, metavar="NAME", help=f"of {', '.join(KINDS)}"
    )
    return parser.parse_args(arguments)


def _scale(options: argparse.Namespace) -> Scale:
    """Return the scale that the options ask for, within the hard limit on open descriptors."""
    scale = _PAIRS if options.pairs else _QUICK if options.quick else _WHOLE
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = min(scale.most if options.stored is None else options.stored, hard - _SPARE)
    crowd = min(options.clients or scale.clients[-1], hard - 100)
    return replace(
        scale,
        rounds=options.rounds or scale.rounds,
        commands=options.commands or scale.commands,
        steps=(*(step for step in scale.steps if step < most), most),
        clients=(*(count for count in scale.clients if count < crowd), crowd),
        outage=min(scale.outage, most),
        attacks=scale.attacks if options.attacks is None else options.attacks,
    )


def _names(options: argparse.Namespace) -> list[str]:
    """Return the servers to measure; print which of the chosen ones are not installed."""
    absent = missing()
    if "loop" in absent:  # the load client needs the same compiler
        raise Failed(f"there is no C compiler: {absent['loop']}")
    chosen = options.only or (_COMPARED if options.pairs else KINDS)
    wanted = [name for name in KINDS if name in chosen]
    for name in wanted:
        if name in absent:
            print(f"{KINDS[name].label} is not installed, so not measured: {absent[name]}")
    return [name for name in wanted if name not in absent]


class _Progress:
    """Status line on standard error, if that is a terminal."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._shown = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._shown:
            print(
                f"\r\x1b[K{timed(self._since)}, {text}"[:110], end="", file=sys.stderr, flush=True
            )

    def over(self) -> None:
        """Erase the status line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the results; return the exit status."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    began = time.monotonic()
    progress = _Progress()
    try:
        scale, names, cpus = _scale(options), _names(options), placement()
        if OTHER not in cpus:
            print("There is one CPU only: no client is measured on another one.")
        with tempfile.TemporaryDirectory(prefix="qmpfd-bench-") as folder, ExitStack() as stack:
            results = measure_all(Servers(Path(folder), stack, cpus), scale, names, progress)
    except (Failed, OSError) as exc:
        progress.over()
        print(f"FAILED: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    progress.over()
    found = goals(results, scale)
    how = f"{scale.rounds} rounds in {timed(began)}; medians."
    text = "\n\n".join([format_results(results, scale, names), format_goals(found), how])
    print(text)
    report: Path | None = options.report
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        (report / "results.txt").write_text(f"{text}\n")
    for file in (options.json, report and report / "results.json"):
        if file is not None:
            file.write_bytes(as_json(results, scale, found))
    if options.page is not None:
        options.page.write_text(goals_page(options.page.read_text(), found))
    for folder_ in (options.plots, report):
        if folder_ is None:
            continue
        print("drawn:", *plots.draw(results, scale, names, folder_))
    return 0


if __name__ == "__main__":
    sys.exit(main())
