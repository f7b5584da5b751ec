"""A restart: makes what whoever kept it has given back into what it was.

The descriptors come in any order, some of them perhaps twice, or of no use any more, or not at
all; the newest journal says what they are.  Like a takeover it is done before Trio runs, so that
each stored descriptor can have its number.

The journal may be of a newcomer that died in the middle of a takeover.  Whether that was done is
for a evidence to say that was kept with it: the old daemon's own journal, or its pidfd.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar

from ...kernel.fd import Fd, close_all
from ...kernel.systemd import InheritedFd, Notifier
from ...limits import LETTING_GO_TIMEOUT
from ..listen.listener import is_socket
from ..renumber import make_way, place
from ..saved_state import SavedState
from .evidence import has_handed_over
from .journal import History, SnapshotHeader, read, replay
from .mirror import Holdings
from .names import PREVIOUS, is_journal, is_ours


@dataclass(slots=True)
class Recovered:
    """What has come back.

    Args:
        state: what it is; there may be nothing.
        fds: the descriptors, in the order of *state*; owned here until they are taken out.
        holdings: whin the fd store has.
        useless: descriptors that are to be closed, which may block; owned here likewise.
        sockets: the service manager's own, to listen on; owned here likewise.
        found: there was a daemon here before, and this is what it had.
        left: another daemon has taken over what was here.
    """

    state: SavedState
    fds: deque[Fd]
    holdings: Holdings
    useless: list[Fd]
    sockets: list[InheritedFd]
    found: bool
    left: bool

    #: It is ours, whatever happens.
    confirmed: ClassVar[bool] = True

    def __enter__(self) -> Recovered:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        close_all([*self.fds, *self.useless, *(given.fd for given in self.sockets)])


def recover(inherited: Sequence[InheritedFd], parent: Notifier | None) -> Recovered:
    """Sort out what this process was started with.

    Args:
        inherited: the descriptors and their names; owned from here on.
        parent: whose socket may have to make way for a descriptor that needs its number.

    Raises:
        ValueError: there is a journal that cannot be read, or a number that is in use.
    """
    try:
        return _recover(inherited, parent)
    except BaseException:
        close_all(given.fd for given in inherited)
        raise


def _recover(inherited: Sequence[InheritedFd], parent: Notifier | None) -> Recovered:
    ours = {given.name: given.fd for given in inherited if is_ours(given.name)}
    sockets = [given for given in inherited if not is_ours(given.name)]
    again = [given.fd for given in inherited if ours.get(given.name, given.fd) is not given.fd]
    history = _newest([fd for name, fd in ours.items() if is_journal(name)])
    generation = history.begun.generation
    has_left = history.left
    found = not has_left and _is_ours(history, ours)
    if not found:
        history = _nothing()
    history.listeners = {n: path for n, path in history.listeners.items() if _is_there(path)}
    history.forget_unfinished(ours.__contains__)
    state = history.state(ours.__contains__)
    listeners = [name for name in history.listeners if name in ours]

    # Who has which descriptor: the first under its name that itself, the others a duplicate.
    left = dict(ours)
    uses = [history.entries[number].name for number in state.stored_numbers] + listeners
    fds = [left.pop(name) if name in left else ours[name].dup() for name in uses]
    wanted: list[int | None] = [*state.stored_numbers, *[None] * len(listeners)]
    useless = [*left.values(), *again]
    others = [*useless, *(given.fd for given in sockets)]
    make_way(parent, set(state.stored_numbers))
    placed = place([*fds, *others], [*wanted, *[None] * len(others)])
    fds, rest = placed[: len(fds)], placed[len(fds) :]
    useless, given_fds = rest[: len(useless)], rest[len(useless) :]
    names = {fd.fileno(): name for fd, name in zip(fds, uses, strict=True)}
    return Recovered(
        state,
        deque(fds),
        Holdings(names, list(left), generation, found),
        useless,
        [InheritedFd(fd, given.name) for fd, given in zip(given_fds, sockets, strict=True)],
        found,
        has_left,
    )


def _nothing() -> History:
    return History(SnapshotHeader(0, 0, None))


def _newest(journals: Sequence[Fd]) -> History:
    """What the newest journal says; nothing if there is none."""
    histories = [replay(read(journal)) for journal in journals]
    return max(histories, key=lambda history: history.begun.generation, default=_nothing())


def _is_ours(history: History, ours: dict[str, Fd]) -> bool:
    """Whether what it tells of belongs to us: it does not in the middle of a takeover."""
    if history.confirmed:
        return history.begun.generation > 0
    evidence = ours.get(PREVIOUS)
    return evidence is not None and has_handed_over(evidence, LETTING_GO_TIMEOUT)


def _is_there(path: str | None) -> bool:
    """Whether a listening socket can still be reached."""
    return path is None or is_socket(path)
