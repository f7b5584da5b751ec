"""What stored descriptors are called at whoever keeps them.

All names of a service come back in one environment string, so they are short: a tilde and a number
in base 62, which is used again when it is free.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

from ...limits import MAX_ARGUMENT_BYTES

_DIGITS = string.digits + string.ascii_letters
_MARK = "~"

#: Bytes that a name takes in $LISTEN_FDNAMES, with the colon: there are 238,000 that are so short.
_NAME_BYTES = 5

#: What the name of a journal begins with; its generation follows.
JOURNAL = "qmpfd-journal-"

#: In the middle of a takeover: the old daemon's journal, if there is one, and the lifeline by which
#: that daemon says how it ends; see :mod:`.evidence`.
PREVIOUS, LIFELINE = "qmpfd-previous", "qmpfd-lifeline"

#: Bytes of $LISTEN_FDNAMES that are none of those: for two journals, and sockets of others.
_OTHER_BYTES = 4096

#: Likewise of what shows whether anything is kept, see :mod:`.sentinel`: a sentinel, by the
#: generation of the first journal beside it, and those that are stored to find out how many can be.
#: What another process has stored there tells nothing.
SENTINEL, PROBE = PIPES = "qmpfd-sentinel-", "qmpfd-probe-"

_OURS = re.compile(
    rf"{_MARK}[0-9a-zA-Z]{{1,5}}|({JOURNAL}|{SENTINEL}|{PROBE})[0-9]{{1,18}}|{PREVIOUS}|{LIFELINE}"
)


def is_ours(name: str) -> bool:
    """Whether a descriptor of that name is one that this module has named."""
    return _OURS.fullmatch(name) is not None


def is_numbered(name: str) -> bool:
    """Whether it is a stored descriptor's, or a listening socket's."""
    return name.startswith(_MARK)


def _text(serial: int) -> str:
    text = ""
    while True:
        serial, digit = divmod(serial, len(_DIGITS))
        text = _DIGITS[digit] + text
        if not serial:
            return _MARK + text


class Names:
    """The names in use."""

    def __init__(self) -> None:
        #: The numbered ones of them.
        self.used: set[str] = set()
        self._free: list[str] = []  # of those below the next serial number
        self._next = 0

    #: How many fit into $LISTEN_FDNAMES.
    MOST = (MAX_ARGUMENT_BYTES - _OTHER_BYTES) // _NAME_BYTES

    def take(self) -> str:
        """A name that is free."""
        if self._free:
            name = self._free.pop()
        else:
            while (name := _text(self._next)) in self.used:
                self._next += 1
            self._next += 1
        self.used.add(name)
        return name

    def claim(self, name: str) -> None:
        """*name* is in use already, before any was taken; one that is not numbered need not be."""
        if is_numbered(name):
            self.used.add(name)

    def free(self, names: Iterable[str]) -> None:
        """*names* are free again; those that are not numbered need not have been in use."""
        for name in names:
            if name in self.used:
                self.used.remove(name)
                self._free.append(name)
