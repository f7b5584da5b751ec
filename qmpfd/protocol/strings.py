"""The insides of a JSON string: escapes and UTF-8, by QEMU's rules.

Noncharacters and lone surrogates are refused, whether raw or escaped; the overlong ``C0 80`` is
read as NUL, QEMU's "modified UTF-8".
"""

from __future__ import annotations

import re


class BadString(ValueError):
    """The string cannot be read; the message is what QEMU says of it."""


_ESCAPE = re.compile(
    rb"\\(?:u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\u(?P<low>[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|u(?P<unit>[0-9a-fA-F]{4})|(?P<bad_unit>u.{0,4})|(?P<short>.))",
    re.DOTALL,
)
_SHORT = {
    ord(k): v
    for k, v in {
        '"': b'"',
        "'": b"'",
        "\\": b"\\",
        "/": b"/",
        "b": b"\b",
        "f": b"\f",
        "n": b"\n",
        "r": b"\r",
        "t": b"\t",
    }.items()
}
# U+FDD0 to U+FDEF and the last two of every plane (Unicode, section 23.7).
_NONCHARACTER = re.compile(
    "[\ufdd0-\ufdef"
    + "".join(chr(p << 16 | 0xFFFE) + chr(p << 16 | 0xFFFF) for p in range(17))
    + "]"
)


def _character(code: int, source: bytes) -> str:
    character = chr(code)
    if 0xD800 <= code <= 0xDFFF or _NONCHARACTER.match(character):
        raise BadString(f"{source.decode('ascii')} is not a valid Unicode character")
    return character


def _raw(text: bytes) -> str:
    if text.isascii():
        return text.decode("ascii")
    try:
        decoded = text.replace(b"\xc0\x80", b"\0").decode("utf-8")
    except UnicodeDecodeError:
        raise BadString("invalid UTF-8 sequence in string") from None
    if _NONCHARACTER.search(decoded):
        raise BadString("invalid UTF-8 sequence in string")
    return decoded


def unquote(token: bytes) -> str:
    """The text of a string token, quotes included in *token*.

    Raises:
        BadString: an escape or a sequence of bytes that the dialect refuses.
    """
    text = token[1:-1]
    if b"\\" not in text:
        return _raw(text)
    parts: list[str] = []
    at = 0
    for match in _ESCAPE.finditer(text):
        parts.append(_raw(text[at : match.start()]))
        at = match.end()
        source = match[0]
        if match["short"] is not None:
            short = _SHORT.get(source[1])
            if short is None:
                raise BadString("invalid escape sequence in string")
            parts.append(short.decode("ascii"))
        elif match["unit"] is not None:
            parts.append(_character(int(match["unit"], 16), source))
        elif match["high"] is not None:
            high, low = int(match["high"], 16), int(match["low"], 16)
            parts.append(_character(0x10000 + ((high & 0x3FF) << 10 | low & 0x3FF), source))
        else:
            shown = source.decode("ascii", "replace")
            raise BadString(f"{shown} is not a valid Unicode character")
    parts.append(_raw(text[at:]))
    return "".join(parts)
