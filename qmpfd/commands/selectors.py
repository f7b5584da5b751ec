"""Selectors of stored descriptors: one type for all commands that select."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import FdNotFound, GenericError, PermissionDenied
from ..fdsets import FdSet, FdSets, StoredFd
from ..policy import Access, Right
from ..protocol.arguments import Int64
from .types import Arguments

#: Maximum characters of a selector's text that an error quotes.
_QUOTED = 64


class Selector(Arguments):
    """Selects stored descriptors: those that meet all conditions that are given.

    Args:
        fdset_id: the fd set.
        fd: the number in the server.
        opaque: the opaque text, the whole of it.
        opaque_prefix: how the opaque text begins.
        added_by_pid: the process with this number added the descriptor.
        added_by_uid: the user with this uid added the descriptor.
    """

    fdset_id: Int64 | None = None
    fd: Int64 | None = None
    opaque: str | None = None
    opaque_prefix: str | None = None
    added_by_pid: Int64 | None = None
    added_by_uid: Int64 | None = None

    def given(self) -> dict[str, int | str]:
        """Return the members that are present, by their names on the wire."""
        given = ((name, getattr(self, name)) for name in Selector.__struct_fields__)
        return {name.replace("_", "-"): value for name, value in given if value is not None}

    @property
    def by_number(self) -> bool:
        """Whether the selector has only numbers of sets and descriptors: nothing is searched."""
        return self.given().keys() <= {"fdset-id", "fd"}

    def check(self) -> None:
        """Check that the selector has at least one member.

        Raises:
            GenericError: it has none.
        """
        if self.fdset_id is None and not self.given():
            raise GenericError("Parameter 'fdset-id' is missing, or another member of the selector")

    def matches(self, stored: StoredFd) -> bool:
        """Whether *stored* meets all conditions."""
        opaque, peer = stored.opaque, stored.added_by
        return (
            (self.opaque is None or opaque == self.opaque)
            and (self.fdset_id is None or stored.fdset.id == self.fdset_id)
            and (self.fd is None or stored.fd.number == self.fd)
            and (
                self.opaque_prefix is None
                or (opaque is not None and opaque.startswith(self.opaque_prefix))
            )
            and (self.added_by_pid is None or (peer is not None and peer.pid == self.added_by_pid))
            and (self.added_by_uid is None or (peer is not None and peer.uid == self.added_by_uid))
        )

    def sets(self, store: FdSets) -> Iterable[FdSet]:
        """Return the sets that may have matching descriptors, by descending id."""
        if self.fdset_id is None:
            return store
        fdset = store.get(self.fdset_id)
        return () if fdset is None else (fdset,)

    def __str__(self) -> str:
        return ", ".join(f"{name}:{str(value)[:_QUOTED]}" for name, value in self.given().items())

    def not_found(self) -> FdNotFound:
        """Return the error if no descriptor matches, with the text of QEMU's ``remove-fd``."""
        return FdNotFound(f"File descriptor named '{self}' not found")


def choose(
    store: FdSets, selector: Selector, access: Access, right: Right
) -> tuple[list[StoredFd], bool]:
    """Select descriptors among those that are visible to the client.

    A descriptor is visible if the client may query it, or if the selector names it by number and
    the client has *right* for it.

    Returns:
        The matching descriptors that the client has *right* for, by descending set id, oldest
        first; and whether more descriptors match, which the client may only query.
    """
    allowed: list[StoredFd] = []
    refused = False
    by_number = selector.by_number
    for fdset in selector.sets(store):
        for stored in filter(selector.matches, fdset.select(selector.fd)):
            known, has_right = rights(access, stored, right, by_number)
            if has_right:
                allowed.append(stored)
            elif known:
                refused = True
    return allowed, refused


def rights(access: Access, stored: StoredFd, right: Right, by_number: bool) -> tuple[bool, bool]:
    """Return whether *stored* is visible to a client, and whether the client has *right* for it."""
    if access.unlimited:
        return True, True
    fdset_id, opaque = stored.fdset.id, stored.opaque
    has_right = access.may(right, fdset_id, opaque)
    known = (has_right and by_number) or access.may("query", fdset_id, opaque)
    return known, has_right and known


def visible_opaque(access: Access, stored: StoredFd) -> str | None:
    """Return the opaque text of *stored*; None if the client may not query the descriptor."""
    may_query = access.may("query", stored.fdset.id, stored.opaque)
    return stored.opaque if may_query else None


def denied(right: Right, selector: Selector) -> PermissionDenied:
    """Return the error of a client that lacks *right* for a selected descriptor."""
    return PermissionDenied(f"The right '{right}' is needed for all of '{selector}'")
