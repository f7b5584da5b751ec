"""A server's own description of its commands (``query-qmp-schema``), for help and completion."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

#: Commands that take a descriptor: a schema does not say so.
TAKES_FDS = frozenset({"add-fd", "add-fds", "getfd"})

#: End of a JSON line in which the name of a command is being typed.
_EXECUTE = re.compile(r'"execute"\s*:\s*"([\w-]*)$')


#: Maximum number of arguments in a signature; blockdev-add has more than a hundred.
_MANY = 8


class Argument(NamedTuple):
    """An argument of a command.

    Args:
        name: its name.
        type: its type, in words.
        json_type: the JSON type of its value; empty if it may have several.
        optional: whether it may be left out.
        values: the values of an enumeration.
    """

    name: str
    type: str
    json_type: str
    optional: bool
    values: Sequence[str]


class Schema:
    """The commands of a server, and their arguments.

    Args:
        entries: what ``query-qmp-schema`` returned; none if the server has no such command.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]] = ()) -> None:
        self._entries = {str(entry.get("name")): entry for entry in entries}

    def commands(self) -> list[str]:
        """Return the names of the commands."""
        return sorted(n for n, e in self._entries.items() if e.get("meta-type") == "command")

    def arguments(self, command: str) -> dict[str, Argument]:
        """Return the arguments of *command* by name, mandatory ones first."""
        entry = self._entries.get(command, {})
        if entry.get("meta-type") != "command":
            return {}
        found = self._members(entry.get("arg-type", ""))
        return dict(sorted(found.items(), key=lambda item: item[1].optional))

    def _members(self, name: str) -> dict[str, Argument]:
        entry = self._entries.get(name, {})
        found = {}
        for member in entry.get("members", ()):
            kind = self._entries.get(member["type"], {})
            is_enum = kind.get("meta-type") == "enum"
            found[member["name"]] = Argument(
                member["name"],
                self.words(member["type"], 1),
                "string" if is_enum else kind.get("json-type", ""),
                "default" in member,
                _values(kind) if is_enum else (),
            )
        for variant in entry.get("variants", ()):
            for member_name, member in self._members(variant["type"]).items():
                found.setdefault(member_name, member._replace(optional=True))
        return found

    def words(self, name: str, depth: int = 2) -> str:
        """Describe a type in words."""
        entry = self._entries.get(name, {})
        match entry.get("meta-type"):
            case "builtin":
                return name
            case "enum":
                values = _values(entry)
                return "|".join(values) if len(values) < 8 else "|".join([*values[:7], "..."])
            case "array":
                return f"[{self.words(entry['element-type'], depth)}, ...]"
            case "alternate":
                return " or ".join(self.words(m["type"], depth) for m in entry["members"])
            case "object" if depth:
                members = (
                    f"{member['name']}{'?' if 'default' in member else ''}: "
                    + self.words(member["type"], depth - 1)
                    for member in entry.get("members", ())
                )
                return "{" + ", ".join(members) + "}"
            case _:
                return "{...}"

    def convert(self, command: str, name: str, text: str) -> Any:
        """Convert *text* to the argument's type; if that is unknown, as JSON, or else return it."""
        argument = self.arguments(command).get(name)
        json_type = argument.json_type if argument is not None else ""
        if json_type == "string":
            return text
        if json_type == "boolean" and text in ("on", "off"):
            return text == "on"
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    def signature(self, command: str) -> str:
        """Return the syntax of *command* in one line."""
        words = [command]
        arguments = self.arguments(command).values()
        for argument in arguments:
            word = f"{argument.name}={_short(argument.type)}"
            if not argument.optional:
                words.append(word)
            elif len(arguments) <= _MANY:
                words.append(f"[{word}]")
        if len(arguments) > _MANY:
            words.append("[...]")
        if command in TAKES_FDS:
            words.append("< FILE")
        return " ".join(words)

    def help(self, command: str) -> str:
        """Return the help text of *command*."""
        arguments = self.arguments(command).values()
        width = max((len(argument.name) for argument in arguments), default=0)
        lines = [self.signature(command)]
        for argument in arguments:
            optional = "  (optional)" if argument.optional else ""
            lines.append(f"  {argument.name:<{width}}  {_short(argument.type)}{optional}")
        returned = self._entries[command].get("ret-type", "")
        lines.append(f"returns {self.words(returned)}")
        if command in TAKES_FDS:
            lines.append("takes a descriptor: < FILE, > FILE, >> FILE, <> FILE or --fd N")
        return "\n".join(lines)

    def complete(self, before: str) -> list[tuple[str, str]]:
        """Return the completions for the last word of *before*, each with its type."""
        if in_json := _EXECUTE.search(before):
            return [(f'"{name}"', "") for name in self.commands() if name.startswith(in_json[1])]
        done, blank, last = before.rpartition(" ")
        if not blank or done.split() == ["help"]:
            return [(name, "") for name in self.commands() if name.startswith(last)]
        command, *others = done.split()
        if others and others[-1] in ("<", ">", ">>", "<>"):
            return [(path, "") for path in sorted(glob.glob(glob.escape(last) + "*"))]
        arguments = self.arguments(command)
        name, equals, value = last.partition("=")
        if equals:
            if name not in arguments:
                return []
            values = arguments[name].values
            if arguments[name].json_type == "boolean":
                values = ("true", "false")
            return [(f"{name}={each}", "") for each in values if each.startswith(value)]
        given = {word.partition("=")[0] for word in others}
        found = [
            (f"{argument.name}=", argument.type)
            for argument in arguments.values()
            if argument.name.startswith(name) and argument.name not in given
        ]
        if command in TAKES_FDS and "--fd".startswith(last) and last:
            found.append(("--fd", "an open descriptor"))
        return found


def _values(enum: Mapping[str, Any]) -> list[str]:
    """Return the values of an enumeration; QEMU has them in one of two members, or in both."""
    return enum.get("values") or [member["name"] for member in enum.get("members", ())]


def _short(text: str) -> str:
    """Shorten the description of a type to 48 characters."""
    return text if len(text) <= 48 else f"{text[:45]}..."
