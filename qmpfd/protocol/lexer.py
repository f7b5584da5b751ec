"""Lexer of QEMU's JSON dialect, incremental over any split of the bytes.

The dialect is RFC 8259 plus single-quoted strings, with a fixed way to recover from an error (QEMU
Machine Protocol Specification, section 2.2 and "Protocol notes": control characters other than tab,
and the bytes FE and FF, force the parser into a known state).  The lexer is a table of states by
byte, as QEMU's own, because the errors that a client gets depend on every byte.  Regular
expressions skip only white space, the contents of strings, and invalid input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import IntEnum


class Token(IntEnum):
    """Kind of a token.  The numbers are entries of the table, above those of the states."""

    LCURLY = 100
    RCURLY = 101
    LSQUARE = 102
    RSQUARE = 103
    COLON = 104
    COMMA = 105
    INTEGER = 106
    FLOAT = 107
    KEYWORD = 108
    STRING = 109
    ERROR = 110
    TOO_BIG = 111  # a token beyond the limit: not in the table


# States.  Token.ERROR is the entry of a byte that the state does not allow.
_START, _RECOVERY = 0, 1
_DQ, _DQ_ESCAPE, _SQ, _SQ_ESCAPE = 2, 3, 4, 5
_SIGN, _ZERO, _DIGITS, _POINT, _FRACTION, _EXP, _EXP_SIGN, _EXP_DIGITS = range(6, 14)
_KEYWORD = 14

#: Added to an entry: the byte is not part of the token, and is examined again in the next state.
_LOOKAHEAD = 1000

_DIGIT = b"0123456789"


def _row(default: int, *entries: tuple[bytes, int]) -> list[int]:
    row = [default] * 256
    for keys, entry in entries:
        for byte in keys:
            row[byte] = entry
    return row


_ERROR = int(Token.ERROR)
_TEXT = bytes(range(0x20, 0xFE))
_RESYNC = _LOOKAHEAD + _START
_INTEGER, _FLOAT = _LOOKAHEAD + Token.INTEGER, _LOOKAHEAD + Token.FLOAT
_EXPONENT = (b"eE", _EXP)
_TABLE = {
    _START: _row(
        _ERROR,
        (b" \t\r\n", _START),
        (b'"', _DQ),
        (b"'", _SQ),
        (b"-", _SIGN),
        (b"0", _ZERO),
        (b"123456789", _DIGITS),
        (b"abcdefghijklmnopqrstuvwxyz", _KEYWORD),
        *((bytes([byte]), int(token)) for byte, token in zip(b"{}[]:,", Token, strict=False)),
    ),
    _RECOVERY: _row(
        _RECOVERY,
        (bytes(range(0x20)), _RESYNC),
        (b"\xfe\xff[]{}:,", _RESYNC),
        (b"\t", _RECOVERY),
    ),
    _DQ: _row(_ERROR, (_TEXT, _DQ), (b"\\", _DQ_ESCAPE), (b'"', Token.STRING)),
    _DQ_ESCAPE: _row(_ERROR, (_TEXT, _DQ)),
    _SQ: _row(_ERROR, (_TEXT, _SQ), (b"\\", _SQ_ESCAPE), (b"'", Token.STRING)),
    _SQ_ESCAPE: _row(_ERROR, (_TEXT, _SQ)),
    _SIGN: _row(_ERROR, (b"0", _ZERO), (b"123456789", _DIGITS)),
    # QEMU forgets the exponent after a lone zero, and so refuses the valid number 0e1.
    _ZERO: _row(_INTEGER, (_DIGIT, _ERROR), (b".", _POINT), _EXPONENT),
    _DIGITS: _row(_INTEGER, (_DIGIT, _DIGITS), (b".", _POINT), _EXPONENT),
    _POINT: _row(_ERROR, (_DIGIT, _FRACTION)),
    _FRACTION: _row(_FLOAT, (_DIGIT, _FRACTION), _EXPONENT),
    _EXP: _row(_ERROR, (b"+-", _EXP_SIGN), (_DIGIT, _EXP_DIGITS)),
    _EXP_SIGN: _row(_ERROR, (_DIGIT, _EXP_DIGITS)),
    _EXP_DIGITS: _row(_FLOAT, (_DIGIT, _EXP_DIGITS)),
    _KEYWORD: _row(_LOOKAHEAD + Token.KEYWORD, (b"abcdefghijklmnopqrstuvwxyz", _KEYWORD)),
}

# Bytes that leave a state unchanged, for the states in which many of them may come in a row.
_RUN = {
    _START: re.compile(rb"[ \t\r\n]*"),
    _RECOVERY: re.compile(rb"[^\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]*"),
    _DQ: re.compile(rb'[^\x00-\x1f\xfe\xff"\\]*'),
    _SQ: re.compile(rb"[^\x00-\x1f\xfe\xff'\\]*"),
}


class Lexer:
    """Splits bytes into tokens; an incomplete token is kept for the next call.

    Args:
        max_token: maximum size of a token; a longer one is discarded and yielded as TOO_BIG.
    """

    def __init__(self, max_token: int) -> None:
        self.max_token = max_token
        #: The state, and the bytes of the token in progress; both can be saved and restored.
        self.state = _START
        self.begun = bytearray()

    @property
    def idle(self) -> bool:
        """Whether no token is in progress."""
        return self.state == _START

    @property
    def buffered(self) -> int:
        """Number of bytes of the token in progress."""
        return len(self.begun)

    def feed(self, data: bytes) -> Iterator[tuple[Token, bytes, int]]:
        """Yield the tokens that *data* completes: kind, bytes, and the offset in *data* of the end.

        The end of a number or keyword is known at the byte after it, so the offset may be 0.
        """
        state, begin, at, size = self.state, 0, 0, len(data)
        begun = self.begun
        while at < size:
            if (run := _RUN.get(state)) is not None:
                match = run.match(data, at)
                assert match is not None  # each of them matches the empty string
                at = match.end()
                if at == size:
                    break
            if state in (_START, _RECOVERY):
                begin = at
            entry = _TABLE[state][data[at]]
            if entry >= _LOOKAHEAD:
                entry -= _LOOKAHEAD
            else:
                at += 1
            if entry >= Token.LCURLY:
                text = data[begin:at]
                if begun:
                    text = bytes(begun) + text
                    begun.clear()
                state = _RECOVERY if entry == Token.ERROR else _START
                # Store the state before each yield: the consumer may save or reset it.
                self.state = state
                yield Token(entry), text, at
                state = self.state
                begin = at
            else:
                state = entry
        self.state = state
        if state != _START and state != _RECOVERY:
            begun += data[begin:]
            if len(begun) > self.max_token:
                # The rest of a string is discarded to its end; other input to where QEMU resumes.
                begun.clear()
                yield Token.TOO_BIG, b"", size
