"""``query-qmp-schema``: complete, closed, and consistent with requests, replies and events.

Tests of commands/types.py, commands/extension_types.py and commands/table.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Pipe, Wire, daemon, error, value

from qmpfd.commands import TABLE
from qmpfd.commands.events import EVENTS

Entry = dict[str, Any]

#: Members that every entry of that meta-type has (qapi/introspect.json).
MEMBERS = {
    "builtin": {"json-type"},
    "enum": {"members", "values"},
    "array": {"element-type"},
    "object": {"members"},
    "command": {"arg-type", "ret-type"},
    "event": {"arg-type"},
}
JSON_TYPES = {"string": str, "int": int, "boolean": bool, "number": float}

OURS = ["open-fdset", "add-fds", "query-fds", "watch-fdsets", "query-stats"]


async def entries(wire: Wire) -> dict[str, Entry]:
    """The schema, by name."""
    listed = value(await wire.call("query-qmp-schema"))
    found = {entry["name"]: entry for entry in listed}
    assert len(found) == len(listed), "no name twice"
    return found


def references(entry: Entry) -> Iterator[str]:
    """The names that an entry refers to."""
    for member in ("arg-type", "ret-type", "element-type"):
        if member in entry:
            yield entry[member]
    if entry["meta-type"] == "object":
        for member in entry["members"]:
            yield member["type"]


async def test_well_formed(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            for entry in (await entries(wire)).values():
                kind = entry["meta-type"]
                assert entry.keys() == {"name", "meta-type"} | MEMBERS[kind]
                if kind == "object":
                    for member in entry["members"]:
                        # An optional member has a default, which is null (introspect.json).
                        assert member.keys() - {"default"} == {"name", "type"}
                        assert member.get("default") is None
                if kind == "enum":
                    assert [member["name"] for member in entry["members"]] == entry["values"]


async def test_every_reference_leads_to_an_entry(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            found = await entries(wire)
            for entry in found.values():
                for name in references(entry):
                    assert found[name]["meta-type"] not in ("command", "event")
                    if entry["meta-type"] in ("event", "command") and name == entry["arg-type"]:
                        assert found[name]["meta-type"] == "object"


async def test_every_type_is_reachable(path: Path) -> None:
    """Every type is reachable from a command or an event."""
    async with daemon(path):
        with await Wire.session(path) as wire:
            found = await entries(wire)
            todo = [name for name, e in found.items() if e["meta-type"] in ("command", "event")]
            reached = set(todo)
            while todo:
                new = set(references(found[todo.pop()])) - reached
                reached |= new
                todo += new
            assert reached == found.keys()


async def test_all_commands_and_events(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            found = await entries(wire)
            commands = [name for name, e in found.items() if e["meta-type"] == "command"]
            listed = [each["name"] for each in value(await wire.call("query-commands"))]
            assert sorted(commands) == sorted(listed) == sorted(TABLE.commands)
            assert set(OURS) < set(commands)
            events = {name for name, e in found.items() if e["meta-type"] == "event"}
            assert events == EVENTS.keys() == {"FD_ADDED", "FD_REMOVED", "FD_EVENTS_LOST"}


async def test_a_command_can_be_resolved_completely(path: Path) -> None:
    """Resolve the arguments and the value of a command completely."""
    async with daemon(path):
        with await Wire.session(path) as wire:
            found = await entries(wire)

            def members(name: str) -> dict[str, tuple[str, bool]]:
                return {
                    member["name"]: (member["type"], "default" in member)
                    for member in found[name]["members"]
                }

            add_fd = found["add-fd"]
            assert members(add_fd["arg-type"]) == {
                "fdset-id": ("int", True),
                "opaque": ("str", True),
            }
            assert members(add_fd["ret-type"]) == {"fdset-id": ("int", False), "fd": ("int", False)}
            assert found["int"] == {"name": "int", "meta-type": "builtin", "json-type": "int"}

            access, optional = members(found["open-fdset"]["arg-type"])["access"]
            assert optional
            assert found[access]["values"] == ["rdonly", "wronly", "rdwr"]

            element = found[found["query-fds"]["ret-type"]]["element-type"]
            assert members(element)["target"] == ("str", False)
            by, optional = members(element)["added-by"]
            assert optional
            assert members(by).keys() == {"pid", "uid", "gid"}
            assert found[members(element)["access"][0]]["values"][-1] == "path"

            assert members(found["FD_REMOVED"]["arg-type"]).keys() == {
                "fdset-id",
                "fd",
                "reason",
                "opaque",
            }
            assert members(found["query-name"]["arg-type"]) == {}


def fits(found: dict[str, Entry], name: str, what: Any) -> bool:
    """Return whether *what* is a value of the type *name*."""
    entry = found[name]
    match entry["meta-type"]:
        case "builtin":
            return type(what) is JSON_TYPES[entry["json-type"]]
        case "enum":
            return what in entry["values"]
        case "array":
            return isinstance(what, list) and all(
                fits(found, entry["element-type"], w) for w in what
            )
        case _:
            required = {m["name"] for m in entry["members"] if "default" not in m}
            types = {m["name"]: m["type"] for m in entry["members"]}
            return (
                isinstance(what, dict)
                and required <= what.keys() <= types.keys()
                and all(fits(found, types[member], inner) for member, inner in what.items())
            )


async def test_values_and_events_fit_the_schema(path: Path) -> None:
    """The values of all commands, and all events, have the types of the schema."""
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            found = await entries(wire)
            output = []
            calls: list[tuple[str, dict[str, Any] | None, list[Pipe]]] = [
                ("watch-fdsets", {"enable": True}, []),
                ("add-fd", {"opaque": "o"}, [pipe]),
                ("add-fds", {"expires": 100, "lifetime": "connection"}, [pipe, pipe]),
                ("open-fdset", {"fdset-id": 0}, []),
                ("query-fds", None, []),
                ("query-fdsets", None, []),
                ("query-stats", None, []),
                ("query-version", None, []),
                ("query-commands", None, []),
                ("remove-fd", {"fdset-id": 0}, []),
            ]
            for command, arguments, fds in calls:
                reply = await wire.call(command, arguments, fds)
                while "event" in reply:
                    output.append(reply)
                    reply = await wire.reply()
                assert fits(found, found[command]["ret-type"], value(reply)), command
                assert fits(found, found[command]["arg-type"], arguments or {}), command
            while len(output) < 4:
                output.append(await wire.reply())
            for event in output:
                assert fits(found, found[event["event"]]["arg-type"], event["data"])


@pytest.mark.parametrize("command", sorted(TABLE.commands.keys() - {"qmp_capabilities", "quit"}))
async def test_arguments_fit_the_schema(path: Path, command: str) -> None:
    """A member of the wrong type, a missing one and an unknown one are refused by name."""
    wrong: dict[str, Any] = {"int": "x", "str": 0, "bool": 0, "number": "x"}
    right: dict[str, Any] = {"int": 0, "str": "", "bool": True, "number": 0.5}
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            found = await entries(wire)
            members = found[found[command]["arg-type"]]["members"]

            async def refusal(arguments: dict[str, Any]) -> str:
                reply = await wire.call(command, arguments, [pipe])
                assert error(reply) == "GenericError"
                return str(reply["error"]["desc"])

            for entry in found.values():
                if entry["meta-type"] == "enum":
                    right[entry["name"]] = entry["values"][0]
            good = {member["name"]: right[member["type"]] for member in members}
            assert "'no-such'" in await refusal({**good, "no-such": 1})
            for member in members:
                name = member["name"]
                assert f"'{name}'" in await refusal({**good, name: wrong.get(member["type"], "?")})
                if "default" not in member:
                    without = {key: what for key, what in good.items() if key != name}
                    assert f"'{name}' is missing" in await refusal(without)
