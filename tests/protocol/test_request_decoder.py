"""Requests: the fast and the slow path, and QEMU's errors.

Tests of protocol/qemu_order.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from qmpfd.commands import DECODER, TABLE
from qmpfd.errors import CommandNotFound, GenericError, QMPError
from qmpfd.protocol.parser import Parser
from qmpfd.protocol.request_decoder import Request

Outcome = tuple[str, Any, Any]


def plain(request: Request) -> Outcome:
    """Return *request* in a form in which missing and empty arguments are equal."""
    name = DECODER.names[type(request)]
    arguments = request.arguments
    if arguments is UNSET:
        arguments = TABLE.commands[name].nothing
        assert arguments is not None
    return name, arguments, request.id


def carefully(data: bytes) -> list[Outcome | str]:
    found: list[Outcome | str] = []
    parser = Parser(1 << 20)
    for value, error, _ in parser.feed(data):
        if error is not None:
            found.append(error.desc)
            continue
        try:
            found.append(plain(DECODER.request(value, oob_enabled=False)))
        except QMPError as exc:
            found.append(exc.desc)
    if not parser.idle:
        found.append("incomplete")
    return found


# -- the fast path and the slow path are equivalent ------------------------------------------------

# As one text: a list would need quotes around each, and escapes in some.
_STRINGS = 'a rdwr:disk.img a:b { } }{ "," execute : :: [ oob 0 é \\ " \x7f'.split()  # noqa: SIM905 - see above
strings = st.sampled_from([*_STRINGS, "", " ", "'", "\n", "\0", "{'a': 1}", '{"a": 1}'])
_NUMBERS = b"""
    0 -0 1 -1 3 7 01 00 1.0 1e0 1E2 0.5 - 1. +1 0e1 1e999 NaN 0x1
    9223372036854775807 9223372036854775808 -9223372036854775808 -9223372036854775809
    18446744073709551615 18446744073709551616
"""
numbers = st.sampled_from(_NUMBERS.split())
words = st.sampled_from([b"null", b"true", b"false", b"[]", b"{}", b'["oob"]', b'[""]', b"nul"])
tokens = strings.map(lambda text: json.dumps(text, ensure_ascii=False).encode())
values = tokens | numbers | words

GOOD: dict[str, st.SearchStrategy[bytes]] = {
    "fdset-id": st.sampled_from([b"0", b"-0", b"7", b"-3", b"9223372036854775807"]),
    "fd": st.sampled_from([b"0", b"12"]),
    "opaque": tokens,
    "fdname": tokens,
    "enable": st.sampled_from([b"[]", b'["oob"]', b'["oob","oob"]']),
}


def assemble(members: list[tuple[str, bytes]]) -> list[bytes]:
    """Return the tokens of an object."""
    parts = [b"{"]
    for key, value in members:
        parts += [json.dumps(key).encode(), b":", value, b","]
    return [*(parts[:-1] if members else parts), b"}"]


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Draw a request; two of three have an error or something rare."""
    name = draw(st.sampled_from(sorted(TABLE.commands)))
    known = TABLE.commands[name].arguments.__struct_encode_fields__
    arguments = [(key, draw(GOOD.get(key, values))) for key in known if draw(st.booleans())]
    members = [("execute", json.dumps(name).encode())]
    if draw(st.booleans()) or arguments:
        members.append(("arguments", b"".join(assemble(arguments))))
    if draw(st.booleans()):
        members.append(("id", draw(GOOD["fdset-id"] | tokens)))
    fault = draw(st.sampled_from([None, "argument", "member", "value", "blank", "token", "byte"]))
    extra = st.sampled_from([*known, "execute", "id", "arguments", "exec-oob", "other", "Execute"])
    if fault == "argument" and len(members) > 1:
        arguments.append((draw(extra), draw(values)))
        members[1] = "arguments", b"".join(assemble(arguments))
    elif fault == "member":
        members.append((draw(extra), draw(values)))
    elif fault == "value":
        members[-1] = members[-1][0], draw(values)
    order: list[tuple[str, bytes]] = draw(st.permutations(members))
    parts = assemble(order)
    at = draw(st.integers(0, len(parts) - 1))
    if fault == "token":
        parts[at] = draw(st.sampled_from([b"", parts[at] * 2, parts[0], parts[-1], b"'a'"]))
        parts[at] = draw(st.sampled_from([parts[at], parts[at].replace(b'"', b"'")]))
    blanks = st.sampled_from([b"", b"", b"", b" ", b"\n", b"\r\n", b"\t "])
    if fault == "blank":
        parts[at] += draw(st.sampled_from([b"\0", b"\x0b", b"\x0c", b"\xc2\xa0", b"\x1b"]))
    text = b"".join(part + draw(blanks) for part in parts)
    if fault == "byte":
        at = draw(st.integers(0, len(text) - 1))
        swap = draw(st.sampled_from([b"", b"\\u0065", b"\x01", b"\xff", b":", b"'", b'"', b"\\"]))
        text = text[:at] + swap + text[at + 1 :]
    return text


@given(st.lists(requests(), min_size=1, max_size=3), st.sampled_from([b"", b"\n", b" \r\n"]))
@settings(max_examples=1500, deadline=None)
@example([b'{"execute":"query-version","execute":"query-version"}'], b"")
@example([b'{"execute":"add-fd","arguments":{"opaque":"a:b"},"arguments":{}}'], b"")
@example([b'{"execute":"add-fd","arguments":{"opaque":"a","opaque":"a:b"}}'], b"")
@example([b'{"execute":"add-fd","arguments":{"fdset-id":-0},"id":-0}'], b"\n")
@example([b'{"execute":"query-version"}', b"{'execute':'query-version'}"], b"")
@example([b'{"execute":"query-version","id":"a:b"}\0'], b"")
@example([b'{"execute":"query-version"}\n,'], b"")
def test_quick_and_careful_agree(chunk: list[bytes], blank: bytes) -> None:
    data = blank.join(chunk)
    quick = DECODER.decode_chunk(data)
    event("quick" if quick is not None else "careful")
    if quick is not None:
        assert [plain(request) for request in quick] == carefully(data)


@given(st.binary(max_size=30) | requests().map(lambda data: data[:-1]))
def test_the_quick_way_never_raises(data: bytes) -> None:
    quick = DECODER.decode_chunk(data)
    if quick is not None:
        assert [plain(request) for request in quick] == carefully(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"execute":"query-version"}',
        b'{"execute":"query-version"}{"execute":"query-fdsets"}',
        b'{ "id" : 7 , "execute" : "add-fd" ,\r\n"arguments" : {"opaque": "a:{b}"} }\r\n',
        b'{"execute":"remove-fd","arguments":{"fdset-id":3,"fd":9},"id":"x"}',
        b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}',
        b" \r\n",
    ],
)
def test_what_clients_usually_send_goes_the_quick_way(data: bytes) -> None:
    quick = DECODER.decode_chunk(data)
    assert quick is not None
    assert [plain(request) for request in quick] == carefully(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"execute":"query-version"',
        b'{"execute":"query-version"}{"exec',
        b'{"execute":"query-version","id":null}',
        b'{"execute":"add-fd","arguments":{"opaque":null}}',
        b'{"execute":"query-version","id":1.5}',
        b'{"execute":"query-version","id":18446744073709551615}',
        b'{"exec-oob":"query-version"}',
        b'{"execute":"query-version","id":"\\u0041"}',
        b'{"execute":"query-version","id":"\xc3\xa9"}',
        b'{"execute":"query-version","id":1,"id":1}',
        b"[" * 100_000,
        b'{"execute":"query-version","id":' + b"[" * 100_000,
    ],
)
def test_what_is_not_plain_goes_the_careful_way(data: bytes) -> None:
    assert DECODER.decode_chunk(data) is None


# -- the envelope ---------------------------------------------------------------------------------


def refused(value: Any, *, oob: bool = False, only: str | None = None) -> QMPError:
    with pytest.raises(QMPError) as caught:
        DECODER.request(value, oob_enabled=oob, only=only)
    return caught.value


def each(*values: object) -> tuple[object, ...]:
    return values


LACKS = "QMP input lacks member 'execute'"


@pytest.mark.parametrize(
    "value, desc",
    [
        *[
            (value, "QMP input must be a JSON object")
            for value in each([], None, "x", 12, 1.5, True)
        ],
        ({}, LACKS),
        ({"id": 1}, LACKS),
        ({"arguments": {}}, LACKS),
        ({"execute": "query-name", "other": 1}, "QMP input member 'other' is unexpected"),
        ({"other": 1}, "QMP input member 'other' is unexpected"),
        ({"Execute": "query-name"}, "QMP input member 'Execute' is unexpected"),
        *[
            ({"execute": value}, "QMP input member 'execute' must be a string")
            for value in each(1, None, [], {}, True)
        ],
        *[
            (
                {"execute": "query-name", "arguments": value},
                "QMP input member 'arguments' must be an object",
            )
            for value in each(1, None, [], "", True)
        ],
        ({"exec-oob": "query-name"}, "QMP input member 'exec-oob' is unexpected"),
        ({"exec-oob": 1, "execute": 2}, "QMP input member 'exec-oob' is unexpected"),
        # The first error in QEMU's order: exec-oob, execute, arguments, id.
        ({"arguments": 1, "execute": 1}, "QMP input member 'execute' must be a string"),
        ({"id": 1, "arguments": 1}, "QMP input member 'arguments' must be an object"),
        ({"execute": "add-fd", "arguments": {"x": 1}}, "Parameter 'x' is unexpected"),
        ({"execute": "remove-fd"}, "Parameter 'fdset-id' is missing"),
        ({"execute": "getfd", "arguments": {}}, "Parameter 'fdname' is missing"),
        (
            {"execute": "add-fd", "arguments": {"fdset-id": "1"}},
            "Invalid parameter type for 'fdset-id', expected: integer",
        ),
        (
            {"execute": "add-fd", "arguments": {"opaque": None}},
            "Invalid parameter type for 'opaque', expected: string",
        ),
        (
            {"execute": "qmp_capabilities", "arguments": {"enable": True}},
            "Invalid parameter type for 'enable', expected: array",
        ),
        (
            {"execute": "qmp_capabilities", "arguments": {"enable": [1]}},
            "Invalid parameter type for 'enable[0]', expected: string",
        ),
        (
            {"execute": "qmp_capabilities", "arguments": {"enable": ["x"]}},
            "Parameter 'null' does not accept value 'x'",
        ),
    ],
)
def test_refused(value: Any, desc: str) -> None:
    error = refused(value)
    assert error.desc == desc
    assert type(error) is GenericError


@pytest.mark.parametrize("name", ["no-such", "", "Query-Name", "query-name ", "a\0b", "x" * 3000])
def test_unknown_command(name: str) -> None:
    error = refused({"execute": name})
    assert error.desc == f"The command {name} has not been found"
    assert type(error) is CommandNotFound


def test_out_of_band() -> None:
    clash = refused({"execute": "query-name", "exec-oob": "query-name"}, oob=True)
    assert clash.desc == "QMP input member 'execute' clashes with 'exec-oob'"
    number = refused({"exec-oob": 1}, oob=True)
    assert number.desc == "QMP input member 'exec-oob' must be a string"
    normal = refused({"exec-oob": "query-name"}, oob=True)
    assert normal.desc == "The command query-name does not support OOB"
    unknown = refused({"exec-oob": "no-such"}, oob=True)
    assert unknown.desc == "The command no-such has not been found"


def test_only_one_command() -> None:
    error = refused({"execute": "query-name"}, only="qmp_capabilities")
    assert type(error) is CommandNotFound
    request = DECODER.request(
        {"execute": "qmp_capabilities"}, oob_enabled=False, only="qmp_capabilities"
    )
    assert DECODER.names[type(request)] == "qmp_capabilities"


@pytest.mark.parametrize("request_id", [None, 0, -1, "x", 1.5, True, [], {"a": [1]}, 2**64 - 1])
def test_id_is_kept(request_id: Any) -> None:
    value = {"execute": "query-name", "id": request_id}
    assert DECODER.request(value, oob_enabled=False).id == request_id
    assert DECODER.request({"execute": "query-name"}, oob_enabled=False).id is UNSET


# -- descriptors ----------------------------------------------------------------------------------


def quickly(text: bytes) -> Any:
    requests = DECODER.decode_chunk(text)
    assert requests is not None
    return requests[0]


@pytest.mark.parametrize("read", [quickly, json.loads])
@pytest.mark.parametrize(
    "text, count",
    [
        (b'{"execute":"add-fd"}', 1),
        (b'{"execute":"getfd","arguments":{"fdname":"x"}}', 1),
        (b'{"execute":"query-fdsets"}', 0),
        (b'{"execute":"remove-fd","arguments":{"fdset-id":0}}', 0),
    ],
)
def test_wanted_fds(read: Callable[[bytes], Any], text: bytes, count: int) -> None:
    assert DECODER.max_fds(read(text)) == count


@pytest.mark.parametrize(
    "value, count",
    [
        ({"execute": "add-fd", "arguments": 1}, 1),  # to be refused, with its descriptors
        ({"exec-oob": "add-fd"}, 1),
        ({"execute": "no-such"}, 0),
        ({"execute": ["add-fd"]}, 0),
        ({"id": "add-fd"}, 0),
        (["execute", "add-fd"], 0),
        ("add-fd", 0),
        (None, 0),
    ],
)
def test_wanted_fds_of_what_is_no_request(value: Any, count: int) -> None:
    assert DECODER.max_fds(value) == count
