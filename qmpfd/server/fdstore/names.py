"""Names of the descriptors in the fd store.

All names of a service come back in one environment string, so they are short: a tilde and a number
in base 62, which is reused when it is free.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

from ...limits import MAX_ARGUMENT_BYTES

_DIGITS = string.digits + string.ascii_letters
_MARK = "~"

#: Bytes of a name in $LISTEN_FDNAMES, with the colon: 238,000 names are that short.
_NAME_BYTES = 5

#: Prefix of the name of a journal, before its generation.
JOURNAL = "qmpfd-journal-"

#: Names during a takeover: the predecessor's journal, if it has one, and the lifeline, on which the
#: predecessor reports the outcome; see :mod:`.handover`.
PREVIOUS, LIFELINE = "qmpfd-previous", "qmpfd-lifeline"

#: Bytes of $LISTEN_FDNAMES for other names: two journals, and sockets of the service manager.
_OTHER_BYTES = 4096

#: Names of what shows that the fd store keeps descriptors, see :mod:`.sentinel`: of the sentinel,
#: and of probes, before their number.
SENTINEL, PROBE = EVIDENCE = "qmpfd-sentinel", "qmpfd-probe-"

_OURS = re.compile(
    rf"{_MARK}[0-9a-zA-Z]{{1,5}}|({JOURNAL}|{PROBE})[0-9]{{1,18}}|{SENTINEL}|{PREVIOUS}|{LIFELINE}"
)


def is_ours(name: str) -> bool:
    """Return whether *name* was made by this module."""
    return _OURS.fullmatch(name) is not None


def is_numbered(name: str) -> bool:
    """Return whether *name* is that of a stored descriptor or a listening socket."""
    return name.startswith(_MARK)


def _text(serial: int) -> str:
    text = ""
    while True:
        serial, digit = divmod(serial, len(_DIGITS))
        text = _DIGITS[digit] + text
        if not serial:
            return _MARK + text


class Names:
    """Allocator of names."""

    def __init__(self) -> None:
        #: The numbered names in use.
        self.used: set[str] = set()
        self._free: list[str] = []  # free names below the next serial number
        self._next = 0

    #: Maximum number of names that fit into $LISTEN_FDNAMES.
    MOST = (MAX_ARGUMENT_BYTES - _OTHER_BYTES) // _NAME_BYTES

    def take(self) -> str:
        """Allocate a free name."""
        if self._free:
            name = self._free.pop()
        else:
            while (name := _text(self._next)) in self.used:
                self._next += 1
            self._next += 1
        self.used.add(name)
        return name

    def claim(self, name: str) -> None:
        """Mark *name* as in use, before the first :meth:`take`; ignore a name without a number."""
        if is_numbered(name):
            self.used.add(name)

    def free(self, names: Iterable[str]) -> None:
        """Free *names*; ignore names that are not in use."""
        for name in names:
            if name in self.used:
                self.used.remove(name)
                self._free.append(name)
