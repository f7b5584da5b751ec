"""The command line.  Only ``serve`` and ``tap`` import Trio: the short verbs must start fast."""

from .main import main, program

__all__ = ["main", "program"]
