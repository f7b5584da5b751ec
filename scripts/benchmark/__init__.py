"""The parts of ``scripts/bench.py``: the servers, the load, what is measured, what is told."""
