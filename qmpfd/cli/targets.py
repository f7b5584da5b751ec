"""Targets: names of stored descriptors on the command line, ``SET[/FD][:ACCESS][=AT]``.

SET is the number of an fd set, or ``@NAME`` for the descriptors whose opaque text is NAME.  The
suffixes are parsed from the end, because NAME may contain any of these characters.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..client.calls import is_missing, members
from ..errors import QMPError
from .options import number, option, text
from .output import printable

if TYPE_CHECKING:
    from ..client.blocking import BlockingClient

ResultT = TypeVar("ResultT")

#: A descriptor of a listing: the id of its fd set, and its entry in the reply.
Row = tuple[int, dict[str, Any]]

_ACCESS = {"r": "rdonly", "w": "wronly", "rw": "rdwr"}
# Compiled on use, by re.fullmatch: most calls have no target.
_AT = r"(?s)(.*)=([^=/:]*)"
_MODE = r"(?s)(.*):(r|w|rw|rdonly|wronly|rdwr)"
_FD = r"(?s)(.+)/([0-9]{1,10})"


class Target(NamedTuple):
    """A word of the command line that names stored descriptors.

    Args:
        word: the word as typed.
        fdset_id: the number of the fd set; None with a name.
        name: the opaque text, or with wildcards a pattern of opaque texts; None with a number.
        fd: the descriptor's number in the daemon, or None.
        access: the access mode, as QMP calls it, or None.
        at: the number at which CMD gets the descriptor, or None.
    """

    word: str
    fdset_id: int | None
    name: str | None
    fd: int | None
    access: str | None
    at: int | None

    @property
    def is_pattern(self) -> bool:
        """Whether the name has wildcards (glob(7))."""
        return self.name is not None and any(char in self.name for char in "*?[")

    @property
    def selector(self) -> dict[str, Any]:
        """Arguments of a QMP command that select the descriptors."""
        return members(fdset_id=self.fdset_id, opaque=self.name, fd=self.fd, access=self.access)

    def alternatives(self) -> Iterator[Target]:
        """Iterate over the readings of the word, the likelier first: ``@disk/3`` is the name
        "disk/3" or, if no descriptor has that name, descriptor 3 with the name "disk".
        """
        yield self
        if self.name is not None and (match := re.fullmatch(_FD, self.name)):
            yield self._replace(name=match[1], fd=int(match[2]))

    def matches(self, fdset_id: int, fd: dict[str, Any]) -> bool:
        """Return whether the target names this descriptor of a listing."""
        return any(each._matches(fdset_id, fd) for each in self.alternatives())

    def _matches(self, fdset_id: int, fd: dict[str, Any]) -> bool:
        if self.fd not in (None, fd["fd"]) or self.access not in (None, fd.get("access")):
            return False
        if self.name is None:
            return self.fdset_id == fdset_id
        opaque = fd.get("opaque")
        if opaque is None:
            return False
        if self.is_pattern:
            from fnmatch import fnmatchcase  # slow to import, and only needed for patterns

            return fnmatchcase(opaque, self.name)
        return bool(self.name == opaque)


def target(word: str) -> Target:
    """Parse an argument that names stored descriptors."""
    rest, at, access, fd = word, None, None, None
    if match := re.fullmatch(_AT, rest):
        if match[2].isdecimal():
            rest, at = match[1], number("descriptor", most=(1 << 31) - 1)(match[2])
        elif not rest.startswith("@"):
            raise argparse.ArgumentTypeError(f"{word!r}: = needs a descriptor's number")
    if match := re.fullmatch(_MODE, rest):
        rest, access = match[1], _ACCESS.get(match[2], match[2])
    if rest.startswith("@"):
        if rest == "@":
            raise argparse.ArgumentTypeError(f"{word!r}: @ needs a name")
        return Target(word, None, text(rest[1:]), None, access, at)
    which, colon, _ = rest.partition(":")
    if colon:
        raise argparse.ArgumentTypeError(f"{word!r}: the access mode is r, w or rw")
    which, slash, digits = which.partition("/")
    if slash:
        fd = number("descriptor")(digits)
    try:
        fdset_id = number("fd set id")(which)
    except argparse.ArgumentTypeError as exc:
        raise argparse.ArgumentTypeError(f"{exc}, or @NAME") from None
    return Target(word, fdset_id, None, fd, access, at)


def stored_target(word: str) -> Target:
    """Parse a target of a verb that hands out no descriptors: without ``:ACCESS`` and ``=AT``."""
    found = target(word)
    if found.at is not None or found.access is not None:
        name = f" (a descriptor of this name: {word[:-1]}[{word[-1]}])" if found.name else ""
        raise argparse.ArgumentTypeError(
            f"{word!r}: the target must be SET, SET/FD or @NAME, without :ACCESS and =AT{name}"
        )
    return found


#: The targets of ``ls`` and ``rm``.
TARGETS = option(
    "targets",
    "SET, SET/FD, @NAME or @PATTERN (shell wildcards)",
    stored_target,
    nargs="*",
    metavar="TARGET",
)


def first_found(wanted: Target, ask: Callable[[Target], ResultT]) -> ResultT:
    """Return the result of *ask* for the first reading of a target that it finds.

    Raises:
        QMPError: no reading names a stored descriptor; the error for the likeliest.
    """
    refused: QMPError | None = None
    for reading in wanted.alternatives():
        try:
            return ask(reading)
        except QMPError as exc:
            if not is_missing(exc):
                raise
            refused = refused or exc
    assert refused is not None
    raise refused


def open_target(client: BlockingClient, wanted: Target) -> tuple[dict[str, Any], list[Any]]:
    """Execute ``open-fdset`` for a target; return the result and the descriptor.

    Raises:
        QMPError: the daemon refuses, or has no such descriptor.
        NoDaemon: the daemon does not answer.
    """
    return first_found(wanted, lambda reading: client.request("open-fdset", reading.selector))


def select(targets: list[Target], rows: list[Row]) -> tuple[list[Row], list[Target]]:
    """Return the rows of a listing that one of the targets names, or all rows without targets; and
    the targets that name none.
    """
    if not targets:
        return rows, []
    found = [row for row in rows if any(each.matches(*row) for each in targets)]
    missing = [each for each in targets if not any(each.matches(*row) for row in rows)]
    return found, missing


def listed(client: BlockingClient, *, long: bool = False) -> list[Row]:
    """List all descriptors with ``query-fdsets``, or with ``query-fds`` for long entries."""
    if long:
        return [(fd["fdset-id"], fd) for fd in client.execute("query-fds")]
    sets = client.execute("query-fdsets")
    return [(fdset["fdset-id"], fd) for fdset in sets for fd in fdset["fds"]]


def described(fdset_id: int, fd: dict[str, Any]) -> str:
    """Describe a descriptor in words."""
    words = f"fd set {fdset_id}, fd {fd['fd']}"
    return printable(f"{words}  {fd['opaque']}" if "opaque" in fd else words)
