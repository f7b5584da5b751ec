"""Compare replies, recorded ones and live ones.

The comparison is strict: the JSON values must be equal, and each line must be ASCII and end with
CRLF.  All exceptions are in this file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SHARED_COMMANDS = frozenset(
    (
        "qmp_capabilities",
        "add-fd",
        "remove-fd",
        "query-fdsets",
        "getfd",
        "closefd",
        "query-version",
        "query-name",
        "query-commands",
        "query-qmp-schema",
        "quit",
    )
)
"""Commands of both servers: QEMU has 205 others, and qmpfd has some of its own."""

PARSE_ERROR = "JSON parse error, "
"""Start of a parse error; the rest differs between parsers and between versions of QEMU."""

NESTED_TOO_DEEP = "JSON nesting depth limit exceeded"

NOT_JSON = {"id": "a number that JSON does not have"}
"""Stands for a reply with the id `inf`, which is no JSON: QEMU's reply to the id 1e999."""

_INF = re.compile(rb'"id": -?inf\b')
_PARSE_ERROR = re.compile(r"(\d+:\d+: )?" + re.escape(PARSE_ERROR))
"""Since QEMU 11.1 a parse error begins with line and column."""

_FD_IN_DESC = re.compile(r"(?<= fd:)\d+(?=' not found)")


class FdNames:
    """Names for one server's descriptor numbers, in the order of their first occurrence.

    The numbers depend on which were free in that process.  A number that is used again after a
    close gets a new name: the time of the close does not matter.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._current: dict[int, int] = {}

    def add(self, number: int) -> str:
        self._current[number] = len(self.numbers)
        self.numbers.append(number)
        return self.name(number)

    def is_current(self, index: int) -> bool:
        """Return whether the number of that name has not been used again for a later name."""
        return self._current[self.numbers[index]] == index

    def name(self, number: int) -> str:
        """Return the name of a number, or of a number plus 2**32; other numbers as text."""
        if number in self._current:
            return f"fd {self._current[number]}"
        if number - 2**32 in self._current:
            return f"fd {self._current[number - 2**32]} + 2**32"
        return str(number)


Reply = dict[str, str]
"""The members of a reply, each as JSON with sorted keys."""


def canonical(line: bytes, names: FdNames) -> Reply:
    """Return `line` as a value; equivalent lines give equal values."""
    with _deep_recursion():
        return _canonical(line, names)


def _canonical(line: bytes, names: FdNames) -> Reply:
    assert line.isascii(), f"not ASCII: {line!r}"
    assert line.endswith(b"\r\n"), f"no CRLF at the end: {line!r}"
    try:
        reply = json.loads(
            line,
            object_pairs_hook=_unique,
            parse_float=_parse_float,
            parse_constant=_parse_constant,
        )
    except ValueError:
        if _INF.search(line):
            return NOT_JSON
        raise AssertionError(f"not JSON: {line!r}") from None
    assert isinstance(reply, dict), f"not an object: {line!r}"
    if "QMP" in reply:
        reply["QMP"]["version"] = _version(reply["QMP"]["version"])
    if "return" in reply:
        reply["return"] = _result(reply["return"], names)
    if "error" in reply:
        reply["error"]["desc"] = _desc(reply["error"]["desc"], names)
    if "timestamp" in reply:
        assert {type(v) for v in reply["timestamp"].values()} == {int}
        reply["timestamp"] = "the time of day"
    # As text: 1 differs from true, and the comparison needs no recursion.
    return {key: json.dumps(value, sort_keys=True) for key, value in reply.items()}


def _result(result: Any, names: FdNames) -> Any:
    match result:
        case {"fd": int(fd), "fdset-id": int()} if len(result) == 2:  # add-fd
            return result | {"fd": names.add(fd)}
        case {"qemu": _, "package": _}:  # query-version
            return _version(result)
        case [{"fdset-id": int()}, *_]:  # query-fdsets
            for fdset in result:
                for info in fdset["fds"]:
                    info["fd"] = names.name(info["fd"])
            return result
        case [{"meta-type": _}, *_]:  # query-qmp-schema
            return _schema(result)
        case [{"name": _}, *_]:  # query-commands
            return sorted(SHARED_COMMANDS & {entry["name"] for entry in result})
    return result


def _version(version: Any) -> str:
    """Check the types of a version: its numbers differ between the servers."""
    assert set(version) == {"qemu", "package"}, version
    assert set(version["qemu"]) == {"major", "minor", "micro"}, version
    assert {type(number) for number in version["qemu"].values()} == {int}, version
    assert type(version["package"]) is str, version
    return "a version"


def _desc(desc: str, names: FdNames) -> str:
    if _PARSE_ERROR.match(desc):
        return PARSE_ERROR
    return _FD_IN_DESC.sub(lambda found: names.name(int(found[0])), desc)


def _schema(schema: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the shared commands with their types resolved: type names are arbitrary."""
    entries = {entry["name"]: entry for entry in schema}
    assert len(entries) == len(schema), "a name comes up twice in the schema"

    def resolve(name: str) -> Any:
        match entries[name]:
            case {"meta-type": "object", "members": members}:
                return {m["name"]: (resolve(m["type"]), "default" in m) for m in members}
            case {"meta-type": "array", "element-type": element}:
                return [resolve(element)]
            case {"meta-type": "enum", "values": values}:
                return ("enum", *sorted(values))
            case {"meta-type": "builtin", "json-type": kind}:
                return kind
            case entry:
                # A union, as the schema of query-qmp-schema: not resolved any further.
                return entry["meta-type"]

    commands = {}
    for name in SHARED_COMMANDS & entries.keys():
        entry = entries[name]
        assert entry["meta-type"] == "command", entry
        known = {"name", "meta-type", "arg-type", "ret-type"}
        rest = {key: value for key, value in entry.items() if key not in known}
        result = "(itself)" if name == "query-qmp-schema" else resolve(entry["ret-type"])
        commands[name] = {"arguments": resolve(entry["arg-type"]), "returns": result} | rest
    return commands


@contextmanager
def _deep_recursion() -> Iterator[None]:
    """Raise the recursion limit for an id with 1023 levels, the most that QEMU accepts.

    Only in the block: elsewhere the usual limit may reveal a mistake.
    """
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + 10_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    assert len(members) == len(pairs), f"a key comes twice: {pairs}"
    return members


def _parse_float(text: str) -> float:
    """Return 1 for 1.0, the same number in JSON: QEMU echoes the id 1.0 as 1, qmpfd as it came."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _parse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
