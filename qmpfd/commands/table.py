"""The one table of commands: from it come dispatch, argument checks, listings, schema and docs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from msgspec import Struct, structs

from ..protocol.request_decoder import Spec

ArgumentsT = TypeVar("ArgumentsT", bound=Struct)
ContextT = TypeVar("ContextT")


@dataclass(frozen=True, slots=True)
class Command(Generic[ContextT]):
    """A command; a context (for the daemon's commands, a connection) executes it.

    Args:
        name: what clients call it.
        arguments: the struct of its arguments.
        returns: the type of its result.
        run: carries it out; may raise QMPError.  It never waits.
        fds: how many descriptors it takes at most.
        nothing: arguments of a request that has none, if none are needed.
        touches_store: whether its result depends on what is stored, or it changes that.
    """

    name: str
    arguments: type[Struct]
    returns: Any
    run: Callable[[ContextT, Any], Any]
    fds: int
    nothing: Struct | None
    touches_store: bool

    @property
    def doc(self) -> str:
        """The description for people: the docstring of *run*."""
        return self.run.__doc__ or ""


@dataclass(slots=True, eq=False)
class Table(Generic[ContextT]):
    """Commands by name, in the order in which they are listed."""

    commands: dict[str, Command[ContextT]] = field(default_factory=dict)
    touches_store: bool = True  #: whether these are about the store

    def command(
        self, name: str, arguments: type[ArgumentsT], returns: Any, *, fds: int = 0
    ) -> Callable[[Callable[[ContextT, ArgumentsT], Any]], Callable[[ContextT, ArgumentsT], Any]]:
        """Enter the decorated function as the command *name*."""

        def enter(
            run: Callable[[ContextT, ArgumentsT], Any],
        ) -> Callable[[ContextT, ArgumentsT], Any]:
            needs = any(member.required for member in structs.fields(arguments))
            nothing = None if needs else arguments()
            self.commands[name] = Command(
                name, arguments, returns, run, fds, nothing, self.touches_store
            )
            return run

        return enter

    def specs(self) -> dict[str, Spec]:
        """The argument types and descriptor counts, for the protocol."""
        return {name: Spec(c.arguments, c.fds) for name, c in self.commands.items()}
