"""Store of fd sets: pure and synchronous, without Trio, JSON or system calls."""

from .entry import PERMANENT, FdSet, Lifetime, Peer, Progress, StoredFd
from .ids import IdPool
from .store import FdSets

__all__ = ["PERMANENT", "FdSet", "FdSets", "IdPool", "Lifetime", "Peer", "Progress", "StoredFd"]
