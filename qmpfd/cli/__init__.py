"""The command line.  Only ``serve`` and ``tap`` import Trio: all other verbs must start fast."""

from .main import main

__all__ = ["main"]
