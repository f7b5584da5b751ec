"""What ``make bench`` has measured, for the page about performance."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "bench"

_NOTHING = """No figures are part of this copy of the documentation. To have yours in it:

```sh
mkdir -p docs/bench
make -s bench ARGS="--plots docs/bench" > docs/bench/results.txt
make docs
```
"""


def results(folder: Path = FOLDER) -> str:
    """What the benchmark printed and drew, where it has been run; else how to run it."""
    text = folder / "results.txt"
    plots = sorted([*folder.glob("*.svg"), *folder.glob("*.png")])
    if not text.exists() and not plots:
        return _NOTHING
    lines = ["What `make bench` said, on one machine on one day:", "", "```text"]
    lines = [*lines, text.read_text().rstrip(), "```", ""] if text.exists() else []
    for plot in plots:
        lines += [f"![{plot.stem.replace('-', ' ')}]({folder.name}/{plot.name})", ""]
    return "\n".join(lines)
