"""What ``add-fds`` and ``remove-fds`` return: each descriptor with its opaque text.

A text is said for each of the descriptors, and may be long: then the reply is made bit by bit.
"""

from __future__ import annotations

from itertools import groupby

from msgspec import to_builtins

from ..fdsets import StoredFd
from ..policy import Access
from ..protocol.encode import JSONStream
from .selectors import visible_opaque
from .types import FdsetFdInfo, FdsetInfo

#: Characters and descriptors of a reply that is made in one go.
_FEW_CHARACTERS, _FEW_FDS = 16384, 256


def added(entries: list[StoredFd]) -> FdsetInfo | JSONStream:
    """What ``add-fds`` returns."""
    (info,) = _infos(entries)
    return JSONStream(to_builtins(info)) if _is_long(entries) else info


def removed(entries: list[StoredFd], access: Access) -> list[FdsetInfo] | JSONStream:
    """What ``remove-fds`` returns: of the opaque texts, those that the client may query."""
    infos = _infos(entries, access)
    return JSONStream(to_builtins(infos)) if _is_long(entries) else infos


def _infos(entries: list[StoredFd], access: Access | None = None) -> list[FdsetInfo]:
    def info(stored: StoredFd) -> FdsetFdInfo:
        opaque = stored.opaque if access is None else visible_opaque(access, stored)
        return FdsetFdInfo(stored.fd.fileno(), opaque)

    return [
        FdsetInfo(fdset_id, [info(stored) for stored in together])
        for fdset_id, together in groupby(entries, key=lambda stored: stored.fdset.id)
    ]


def _is_long(entries: list[StoredFd]) -> bool:
    size = sum(len(stored.opaque or "") for stored in entries)
    return size > _FEW_CHARACTERS or len(entries) > _FEW_FDS
