"""Listings, which may be long: they are made bit by bit, and others are served between two bits.

A listing is of what was stored when it was asked for; what is removed before its turn comes is
left out.  A descriptor is looked at in the same step in which it is found in its set, so that
its number cannot mean another one by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil

from msgspec import to_builtins

from ..fdsets import FdSet, StoredFd
from ..kernel.fdinfo import access_mode, kind, target
from ..limits import INT64_MAX
from ..protocol.encode import LONG_TEXT, JSONStream, RawJSON, encode, iter_encode
from .context import Context
from .extension_types import FdInfo, PeerInfo
from .types import FdsetFdInfo, FdsetInfo

# A step is over after so much work, about a millisecond.  The opaque texts count by the character.
_STEP = 4096
_COPYING, _ENCODING, _LOOKING = 4, 16, 64

#: What is listed in one go, if it is no more.
_FEW_FDS, _FEW_CHARACTERS = 256, 16384

#: Bytes of what is said of a set, up to which they are kept for the next time.
_KEPT_BYTES = 512


def list_fdsets(context: Context) -> JSONStream | RawJSON:
    """What ``query-fdsets`` returns."""
    return _result(context, _list_fdsets(context))


def list_fds(context: Context, sets: Iterable[FdSet], prefix: str | None) -> JSONStream | RawJSON:
    """What ``query-fds`` returns.

    Args:
        context: the connection that asks.
        sets: the fd sets.
        prefix: what the opaque texts have to begin with; None for all.
    """
    return _result(context, _list_fds(context, sets, prefix))


def added(entries: list[StoredFd]) -> FdsetInfo | JSONStream:
    """What ``add-fds`` returns: the opaque text is said for each of the descriptors.

    Args:
        entries: what was added, to one set, with the same opaque text.
    """
    first = entries[0]
    fds = [FdsetFdInfo(stored.fd.fileno(), stored.opaque) for stored in entries]
    info = FdsetInfo(first.fdset.id, fds)
    if len(fds) * len(first.opaque or "") <= _FEW_CHARACTERS:
        return info
    return JSONStream(_bits_of(info))


def _bits_of(info: FdsetInfo) -> Iterator[bytes]:
    separator = b'{"fdset-id": %d, "fds": [' % info.fdset_id
    for fd in info.fds:
        yield separator
        yield from iter_encode(to_builtins(fd))
        separator = b", "
    yield b"]}"


def _result(context: Context, bits: Iterator[bytes]) -> JSONStream | RawJSON:
    shared = context.shared
    few = shared.store.fd_count <= _FEW_FDS and shared.quotas.opaque_total <= _FEW_CHARACTERS
    return RawJSON(b"".join(bits)) if few else JSONStream(bits)


def _list_fdsets(context: Context) -> Iterator[bytes]:
    now = context.shared.clock()
    out: list[bytes] = []
    work = 0
    separator = b"["
    for fdset in context.shared.store.iter_stable():
        cost = _COPYING if fdset.listing else len(fdset.fds) * _ENCODING
        if context.access.unlimited and (whole := fdset.listing or _whole(fdset)):
            out += separator, whole
            separator = b", "
            work += cost
        else:
            opened = False
            for stored in fdset.iter_stable(now):
                work += _ENCODING + len(stored.opaque or "")
                if context.access.may("query", fdset.id, stored.opaque):
                    if opened:
                        out.append(b", ")
                    else:
                        out += separator, b'{"fdset-id": %d, "fds": [' % fdset.id
                        separator, opened = b", ", True
                    entry = FdsetFdInfo(stored.fd.fileno(), stored.opaque)
                    if _is_long(stored.opaque):
                        yield b"".join(out)
                        out.clear()
                        yield from iter_encode(to_builtins(entry))
                    else:
                        out.append(encode(entry))
                if work > _STEP:
                    yield b"".join(out)
                    out.clear()
                    work = 0
            if opened:
                out.append(b"]}")
        if work > _STEP:
            yield b"".join(out)
            out.clear()
            work = 0
    out.append(b"[]" if separator == b"[" else b"]")
    yield b"".join(out)


def _whole(fdset: FdSet) -> bytes | None:
    """What a listing says of *fdset*, if that is short: of 15,000 sets, few have changed since the
    last time, and what was said of the others is still right.
    """
    few = len(fdset.fds) <= _KEPT_BYTES // len(b'{"fd": 10}, ')
    if few:
        fds = [FdsetFdInfo(number, stored.opaque) for number, stored in fdset.fds.items()]
        if sum(len(fd.opaque or "") for fd in fds) <= _KEPT_BYTES:
            whole = encode(FdsetInfo(fdset.id, fds))
            if len(whole) <= _KEPT_BYTES:
                fdset.listing = whole
    return fdset.listing


def _list_fds(context: Context, sets: Iterable[FdSet], prefix: str | None) -> Iterator[bytes]:
    now = context.shared.clock()
    out: list[bytes] = []
    work = 0
    separator = b"["
    for fdset in sets:
        for stored in fdset.iter_stable(now):
            opaque = stored.opaque
            work += _ENCODING + len(opaque or "")
            if (prefix is None or (opaque is not None and opaque.startswith(prefix))) and (
                context.access.may("query", fdset.id, opaque)
            ):
                out.append(separator)
                separator = b", "
                work += _LOOKING
                entry = _describe(fdset, stored, now)
                if _is_long(opaque):
                    yield b"".join(out)
                    out.clear()
                    yield from iter_encode(to_builtins(entry))
                else:
                    out.append(encode(entry))
            if work > _STEP:
                yield b"".join(out)
                out.clear()
                work = 0
    out.append(b"[]" if separator == b"[" else b"]")
    yield b"".join(out)


def _is_long(opaque: str | None) -> bool:
    return opaque is not None and len(opaque) > LONG_TEXT


def _describe(fdset: FdSet, stored: StoredFd, now: float) -> FdInfo:
    number = stored.fd.fileno()
    link = target(number)
    lifetime = stored.lifetime
    return FdInfo(
        fdset_id=fdset.id,
        fd=number,
        access=access_mode(number),
        kind=kind(number, link),
        target=link,
        age=int(now - stored.added_at),
        lifetime="daemon" if lifetime.owner is None else "connection",
        watch_hangup=lifetime.watch_hangup,
        opaque=stored.opaque,
        expires=None if lifetime.expires_at is None else _seconds(lifetime.expires_at - now),
        added_by=None if stored.added_by is None else PeerInfo(*stored.added_by),
    )


def _seconds(left: float) -> int:
    """Time that is left, as an int64: a float comes near to its end, but may be beyond it."""
    return min(max(0, ceil(left)), INT64_MAX)
