"""``qmpfd completion``: scripts with which a shell completes verbs, options and targets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from .exit_codes import DONE
from .options import Subparsers, add_examples

#: Values of these are files.
_FILES = ("PATH", "FILE", "QMP_SOCKET")

#: The targets there are, for verbs that take one: ids, and names behind an @; nothing if there is
#: no daemon.  Names with blanks or a shell's special characters are left out: they want quoting.
#: In each shell, ``$socket`` is the ``--socket`` of the line.  It is not evaluated: whoever presses
#: Tab has not asked for the commands in it to be run.
_IDS = (
    "qmpfd ls --timeout 1 $socket 2>/dev/null | "
    "sed -n -e 's/^\\([0-9][0-9]*\\) .*/\\1/p' "
    "-e 's/^[0-9][0-9]*  *[0-9][0-9]*  *\\([-A-Za-z0-9_.:,+%/]*\\)$/@\\1/p' | sort -u"
)


def add_parsers(verbs: Subparsers) -> None:
    """Add ``completion`` to the command line."""
    parser = verbs.add_parser(
        "completion",
        help="print a completion script for bash, zsh or fish",
        description="Print a script with which a shell completes qmpfd's verbs, options and "
        "targets.",
    )
    parser.add_argument("shell", choices=_SCRIPTS, help="the shell")
    add_examples(
        parser,
        "source <(qmpfd completion bash)     # in ~/.bashrc",
        "source <(qmpfd completion zsh)      # in ~/.zshrc, after compinit",
        "qmpfd completion fish | source      # in ~/.config/fish/config.fish",
        status="  0 done, 2 usage",
    )
    parser.set_defaults(run=_completion)


def _completion(arguments: argparse.Namespace) -> int:
    from .main import _parser

    print(_SCRIPTS[arguments.shell](list(_verbs(_parser("")))))
    return DONE


class _Option(NamedTuple):
    """An option of a verb: its names, what it is, and what its value is, if it takes one."""

    names: list[str]
    help: str
    takes_value: bool
    values: str
    files: bool


class _Verb(NamedTuple):
    """A verb, and what may stand behind it."""

    name: str
    help: str
    options: list[_Option]
    values: str
    ids: bool


def _verbs(parser: argparse.ArgumentParser) -> Iterator[_Verb]:
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for choice in verbs._choices_actions:
        options: list[_Option] = []
        values, ids = "", False
        for action in verbs.choices[choice.dest]._actions:
            choices = " ".join(map(str, action.choices or ()))
            metavar = str(action.metavar)
            if action.option_strings:
                told = (action.help or "").partition(" (default")[0]
                names, takes_value = [*action.option_strings], action.nargs != 0
                options.append(_Option(names, told, takes_value, choices, metavar in _FILES))
            else:
                values, ids = values or choices, ids or metavar.startswith("TARGET")
        yield _Verb(choice.dest, choice.help or "", options, values, ids)


_BASH = """\
# bash completion of qmpfd
_qmpfd() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words= i word
    local -a socket=()
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        words='@VERBS@ --help --version'
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
        return
    fi
    # --socket=PATH is three words to bash.
    [[ $cur == = ]] && cur=
    [[ $prev == = ]] && prev=${COMP_WORDS[COMP_CWORD-2]}
    for ((i = 2; i < COMP_CWORD; i++)); do
        if [[ ${COMP_WORDS[i]} == -- ]]; then
            ((i + 1 == COMP_CWORD)) && words=-c || words=-f
            mapfile -t COMPREPLY < <(compgen "$words" -- "$cur")
            return
        fi
        [[ ${COMP_WORDS[i]} == --socket ]] || continue
        word=${COMP_WORDS[i+1]}
        [[ $word == = ]] && word=${COMP_WORDS[i+2]}
        word=${word//[\\"\\'\\\\]/}
        socket=(--socket "${word/#\\~/$HOME}")
    done
    case "${COMP_WORDS[1]} $prev" in
@OPTIONS@
        *)
            case "${COMP_WORDS[1]} $cur" in
@VALUES@
                *) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
            esac ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}
complete -o filenames -F _qmpfd qmpfd"""


def _bash(verbs: list[_Verb]) -> str:
    options, values = [], []
    for verb in verbs:
        for option in verb.options:
            where = "|".join(f"'{verb.name} {name}'" for name in option.names)
            if option.values:
                options.append(f"        {where}) words='{option.values}' ;;")
            elif option.takes_value:
                files = 'mapfile -t COMPREPLY < <(compgen -f -- "$cur"); ' if option.files else ""
                options.append(f"        {where}) {files}return ;;")
        names = " ".join(name for option in verb.options for name in option.names)
        values.append(f"                '{verb.name} -'*) words='{names}' ;;")
        if verb.ids:
            ids = _IDS.replace("$socket", '"${socket[@]}"')
            values.append(f"                '{verb.name} '*) words=$({ids}) ;;")
        elif verb.values:
            values.append(f"                '{verb.name} '*) words='{verb.values}' ;;")
    return (
        _BASH.replace("@VERBS@", " ".join(verb.name for verb in verbs))
        .replace("@OPTIONS@", "\n".join(options))
        .replace("@VALUES@", "\n".join(values))
    )


_ZSH = """\
#compdef qmpfd
_qmpfd() {
    local -a verbs ids socket
    integer at
    verbs=(
@VERBS@
    )
    if ((CURRENT == 2)); then
        _describe verb verbs
        return
    fi
    local verb=$words[2]
    at=${words[(I)--socket]}
    ((at && at + 1 != CURRENT)) && socket=(--socket ${${(Q)words[at+1]}/#\\~/$HOME})
    at=${words[(I)--socket=*]}
    ((at)) && socket=(--socket ${${${(Q)words[at]}#--socket=}/#\\~/$HOME})
    shift words
    ((CURRENT--))
    case $verb in
@CASES@
    esac
}
compdef _qmpfd qmpfd"""


def _zsh(verbs: list[_Verb]) -> str:
    cases = []
    for verb in verbs:
        specs = [_zsh_option(name, option) for option in verb.options for name in option.names]
        before = ""
        if verb.ids:
            before = f'ids=(${{(f)"$({_IDS})"}}); '
            specs.append("'*:fd set:('\"$ids\"')'")
        elif verb.values:
            specs.append(_quoted(f"*:value:({verb.values})"))
        else:
            specs.append("'*:file:_files'")
        cases.append(f"        {verb.name}) {before}_arguments {' '.join(specs)} ;;")
    names = "\n".join(f"        {_quoted(f'{verb.name}:{verb.help}')}" for verb in verbs)
    return _ZSH.replace("@VERBS@", names).replace("@CASES@", "\n".join(cases))


def _zsh_option(name: str, option: _Option) -> str:
    told = "".join(f"\\{char}" if char in "[]:\\" else char for char in option.help)
    value = ""
    if option.values:
        value = f":value:({option.values})"
    elif option.takes_value:
        value = ":file:_files" if option.files else ":value:"
    return _quoted(f"{name}[{told}]{value}")


def _quoted(text: str) -> str:
    """*text* as a word of zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


_FISH = """\
# fish completion of qmpfd
function __qmpfd_ids
    set -l words (commandline -opc)
    set -l socket (string match -r -g -- '^--socket=(.+)' $words)
    if set -l at (contains -i -- --socket $words)
        set -a socket $words[(math $at + 1)..(math $at + 1)]
    end
    set socket (string replace -r -- '^~' $HOME $socket)
    set -q socket[1]; and set socket --socket $socket[-1]
    @IDS@
end
complete -c qmpfd -f"""


def _fish(verbs: list[_Verb]) -> str:
    first = f"-n 'not __fish_seen_subcommand_from {' '.join(verb.name for verb in verbs)}'"
    lines = [_FISH.replace("@IDS@", _IDS)]
    for verb in verbs:
        lines.append(f"complete -c qmpfd {first} -a {verb.name} -d {_fish_quoted(verb.help)}")
        after = f"complete -c qmpfd -n '__fish_seen_subcommand_from {verb.name}'"
        for option in verb.options:
            words = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                for name in option.names
            )
            if option.values:
                words += f" -x -a '{option.values}'"
            elif option.takes_value:
                words += " -r -F" if option.files else " -x"
            lines.append(f"{after} {words} -d {_fish_quoted(option.help)}")
        if verb.ids:
            lines.append(f"{after} -a '(__qmpfd_ids)'")
        elif verb.values:
            lines.append(f"{after} -a '{verb.values}'")
        else:
            lines.append(f"{after} -F")
    return "\n".join(lines)


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
