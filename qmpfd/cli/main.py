"""The command line: arguments in, exit status out, one line for each error."""

from __future__ import annotations

import argparse
import gc
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

#: The module of each verb, in the order of the help.  It has the verb's SUMMARY, DESCRIPTION,
#: EXAMPLES and OPTIONS, and the function *run*, which returns the exit status, None for 0; it may
#: have an EXIT_STATUS and a USAGE.  Just one is imported to run a verb.
_VERBS = {
    "serve": "serve",
    "add": "add",
    "ls": "ls",
    "rm": "rm",
    "exec": "exec",
    "push": "push",
    "watch": "watch",
    "shell": "shell.verb",
    "status": "status",
    "check-policy": "policy",
    "completion": "completion",
    "tap": "tap",
}

#: The exit statuses of most verbs; others have an EXIT_STATUS of their own.
_EXIT_STATUS = "  0 done, 1 the daemon refused, 2 usage, 3 no daemon"

#: Options that may stand before the verb, and whether a value comes behind them.
_SHARED = {"--socket": True, "--timeout": True, "--json": False}

#: What to do next, by an error's class and a part of its text.
_ADVICE = [
    ("FdNotFound", "' not found", "qmpfd ls lists the stored descriptors"),
    (
        "InvalidParameterValue",
        "existing fdset-id",
        "without --fdset, the daemon makes a new fd set",
    ),
    (
        "PermissionDenied",
        "",
        "the daemon's policy file gives rights; see qmpfd check-policy --help",
    ),
    ("GenericError", "the limit is", "qmpfd status shows the limits and their use"),
    ("CommandNotFound", "", "qmpfd status names the server and its version"),
]


class _Parser(argparse.ArgumentParser):
    """As argparse has it, but with one line for an error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Formatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:  # argparse would not tell whether it can be written
            print(message, end="", flush=True)
        else:
            print_error(message.removesuffix("\n"))


def _parser(verb: str) -> argparse.ArgumentParser:
    """The parser for *verb*; for all verbs if there is no such."""
    parser: argparse.ArgumentParser = _Parser(
        prog="qmpfd",
        description="Store open file descriptors for other programs. The daemon speaks QMP, the "
        "protocol of QEMU's monitor.",
        epilog="Exit status: 0 done, 1 the daemon refused, 2 usage, 3 no daemon.",
    )
    parser.add_argument("--version", action="version", version=f"qmpfd {__version__}")
    commands = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name in [verb] if verb in _VERBS else _VERBS:
        module = importlib.import_module(f".{_VERBS[name]}", __package__)
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
    # Where one is closed, Python has None, and says on the one what was meant for the other.
    sys.stdin = sys.stdin or io.StringIO()
    sys.stdout = sys.stdout or Nowhere()
    sys.stderr = sys.stderr or Nowhere()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what this locale has no sign for
    words = _verb_first(list(sys.argv[1:] if argv is None else argv))
    command: list[str] = []
    if words[:1] in (["exec"], ["completion"]) and "--" in words:
        # Whatever is behind it is the command's, options and further dashes too.
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
        drop(sys.stdout)  # most likely it was that
        if isinstance(exc, BrokenPipeError):  # as if SIGPIPE had ended us: the reader is gone
            return 128 + signal.SIGPIPE
        done = (
            f" (the output failed; this was done: {output.unprinted})" if output.unprinted else ""
        )
        return _fail(f"{exc.strerror or exc}{done}", REFUSED)
    except (MemoryError, ImportError) as exc:  # which says so of a library
        return _fail(str(exc) or "this process is out of memory", REFUSED)
    except Exception as exc:
        # A verb takes each reply for what its command returns; a server may say anything.
        if not hasattr(arguments, "timeout"):  # a verb without a server
            raise
        return _fail(f"the server's reply is not what the command returns: {exc!r}", NO_DAEMON)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print_error("")  # behind the ^C
        return 130
    return status


def _verb_first(words: list[str]) -> list[str]:
    """The words with the verb in front, and the options that stood before it behind it;
    ``help VERB`` is ``VERB --help``.
    """
    at = 0
    while at < len(words) and words[at].partition("=")[0] in _SHARED:
        name, equals, _ = words[at].partition("=")
        at += 2 if _SHARED[name] and not equals else 1
    words = [*words[at : at + 1], *words[:at], *words[at + 1 :]]
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    verb = words[0] if words else ""
    if verb and not verb.startswith("-") and verb not in _VERBS:
        import difflib

        near = difflib.get_close_matches(verb, _VERBS, 1)
        meant = f": did you mean {near[0]}?" if near else ""
        _parser("").exit(
            USAGE, f"qmpfd: unknown verb {printable(verb)}{meant} (see qmpfd --help)\n"
        )
    return words


def program() -> int:
    """The ``qmpfd`` command: the command line, and then the end of the process."""
    status = main()
    # At exit, the interpreter need not look through all that was loaded once more: a tenth of the
    # time of a short verb.
    gc.freeze()
    return status


def _advice(error: QMPError) -> str:
    """Advice for an error whose text has none."""
    for error_class, text, advice in _ADVICE:
        if error.error_class == error_class and text in error.desc:
            return f" ({advice})"
    return ""


def _fail(message: str, status: int) -> int:
    print_error(f"qmpfd: {printable(message)}")
    return status
