"""The parts of ``scripts/bench.py``: servers, load client, plan, report and plots."""
