"""Hypothesis strategies for the steps of a random walk, valid ones and broken ones.

A step has the bytes to send before the next wait for replies.  `DIFFERENCES` has the intended
differences between qmpfd and QEMU, with reasons; the strategies generate none of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from hypothesis import strategies as st

DIFFERENCES = {
    "0e1 and similar numbers": "valid JSON, which QEMU up to 11.1 refuses and qmpfd accepts",
    "floats beyond 1.8e308": "QEMU echoes the id 1e999 as inf, which is not JSON",
    "limits: nesting, tokens, size": "qmpfd has other limits, and sends one error for each excess",
    "quit": "ends the peer; QEMU sends an event first.  test_transcripts.py tests it",
    "commands that one side lacks": "stop, migrate-pause; open-fdset, query-stats",
    "the fd of a refused add-fd or getfd": "QEMU keeps it for the next command, qmpfd closes it",
    "fds with text that does not parse": "QEMU keeps them, qmpfd closes them",
    "fds before the negotiation": "QEMU keeps them, qmpfd closes those of a refused add-fd",
    "two commands in one send that take an fd, and fds": "qmpfd gives an fd to each, QEMU only to "
    "the first",
    "exec-oob next to other commands": "QEMU's two threads answer in either order",
    "reconnecting": "QEMU drops the sets with its last client and keeps the names of getfd; a walk "
    "uses few names, and begins by closing them",
}

OURS_ALONE = {"open-fdset", "add-fds", "query-fds", "watch-fdsets", "query-stats"}

NO_QEMU_NUMBER = re.compile(rb"0[eE]|[eE]\+?\d{3}")
"""Finds the first two differences, and some harmless text."""

OUT_OF_BAND = re.compile(rb"exec-oob|\\u002d\\u006f\\u006f\\u0062")
"""Finds out-of-band commands, which may not be sent with other commands, also if escaped."""

FD = b"@fd%d@"
"""Placeholder for the n-th descriptor number: the numbers differ between the peers."""

FD_ALIAS = b"@alias%d@"
"""Placeholder for that number plus 2**32, which a peer with 32-bit numbers would find."""


@dataclass(frozen=True)
class Send:
    data: bytes
    fds: int = 0


@dataclass(frozen=True)
class Step:
    """Sends without a wait in between."""

    sends: tuple[Send, ...]
    clean: bool = True
    """Whether the sends are complete messages, which leave the parser in its initial state."""
    connection: int = 0

    @property
    def has_fds(self) -> bool:
        return any(send.fds for send in self.sends)


# Strings

ODD_STRINGS = ["", "a", "b", "x", "foo", "opaque", "fdset-id", "fd", "id", "execute", "exec-oob"]
ODD_STRINGS += ["9a", "0", "-1", " a", "a b", "rdwr:/disk.img", "%s%n%d", "it's", 'say "hi"', "/"]
ODD_STRINGS += ["\\", "a\0b", "\0", "\x01\x1f\x7f", "\t\r\n", "\u0080", "é", "€", "\ufeff", "😀"]
ODD_STRINGS += ["\ufffd", "\U0010fffd", "\ufdcf", "x" * 300, "é" * 40]
strings = st.one_of(st.sampled_from(ODD_STRINGS), st.text(max_size=6))
short = st.sampled_from("abcdefgh")

_ESCAPES = {'"': '\\"', "'": "\\'", "\\": "\\\\", "/": "\\/", "\b": "\\b", "\f": "\\f"}
_ESCAPES |= {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _escaped(char: str) -> str:
    """Return `char` as one \\uXXXX, or as a pair of surrogates."""
    utf16 = char.encode("utf-16-be").hex()
    return "".join(f"\\u{utf16[i : i + 4]}" for i in range(0, len(utf16), 4))


@st.composite
def literals(draw: st.DrawFn, of: st.SearchStrategy[str] = strings) -> str:
    """Draw a string as JSON text, in one of the notations that QEMU accepts."""
    value = draw(of)
    style = draw(st.sampled_from(["plain", "plain", "raw", "single", "escaped"]))
    if style == "plain":
        return json.dumps(value)
    quote = "'" if style == "single" else '"'
    text = []
    for char in value:
        if style == "escaped":
            text.append(_escaped(char))
        elif char in _ESCAPES and (char not in "'/" or char == quote):
            text.append(_ESCAPES[char])
        else:
            text.append(char if char >= " " else _escaped(char))
    return quote + "".join(text) + quote


# Values

INTEGERS = ["0", "-0", "1", "-1", "2", "7", "65536", "2147483647", "2147483648", "4294967296"]
INTEGERS += ["9223372036854775807", "-9223372036854775808"]
NOT_INTEGERS = ["9223372036854775808", "-9223372036854775809", "18446744073709551615"]
NOT_INTEGERS += ["18446744073709551616", "123456789012345678901234567890", "1.0", "-0.0", "1e0"]
NOT_INTEGERS += ["1e3", "1E+5", "1.50", "0.1", "3.141592653589793238", "5e-324", "1e-400", "1e22"]
NOT_INTEGERS += ["1e16", "1e17", "1.7976931348623157e99", "true", "false", "null"]

scalars = st.one_of(st.sampled_from(INTEGERS + NOT_INTEGERS), literals())


def _array(items: list[str]) -> str:
    return f"[{','.join(items)}]"


def _object(members: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in members) + "}"


# Keys are drawn from a few: a key that occurs twice is a parse error, in any notation.
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(_array),
        st.lists(st.tuples(literals(st.one_of(short, strings)), inner), max_size=3).map(_object),
    ),
    max_leaves=6,
)

fdset_ids = st.one_of(
    st.integers(0, 5).map(str), st.sampled_from(INTEGERS), st.sampled_from(NOT_INTEGERS), values
)
fd_numbers = st.one_of(
    st.integers(0, 12).map(lambda n: (FD % n).decode()),
    st.integers(0, 12).map(lambda n: (FD_ALIAS % n).decode()),
    # No other small numbers: they may be open descriptors in one peer only.
    st.sampled_from(["-1", "0", "2", "99999", "-9223372036854775808", *NOT_INTEGERS]),
    values,
)


FD_NAMES = ["", "a", "b", "9a", "-1", "a b", "a\0b", "é"]
"""Only a few, because QEMU keeps them after the end of a connection: see FORGET_NAMES."""

FORGET_NAMES = b"".join(
    b'{"execute":"closefd","arguments":{"fdname":%s}}' % json.dumps(name).encode()
    for name in FD_NAMES
)

# Commands


def _no_string(text: str) -> bool:
    return text[0] not in "\"'"


@st.composite
def members(draw: st.DrawFn, *known: tuple[str, st.SearchStrategy[str]]) -> str:
    """Draw an object with some of the `known` members, and sometimes others, in any order."""
    pairs = [(json.dumps(name), draw(value)) for name, value in known if draw(st.booleans())]
    if draw(st.integers(0, 5)) == 5:
        unknown = st.tuples(literals(st.one_of(short, strings)), values)
        pairs += draw(st.lists(unknown, min_size=1, max_size=4))
    return _object(draw(st.permutations(pairs)))


_fd_names = st.one_of(literals(st.sampled_from(FD_NAMES)), values.filter(_no_string))
_arguments = {
    "add-fd": members(("fdset-id", fdset_ids), ("opaque", st.one_of(literals(), values))),
    "remove-fd": members(("fdset-id", fdset_ids), ("fd", fd_numbers)),
    "getfd": members(("fdname", _fd_names)),
    "closefd": members(("fdname", _fd_names)),
    "qmp_capabilities": members(
        ("enable", st.one_of(values, st.sampled_from(["[]", '["oob"]', '["oob",1]', '["x"]'])))
    ),
}
PLAIN = ["query-name", "query-fdsets", "query-version", "query-commands"]
unknown_commands = strings.filter(lambda name: name not in OURS_ALONE)


@st.composite
def commands(draw: st.DrawFn, *names: str, verb: str = "execute") -> bytes:
    """Draw one of the commands `names`, with valid or nearly valid arguments and any id."""
    name = draw(st.sampled_from(names)) if names else draw(unknown_commands)
    pairs = [(f'"{verb}"', json.dumps(name) if names else draw(literals(st.just(name))))]
    if name in _arguments or draw(st.integers(0, 9)) == 9:
        pairs.append(('"arguments"', draw(_arguments.get(name, members()))))
    if draw(st.booleans()):
        pairs.append(('"id"', draw(values)))
    return _object(draw(st.permutations(pairs))).encode("utf-8", "surrogatepass")


# Missing, wrong, unknown or surplus members: QEMU reports the first in the order of its hash table.
envelopes = st.lists(
    st.tuples(
        literals(st.one_of(st.sampled_from(["execute", "exec-oob", "arguments", "id"]), strings)),
        st.one_of(st.sampled_from(['"query-name"', "{}", '{"x": 1}']), values),
    ),
    max_size=5,
).map(lambda pairs: _object(pairs).encode("utf-8", "surrogatepass"))

TAKERS = ("add-fd", "getfd")
any_command = st.one_of(
    commands("add-fd"),
    commands("remove-fd"),
    commands("remove-fd", "closefd", *PLAIN),
    commands("getfd", "closefd", "qmp_capabilities"),
    commands(*PLAIN, *TAKERS, "remove-fd", "closefd", verb="exec-oob"),
    commands(),
    envelopes,
    values.map(lambda text: text.encode("utf-8", "surrogatepass") + b" "),
)

# Bytes

PIECES = list("{}[]:,\"' \n\t\r\\-+.019eE%#;!~aA_\x7f\x00\x01\x08\x0b\x0c\x1b\x1f")
PIECES += ["true", "null", "nan", "NaN", "inf", "Infinity", "nul", "truetrue", "01", "1.", "1e"]
PIECES += ["-", "--1", ".5", "1e5", "0x1", "/*x*/", "//", '"a"', "'a'", '"execute"', '"id":1']
PIECES += ['"\\u12"', '"\\ud800"', '"\\udc00\\ud800"', '"\\uffff"', '"\\x41"', '"\\', '"\\u', '""']
PIECES += ['{"execute":"query-name"}', '{"execute":"query-name","id":7}', '{"execute":"nope"}']
PIECES += [
    '{"execute":',
    '"query-name"}',
    '{"a":["b"}',
    "[1 2]",
    '{"a":1,}',
    "{]",
    "[}",
    "é",
    "\ufeff",
]
_BYTES = [b"\xff", b"\xfe", b"\xc0\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"\x80", b"\xf4\x90\x80\x80"]
_BYTES += [b"\xfc\x84\x80\x80\x80\x80", b"\xe2\x82", b"\xef\xbf\xbf", b"\xf0\x9f\xbf\xbe"]
pieces = st.sampled_from([piece.encode() for piece in PIECES] + _BYTES)
junk = st.lists(pieces, min_size=1, max_size=10).map(b"".join)


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """Draw a command with random bytes inserted or replaced."""
    text: bytes = draw(any_command)
    at, end = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    piece: bytes = draw(pieces)
    return text[:at] + piece + text[draw(st.sampled_from([at, at, end])) :]


# Steps


def _step(*sends: Send, clean: bool = True) -> Step:
    return Step(sends, clean)


@st.composite
def _cut(draw: st.DrawFn, data: bytes, fds: int = 0) -> tuple[Send, ...]:
    """Split `data` into sends, with the descriptors on any one of them."""
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=3)))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    parts = [part for part in parts if part]
    chosen = draw(st.integers(0, len(parts) - 1))
    return tuple(Send(part, fds if n == chosen else 0) for n, part in enumerate(parts))


counts = st.sampled_from([1, 1, 1, 2, 3])
taker = st.one_of(commands("add-fd"), commands("add-fd"), commands("getfd"))
bystander = st.sampled_from([b'{"execute":"%s"}' % name.encode() for name in PLAIN[:3]])


@st.composite
def _with_fds(draw: st.DrawFn) -> Step:
    """Draw a command that takes an fd, sent in each way that clients are known to use."""
    command, blank, other = draw(taker), draw(st.sampled_from([b" ", b"\n"])), draw(bystander)
    fds = draw(counts)
    match draw(st.sampled_from(["on", "on", "cut", "blank", "replaced", "between", "joined"])):
        case "on":
            return _step(Send(command, fds))
        case "cut":
            return Step(draw(_cut(command, fds)))
        case "blank":
            return _step(Send(blank, fds), Send(command))
        case "replaced":
            return _step(Send(blank, fds), Send(blank, draw(counts)), Send(command))
        case "between":
            return _step(Send(blank, fds), Send(other), Send(command))
        case _:
            return _step(Send(other + command + other, fds))


@st.composite
def _glued(draw: st.DrawFn) -> Step:
    return Step(draw(_cut(b"\n".join(draw(st.lists(any_command, min_size=2, max_size=4))))))


def _allowed(step: Step) -> bool:
    return not NO_QEMU_NUMBER.search(b"".join(send.data for send in step.sends))


def _no_race(step: Step) -> bool:
    return not OUT_OF_BAND.search(b"".join(send.data for send in step.sends))


_single = st.one_of(
    any_command.map(lambda command: _step(Send(command))),
    any_command.flatmap(_cut).map(Step),
)
_several = st.one_of(
    _with_fds(),
    _with_fds(),
    _glued(),
    st.one_of(junk, _mutated()).map(lambda data: _step(Send(data), clean=False)),
    st.tuples(pieces, _mutated()).map(lambda two: _step(*map(Send, two), clean=False)),
)
_usual = st.one_of(_single, _several.filter(_no_race), _several.filter(_no_race))

steps = st.builds(
    lambda step, connection: Step(step.sends, step.clean, connection),
    _usual.filter(_allowed),
    st.sampled_from([0, 0, 0, 1]),
)

openings = st.lists(
    st.one_of(any_command, junk).map(lambda data: _step(Send(data), clean=False)), max_size=3
).map(lambda found: [step for step in found if _allowed(step)])
"""Steps before the negotiation."""

negotiations = st.sampled_from(
    [b'{"execute":"qmp_capabilities"}']
    + [b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":[]}'] * 2
)


@st.composite
def walks(draw: st.DrawFn) -> list[Step]:
    """Draw 1 to 40 steps with equal probability: lists of hypothesis are mostly short."""
    return [draw(steps) for _ in range(draw(st.integers(1, 40)))]
