"""``qmpfd completion``: completion of ``qmpfd`` command lines in a shell.

The scripts run ``qmpfd completion SHELL -- LINE`` for each Tab; the candidates for the end of the
line come from the argument parsers.  The line is not evaluated: pressing Tab must not run the
command substitutions in it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Iterable
from itertools import pairwise

from .exit_codes import UsageError
from .options import client_of, option
from .targets import listed

#: Output in place of candidates: the shell completes names of files, or of commands.
_FILES, _COMMANDS = ":files", ":commands"

#: Metavars of options and arguments that take the name of a file.
_PATHS = ("PATH", "PATH|-", "FILE", "QMP_SOCKET", "LISTEN", "SERVER")

#: Targets that are offered: they need no quotes in any of the shells, and their ends are not read
#: as :ACCESS.
_OFFERED = re.compile(r"@?[-A-Za-z0-9_.:,+%/]+(?<!:r)(?<!:w)(?<!:rw)(?<!:(?:rd|wr)only)(?<!:rdwr)")

#: Seconds that the daemon has to list the stored descriptors.
_TIMEOUT = 1.0

_SCRIPTS = {
    # bash replaces $2 only, which begins after the last = or : of a word.
    "bash": """\
_qmpfd() {
    local found=$(qmpfd completion bash -- "${COMP_LINE:0:COMP_POINT}" "$2" 2>/dev/null)
    COMPREPLY=()
    case $found in
        '') ;;
        :files) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$2") ;;
        :commands) mapfile -t COMPREPLY < <(compgen -c -- "$2") ;;
        *) mapfile -t COMPREPLY <<< "$found" ;;
    esac
}
complete -F _qmpfd qmpfd""",
    "zsh": """\
#compdef qmpfd
_qmpfd() {
    local -a found
    found=("${(@f)$(qmpfd completion zsh -- "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    case $found[1] in
        '') ;;
        :files) compset -P '--*='; _files ;;
        :commands) _command_names -e ;;
        *) _describe value found ;;
    esac
}
compdef _qmpfd qmpfd""",
    "fish": """\
function __qmpfd_complete
    set -l word (commandline -ct)
    set -l option (string match -r -- '^--[^=]*=' $word)
    set -l found (qmpfd completion fish -- (commandline -cp | string collect) 2>/dev/null)
    switch "$found[1]"
        case :files
            set -l path (string replace -- "$option" '' $word)
            __fish_complete_path "$path" | string replace -r -- '^' "$option"
        case :commands
            complete -C "$word"
        case '*'
            printf '%s\\n' $found
    end
end
complete -c qmpfd -f -a '(__qmpfd_complete)'""",
}

SUMMARY = "print a completion script for bash, zsh or fish"
DESCRIPTION = "Print a script with which a shell completes qmpfd's verbs, options and targets."
EXAMPLES = [
    "source <(qmpfd completion bash)     # in ~/.bashrc",
    "source <(qmpfd completion zsh)      # in ~/.zshrc, after compinit",
    "qmpfd completion fish | source      # in ~/.config/fish/config.fish",
]
EXIT_STATUS = "  0 done, 2 usage"
OPTIONS = [
    option("shell", "the shell", choices=_SCRIPTS),
]


def run(arguments: argparse.Namespace) -> None:
    if not arguments.command:
        print(_SCRIPTS[arguments.shell])
        return
    line, *replaced = arguments.command
    before, word = _words(line)
    found = _candidates(before[1:], word)
    if isinstance(found, str):
        print(found)
        return
    start = len(word) - len(replaced[0]) if replaced else 0
    for name, meaning in found.items():
        if name.startswith(word):
            escaped = name.replace(":", "\\:")
            zsh = f"{escaped}:{meaning}" if meaning else escaped
            print({"bash": name[start:], "zsh": zsh, "fish": f"{name}\t{meaning}"}[arguments.shell])


def _words(line: str) -> tuple[list[str], str]:
    """Split an unfinished command line into its words and the last, perhaps empty, word."""
    for end in ("", "'", '"'):
        try:
            *before, word = shlex.split(f"{line}\0{end}")
        except ValueError:  # a quotation is not closed
            continue
        return before, word[:-1]
    raise UsageError("the line cannot be read")


def _candidates(before: list[str], word: str) -> dict[str, str] | str:
    """Return the candidates for *word* after the words *before*, each with its help; or _FILES or
    _COMMANDS.
    """
    from .main import _SHARED, _parser, _verb_first

    *option, value = _parts(word)
    before = [part for each in before for part in _parts(each)] + option
    verb = "".join(_verb_first(before)[:1])
    top = _parser(verb)
    (verbs,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    if "--" in before:
        return _COMMANDS if before[-1] == "--" else _FILES
    parser = verbs.choices.get(verb) or verbs.choices["ls"]  # ls has all common options
    takers = {
        name: action
        for action in reversed(parser._actions)
        for name in action.option_strings or [""]
        if action.nargs != 0
    }
    action = takers.get(before[-1]) if before else None
    if action is None and verb not in verbs.choices:
        found = {each.dest: each.help or "" for each in verbs._choices_actions} | _options(top)
        return found | {name: text for name, text in _options(parser).items() if name in _SHARED}
    if action is None and value.startswith("-"):
        return _options(parser)
    values = _values(action or takers.get(""), before)
    if isinstance(values, str):
        return values
    return {word.removesuffix(value) + name: "" for name in values}


def _parts(word: str) -> list[str]:
    """Split ``--option=value`` into two parts; return any other word as one."""
    return word.split("=", 1) if word.startswith("--") else [word]


def _options(parser: argparse.ArgumentParser) -> dict[str, str]:
    return {
        name: (action.help or "").partition(" (default")[0]
        for action in parser._actions
        for name in action.option_strings
    }


def _values(action: argparse.Action | None, before: list[str]) -> Iterable[str]:
    """Return the possible values of an option or an argument; or _FILES."""
    metavar = "" if action is None else str(action.metavar)
    if action is not None and action.choices is not None:
        return map(str, action.choices)
    if metavar.startswith("TARGET"):
        return _targets(before)
    return _FILES if metavar in _PATHS else ()


def _targets(before: list[str]) -> Iterable[str]:
    """List the fd sets, and the names of descriptors, of the daemon that the line names."""
    named = [value for option, value in pairwise(before) if option == "--socket"]
    socket = os.path.expanduser(named[-1]) if named else None
    with client_of(argparse.Namespace(socket=socket, timeout=_TIMEOUT)) as client:
        rows = listed(client)
    words = [str(fdset_id) for fdset_id, _ in rows]
    words += [f"@{fd['opaque']}" for _, fd in rows if "opaque" in fd]
    return filter(_OFFERED.fullmatch, dict.fromkeys(words))
