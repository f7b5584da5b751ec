"""The store of fd sets: pure and synchronous, without Trio, without JSON, without system calls."""

from .ids import IdPool
from .store import PERMANENT, FdSet, FdSets, Lifetime, Observer, Peer, StoredFd

__all__ = ["PERMANENT", "FdSet", "FdSets", "IdPool", "Lifetime", "Observer", "Peer", "StoredFd"]
