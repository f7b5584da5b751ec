"""The command line: parses arguments, runs a verb, reports errors in one line, returns a status."""

from __future__ import annotations

import argparse
import importlib
import io
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .._version import __version__
from ..client.blocking import NoDaemon
from ..errors import QMPError
from . import output
from .exit_codes import DONE, NO_DAEMON, REFUSED, USAGE, UsageError
from .options import Formatter
from .output import Nowhere, drop, print_error, printable

#: The module of each verb, in the order of the help.  A module has the verb's SUMMARY, DESCRIPTION,
#: EXAMPLES and OPTIONS, and the function *run*, which returns the exit status or None for 0; it may
#: have an EXIT_STATUS and a USAGE.  To run a verb, only its module is imported.
_VERBS = (
    *("serve", "add", "ls", "rm", "exec", "push", "watch", "shell", "status", "check-policy"),
    *("completion", "tap"),
)

#: Help on exit statuses of verbs that have no EXIT_STATUS of their own.
_EXIT_STATUS = "  0 done, 1 the daemon refused, 2 usage, 3 no daemon"

#: Options that may precede the verb, and whether each takes a value.
_SHARED = {"--socket": True, "--timeout": True, "--json": False}

#: Options that stand in place of a verb.
_ALONE = ("-h", "--help", "--version")

_POLICY_ADVICE = "the daemon's policy file gives rights; see qmpfd check-policy --help"

#: Advice for an error, by a part of its text: the dialect ``qemu`` has one class for most errors.
_ADVICE = {
    "' not found": "qmpfd ls lists the stored descriptors",
    "existing fdset-id": "without --fdset, the daemon makes a new fd set",
    "The right '": _POLICY_ADVICE,
    "may not connect": _POLICY_ADVICE,
    "Too many connections": "serve --max-connections sets the limit",
    "the limit is": "qmpfd status shows the limits and their use",
    "has not been found": "qmpfd status names the server and its version",
}


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Formatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; report unknown words as the verb's: argparse leaves them to the parser of all."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:  # argparse would ignore an OSError of the write
            print(message, end="", flush=True)
        else:
            print_error(message.removesuffix("\n"))


def _parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser for *verb*, or for all verbs if *verb* is not one."""
    parser: argparse.ArgumentParser = _Parser(
        prog="qmpfd",
        description="Store open file descriptors for other programs. The daemon speaks QMP, the "
        "protocol of QEMU's monitor.",
        epilog="Exit status: 0 done, 1 the daemon refused, 2 usage, 3 no daemon.",
    )
    parser.add_argument("--version", action="version", version=f"qmpfd {__version__}")
    commands = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name in [verb] if verb in _VERBS else _VERBS:
        module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
        examples = "\n".join(f"  {example}" for example in module.EXAMPLES)
        status = getattr(module, "EXIT_STATUS", _EXIT_STATUS)
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            usage=getattr(module, "USAGE", None),
            description=module.DESCRIPTION,
            epilog=f"examples:\n{examples}\n\nexit status:\n{status}",
        )
        for add_option in module.OPTIONS:
            add_option(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done, 1 the daemon refused, 2 usage, 3 no daemon.
    """
    # Python has None for a closed stream, and argparse would print to the other one instead.
    sys.stdin = sys.stdin or io.StringIO()
    sys.stdout = sys.stdout or Nowhere()
    sys.stderr = sys.stderr or Nowhere()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # characters that the locale lacks
    words = _verb_first(list(sys.argv[1:] if argv is None else argv))
    command: list[str] = []
    if words[:1] in (["exec"], ["completion"]) and "--" in words:
        # All words after the first -- belong to the command, options and a second -- too.
        cut = words.index("--")
        words, command = words[:cut], words[cut + 1 :]
    arguments = argparse.Namespace()
    try:
        arguments = _parser(words[0] if words else "").parse_args(words)
        arguments.command = command
        status: int = arguments.run(arguments) or DONE
        sys.stdout.flush()
    except UsageError as exc:
        return _fail(str(exc), USAGE)
    except NoDaemon as exc:
        advice = " (--timeout S waits longer)" if isinstance(exc, TimeoutError) else ""
        return _fail(f"{exc}{advice}", NO_DAEMON)
    except QMPError as exc:
        return _fail(f"{exc.error_class}: {exc.desc}{_advice(exc)}", REFUSED)
    except OSError as exc:
        drop(sys.stdout)  # the error most likely comes from printing to it
        if isinstance(exc, BrokenPipeError):  # no reader: exit as if SIGPIPE had killed us
            return 128 + signal.SIGPIPE
        done = (
            f" (the output failed; this was done: {output.unprinted})" if output.unprinted else ""
        )
        return _fail(f"{exc.strerror or exc}{done}", REFUSED)
    except (MemoryError, ImportError) as exc:  # ImportError: a library could not be loaded
        return _fail(str(exc) or "this process is out of memory", REFUSED)
    except Exception as exc:
        # Verbs do not check the types in replies; a server that is not qmpfd may send others.
        if not hasattr(arguments, "timeout"):  # the verb does not connect to a server
            raise
        return _fail(f"the server's reply is not what the command returns: {exc!r}", NO_DAEMON)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print_error("")  # end the line in which the terminal has echoed ^C
        return 130
    return status


def _verb_first(words: list[str]) -> list[str]:
    """Move options that precede the verb behind it, and return the words; replace ``help VERB`` by
    ``VERB --help``.
    """
    at = 0
    while at < len(words) and words[at].partition("=")[0] in _SHARED:
        name, equals, _ = words[at].partition("=")
        at += 2 if _SHARED[name] and not equals else 1
    if at >= len(words):
        return []
    verb = words[at]
    if verb == "help":
        return [*_verb_first(words[:at] + words[at + 1 :])[:1], "--help"]
    if verb and verb not in (*_VERBS, *_ALONE):
        import difflib

        near = difflib.get_close_matches(verb, _VERBS, 1)
        what = f"unknown verb {verb}" + (f": did you mean {near[0]}?" if near else "")
        if verb.startswith("-"):
            what = f"{verb} cannot precede the verb: only {', '.join(_SHARED)} can"
        _parser("").exit(USAGE, f"qmpfd: {printable(what)} (see qmpfd --help)\n")
    return [verb, *words[:at], *words[at + 1 :]]


def _advice(error: QMPError) -> str:
    """Return advice for an error of the daemon, in brackets; empty if there is none."""
    return next((f" ({advice})" for text, advice in _ADVICE.items() if text in error.desc), "")


def _fail(message: str, status: int) -> int:
    print_error(f"qmpfd: {printable(message)}")
    return status
