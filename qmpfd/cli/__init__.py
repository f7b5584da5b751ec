"""What a person types.  Trio is imported by ``serve`` alone: the short verbs must start fast."""

from .main import main, program

__all__ = ["main", "program"]
