"""The reference of the Python library, from its signatures and docstrings: ``make reference``."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import qmpfd
import qmpfd.testing

ROOT = Path(__file__).resolve().parent.parent
_WIDTH = 92

_CALLS = (
    "greeting execute add_fd remove_fd query_fdsets open_fdset add_fds query_fds remove_fds "
    "watch_fdsets events close"
)

#: What each section of the page explains: names of the package, and their members that are public.
SECTIONS: dict[str, dict[str, str]] = {
    "client": {
        "connect": "",
        "Client": _CALLS,
        "Selector": "",
        "QMPEvent": "",
        "Fd": "fileno closed detach dup close",
        "fdset_opener": "",
    },
    "blocking": {"connect_blocking": "", "BlockingClient": "watch_fdsets events close"},
    "results": {"AddfdInfo": "", "FdsetInfo": "", "FdsetFdInfo": "", "FdInfo": "", "PeerInfo": ""},
    "server": {
        "serve": "",
        "Server": "stop ended change_policy",
        "Limits": "",
        "Policy": "",
        "Rule": "",
        "load_policy": "",
    },
    "exceptions": {
        "QMPError": "",
        "GenericError": "",
        "CommandNotFound": "",
        "FdNotSupplied": "",
        "FdNotFound": "",
        "FdExists": "",
        "InvalidParameterValue": "",
        "PermissionDenied": "",
        "ReplyLost": "",
        "ProtocolError": "",
        "NoDaemon": "",
        "ClientClosed": "",
        "SocketInUse": "",
        "BadPolicy": "",
    },
    "testing": {"daemon": "", "daemon_process": "", "DaemonProcess": "pid open_fds kill"},
}


def _markdown(text: str) -> str:
    """A paragraph of a docstring."""
    text = re.sub(r":\w+:`(?:~[\w.]+\.)?([^`]+)`", r"`\1`", text)
    return " ".join(text.replace("``", "`").split())


def _items(text: str, defaults: Mapping[str, object]) -> Iterator[str]:
    for name, what in re.findall(r"^    ([\w*]+): ((?:.|\n {8})*)", text, re.MULTILINE):
        default = f" Default: {defaults[name]}." if name in defaults else ""
        yield f"- `{name}`: {_markdown(what)}{default}"


def docs(obj: Any, members: str = "Arguments") -> list[str]:
    """What the docstring of *obj* says.

    Args:
        obj: a class, a function or a property.
        members: what is described below ``Args:``; none of it if empty.
    """
    lines: list[str] = []
    defaults = getattr(obj, "_field_defaults", {})  # of a named tuple
    text, *sections = re.split(
        r"^(Args|Returns|Yields|Raises):\n", inspect.getdoc(obj) or "", flags=re.MULTILINE
    )
    for paragraph in text.strip().split("\n\n"):
        lines += [_markdown(paragraph), ""]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title == "Args" and not members:
            continue
        if title in ("Args", "Raises"):
            lines += [f"{members if title == 'Args' else title}:", "", *_items(body, defaults), ""]
        else:
            lines += [f"{title}: {_markdown(body)}", ""]
    return lines


def _parameter(parameter: inspect.Parameter) -> str:
    text = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
    if isinstance(parameter.annotation, str):
        text += f": {parameter.annotation}"
    if parameter.default is not parameter.empty:
        default = oct(parameter.default) if "mode" in parameter.name else repr(parameter.default)
        text += f" = {default}"
    return text


def _how(function: Callable[..., Any], returned: str) -> str:
    """What is written before a call of *function*."""
    generator = inspect.unwrap(function)
    if inspect.iscoroutinefunction(function):
        return "await "
    if inspect.isasyncgenfunction(generator):
        return "async with "
    if inspect.isgeneratorfunction(generator) or returned == "Fd":
        return "with "
    return ""


def signature(name: str, function: Callable[..., Any]) -> list[str]:
    """How *function* is called, in a fenced block."""
    found = inspect.signature(function)
    parameters: list[str] = []
    keywords = False
    for each in found.parameters.values():
        if each.name in ("self", "task_status"):
            continue
        if each.kind is each.KEYWORD_ONLY and not keywords:
            parameters.append("*")
            keywords = True
        keywords |= each.kind is each.VAR_POSITIONAL
        parameters.append(_parameter(each))
    returned = found.return_annotation if isinstance(found.return_annotation, str) else ""
    how = _how(function, returned)
    if inner := re.fullmatch(
        r"(?:Async)?(?:Generator|Iterator)\[(.*?)(?:, None)?(?:, None)?\]", returned
    ):
        returned = inner[1] if "with" in how else returned
    result = f" -> {returned}" if returned not in ("", "None") else ""
    line = f"{how}{name}({', '.join(parameters)}){result}"
    if len(line) > _WIDTH:
        inside = "".join(f"    {parameter},\n" for parameter in parameters)
        line = f"{how}{name}(\n{inside}){result}"
    return ["```text", line, "```", ""]


def _source(obj: Any) -> str:
    """A link to the file that defines *obj*."""
    path = Path(inspect.getfile(importlib.import_module(obj.__module__))).resolve()
    return f"[source](../../{path.relative_to(ROOT).as_posix()})"


def _class(name: str, cls: type, members: str) -> list[str]:
    has_members = issubclass(cls, tuple | dict) or hasattr(cls, "__struct_fields__")
    made_by_connect = name in ("Client", "BlockingClient")
    arguments = "" if made_by_connect else "Arguments"
    lines = docs(cls, "Members" if has_members or name == "DaemonProcess" else arguments)
    if issubclass(cls, Exception):
        lines += ["Bases: " + ", ".join(f"`{base.__name__}`" for base in cls.__bases__) + ".", ""]
    for member in members.split():
        value = inspect.getattr_static(cls, member)
        lines += [f"#### {name}.{member}", ""]
        if callable(value):
            lines += signature(member, value)
        lines += docs(value)
    return lines


def section(name: str) -> str:
    """What the page says of the names of a section."""
    home = qmpfd.testing if name == "testing" else qmpfd
    lines: list[str] = []
    for each, members in SECTIONS[name].items():
        obj = getattr(home, each)
        lines += [f"### {each}", "", _source(obj), ""]
        if inspect.isclass(obj):
            lines += _class(each, obj, members)
        else:
            lines += [*signature(each, obj), *docs(obj)]
    return "\n".join(lines)
