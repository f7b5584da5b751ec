"""JSON values out of tokens, with QEMU's errors and its way to recover from them.

A value is complete when its braces and brackets balance, or when either count goes below zero
(QEMU 7.2's ``json-streamer.c``).  It is built while its tokens come, so that no step costs more
than the bytes that were just read; of several syntax errors the first is told, at the value's end.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Hashable, Iterator
from enum import Enum, auto
from typing import Any

from ..errors import GenericError
from ..limits import INT64_MIN, MAX_NESTING, MAX_TOKENS, TOKEN_BYTES
from .lexer import Lexer, Token
from .saved import ParserState
from .strings import BadString, unquote

_UINT64_MAX = (1 << 64) - 1

_KEYWORDS = {b"true": True, b"false": False, b"null": None}


class _Want(Enum):
    """What the grammar allows next."""

    VALUE = auto()
    VALUE_OR_END = auto()  # behind [
    KEY_OR_END = auto()  # behind {
    KEY = auto()  # behind the comma of an object
    COLON = auto()
    COMMA_OR_END = auto()


class _Level:
    """An object or array that is not closed yet."""

    __slots__ = ("is_key", "key", "value")

    def __init__(self, value: dict[str, Any] | list[Any], is_key: bool) -> None:
        self.value = value
        self.is_key = is_key  # it stands where a key should; told once it is complete
        self.key = ""


def _number(token: Token, text: bytes) -> int | float:
    """A number as QEMU keeps it: int64, else uint64, else double."""
    if token is Token.INTEGER and len(text) <= 20:
        value = int(text)
        if INT64_MIN <= value <= _UINT64_MAX:
            return value
    return float(text)


class Budget:
    """Memory that the incomplete values of several parsers share.

    When it is used up, somebody has to give up what it has: whoever of the owner that has the most
    has made no progress for the longest time.  So neither do the silent keep it for ever, nor the
    many of one owner from another.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        self._parsers: dict[Hashable, dict[Parser, int]] = {}  # by owner; oldest progress first
        self._of: Counter[Hashable] = Counter()

    def charge(self, parser: Parser, before: int, now: int) -> None:
        """*parser*, which has used *before* bytes, now uses *now*."""
        owner = parser.owner
        theirs = self._parsers.setdefault(owner, {})
        theirs.pop(parser, None)
        if now:
            theirs[parser] = now
        elif not theirs:
            del self._parsers[owner]
        self._of[owner] += now - before
        self.used += now - before
        while self.used > self.most:
            greediest = max(self._parsers, key=lambda owner: self._of[owner])
            next(iter(self._parsers[greediest])).give_up()


class Parser:
    """Turns bytes into JSON values and errors; keeps what is incomplete for the next call.

    Args:
        max_bytes: bytes of all tokens of one value.
        budget: what all that is kept is taken from; none if None.
        owner: for whom.
    """

    def __init__(
        self, max_bytes: int, budget: Budget | None = None, owner: Hashable = None
    ) -> None:
        self.owner = owner
        self._budget = budget or Budget(sys.maxsize)
        self._charged = 0
        self._lexer = Lexer(max_bytes)
        self._max_bytes = max_bytes
        self._discarding = False  # past a limit: everything is dropped until the value ends
        self._given_up = False  # so it is, and that is still to be told
        self._reset()

    def _reset(self) -> None:
        self._braces = self._brackets = self._tokens = self._bytes = 0
        self._stack: list[_Level] = []
        self._want = _Want.VALUE
        self._error: GenericError | None = None
        self._discarding = False
        self._result: Any = None
        self._text = bytearray()  # the tokens of the value in progress

    @property
    def idle(self) -> bool:
        """Whether nothing is in progress: what comes next begins a value."""
        return self._tokens == 0 and not self._discarding and self._lexer.idle

    def feed(self, data: bytes) -> Iterator[tuple[Any, GenericError | None, int]]:
        """The values that *data* completes: each with its error instead, if it has one, and with
        the offset in *data* behind it.
        """
        yield from self._tell_given_up(0)
        self._lexer.max_token = 0 if self._discarding else self._max_bytes
        for token, text, end in self._lexer.feed(data):
            if token is Token.ERROR:
                self._reset()
                shown = text.split(b"\0")[0].decode("utf-8", "replace")
                yield None, GenericError(f"JSON parse error, stray '{shown}'"), end
                continue
            self._count(token, text)
            if not self._discarding:
                self._text += text + b" "
            limit = None if self._discarding else self._limit_passed(token)
            if limit is not None:
                yield None, GenericError(f"JSON {limit} limit exceeded"), end
                if limit == "nesting depth":
                    self._reset()  # as QEMU: each surplus closer is an error of its own
                    continue
                self._discarding = True
                self._stack.clear()
                self._text.clear()
            elif self._error is None and not self._discarding:
                self._error = self._accept(token, text)
            if self._braces < 0 or self._brackets < 0 or not (self._braces or self._brackets):
                if token is Token.TOO_BIG:
                    continue  # its end is still to come
                value, error, discarded = self._result, self._error, self._discarding
                self._reset()
                if not discarded:
                    yield value, error, end
        self._charge()
        yield from self._tell_given_up(len(data))

    def give_up(self) -> None:
        """Drop what is incomplete, and all of the value that is still to come."""
        if not self._discarding:
            self._discarding = self._given_up = True
            self._stack.clear()
            self._text.clear()
        self._lexer.drop()
        self._charge()

    def _tell_given_up(self, end: int) -> Iterator[tuple[Any, GenericError | None, int]]:
        if self._given_up:
            self._given_up = False
            yield None, GenericError("JSON token size limit exceeded"), end

    def snapshot(self) -> ParserState:
        """What is incomplete; for :meth:`restore`."""
        state, begun = self._lexer.snapshot()
        return ParserState(
            b"" if self._discarding else bytes(self._text),
            self._discarding,
            self._braces,
            self._brackets,
            state,
            begun,
            self._given_up,
        )

    def restore(self, saved: ParserState) -> None:
        """Go on where another parser was when it gave :meth:`snapshot`.

        It may have had higher limits: what is beyond ours is refused when more of it comes.

        Raises:
            ValueError: that was none.
        """
        limits = self._max_bytes, self._budget
        self._max_bytes, self._budget = sys.maxsize, Budget(sys.maxsize)
        try:
            for _ in self.feed(saved.text):
                raise ValueError("this is not the state of a parser: a value is complete in it")
        finally:
            self._max_bytes, self._budget = limits
            self._charged = 0
        if saved.discarding:
            self._discarding, self._tokens = True, 1
            self._braces, self._brackets = saved.braces, saved.brackets
            self._given_up = saved.given_up
        self._lexer.restore(saved.lexer_state, saved.begun)
        self._charge()

    def close(self) -> None:
        """Drop what is incomplete."""
        self._lexer = Lexer(self._max_bytes)
        self._given_up = False
        self._reset()
        self._charge()

    @property
    def _cost(self) -> int:
        """Bytes of memory that what is incomplete takes, about."""
        kept = 0 if self._discarding else self._tokens * TOKEN_BYTES + self._bytes
        return kept + self._lexer.buffered

    def _charge(self) -> None:
        cost = self._cost
        before, self._charged = self._charged, cost
        if before or cost:
            self._budget.charge(self, before, cost)

    def _count(self, token: Token, text: bytes) -> None:
        self._tokens += 1
        self._bytes += len(text)
        if token is Token.LCURLY:
            self._braces += 1
        elif token is Token.RCURLY:
            self._braces -= 1
        elif token is Token.LSQUARE:
            self._brackets += 1
        elif token is Token.RSQUARE:
            self._brackets -= 1

    def _limit_passed(self, token: Token) -> str | None:
        if self._bytes > self._max_bytes or token is Token.TOO_BIG:
            return "token size"
        if self._tokens > MAX_TOKENS:
            return "token count"
        if self._braces + self._brackets > MAX_NESTING:
            return "nesting depth"
        return None

    # -- the grammar ---------------------------------------------------------------------------

    def _accept(self, token: Token, text: bytes) -> GenericError | None:
        """Take one token; the error, if the grammar does not allow it here."""
        want = self._want
        if want is _Want.COLON:
            if token is not Token.COLON:
                return _syntax("missing : in object pair")
            self._want = _Want.VALUE
            return None
        if want is _Want.COMMA_OR_END:
            return self._separator(token)
        if want is _Want.KEY_OR_END and token is Token.RCURLY:
            return self._close()
        if want is _Want.VALUE_OR_END and token is Token.RSQUARE:
            return self._close()
        is_key = want is _Want.KEY or want is _Want.KEY_OR_END
        if token is Token.LCURLY:
            self._stack.append(_Level({}, is_key))
            self._want = _Want.KEY_OR_END
            return None
        if token is Token.LSQUARE:
            self._stack.append(_Level([], is_key))
            self._want = _Want.VALUE_OR_END
            return None
        return self._scalar(token, text, is_key)

    def _separator(self, token: Token) -> GenericError | None:
        level = self._stack[-1]
        in_dict = isinstance(level.value, dict)
        if token is Token.COMMA:
            self._want = _Want.KEY if in_dict else _Want.VALUE
            return None
        if token is (Token.RCURLY if in_dict else Token.RSQUARE):
            return self._close()
        return _syntax(f"expected separator in {'dict' if in_dict else 'list'}")

    def _close(self) -> GenericError | None:
        level = self._stack.pop()
        return self._complete(level.value, level.is_key)

    def _scalar(self, token: Token, text: bytes, is_key: bool) -> GenericError | None:
        value: Any
        if token is Token.STRING:
            try:
                value = unquote(text)
            except BadString as exc:
                return _syntax(str(exc))
        elif token is Token.INTEGER or token is Token.FLOAT:
            value = _number(token, text)
        elif token is Token.KEYWORD:
            if text not in _KEYWORDS:
                return _syntax(f"invalid keyword '{text.decode('ascii')}'")
            value = _KEYWORDS[text]
        else:
            return _syntax("expecting value")
        return self._complete(value, is_key)

    def _complete(self, value: Any, is_key: bool) -> GenericError | None:
        """Put a complete value where it belongs."""
        if not self._stack:
            self._result = value
            return None
        level = self._stack[-1]
        if is_key:
            if not isinstance(value, str):
                return _syntax("key is not a string in object")
            level.key = value
            self._want = _Want.COLON
            return None
        self._want = _Want.COMMA_OR_END
        if isinstance(level.value, list):
            level.value.append(value)
        elif level.key in level.value:
            return _syntax("duplicate key")
        else:
            level.value[level.key] = value
        return None


def _syntax(what: str) -> GenericError:
    return GenericError(f"JSON parse error, {what}")
