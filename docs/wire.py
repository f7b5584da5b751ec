"""The wire reference, out of the table of commands; all functions return Markdown.

What the table does not know, the right that a command needs and the errors it may meet, is
written here; ``tests/test_docs.py`` asks a daemon whether it is so.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct

from qmpfd import errors as qmp_errors
from qmpfd.commands import TABLE
from qmpfd.commands.events import EVENTS
from qmpfd.commands.table import Command
from qmpfd.errors import QMPError
from qmpfd.limits import SCM_MAX_FD, TAKEOVER_FORMAT
from qmpfd.policy import Right, Rule
from qmpfd.protocol.arguments import bare_type

#: The right that each command needs; one that is not here needs none.
RIGHTS: dict[str, Right] = {
    "add-fd": "add",
    "add-fds": "add",
    "getfd": "add",
    "remove-fd": "remove",
    "remove-fds": "remove",
    "query-fdsets": "query",
    "query-fds": "query",
    "query-stats": "query",
    "watch-fdsets": "query",
    "open-fdset": "open",
    "quit": "admin",
    "takeover": "admin",
}


class Case(NamedTuple):
    """A request that is refused.

    Args:
        command: its command.
        arguments: its arguments.
        fds: how many descriptors, of files, are sent with it.
        error_class: the class of the error, in the dialect ``spec``.
        desc: its text.
        when: what is wrong.
        full: only where the daemon may keep just the one descriptor that it has.
    """

    command: str
    arguments: dict[str, Any]
    fds: int
    error_class: str
    desc: str
    when: str
    full: bool = False


_NO_FD = (
    "FdNotSupplied",
    "No file descriptor supplied via SCM_RIGHTS",
    "no descriptor was sent with the command",
)
_NO_SET = ("FdNotFound", "File descriptor named 'fdset-id:7' not found", "there is no such fd set")
_NEW_SET = (
    "InvalidParameterValue",
    "Parameter 'fdset-id' expects an existing fdset-id",
    "there is no such fd set (in the dialect `qemu`, it is created)",
)
_FULL = (
    "GenericError",
    "Too many file descriptors: the limit is 1",
    "the daemon holds as many descriptors as `--max-fds` permits",
    True,
)

#: Refused by a daemon whose fd set 0 has one descriptor, of a file open for reading.
CASES = [
    Case(
        "qmp_capabilities",
        {},
        0,
        "CommandNotFound",
        "Capabilities negotiation is already complete, command ignored",
        "the connection has sent this command before",
    ),
    Case("add-fd", {}, 0, *_NO_FD),
    Case("add-fd", {"fdset-id": 7}, 1, *_NEW_SET),
    Case("add-fd", {}, 1, *_FULL),
    Case("add-fds", {}, 0, *_NO_FD),
    Case("add-fds", {"fdset-id": 7}, 2, *_NEW_SET),
    Case(
        "add-fds",
        {"expires": 0},
        1,
        "InvalidParameterValue",
        "Parameter 'expires' expects a positive number of seconds",
        "0 or a negative number",
    ),
    Case(
        "add-fds",
        {"watch-hangup": True},
        1,
        "InvalidParameterValue",
        "Parameter 'watch-hangup' expects sockets or pipes only",
        "the descriptor is neither a socket nor a pipe",
    ),
    Case("add-fds", {}, 2, *_FULL),
    Case("remove-fd", {"fdset-id": 7}, 0, *_NO_SET),
    Case(
        "remove-fd",
        {"fdset-id": 0, "fd": 999},
        0,
        "FdNotFound",
        "File descriptor named 'fdset-id:0, fd:999' not found",
        "the fd set has no descriptor of this number",
    ),
    Case("getfd", {"fdname": "disk"}, 0, *_NO_FD),
    Case(
        "getfd",
        {"fdname": "1st"},
        1,
        "InvalidParameterValue",
        "Parameter 'fdname' expects a name not starting with a digit",
        "the name begins with a digit",
    ),
    Case("getfd", {"fdname": "disk"}, 1, *_FULL),
    Case(
        "closefd",
        {"fdname": "disk"},
        0,
        "FdNotFound",
        "File descriptor named 'disk' not found",
        "this connection has stored no descriptor under this name",
    ),
    Case("open-fdset", {"fdset-id": 7}, 0, *_NO_SET),
    Case(
        "open-fdset",
        {"fdset-id": 0, "access": "wronly"},
        0,
        "FdNotFound",
        "No file descriptor with access mode 'wronly' in 'fdset-id:0', only 'rdonly'",
        "no descriptor of the fd set has this access mode",
    ),
    Case("query-fds", {"fdset-id": 7}, 0, *_NO_SET),
    Case("remove-fds", {"fdset-id": 7}, 0, *_NO_SET),
    Case(
        "remove-fds",
        {},
        0,
        "GenericError",
        "Parameter 'fdset-id' is missing, or another member of the selector",
        "it would remove everything",
    ),
    Case(
        "takeover",
        {"format": 0},
        0,
        "InvalidParameterValue",
        f"Parameter 'format' expects {TAKEOVER_FORMAT}, this daemon's, or a newer one",
        "the new daemon is an older version, and cannot read the state of this one",
    ),
]

#: Refused whatever the command; told of one that has such an argument.
COMMON_CASES = [
    Case(
        "query-everything",
        {},
        0,
        "CommandNotFound",
        "The command query-everything has not been found",
        "no such command",
    ),
    Case(
        "remove-fd",
        {},
        0,
        "GenericError",
        "Parameter 'fdset-id' is missing",
        "a required argument is missing",
    ),
    Case(
        "remove-fd",
        {"fdset-id": "0"},
        0,
        "GenericError",
        "Invalid parameter type for 'fdset-id', expected: integer",
        "an argument has the wrong type",
    ),
    Case(
        "open-fdset",
        {"fdset-id": 0, "access": "any"},
        0,
        "GenericError",
        "Parameter 'access' does not accept value 'any'",
        "an argument has a value that is not in its list",
    ),
    Case(
        "query-fdsets",
        {"all": True},
        0,
        "GenericError",
        "Parameter 'all' is unexpected",
        "the command does not have this argument",
    ),
]


# -- types in words ----------------------------------------------------------------------------


def type_words(annotation: Any) -> str:
    """A type as JSON has it."""
    kind = bare_type(annotation)
    if typing.get_origin(kind) is Literal:
        return " or ".join(f'`"{value}"`' for value in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"array of {type_words(typing.get_args(kind)[0])}"
    return {int: "integer", str: "string", bool: "boolean", float: "number"}.get(kind, "object")


def member_docs(struct: type[Struct]) -> dict[str, str]:
    """What the docstring of *struct*, or of a base, says of each member, by its name in Python."""
    found: dict[str, str] = {}
    for each in reversed(struct.__mro__):
        section = inspect.cleandoc(each.__dict__.get("__doc__") or "").partition("Args:\n")[2]
        for name, text in re.findall(r"^    (\w+): ((?:.|\n {8})*)", section, re.MULTILINE):
            found[name] = " ".join(text.split()).replace("``", "`")
    return found


def _inner(annotation: Any) -> type[Struct] | None:
    """The struct that a type comes down to, if any."""
    kind = bare_type(annotation)
    if typing.get_origin(kind) is list:
        return _inner(typing.get_args(kind)[0])
    return kind if isinstance(kind, type) and issubclass(kind, Struct) else None


def rows(struct: type[Struct], before: str = "") -> list[str]:
    """A row for each member of *struct*, and for each member of a member."""
    docs = member_docs(struct)
    lines = []
    for field in msgspec.structs.fields(struct):
        name = f"{before}{field.encode_name}"
        optional = "" if field.required else ", optional"
        lines.append(
            f"| `{name}` | {type_words(field.type)}{optional} | {docs.get(field.name, '')} |"
        )
        inner = _inner(field.type)
        if inner is not None:
            is_list = typing.get_origin(bare_type(field.type)) is list
            lines += rows(inner, f"{name}[]." if is_list else f"{name}.")
    return lines


def _table(head: str, lines: list[str]) -> list[str]:
    return [head, re.sub(r"[^|]+", "---", head), *lines, ""]


def _members(what: str, struct: type[Struct], before: str = "") -> list[str]:
    return _table(f"| {what} | type | meaning |", rows(struct, before))


# -- the parts of the page ---------------------------------------------------------------------


def _command(command: Command[Any]) -> list[str]:
    doc = inspect.cleandoc(command.run.__doc__ or "").partition("\n\nRaises:")[0].replace("``", "`")
    right = RIGHTS.get(command.name)
    takes = {0: "", 1: "Takes 1 descriptor."}.get(
        command.fds, f"Takes up to {SCM_MAX_FD} descriptors."
    )
    needs = f"Needs the right `{right}`." if right else "Needs no right."
    lines = [f"### {command.name}", "", doc, "", f"{takes} {needs}".strip(), ""]
    if msgspec.structs.fields(command.arguments):
        lines += _members("argument", command.arguments)
    result = _inner(command.returns)
    is_list = typing.get_origin(bare_type(command.returns)) is list
    if result is not None and msgspec.structs.fields(result):
        lines += _members("result", result, "[]." if is_list else "")
    else:
        lines += ["Returns an empty object.", ""]
    cases = [case for case in CASES if case.command == command.name]
    if cases:
        lines += _table("| error | text | when |", [_case(case) for case in cases])
    return lines


def _case(case: Case) -> str:
    return f"| `{case.error_class}` | {case.desc} | {case.when} |"


def commands() -> str:
    """Every command, with its arguments, result, right and errors."""
    return "\n".join(line for command in TABLE.commands.values() for line in _command(command))


def events() -> str:
    """Every event, with its data."""
    lines: list[str] = []
    for name, data in EVENTS.items():
        lines += [f"### {name}", "", (inspect.getdoc(data) or "").partition("\n")[0], ""]
        lines += _members("data", data)
    return "\n".join(lines)


def error_classes() -> list[type[QMPError]]:
    """The error classes that a peer can be told."""
    return sorted(QMPError.__subclasses__(), key=lambda each: each.__name__)


def errors() -> str:
    """Every error class, and the errors that any command can meet."""
    lines = []
    for each in error_classes():
        qemu = each.__name__ if each.__name__ in qmp_errors.QEMU_CLASSES else "GenericError"
        summary = (inspect.getdoc(each) or "").replace("``", "`")
        lines.append(f"| `{each.__name__}` | `{qemu}` | {' '.join(summary.split())} |")
    told = []
    for case in COMMON_CASES:
        request = json.dumps({"execute": case.command, "arguments": case.arguments})
        told.append(f"| `{case.error_class}` | {case.desc} | {case.when}: `{request}` |")
    return "\n".join(
        [
            *_table("| class in `spec` | class in `qemu` | |", lines),
            "Any command can meet these:",
            "",
            *_table("| error | text | when |", told),
        ]
    )


def rights() -> str:
    """Every right, with the commands that need it."""
    told = []
    for right in typing.get_args(Right):
        needing = ", ".join(f"`{name}`" for name, needed in RIGHTS.items() if needed == right)
        told += [f"`{right}`", f": {needing}", ""]
    return "\n".join(told)


def rule() -> str:
    """The members of a rule of the policy file."""
    lines = []
    docs = member_docs(Rule)
    for field in msgspec.structs.fields(Rule):
        optional = "" if field.required else ", optional"
        lines += [f"`{field.encode_name}` ({type_words(field.type)}{optional})"]
        lines += [f": {docs[field.name]}", ""]
    return "\n".join(lines)
