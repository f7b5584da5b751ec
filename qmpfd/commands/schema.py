"""``query-qmp-schema``: the table of commands, in the form in which QEMU describes its own.

The form is that of ``qapi/introspect.json`` (SchemaInfo).  Where QEMU hides the names of types
behind numbers, because they are no part of its promise, ours are shown.
"""

from __future__ import annotations

import typing
from functools import cache
from typing import Any, Literal

import msgspec
from msgspec import Struct

from ..protocol.arguments import bare_type
from .events import EVENTS
from .table import Table

_BUILTINS = {
    int: ("int", "int"),
    str: ("str", "string"),
    bool: ("bool", "boolean"),
    float: ("number", "number"),
}

#: QEMU's name for the object without members.
_EMPTY = "q_empty"


class _Schema:
    """Collects entries: each type once, behind what refers to it."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    def type_name(self, annotation: Any) -> str:
        """The name under which *annotation* is described."""
        kind = bare_type(annotation)
        entry: dict[str, Any]
        if kind in _BUILTINS:
            name, json_type = _BUILTINS[kind]
            entry = {"name": name, "json-type": json_type, "meta-type": "builtin"}
        elif typing.get_origin(kind) is Literal:
            values = list(typing.get_args(kind))
            name = f"Enum({'|'.join(values)})"
            members = [{"name": value} for value in values]
            entry = {"name": name, "members": members, "meta-type": "enum", "values": values}
        elif typing.get_origin(kind) is list:
            element = self.type_name(typing.get_args(kind)[0])
            name = f"[{element}]"
            entry = {"name": name, "element-type": element, "meta-type": "array"}
        else:
            return self._object(kind)
        self.entries.setdefault(name, entry)
        return name

    def _object(self, struct: type[Struct]) -> str:
        fields = msgspec.structs.fields(struct)
        name = struct.__name__ if fields else _EMPTY
        if name not in self.entries:
            members: list[dict[str, Any]] = []
            self.entries[name] = {"name": name, "members": members, "meta-type": "object"}
            for field in fields:
                member: dict[str, Any] = {
                    "name": field.encode_name,
                    "type": self.type_name(field.type),
                }
                if not field.required:
                    member["default"] = None
                members.append(member)
        return name


@cache  # a daemon has one table, which does not change
def schema(table: Table[Any]) -> list[dict[str, Any]]:
    """All commands of *table* and all events, with the types that they refer to."""
    collected = _Schema()
    entries = collected.entries
    for command in table.commands.values():
        entries[command.name] = {
            "name": command.name,
            "ret-type": collected.type_name(command.returns),
            "meta-type": "command",
            "arg-type": collected.type_name(command.arguments),
        }
    for name, data in EVENTS.items():
        arguments = collected.type_name(data)
        entries[name] = {"name": name, "meta-type": "event", "arg-type": arguments}
    return list(entries.values())
