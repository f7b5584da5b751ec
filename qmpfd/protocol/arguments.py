"""Checks a command's arguments against their types, with QEMU's errors in QEMU's order.

msgspec checks valid arguments in one call, but has other error texts.  This module reports the
first error as QEMU does (``qobject-input-visitor.c``): missing members and wrong types in the
order of the schema, then unknown members.
"""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import NODEFAULT, Struct, UnsetType

from ..errors import GenericError
from ..limits import INT64_MAX, INT64_MIN
from .qemu_order import first_left_over

ArgumentsT = TypeVar("ArgumentsT", bound=Struct)

#: QMP's ``int``: QAPI int64.
Int64 = typing.Annotated[int, msgspec.Meta(ge=INT64_MIN, le=INT64_MAX)]


def bare_type(annotation: Any) -> Any:
    """Return the type of *annotation*, without bounds, None and UnsetType."""
    if typing.get_origin(annotation) is typing.Annotated:
        return bare_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (kind,) = (a for a in typing.get_args(annotation) if a not in (UnsetType, type(None)))
        return bare_type(kind)
    return annotation


_TYPE_NAMES = {int: "integer", str: "string", bool: "boolean", list: "array"}


def _check(value: Any, kind: Any, name: str) -> None:
    """Raise GenericError if *value* is not of type *kind*; the text calls the value *name*."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    json_type: Any = str if choices else typing.get_origin(kind) or kind
    if json_type not in _TYPE_NAMES:
        raise TypeError(f"no QMP type: {kind!r}")
    if type(value) is not json_type or (json_type is int and not INT64_MIN <= value <= INT64_MAX):
        expected = _TYPE_NAMES[json_type]
        raise GenericError(f"Invalid parameter type for '{name}', expected: {expected}")
    if choices and value not in choices:
        # QEMU's visitor has no name for an element of an array.
        name = "null" if name.endswith("]") else name
        raise GenericError(f"Parameter '{name}' does not accept value '{value}'")
    if json_type is list:
        (element,) = map(bare_type, typing.get_args(kind))
        fine: set[str] = set()  # of up to 200,000 equal strings, check one
        for number, item in enumerate(value):
            if type(item) is str and item in fine:
                continue
            _check(item, element, f"{name}[{number}]")
            if type(item) is str:
                fine.add(item)


def convert(members: dict[str, Any], arguments: type[ArgumentsT]) -> ArgumentsT:
    """Convert *members* to the struct *arguments*.

    Raises:
        GenericError: a member is invalid, missing or unknown; the text is QEMU's for the first one.
    """
    values: dict[str, Any] = {}
    known: dict[str, None] = {}
    for field in msgspec.structs.fields(arguments):
        name = field.encode_name
        known[name] = None
        if name in members:
            _check(members[name], bare_type(field.type), name)
            values[field.name] = members[name]
        elif field.default is NODEFAULT and field.default_factory is NODEFAULT:
            raise GenericError(f"Parameter '{name}' is missing")
    if not known.keys() >= members.keys():
        raise GenericError(f"Parameter '{first_left_over(members, known)}' is unexpected")
    return arguments(**values)
