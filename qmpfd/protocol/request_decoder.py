"""The requests that a server understands, built from its commands' argument types.

Two ways lead to a request.  The quick one decodes and checks a whole chunk of requests in one
call of msgspec, and gives up at anything that is not plain.  The careful one starts from a value
of our own parser and finds QEMU's error for it.  Where the quick one answers, both agree; the
tests hold them to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Union, cast

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..errors import CommandNotFound, GenericError
from ..limits import INT64_MIN
from .arguments import convert
from .qemu_order import qdict_order


class Request(Struct):
    """A request that is well-formed and whose arguments have the right types.

    The subclasses, one a command, have the members ``arguments`` (the command's struct; absent
    when the request has none and needs none) and ``id``.
    """

    #: How many descriptors the command takes at most.
    takes: ClassVar[int] = 0
    arguments: Any = UNSET
    id: Any = UNSET


class Spec(Struct, frozen=True):
    """What the protocol needs to know of a command.

    Args:
        arguments: the struct of its arguments.
        fds: how many descriptors it takes at most.
        allow_oob: whether it may be executed out of band.
    """

    arguments: type[Struct]
    fds: int = 0
    allow_oob: bool = False


#: The ids that the quick way echoes; any other JSON value goes the careful way.
_PlainId = Annotated[int, Meta(ge=INT64_MIN, le=(1 << 63) - 1)] | str | UnsetType

_encoder = msgspec.json.Encoder()
_BACKSLASH = ord("\\")  # bytes contain a number ten times as fast as bytes


def _request_type(name: str, spec: Spec) -> type[Request]:
    """The struct of a request of the command *name*, for the quick way."""
    needed = any(field.required for field in msgspec.structs.fields(spec.arguments))
    given: Any = spec.arguments
    members: Any = [
        ("arguments", given) if needed else ("arguments", given | UnsetType, UNSET),
        ("id", _PlainId, UNSET),
    ]
    request: Any = msgspec.defstruct(
        name,
        members,
        bases=(Request,),
        tag_field="execute",
        tag=name,
        forbid_unknown_fields=True,
        gc=False,
        namespace={"takes": spec.fds},
    )
    return cast("type[Request]", request)


class RequestDecoder:
    """The commands of a server.

    Args:
        commands: what there is to know of each, by name.
    """

    def __init__(self, commands: Mapping[str, Spec]) -> None:
        self._commands = commands
        self._types: dict[str, type[Request]] = {}
        self.names: dict[type[Request], str] = {}
        for name, spec in commands.items():
            request = _request_type(name, spec)
            self._types[name] = request
            self.names[request] = name
        union: Any = Union[tuple(self._types.values())]  # noqa: UP007 - built at run time
        self._decode_lines = msgspec.json.Decoder(union).decode_lines

    def decode_chunk(self, data: bytes) -> list[Request] | None:
        """All requests in *data*, the quick way; None if it has to go the careful way."""
        if not data.isascii() or _BACKSLASH in data:
            return None
        try:
            requests: list[Request] = self._decode_lines(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        # Of a key that occurs twice, msgspec takes the last and says nothing.  Each key has one
        # colon: where none occurs twice, what is encoded again has as many, as without escapes the
        # colons inside of strings are the same.
        if data.count(b":") != _encoder.encode(requests).count(b":"):
            return None
        return requests

    def max_fds(self, message: Any) -> int:
        """How many descriptors *message*, a request or a value still to be checked, takes."""
        if isinstance(message, Request):
            return message.takes
        if isinstance(message, dict):
            for member in ("execute", "exec-oob"):
                name = message.get(member)
                if isinstance(name, str) and name in self._commands:
                    return self._commands[name].fds
        return 0

    def request(self, value: Any, *, oob_enabled: bool, only: str | None = None) -> Request:
        """The careful way: *value* as a request.

        Args:
            value: what the parser gave.
            oob_enabled: whether the client has enabled out-of-band execution.
            only: the one command that is known in this state; None for all.

        Raises:
            GenericError, CommandNotFound: with QEMU's text (``qmp-dispatch.c``).
        """
        members = _check_envelope(value, oob_enabled)
        oob = "exec-oob" in members
        name = members["exec-oob" if oob else "execute"]
        if name not in self._commands or (only is not None and name != only):
            raise CommandNotFound(f"The command {name} has not been found")
        spec = self._commands[name]
        if oob and not spec.allow_oob:
            raise GenericError(f"The command {name} does not support OOB")
        arguments = convert(members.get("arguments", {}), spec.arguments)
        return self._types[name](arguments=arguments, id=members.get("id", UNSET))


def _check_envelope(value: Any, oob_enabled: bool) -> dict[str, Any]:
    """*value* as the members of a request, checked in the order in which QEMU comes across them."""
    if not isinstance(value, dict):
        raise GenericError("QMP input must be a JSON object")
    execute: str | None = None
    for member in qdict_order(value):
        if member == "execute" or (member == "exec-oob" and oob_enabled):
            if not isinstance(value[member], str):
                raise GenericError(f"QMP input member '{member}' must be a string")
            if execute is not None:
                raise GenericError(f"QMP input member '{member}' clashes with '{execute}'")
            execute = member
        elif member == "arguments":
            if not isinstance(value[member], dict):
                raise GenericError("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise GenericError(f"QMP input member '{member}' is unexpected")
    if execute is None:
        raise GenericError("QMP input lacks member 'execute'")
    return value
