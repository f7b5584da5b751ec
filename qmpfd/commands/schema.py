"""Result of ``query-qmp-schema``, derived from the table of commands.

The format is that of ``qapi/introspect.json`` (SchemaInfo).  QEMU replaces the names of types by
numbers, because the names are not part of its interface; here the names are shown.
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
    """Collects the entries of the schema, each type once."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    def type_name(self, annotation: Any) -> str:
        """Return the name of the entry for *annotation*, which is added if it is missing."""
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


@cache  # a daemon has one table, which never changes
def schema(table: Table[Any]) -> list[dict[str, Any]]:
    """Return the entries of all commands of *table*, all events, and the types that they use."""
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
