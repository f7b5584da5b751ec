"""Listings, which may be long: produced in parts, between which other clients are served.

A listing has the descriptors that were stored when it was requested, without those removed before
their turn.  Each descriptor is examined in the step that finds it in its set, before its number
can be reused.

Between two parts, the query and the position can be saved, and a successor daemon with the same
store can continue the listing: a takeover need not wait for its end, nor buffer the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from math import ceil, inf
from typing import Any

from msgspec import Struct, to_builtins

from ..fdsets import FdSet, Progress, StoredFd
from ..kernel.fdinfo import access_mode, flags, kind, size, target
from ..kernel.sockets import describe_socket
from ..limits import INT64_MAX
from ..protocol.encode import LONG_TEXT, JSONStream, RawJSON, encode, iter_encode
from .context import Context
from .extension_types import FdInfo, PeerInfo
from .selectors import Selector
from .types import FdsetFdInfo, FdsetInfo

# A step ends after this much work, about a millisecond.  Opaque texts cost 1 a character.
_STEP = 4096
_COPYING, _ENCODING, _EXAMINING = 4, 16, 64

#: Number of descriptors, and of characters of opaque texts, of a reply encoded in one step.
FEW_FDS, FEW_CHARACTERS = 256, 16384

#: Maximum size of a set's part of ``query-fdsets`` that is cached.
_CACHED_BYTES = 512


def listing(context: Context, query: Selector | None) -> JSONStream | RawJSON:
    """Return the result of ``query-fds`` for a selector, or of ``query-fdsets`` for None."""
    shared = context.shared
    listed = Listing(context, query, shared.clock())
    few = shared.store.fd_count <= FEW_FDS and shared.quotas.opaque_total <= FEW_CHARACTERS
    return RawJSON(b"".join(listed.bits)) if few else listed


class Stage(Enum):
    """The last part of a listing's text so far."""

    #: No text.
    EMPTY = "empty"
    #: A complete entry: a set of ``query-fdsets``, or a descriptor of ``query-fds``.
    ENTRY = "entry"
    #: A descriptor in a set of ``query-fdsets``, which is not closed yet.
    IN_SET = "in set"
    #: The end of the listing.
    COMPLETE = "complete"


class SavedListing(Struct, forbid_unknown_fields=True):
    """State of a listing that was written in part.

    Args:
        query: the selector of ``query-fds``; None for ``query-fdsets``.
        age: seconds since the request: descriptors stored later are left out.
        stage: the last part of the text that was written.
        below: sets of lower ids are still to be listed, besides the one in progress.
        fdset_id: the set in progress, of which some descriptors were listed, or None.
        next_fd: the next descriptor of that set; None if there is none.
        entry: an entry that was written in part, without its opaque text, or None.
        written: number of bytes of that entry that were written.
    """

    query: Selector | None
    age: float
    stage: Stage
    below: int | None
    fdset_id: int | None
    next_fd: int | None
    entry: dict[str, Any] | None
    written: int


class Listing(JSONStream):
    """A listing in progress."""

    def __init__(self, context: Context, query: Selector | None, asked_at: float) -> None:
        super().__init__()
        self.bits = self._make_bits()
        self._context = context
        self._query = query
        self._asked_at = asked_at
        self._stage = Stage.EMPTY
        self._below: float = inf
        self._fdset: FdSet | None = None  # the set in progress
        self._progress = Progress()  # the position in that set
        self._entry: dict[str, Any] | None = None  # the long entry in progress
        self._written = 0  # bytes of that entry that were written

    def save(self, now: float) -> tuple[SavedListing, str | None]:
        """Return the state between two parts, for :meth:`restore`, and the opaque text of the entry
        in progress: separate, because several listings may be at the same long entry.
        """
        fdset = self._fdset
        entry, opaque = self._entry, None
        if entry is not None:
            opaque = entry["opaque"]
            entry = {**entry, "opaque": ""}
        saved = SavedListing(
            query=self._query,
            age=now - self._asked_at,
            stage=self._stage,
            below=None if self._below == inf else int(self._below),
            fdset_id=None if fdset is None else fdset.id,
            next_fd=None if fdset is None else fdset.next_number(self._progress, self._asked_at),
            entry=entry,
            written=self._written,
        )
        return saved, opaque

    def restore(self, saved: SavedListing, opaque: str | None) -> None:
        """Restore the state that :meth:`save` has returned."""
        self._stage = saved.stage
        self._below = inf if saved.below is None else saved.below
        if saved.fdset_id is not None and saved.next_fd is not None:
            fdset = self._context.shared.store.get(saved.fdset_id)
            if fdset is not None and saved.next_fd in fdset.fds:
                self._fdset, self._progress = fdset, fdset.progress_before(saved.next_fd)
        if saved.entry is not None:
            self._entry, self._written = {**saved.entry, "opaque": opaque}, saved.written

    def _sets(self) -> Iterator[FdSet]:
        """Yield the sets that are still to be listed, the one in progress first."""
        if self._fdset is not None:
            yield self._fdset
        query = self._query
        only = None if query is None else query.fdset_id
        if only is not None:  # start at that set; the loop ends after it
            self._below = min(self._below, only + 1)
        for fdset in self._context.shared.store.iter_stable(self._below):
            if only is not None and fdset.id != only:
                break
            self._fdset, self._progress, self._below = fdset, Progress(), fdset.id
            yield fdset
        self._fdset = None

    def _make_bits(self) -> Iterator[bytes]:
        """Yield the text in parts; at each yield the attributes are the position of the next."""
        context, query, asked_at = self._context, self._query, self._asked_at
        out: list[bytes] = []
        work = 0
        if self._entry is not None:
            yield from self._long_entry(self._entry)
        if self._stage is Stage.IN_SET and self._fdset is None:  # the rest of the set was removed
            out.append(self._close_set())
        for fdset in self._sets():
            in_set = self._stage is Stage.IN_SET
            cost = _COPYING if fdset.listing else len(fdset.fds) * _ENCODING
            if query is None and not in_set and (whole := self._whole(fdset)):
                out += self._separator(), whole
                self._stage, self._fdset = Stage.ENTRY, None
                work += cost
            else:
                for stored in fdset.iter_stable(asked_at, self._progress):
                    opaque = stored.opaque
                    work += _ENCODING + len(opaque or "")
                    if (query is None or query.matches(stored)) and (
                        context.access.may("query", fdset.id, opaque)
                    ):
                        entry: Struct
                        if query is None:
                            out.append(self._begin_fd(fdset.id))
                            entry = FdsetFdInfo(stored.fd.fileno(), opaque)
                        else:
                            out.append(self._separator())
                            self._stage = Stage.ENTRY
                            work += _EXAMINING
                            entry = _describe(stored, asked_at)
                        if opaque is not None and len(opaque) > LONG_TEXT:
                            self._entry, self._written = to_builtins(entry), 0
                            yield b"".join(out)
                            out.clear()
                            yield from self._long_entry(self._entry)
                        else:
                            out.append(encode(entry))
                    if work > _STEP:
                        yield b"".join(out)
                        out.clear()
                        work = 0
                if self._stage is Stage.IN_SET:
                    out.append(self._close_set())
            if work > _STEP:
                yield b"".join(out)
                out.clear()
                work = 0
        if self._stage is not Stage.COMPLETE:
            out.append(b"[]" if self._stage is Stage.EMPTY else b"]")
            self._stage = Stage.COMPLETE
            yield b"".join(out)

    def _separator(self) -> bytes:
        """Return the separator before an entry."""
        return b"[" if self._stage is Stage.EMPTY else b", "

    def _begin_fd(self, fdset_id: int) -> bytes:
        """Return the text before a descriptor of a set of ``query-fdsets``."""
        if self._stage is Stage.IN_SET:
            return b", "
        begin = self._separator() + b'{"fdset-id": %d, "fds": [' % fdset_id
        self._stage = Stage.IN_SET
        return begin

    def _close_set(self) -> bytes:
        self._stage = Stage.ENTRY
        return b"]}"

    def _long_entry(self, entry: dict[str, Any]) -> Iterator[bytes]:
        """Yield the rest of an entry whose opaque text is long."""
        skip = self._written
        for bit in iter_encode(entry):
            self._written += max(0, len(bit) - skip)
            yield bit[skip:]
            skip = max(0, skip - len(bit))
        self._entry = None

    def _whole(self, fdset: FdSet) -> bytes | None:
        """Return the cached entry of ``query-fdsets`` for *fdset*; None if it is too long for the
        cache, or the client may not see all of it.

        Of 15,000 sets, few change between two listings.
        """
        if not self._context.access.unlimited:
            return None
        few = len(fdset.fds) <= _CACHED_BYTES // len(b'{"fd": 10}, ')
        if fdset.listing is None and few:
            fds = [FdsetFdInfo(number, stored.opaque) for number, stored in fdset.fds.items()]
            if sum(len(fd.opaque or "") for fd in fds) <= _CACHED_BYTES:
                whole = encode(FdsetInfo(fdset.id, fds))
                if len(whole) <= _CACHED_BYTES:
                    fdset.listing = whole
        return fdset.listing


def _describe(stored: StoredFd, now: float) -> FdInfo:
    """Return the ``query-fds`` entry of *stored*, at the time *now*."""
    number, lifetime = stored.fd.fileno(), stored.lifetime
    link = target(number)
    what = kind(number, link)
    info = FdInfo(
        fdset_id=stored.fdset.id,
        fd=number,
        access=access_mode(number),
        kind=what,
        target=link,
        flags=flags(number),
        age=int(now - stored.added_at),
        lifetime="daemon" if lifetime.owner is None else "connection",
        watch_hangup=lifetime.watch_hangup,
        opaque=stored.opaque,
        size=size(number) if what in ("file", "memfd") else None,
        added_by=None if stored.added_by is None else PeerInfo(*stored.added_by),
    )
    if what == "socket":
        info.address, info.peer, info.listening = describe_socket(number)
    if lifetime.expires_at is not None:  # a float near INT64_MAX may round up beyond it
        info.expires = min(max(0, ceil(lifetime.expires_at - now)), INT64_MAX)
    return info
