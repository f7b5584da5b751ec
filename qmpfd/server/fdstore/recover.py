"""Recovery after a crash: matches descriptors from the fd store with the records of the journal.

The descriptors come in any order, some of them perhaps twice, or stale, or not at all; the newest
journal describes them.  Like a takeover this runs before the import of Trio: each stored descriptor
can get its old number.  A fault of one descriptor or record does not affect the others.

The journal may be that of a successor that died during a takeover.  Then the lifeline, which is in
the fd store as well, says whether the predecessor had handed everything over.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ...kernel.fd import Fd, close_all, is_in_memory, is_pipe
from ...kernel.renumber import Movable, renumber
from ...kernel.systemd import InheritedFd
from ...kernel.unix_address import listens
from ...limits import HANDOVER_TIMEOUT, JOURNAL_FORMAT
from ..saved_state import SavedFd, SavedState
from .handover import has_handed_over
from .journal import SnapshotHeader
from .names import JOURNAL, LIFELINE, PREVIOUS, SENTINEL, is_numbered, is_ours
from .replay import History, replay

_log = logging.getLogger("qmpfd")


@dataclass(slots=True)
class Recovered:
    """Recovered state and descriptors, and the entries that are still in the fd store.

    Args:
        state: the recovered state; empty without a predecessor.
        stored: the stored descriptors by number; owned here until they are taken out.
        others: the listening sockets, in the order of *state*; owned here likewise.
        names: names in the fd store of *stored* and *others*, by their number here.
        stale_names: names of unused entries in the fd store.
        stale_fds: unused descriptors to close, which may block; owned here likewise.
        sentinel: write end of a sentinel that is valid for this process; it is among *stale_fds*.
        sockets: the service manager's own sockets to listen on; owned here likewise.
        generation: generation of the newest journal.
        has_state: whether a predecessor has crashed and *state* is its state: its journal is valid
            until this process has stored another.
        handed_over: whether the predecessor has handed everything over to another daemon.
    """

    state: SavedState = field(default_factory=lambda: SavedState(time.monotonic(), [], []))
    stored: dict[int, Fd] = field(default_factory=dict)
    others: deque[Fd] = field(default_factory=deque)
    names: dict[int, str] = field(default_factory=dict)
    stale_names: list[str] = field(default_factory=list)
    stale_fds: list[Fd] = field(default_factory=list)
    sentinel: Fd | None = None
    sockets: list[InheritedFd] = field(default_factory=list)
    generation: int = 0
    has_state: bool = False
    handed_over: bool = False

    def close(self) -> None:
        """Close all that was not taken out."""
        close_all([*self.stored.values(), *self.others, *self.stale_fds])
        close_all(given.fd for given in self.sockets)


def recover(
    inherited: Sequence[InheritedFd],
    others: Iterable[Movable] = (),
    history: History | None = None,
) -> Recovered:
    """Match the inherited descriptors with the journal.

    Args:
        inherited: descriptors from the fd store, and their names; owned from here on.
        others: more descriptors that may be moved out of the way.
        history: the history in the newest journal, if it was read before.

    Raises:
        ValueError: no journal can be read.
    """
    try:
        return _recover(inherited, others, history)
    except BaseException:
        close_all(given.fd for given in inherited)
        raise


def _recover(
    inherited: Sequence[InheritedFd], others: Iterable[Movable], history: History | None
) -> Recovered:
    ours: dict[str, Fd] = {}
    sockets = []
    again = []  # descriptors under a name that another one has
    for given in inherited:
        if not _is_stored(given):
            sockets.append(given)
        elif given.name in ours:
            again.append(given.fd)
        else:
            ours[given.name] = given.fd
    if history is None:
        history = newest([given.fd for given in inherited if _is_journal(given)])
    # With a lifeline, the entries are of a takeover that had barely begun: the predecessor goes on.
    has_journal = any(name.startswith(JOURNAL) for name in ours)
    if LIFELINE not in ours and not has_journal and any(map(is_numbered, ours)):
        history = _without_journal(ours)
    generation = history.begun.generation
    handed_over = history.left is True
    has_state = not handed_over and _is_ours(history, ours)
    if not has_state:
        history = _nothing()
    history.forget_unfinished(ours.__contains__)
    untaken = dict(ours)

    def take(name: str) -> Fd | None:
        """Take the descriptor with that name, or a duplicate if it is taken; None if there is no
        such descriptor, or this process is out of descriptors.
        """
        fd = untaken.pop(name, None)
        if fd is None and name in ours:
            with suppress(OSError):
                return ours[name].dup()
        return fd

    stored: dict[int, Fd] = {}
    for number, saved in list(history.entries.items()):
        fd = take(saved.name)
        if fd is not None:
            stored[number] = fd
            continue
        del history.entries[number]
        _log.warning(
            "descriptor %d of fd set %d is lost: the crash interrupted its add-fd, or the fd "
            "store dropped it",
            number,
            saved.fdset_id,
        )
    listening = [name for name in history.listeners if name in ours and listens(ours[name])]
    listeners = {name: fd for name in listening if (fd := take(name))}
    history.listeners = {name: history.listeners[name] for name in listeners}
    state = history.state(ours.__contains__)
    stale_fds = [*untaken.values(), *again]
    sentinel = untaken.get(SENTINEL) if has_state else None
    renumber(stored, [*listeners.values(), *stale_fds, *(each.fd for each in sockets), *others])
    names = {stored[saved.number].number: saved.name for saved in state.fds}
    names |= {fd.number: name for name, fd in listeners.items()}
    return Recovered(
        state,
        stored,
        deque(listeners.values()),
        names,
        [name for name, fd in untaken.items() if fd is not sentinel],
        stale_fds,
        sentinel,
        sockets,
        generation,
        has_state,
        handed_over,
    )


def _is_journal(given: InheritedFd) -> bool:
    return given.name.startswith(JOURNAL) and _is_stored(given)


def _is_stored(given: InheritedFd) -> bool:
    """Return whether a descriptor comes from the fd store, by its name.  What a socket unit or
    OpenFile= has given such a name, the kind may still tell; nothing tells it of a numbered name.
    """
    fd, name = given
    if not is_ours(name) or is_numbered(name):
        return is_ours(name)
    if name.startswith(JOURNAL):
        return is_in_memory(fd.number)
    return is_pipe(fd) if name == SENTINEL else not listens(fd)


def _without_journal(ours: Mapping[str, Fd]) -> History:
    """Make a history for descriptors whose journal the fd store has dropped: one fd set for each.

    They are not the rest of a store that was released: there, the journal is removed last.
    """
    found = [(name, fd.fileno()) for name, fd in ours.items() if is_numbered(name)]
    _log.error(
        "the fd store has lost the journal: %d descriptors come back in fd sets of their own, "
        "without their opaque texts",
        len(found),
    )
    history = History(SnapshotHeader(JOURNAL_FORMAT, 1, None))
    now = time.monotonic()
    history.apply_frame(
        [history.begun]
        + [SavedFd(name, number, number, None, None, now, None, False) for name, number in found]
    )
    return history


def _nothing() -> History:
    return History(SnapshotHeader(0, 0, None))


def newest(journals: Sequence[Fd]) -> History:
    """Read the newest journal; return an empty history if *journals* is empty.

    Raises:
        ValueError, OSError: none of the journals can be read.
    """
    histories, problems = [], []
    for journal in journals:
        try:
            histories.append(replay(journal))
        except (ValueError, OSError) as exc:
            problems.append(exc)
    if problems and not histories:
        raise problems[0]
    for problem in problems:
        _log.error("%s: the other journal is used", problem)
    return max(histories, key=lambda history: history.begun.generation, default=_nothing())


def _is_ours(history: History, ours: Mapping[str, Fd]) -> bool:
    """Return whether the store belongs to this daemon: not if the journal is that of a successor
    to which the predecessor had not handed over.
    """
    if history.confirmed:
        return history.begun.generation > 0
    lifeline = ours.get(LIFELINE)
    return lifeline is not None and has_handed_over(lifeline, ours.get(PREVIOUS), HANDOVER_TIMEOUT)
