"""Faults injected into a daemon process, by real processes, while a well-behaved client measures."""
