"""Run libFuzzer on the target: ``fuzz.py [OPTION...] CORPUS...`` (see ``make fuzz``)."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["qmpfd"]):
    from fuzz.target import check

if __name__ == "__main__":
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
