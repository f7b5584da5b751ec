"""Contents of a JSON string: escapes and UTF-8, by QEMU's rules.

Noncharacters and lone surrogates are refused, raw or escaped; the overlong ``C0 80`` is decoded as
NUL (QEMU's "modified UTF-8").

A string may be as long as a request and consist of escapes only, so no Python code runs for each
escape: that would block the event loop for a fifth of a second.
"""

from __future__ import annotations

import json
import re

from ..errors import GenericError


def syntax_error(what: str) -> GenericError:
    """Return QEMU's error for text that it cannot parse."""
    return GenericError(f"JSON parse error, {what}")


# All up to the first escape that is refused; possessive (the last plus sign): no backtracking.
_ALLOWED = re.compile(
    rb"""(?: [^\\]+ | \\["'\\/bfnrt]
    | \\u (?! [dD][89a-fA-F] | [fF][dD][dDeE] | [fF]{3}[eEfF] ) [0-9a-fA-F]{4}
    | \\u (?! .{3}[fF]\\u... [eEfF] (?<= [37bBfF][fF]\\u[dD][fF][fF][eEfF] ) )
      [dD][89abAB][0-9a-fA-F]{2} \\u [dD][c-fC-F][0-9a-fA-F]{2} )*+""",
    re.DOTALL | re.VERBOSE,
)
_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_UNIT = re.compile(rb"\\u[0-9a-fA-F]{4}")
# U+FDD0 to U+FDEF and the last two of every plane (Unicode, section 23.7), in UTF-8.
_NONCHARACTER = re.compile(
    rb"\xef\xb7[\x90-\xaf]|(?:\xef|[\xf0-\xf4][\x8f\x9f\xaf\xbf])\xbf[\xbe\xbf]"
)
_OF_NONCHARACTERS = (b"\xef\xb7", b"\xbf\xbe", b"\xbf\xbf")  # each noncharacter contains one
_json = json.JSONDecoder(strict=False)  # allows an unescaped NUL


def _checked(text: bytes) -> bytes:
    """Return *text* in standard UTF-8; raise GenericError for other bytes and noncharacters."""
    if text.isascii():
        return text
    text = text.replace(b"\xc0\x80", b"\0")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        raise syntax_error("invalid UTF-8 sequence in string") from None
    if any(part in text for part in _OF_NONCHARACTERS) and _NONCHARACTER.search(text):
        raise syntax_error("invalid UTF-8 sequence in string")
    return text


def _refused(escape: bytes) -> GenericError:
    """Return the error for the invalid escape at the start of *escape*."""
    if escape[1:2] != b"u":
        return syntax_error("invalid escape sequence in string")
    whole = _PAIR.match(escape) or _UNIT.match(escape)
    shown = escape[:6] if whole is None else whole[0]
    return syntax_error(f"{shown.decode('ascii', 'replace')} is not a valid Unicode character")


def unquote(token: bytes) -> str:
    """Return the text of a string token; *token* includes the quotes.

    Raises:
        GenericError: *token* contains an escape or a byte sequence that the dialect refuses.
    """
    text = token[1:-1]
    if b"\\" not in text:
        return _checked(text).decode("utf-8")
    match = _ALLOWED.match(text)
    assert match is not None  # it matches the empty string
    good = _checked(text[: match.end()])
    if match.end() < len(text):
        raise _refused(text[match.end() :])
    # Convert to standard JSON, where \' is no escape and a quotation mark has to be escaped.  The
    # placeholder of two backslashes, \1, cannot occur in a string token.
    good = good.replace(rb"\\", b"\1").replace(rb"\'", b"'")
    good = good.replace(rb"\"", b'"').replace(b'"', rb"\"").replace(b"\1", rb"\\")
    decoded: str = _json.decode('"' + good.decode("utf-8") + '"')
    return decoded
