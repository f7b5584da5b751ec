"""Table of commands: the source of dispatch, argument checks, listings, schema and docs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from msgspec import Struct, structs

from ..protocol.request_decoder import Spec

ArgumentsT = TypeVar("ArgumentsT", bound=Struct)
ContextT = TypeVar("ContextT")


@dataclass(frozen=True, slots=True)
class Command(Spec, Generic[ContextT]):
    """A command.

    Args:
        name: its name on the wire.
        returns: the type of its result.
        run: executes it in a context; never waits, and may raise QMPError.
        nothing: the arguments of a request without any; None if some are required.
        touches_store: whether it reads or changes the store.
    """

    name: str
    returns: Any
    run: Callable[[ContextT, Any], Any]
    nothing: Struct | None
    touches_store: bool


@dataclass(slots=True, eq=False)
class Table(Generic[ContextT]):
    """Commands by name, in the order in which they are listed."""

    commands: dict[str, Command[ContextT]] = field(default_factory=dict)
    touches_store: bool = True  #: whether these commands read or change the store

    def command(
        self, name: str, arguments: type[ArgumentsT], returns: Any, *, fds: int = 0
    ) -> Callable[[Callable[[ContextT, ArgumentsT], Any]], Callable[[ContextT, ArgumentsT], Any]]:
        """Decorator: enter a function in the table as the command *name*."""

        def enter(
            run: Callable[[ContextT, ArgumentsT], Any],
        ) -> Callable[[ContextT, ArgumentsT], Any]:
            needs = any(member.required for member in structs.fields(arguments))
            nothing = None if needs else arguments()
            self.commands[name] = Command(
                arguments, fds, name, returns, run, nothing, self.touches_store
            )
            return run

        return enter
