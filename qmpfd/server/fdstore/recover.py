"""A restart: sorts out what the fd store has given back.

The descriptors come in any order, some of them perhaps twice, or stale, or not at all; the newest
journal says what they are.  Like a takeover this runs before Trio is imported, so that each stored
descriptor can have its number.  Whatever is wrong with one of them, all the others come back.

The journal may be of a newcomer that died in the middle of a takeover.  Whether the old daemon had
handed everything over then, is for the lifeline to say, which is in the store too.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ...kernel.fd import Fd, close_all
from ...kernel.systemd import InheritedFd
from ...limits import HANDOVER_TIMEOUT, JOURNAL_FORMAT
from ..renumber import Movable, renumber
from ..saved_state import SavedFd, SavedState
from .evidence import has_handed_over
from .journal import SnapshotHeader
from .names import JOURNAL, LIFELINE, PREVIOUS, SENTINEL, is_numbered, is_ours
from .replay import History, replay

_log = logging.getLogger("qmpfd")


@dataclass(slots=True)
class Recovered:
    """What has come back from the fd store, and what is still there.

    Args:
        state: what it is; there may be nothing.
        stored: the stored descriptors by number; owned here until they are taken out.
        others: the listening sockets, in the order of *state*; owned here likewise.
        names: what these are called there, by their number here.
        stale_names: what is there and means nothing.
        stale_fds: descriptors that are to be closed, which may block; owned here likewise.
        sentinel: name and write end of the sentinel there, if it counts; one of the stale ones.
        sockets: the service manager's own, to listen on; owned here likewise.
        generation: of the last journal there.
        has_state: there was a daemon here before, and this is what it had: that journal counts,
            until there is another.
        handed_over: another daemon has taken over what was here.
    """

    state: SavedState = field(default_factory=lambda: SavedState(time.monotonic(), [], []))
    stored: dict[int, Fd] = field(default_factory=dict)
    others: deque[Fd] = field(default_factory=deque)
    names: dict[int, str] = field(default_factory=dict)
    stale_names: list[str] = field(default_factory=list)
    stale_fds: list[Fd] = field(default_factory=list)
    sentinel: tuple[str, Fd] | None = None
    sockets: list[InheritedFd] = field(default_factory=list)
    generation: int = 0
    has_state: bool = False
    handed_over: bool = False

    def __enter__(self) -> Recovered:
        return self

    def __exit__(self, *exc_info: object) -> None:
        close_all([*self.stored.values(), *self.others, *self.stale_fds])
        close_all(given.fd for given in self.sockets)


def recover(
    inherited: Sequence[InheritedFd],
    others: Iterable[Movable] = (),
    history: History | None = None,
) -> Recovered:
    """Sort out what this process was started with.

    Args:
        inherited: the descriptors and their names; owned from here on.
        others: more descriptors that may get other numbers.
        history: what the newest journal says, where that is known already.

    Raises:
        ValueError: there is a journal that cannot be read.
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
    again = []  # under a name that is there already
    for given in inherited:
        if not is_ours(given.name):
            sockets.append(given)
        elif given.name in ours:
            again.append(given.fd)
        else:
            ours[given.name] = given.fd
    if history is None:
        history = newest([fd for name, fd in ours.items() if name.startswith(JOURNAL)])
    # With that evidence, they are of a takeover that had not come far: the old daemon has all.
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
        """What came under that name, a duplicate of it if it is taken already; None if nothing did,
        or there is no descriptor for the duplicate.
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
    listeners = {name: fd for name in history.listeners if (fd := take(name))}
    history.listeners = {name: history.listeners[name] for name in listeners}
    state = history.state(ours.__contains__)
    stale_fds = [*untaken.values(), *again]
    sentinels = sorted(name for name in untaken if has_state and name.startswith(SENTINEL))[:1]
    renumber(stored, [*listeners.values(), *stale_fds, *(each.fd for each in sockets), *others])
    names = {stored[saved.number].number: saved.name for saved in state.fds}
    names |= {fd.number: name for name, fd in listeners.items()}
    return Recovered(
        state,
        stored,
        deque(listeners.values()),
        names,
        [name for name in untaken if name not in sentinels],
        stale_fds,
        (sentinels[0], untaken[sentinels[0]]) if sentinels else None,
        sockets,
        generation,
        has_state,
        handed_over,
    )


def _without_journal(ours: Mapping[str, Fd]) -> History:
    """What is left where the fd store has dropped the journal: each descriptor in a set of its own.

    A daemon that lets go of everything removes the journal last, so this is none of its leavings.
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
    """What the newest journal says; nothing if there is none.

    Raises:
        ValueError, OSError: there are some, and none of them can be read.
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
    """Whether what it tells of belongs to us: it does not in the middle of a takeover."""
    if history.confirmed:
        return history.begun.generation > 0
    lifeline = ours.get(LIFELINE)
    return lifeline is not None and has_handed_over(lifeline, ours.get(PREVIOUS), HANDOVER_TIMEOUT)
