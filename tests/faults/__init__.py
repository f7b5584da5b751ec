"""Faults injected into a daemon process by others, while a well-behaved client measures."""
