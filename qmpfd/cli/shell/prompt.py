"""Where ``qmpfd shell`` gets its lines on a terminal: prompt_toolkit, or readline without it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .syntax import unfinished

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document

    from .session import Session

PROMPT, MORE = "qmp> ", "...> "

#: Lines that are kept from one shell to the next.
_HISTORY = 2000


def lines(session: Session) -> Iterator[str]:
    """What the person types, command by command; ends when that person is done.

    An interrupt drops the line that is being typed.
    """
    try:
        import prompt_toolkit  # noqa: F401 - whether it is installed
    except ImportError:
        return _with_readline(session)
    return _with_prompt_toolkit(session)


def _history_file(name: str) -> Path | None:
    """A file that only its owner can read; None if there can be none."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(state, "qmpfd", name)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return None
    return path


# -- prompt_toolkit ----------------------------------------------------------------------------


def _with_prompt_toolkit(session: Session) -> Iterator[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.patch_stdout import patch_stdout

    schema = session.schema

    class Names(Completer):
        """Commands, arguments and values out of the schema."""

        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterator[Completion]:
            before = document.current_line_before_cursor
            start = len(before) - before.rfind(" ") - 1
            for text, meta in schema.complete(before):
                yield Completion(text, -start, display_meta=meta)

    def toolbar() -> str:
        words = get_app().current_buffer.text.split()
        if words and words[0] in schema.commands():
            return schema.signature(words[0])
        return "help lists the commands, Tab completes, Ctrl-D leaves"

    history = _history_file("shell-history")
    prompt: PromptSession[str] = PromptSession(
        PROMPT,
        completer=Names(),
        complete_while_typing=False,
        history=InMemoryHistory() if history is None else FileHistory(str(history)),
        multiline=Condition(lambda: unfinished(get_app().current_buffer.text)),
        prompt_continuation=lambda width, number, wrapped: MORE,
        bottom_toolbar=toolbar,
        enable_suspend=True,
    )
    with patch_stdout():
        while True:
            try:
                yield prompt.prompt()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return


# -- readline ----------------------------------------------------------------------------------


def _with_readline(session: Session) -> Iterator[str]:
    try:
        import readline
    except ImportError:  # a Python without it: input() does what it can
        yield from _typed(lambda: "")
        return
    history = _history_file("shell-history.readline")
    if history is not None:
        try:
            readline.read_history_file(history)
        except OSError:
            history = None
    readline.set_history_length(_HISTORY)
    readline.set_completer_delims(" \t\n")
    readline.set_completer(_completer(session, readline.get_line_buffer, readline.get_begidx))
    readline.parse_and_bind("tab: complete")

    def show(text: str) -> None:
        # Above the line that is being typed, which is drawn again below.
        sys.stdout.write(f"\r\x1b[K{text}\n{PROMPT}{readline.get_line_buffer()}")
        sys.stdout.flush()

    session.show = show
    try:
        yield from _typed(readline.get_line_buffer)
    finally:
        readline.set_completer(None)
        if history is not None:
            readline.write_history_file(history)


def _completer(
    session: Session, buffer: Callable[[], str], begin: Callable[[], int]
) -> Callable[[str, int], str | None]:
    schema = session.schema

    def complete(word: str, state: int) -> str | None:
        found: list[str] = []
        for text, meta in schema.complete(buffer()[: begin()] + word):
            found.append(text)
            if text.endswith("="):
                # readline puts a blank behind a word that it is sure of; with two it is not.
                found.append(f"{text}<{meta}>")
        return found[state] if state < len(found) else None

    return complete


def _typed(buffer: Callable[[], str]) -> Iterator[str]:
    text = ""
    while True:
        try:
            text += input(MORE if text else PROMPT)
        except KeyboardInterrupt:
            print()
            text = ""
            continue
        except EOFError:
            print()
            return
        if unfinished(text):
            text += "\n"
            continue
        yield text
        text = ""
