"""The store of fd sets: pure and synchronous, without Trio, without JSON, without system calls."""

from .ids import IdPool
from .store import FdSet, FdSets, StoredFd

__all__ = ["FdSet", "FdSets", "IdPool", "StoredFd"]
