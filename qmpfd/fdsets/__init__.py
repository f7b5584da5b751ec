"""The store of fd sets: pure and synchronous, without Trio, without JSON, without system calls."""

from .ids import IdPool
from .store import FOREVER, FdSet, FdSets, Observer, Peer, StoredFd, Terms

__all__ = ["FOREVER", "FdSet", "FdSets", "IdPool", "Observer", "Peer", "StoredFd", "Terms"]
