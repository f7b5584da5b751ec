"""Decodes requests, by the argument types of the server's commands.

The fast path decodes and checks a whole chunk of requests in one call of msgspec; it returns None
for anything unusual.  The slow path checks a value of our own parser, and raises QEMU's error for
it.  For every chunk that the fast path decodes both return the same requests; tests compare them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Union, cast

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..errors import CommandNotFound, GenericError
from ..limits import INT64_MIN
from .arguments import convert
from .qemu_order import qdict_order


class Request(Struct):
    """A well-formed request, whose arguments have the right types.

    Each command has a subclass, with the members ``arguments`` (the command's struct; UNSET if the
    request has none and none are required) and ``id``.
    """

    #: Maximum number of descriptors that the command takes.
    takes: ClassVar[int] = 0
    arguments: Any = UNSET
    id: Any = UNSET


@dataclass(frozen=True, slots=True)
class Spec:
    """Properties of a command that the protocol needs.

    Args:
        arguments: the struct of its arguments.
        fds: maximum number of descriptors that it takes.
    """

    arguments: type[Struct]
    fds: int


#: The types of an id on the fast path; any other JSON value takes the slow path.
_PlainId = Annotated[int, Meta(ge=INT64_MIN, le=(1 << 63) - 1)] | str | UnsetType

_encoder = msgspec.json.Encoder()
_BACKSLASH = ord("\\")  # an int: searching bytes for an int is ten times as fast as for bytes


def _request_type(name: str, spec: Spec) -> type[Request]:
    """Define the request struct of the command *name*, for msgspec to decode."""
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
    """Decodes the requests of a server's commands.

    Args:
        commands: the properties of each command, by name.
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
        """Decode all requests in *data* on the fast path; return None if the slow path has to."""
        if not data.isascii() or _BACKSLASH in data:
            return None
        try:
            requests: list[Request] = self._decode_lines(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        # msgspec accepts a duplicate key and keeps its last value; QEMU refuses it.  Each key has
        # one colon, and without escapes strings keep theirs, so the requests encoded again have as
        # many colons as *data* only if no key was a duplicate.
        if data.count(b":") != _encoder.encode(requests).count(b":"):
            return None
        return requests

    def max_fds(self, message: Any) -> int:
        """Return how many descriptors *message* takes: a request, or a value of the parser."""
        if isinstance(message, Request):
            return message.takes
        if isinstance(message, dict):
            for member in ("execute", "exec-oob"):
                name = message.get(member)
                if isinstance(name, str) and name in self._commands:
                    return self._commands[name].fds
        return 0

    def request(self, value: Any, *, oob_enabled: bool, only: str | None = None) -> Request:
        """Check *value* and convert it to a request: the slow path.

        Args:
            value: a value of the parser.
            oob_enabled: whether the client has enabled out-of-band execution.
            only: the one command that the state allows; None for all.

        Raises:
            GenericError, CommandNotFound: with QEMU's text (``qmp-dispatch.c``).
        """
        members = _check_envelope(value, oob_enabled)
        oob = "exec-oob" in members
        name = members["exec-oob" if oob else "execute"]
        if name not in self._commands or (only is not None and name != only):
            raise CommandNotFound(f"The command {name} has not been found")
        spec = self._commands[name]
        if oob:  # QEMU allows out-of-band execution for a few commands, none of which exist here
            raise GenericError(f"The command {name} does not support OOB")
        arguments = convert(members.get("arguments", {}), spec.arguments)
        return self._types[name](arguments=arguments, id=members.get("id", UNSET))


def _check_envelope(value: Any, oob_enabled: bool) -> dict[str, Any]:
    """Return the members of a request, checked in the order in which QEMU checks them."""
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
