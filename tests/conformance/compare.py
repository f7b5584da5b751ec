"""When are two replies the same?  One answer, for recorded and for live ones.

Strict by default: the JSON values must be equal, each line ASCII and ended by CRLF.  What is
looked at less closely is listed here, and nowhere else.
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
"""What both sides have: QEMU has 205 commands more, and we have some of our own."""

PARSE_ERROR = "JSON parse error, "
"""The wording after it is a parser's own, and has changed from one QEMU to the next."""

NESTED_TOO_DEEP = "JSON nesting depth limit exceeded"

NOT_JSON = {"id": "a number that JSON does not have"}
"""Stands for a reply with a bare `inf`: QEMU's answer to the id 1e999."""

_INF = re.compile(rb'"id": -?inf\b')
_PARSE_ERROR = re.compile(r"(\d+:\d+: )?" + re.escape(PARSE_ERROR))
"""QEMU 11.1 begins with line and column."""

_FD_IN_DESC = re.compile(r"(?<= fd:)\d+(?=' not found)")


class FdNames:
    """One side's descriptor numbers, named in the order in which they came up.

    The numbers themselves are whatever was free in that process.  A number that comes back after
    a close gets a new name, so it does not matter when exactly a side closes.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._current: dict[int, int] = {}

    def add(self, number: int) -> str:
        self._current[number] = len(self.numbers)
        self.numbers.append(number)
        return self.name(number)

    def is_current(self, index: int) -> bool:
        """Whether the number of that name has not been given to a later one."""
        return self._current[self.numbers[index]] == index

    def name(self, number: int) -> str:
        """The name, for a number that has one; also for one that is 2**32 off such a number."""
        if number in self._current:
            return f"fd {self._current[number]}"
        if number - 2**32 in self._current:
            return f"fd {self._current[number - 2**32]} + 2**32"
        return str(number)


Reply = dict[str, str]
"""The members of a reply, each as JSON with sorted keys."""


def canonical(line: bytes, names: FdNames) -> Reply:
    """`line` as a value that equals that of every line which says the same."""
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
    # As text because it tells 1 from true, and compares without recursion.
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
    """Ours are other numbers than QEMU's, in the same shape."""
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
    """The commands that both have, each with its types written out: type names are arbitrary."""
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
                # The schema describes itself by a union, which is as far as we follow it.
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
    """Room for an id that is nested as deeply as QEMU takes it, 1023 levels.

    Only for the moment: elsewhere the usual limit may be what brings a mistake to light.
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
    """1 for 1.0, which is the same number in JSON: QEMU echoes an id that way, we as it came."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _parse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
