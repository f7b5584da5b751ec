"""What ``make bench`` has measured, for the page about performance."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "bench"

_NOTHING = """No figures are part of this copy of the documentation. To have yours in it:

```sh
make figures docs
```
"""


#: What each plot shows, for who cannot see it.
_SHOWN = {
    "bench-commands": "CPU time of each server for a command, by how many requests are in flight "
    "and how many clients there are",
    "bench-stored": "CPU time of each server for a command, by how many descriptors are stored",
}


def results(folder: Path = FOLDER) -> str:
    """What the benchmark drew and printed, where it has been run; else how to run it."""
    text = folder / "results.txt"
    plots = sorted([*folder.glob("*.svg"), *folder.glob("*.png")])
    if not text.exists() and not plots:
        return _NOTHING
    lines = ["On one machine, on one day:", ""]
    for plot in plots:
        shown = _SHOWN.get(plot.stem, plot.stem.replace("-", " "))
        lines += [f"![{shown}]({folder.name}/{plot.name})", ""]
    if text.exists():
        lines += ["All that `make bench` said:", "", "```text", text.read_text().rstrip(), "```"]
    return "\n".join(lines)
