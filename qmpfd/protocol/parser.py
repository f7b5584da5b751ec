"""Incremental JSON parser, with QEMU's errors and QEMU's recovery from them.

A value is complete when its braces and brackets balance, or when either count goes below zero
(QEMU 7.2's ``json-streamer.c``).  The parser builds the value token by token: the cost of each
call is proportional to the bytes of that call.  Of several syntax errors in a value, the first is
reported, at the end of the value.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from ..errors import GenericError
from ..limits import INT64_MIN, MAX_NESTING, MAX_TOKENS, TOKEN_BYTES
from .budget import Budget
from .lexer import Lexer, Token
from .saved import ParserState
from .strings import syntax_error, unquote

_UINT64_MAX = (1 << 64) - 1

_BRACES = {Token.LCURLY: 1, Token.RCURLY: -1}
_BRACKETS = {Token.LSQUARE: 1, Token.RSQUARE: -1}
_KEYWORDS = {b"true": True, b"false": False, b"null": None}


class _Expected(Enum):
    """The kind of token that the grammar allows next."""

    VALUE = auto()
    VALUE_OR_END = auto()  # after [
    KEY_OR_END = auto()  # after {
    KEY = auto()  # after the comma of an object
    COLON = auto()
    COMMA_OR_END = auto()


_KEYS = (_Expected.KEY, _Expected.KEY_OR_END)
_EMPTY = ((_Expected.KEY_OR_END, Token.RCURLY), (_Expected.VALUE_OR_END, Token.RSQUARE))


@dataclass(slots=True)
class _Level:
    """An object or array that is not closed yet."""

    value: dict[str, Any] | list[Any]
    is_key: bool  # stands in the place of a key: an error once it is complete
    key: str = ""


def _number(token: Token, text: bytes) -> int | float:
    """Convert a number to QEMU's type: int64, else uint64, else double."""
    if token is Token.INTEGER and len(text) <= 20:
        value = int(text)
        if INT64_MIN <= value <= _UINT64_MAX:
            return value
    return float(text)


class Parser:
    """Parses bytes into JSON values and errors; an incomplete value is kept for the next call.

    Args:
        max_bytes: maximum size of all tokens of one value.
        budget: limit of the memory for incomplete values; None for no limit.
        owner: the user whom that memory counts for.
    """

    def __init__(
        self, max_bytes: int, budget: Budget | None = None, owner: Hashable = None
    ) -> None:
        self._owner = owner
        self._budget = budget or Budget(sys.maxsize)
        self._lexer = Lexer(max_bytes)
        self._max_bytes = max_bytes
        self._discarding = False  # the value is beyond a limit: its tokens are discarded
        self._given_up = False  # the budget is exceeded: discarding, and the error is not reported
        self._reset()

    def _reset(self) -> None:
        self._braces = self._brackets = self._tokens = self._bytes = 0
        self._stack: list[_Level] = []
        self._expected = _Expected.VALUE
        self._error: GenericError | None = None
        self._discarding = False
        self._lexer.max_token = self._max_bytes
        self._result: Any = None
        self._text = bytearray()  # the tokens of the value in progress

    @property
    def idle(self) -> bool:
        """Whether no value is incomplete: the next token begins one."""
        return self._tokens == 0 and not self._discarding and self._lexer.idle

    def feed(self, data: bytes) -> Iterator[tuple[Any, GenericError | None, int]]:
        """Yield for each value that *data* completes: the value, or None and the parse error; and
        the offset of its end in *data*.
        """
        yield from self._report_given_up(0)
        self._lexer.max_token = 0 if self._discarding else self._max_bytes
        for token, text, end in self._lexer.feed(data):
            if token is Token.ERROR:
                self._reset()
                shown = text.split(b"\0")[0].decode("utf-8", "replace")
                yield None, GenericError(f"JSON parse error, stray '{shown}'"), end
                continue
            self._tokens += 1
            self._bytes += len(text)
            self._braces += _BRACES.get(token, 0)
            self._brackets += _BRACKETS.get(token, 0)
            if not self._discarding:
                limit = self._limit_passed(token)
                if limit is not None:
                    yield None, GenericError(f"JSON {limit} limit exceeded"), end
                    if limit == "nesting depth":
                        self._reset()  # as in QEMU, each unmatched closing token is an error now
                        continue
                    self._discard()
                else:
                    self._text += text + b" "
                    self._accept(token, text)
            if self._braces < 0 or self._brackets < 0 or not (self._braces or self._brackets):
                if token is Token.TOO_BIG:
                    continue  # the end of the token is still to come
                value, error, discarded = self._result, self._error, self._discarding
                self._reset()
                if not discarded:
                    yield value, error, end
        self._charge()
        yield from self._report_given_up(len(data))

    def give_up(self) -> None:
        """Discard the incomplete value: what is parsed, and what is still to come."""
        if not self._discarding:
            self._discard()
            self._given_up = True
        self._lexer.begun.clear()
        self._charge()

    def _discard(self) -> None:
        self._discarding = True
        self._stack.clear()
        self._text.clear()

    def _report_given_up(self, end: int) -> Iterator[tuple[Any, GenericError | None, int]]:
        if self._given_up:
            self._given_up = False
            yield None, GenericError("JSON token size limit exceeded"), end

    def snapshot(self) -> ParserState:
        """Return the state of the incomplete value, for :meth:`restore`."""
        return ParserState(
            b"" if self._discarding else bytes(self._text),
            self._discarding,
            self._braces,
            self._brackets,
            self._lexer.state,
            bytes(self._lexer.begun),
            self._given_up,
        )

    def restore(self, saved: ParserState) -> None:
        """Restore the incomplete value of another parser's :meth:`snapshot`.

        The other parser may have had higher limits: a value beyond the limits of this one is
        refused at its next token.

        Raises:
            ValueError: *saved* is inconsistent.
        """
        limits = self._max_bytes, self._budget
        self._max_bytes, self._budget = sys.maxsize, Budget(sys.maxsize)
        try:
            for _ in self.feed(saved.text):
                raise ValueError("this is not the state of a parser: a value is complete in it")
        finally:
            self._max_bytes, self._budget = limits
        if saved.discarding:
            self._discarding, self._tokens = True, 1
            self._braces, self._brackets = saved.braces, saved.brackets
            self._given_up = saved.given_up
        self._lexer.state, self._lexer.begun = saved.lexer_state, bytearray(saved.begun)
        self._charge()

    def close(self) -> None:
        """Discard the incomplete value and token."""
        self._lexer = Lexer(self._max_bytes)
        self._given_up = False
        self._reset()
        self._charge()

    def _charge(self) -> None:
        """Charge the estimated memory of the incomplete value and token."""
        size = 0 if self._discarding else self._tokens * TOKEN_BYTES + self._bytes
        self._budget.charge(self.give_up, self._owner, size + self._lexer.buffered)

    def _limit_passed(self, token: Token) -> str | None:
        if self._bytes > self._max_bytes or token is Token.TOO_BIG:
            return "token size"
        if self._tokens > MAX_TOKENS:
            return "token count"
        if self._braces + self._brackets > MAX_NESTING:
            return "nesting depth"
        return None

    # -- the grammar ---------------------------------------------------------------------------

    def _accept(self, token: Token, text: bytes) -> None:
        """Add one token to the value; keep the first syntax error."""
        if self._error is not None:
            return
        expected = self._expected
        try:
            if expected is _Expected.COLON:
                if token is not Token.COLON:
                    raise syntax_error("missing : in object pair")
                self._expected = _Expected.VALUE
            elif expected is _Expected.COMMA_OR_END:
                self._separate(token)
            elif (expected, token) in _EMPTY:
                self._end()
            elif token is Token.LCURLY:
                self._begin({}, _Expected.KEY_OR_END)
            elif token is Token.LSQUARE:
                self._begin([], _Expected.VALUE_OR_END)
            else:
                self._complete(_scalar(token, text), expected in _KEYS)
        except GenericError as exc:
            self._error = exc

    def _begin(self, value: dict[str, Any] | list[Any], expected: _Expected) -> None:
        self._stack.append(_Level(value, self._expected in _KEYS))
        self._expected = expected

    def _separate(self, token: Token) -> None:
        in_dict = isinstance(self._stack[-1].value, dict)
        if token is Token.COMMA:
            self._expected = _Expected.KEY if in_dict else _Expected.VALUE
        elif token is (Token.RCURLY if in_dict else Token.RSQUARE):
            self._end()
        else:
            raise syntax_error(f"expected separator in {'dict' if in_dict else 'list'}")

    def _end(self) -> None:
        level = self._stack.pop()
        self._complete(level.value, level.is_key)

    def _complete(self, value: Any, is_key: bool) -> None:
        """Add a complete value to the enclosing object or array, or make it the result."""
        if not self._stack:
            self._result = value
            return
        level = self._stack[-1]
        if is_key:
            if not isinstance(value, str):
                raise syntax_error("key is not a string in object")
            level.key = value
            self._expected = _Expected.COLON
            return
        self._expected = _Expected.COMMA_OR_END
        if isinstance(level.value, list):
            level.value.append(value)
        elif level.key in level.value:
            raise syntax_error("duplicate key")
        else:
            level.value[level.key] = value


def _scalar(token: Token, text: bytes) -> Any:
    """Return the value of a string, number or keyword token."""
    if token is Token.STRING:
        return unquote(text)
    if token is Token.INTEGER or token is Token.FLOAT:
        return _number(token, text)
    if token is not Token.KEYWORD:
        raise syntax_error("expecting value")
    if text not in _KEYWORDS:
        raise syntax_error(f"invalid keyword '{text.decode('ascii')}'")
    return _KEYWORDS[text]
