"""Reads the lines of ``qmpfd shell`` from a terminal: with prompt_toolkit, else with readline."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .syntax import unfinished

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document

    from .session import Session

PROMPT, MORE = "qmp> ", "...> "

#: Maximum number of lines in the history file.
_HISTORY = 2000


def lines(session: Session) -> Iterator[str]:
    """Iterate over the commands that the user types, until Ctrl-D.

    SIGINT discards the line that is being typed.
    """
    try:
        import prompt_toolkit  # noqa: F401 - whether it is installed
    except ImportError:
        return _with_readline(session)
    return _with_prompt_toolkit(session)


def _history_file(name: str) -> Path | None:
    """Return the path of a history file with mode 0600; None if it cannot be created."""
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
        """Completes commands, arguments and values from the schema."""

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
    except ImportError:  # this Python lacks readline: input() without history and completion
        yield from _typed()
        return
    history = _history_file("shell-history.readline")
    if history is not None:
        try:
            readline.read_history_file(history)
        except OSError:
            history = None
    readline.set_history_length(_HISTORY)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")

    def complete(word: str, state: int) -> str | None:
        found: list[str] = []
        before = readline.get_line_buffer()[: readline.get_begidx()]
        for text, meta in session.schema.complete(before + word):
            found.append(text)
            if text.endswith("="):
                # readline appends a blank to a sole match: with a second match it does not.
                found.append(f"{text}<{meta}>")
        return found[state] if state < len(found) else None

    def show(text: str) -> None:
        # Print *text* above the line that is being typed, and draw that line again.
        sys.stdout.write(f"\r\x1b[K{text}\n{PROMPT}{readline.get_line_buffer()}")
        sys.stdout.flush()

    readline.set_completer(complete)
    session.show = show
    try:
        yield from _typed()
    finally:
        readline.set_completer(None)
        if history is not None:
            readline.write_history_file(history)


def _typed() -> Iterator[str]:
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
