"""The reference of the command line, out of its parsers; all functions return Markdown."""

from __future__ import annotations

import argparse
import os
import re

from qmpfd.cli.main import _parser


def parsers() -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Each verb's summary and parser, in the order of the help."""
    found: dict[str, tuple[str, argparse.ArgumentParser]] = {}
    for action in _parser("")._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                found[choice.dest] = (choice.help or "", action.choices[choice.dest])
    return found


def _plain(text: str) -> str:
    """*text* so that Markdown leaves it alone: neither names with ``$`` nor patterns with ``*``."""
    return re.sub(r"([*_<>\[\]`|\\])", r"\\\1", text)


def _paragraphs(text: str | None) -> list[str]:
    """Text of a parser, as paragraphs; but its examples as they are typed."""
    lines: list[str] = []
    for part in re.split(r"\n\s*\n", (text or "").strip("\n")):
        head, _, rest = part.partition(":\n")
        if head == "examples":
            lines += ["Examples:", "", "```sh"]
            lines += [*(line.strip() for line in rest.splitlines()), "```", ""]
        elif words := " ".join(part.split()):
            lines += [_plain(words[0].upper() + words[1:]), ""]
    return lines


def _usage(parser: argparse.ArgumentParser) -> str:
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        head = "usage: "
        lines = parser.format_usage().rstrip().splitlines()
        return "\n".join([lines[0].removeprefix(head), *(line[len(head) :] for line in lines[1:])])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _definitions(parser: argparse.ArgumentParser) -> list[str]:
    """What the parser takes, word by word."""
    lines: list[str] = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(
            action, (argparse._HelpAction, argparse._SubParsersAction)
        ):
            continue
        lines += [_name(action), f": {_plain(_help(parser, action))}", ""]
    return lines


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    told = (action.help or "") % {**vars(action), "prog": parser.prog}
    return told or "No more is known of it."


def _name(action: argparse.Action) -> str:
    value = action.metavar or action.dest
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if isinstance(value, tuple):
        value = " ".join(value)
    if not action.option_strings:
        return f"`{value}`"
    takes = "" if action.nargs == 0 else f" {value}"
    return ", ".join(f"`{option}{takes}`" for option in action.option_strings)


def options() -> str:
    """What comes before the verb."""
    return "\n".join(_definitions(_parser("")))


def verbs() -> str:
    """Every verb, with what it takes."""
    lines: list[str] = []
    for verb, (summary, parser) in parsers().items():
        lines += [f"## qmpfd {verb}", ""]
        lines += ["```text", _usage(parser), "```", ""]
        lines += _paragraphs(parser.description or f"{summary.capitalize()}.")
        lines += _definitions(parser)
        lines += _paragraphs(parser.epilog)
    return "\n".join(lines)
