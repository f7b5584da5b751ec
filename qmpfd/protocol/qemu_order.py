"""Order in which QEMU iterates over the members of an object.

Of several invalid members, QEMU names the first in the order of its hash tables, and clients' tests
compare the text.  Both tables are modelled as far as that order needs: QEMU's own QDict
(``qobject/qdict.c``) and GLib's GHashTable (``ghash.c``), which holds the arguments while they are
checked.  The model was compared with a running QEMU over thousands of random members.

For very many or very long members the order is that of the request: ordering a mebibyte of them
would take a second here, and hours with names chosen to collide.
"""

from __future__ import annotations

from collections.abc import Iterable

_WORD = 0xFFFFFFFF

#: Number of members, and of characters in all their names, up to which the order is QEMU's.
_MAX_MEMBERS, _MAX_CHARACTERS = 256, 4096


def _encoded(key: str) -> bytes:
    """Encode a key as QEMU stores it: UTF-8, with NUL as C0 80."""
    return key.encode("utf-8").replace(b"\0", b"\xc0\x80")


def _bucket(key: str) -> int:
    """Return the index of the bucket, of a QDict's 512, that holds *key* (tdb_hash)."""
    raw = _encoded(key)
    value = 0x238F13AF * len(raw)
    for number, byte in enumerate(raw):
        value += byte << (number * 5 % 24)
    return (value * 1103515243 + 12345 & _WORD) % 512


def _exceeds_limits(keys: list[str]) -> bool:
    return len(keys) > _MAX_MEMBERS or sum(map(len, keys)) > _MAX_CHARACTERS


def qdict_order(keys: Iterable[str]) -> list[str]:
    """Return *keys*, given in order of insertion, in the order of iteration over a QDict.

    Within a bucket the key inserted last comes first.
    """
    ordered = list(keys)
    if _exceeds_limits(ordered):
        return ordered
    ordered.reverse()
    ordered.sort(key=_bucket)
    return ordered


# ghash.c, prime_mod: the largest primes below the powers of two.
_PRIMES = (1, 2, 3, 7, 13, 31, 61, 127, 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521)
_SMALLEST = 3


class _GHashTable:
    """Slots of a GHashTable: all keys are added first, then some are removed.

    A slot holds a key, None (unused), or False (a tombstone, whose key was removed).
    """

    def __init__(self) -> None:
        self._count = self._occupied = 0  # number of keys; of keys and tombstones
        self._modulus = _PRIMES[_SMALLEST]
        self.slots: list[str | bool | None] = [None] * (1 << _SMALLEST)

    def _home(self, key: str) -> int:
        value = 5381
        for byte in _encoded(key):  # g_str_hash works on signed chars
            value = value * 33 + (byte - 256 if byte > 127 else byte) & _WORD
        value = max(value, 2)  # 0 and 1 mean unused and tombstone
        return (value * 11 & _WORD) % self._modulus

    def _find(self, key: str) -> int:
        """Return the slot that holds *key*, or else the unused slot for it."""
        slot, step = self._home(key), 0
        while self.slots[slot] not in (None, key):
            step += 1
            slot = slot + step & len(self.slots) - 1
        return slot

    def add(self, key: str) -> None:
        self.slots[self._find(key)] = key
        self._count += 1
        self._occupied += 1
        self._resize_if_due()

    def discard(self, key: str) -> None:
        slot = self._find(key)
        if self.slots[slot] is not None:
            self.slots[slot] = False
            self._count -= 1
            self._resize_if_due()

    def _resize_if_due(self) -> None:
        before = len(self.slots)
        sparse = before > max(self._count * 4, 1 << _SMALLEST)
        if not sparse and before > self._occupied + self._occupied // 16:
            return
        shift = max(int(self._count * 1.333).bit_length(), _SMALLEST)
        self._modulus = _PRIMES[min(shift, len(_PRIMES) - 1)]
        size = 1 << shift
        slots: list[str | None] = [key if isinstance(key, str) else None for key in self.slots]
        slots += [None] * (size - before)
        moved = [False] * len(slots)
        for start in range(before):
            key = slots[start]
            if key is None or moved[start]:
                continue
            slots[start] = None
            while key is not None:  # the key displaced by this one has to move next
                slot, step = self._home(key), 0
                while moved[slot]:
                    step += 1
                    slot = slot + step & size - 1
                moved[slot] = True
                slots[slot], key = key, slots[slot]
        self.slots = list(slots[:size])
        self._occupied = self._count


def first_left_over(members: Iterable[str], known: Iterable[str]) -> str:
    """Return the member that QEMU reports as unknown; at least one must not be *known*."""
    ordered = qdict_order(members)
    if _exceeds_limits(ordered):
        known = frozenset(known)
        return next(key for key in ordered if key not in known)
    table = _GHashTable()
    for key in ordered:
        table.add(key)
    for key in known:
        table.discard(key)
    return next(key for key in table.slots if isinstance(key, str))
