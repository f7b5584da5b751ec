"""States, output and parsing of a connection, as server and as client.

Tests of errors.py, protocol/client.py and protocol/server.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from outcome import Error, Value
from splits import bytewise, json_soup, pieces

from qmpfd import errors
from qmpfd.commands import DECODER
from qmpfd.errors import CommandNotFound, FdNotFound, FdNotSupplied, GenericError, QMPError
from qmpfd.limits import MAX_ERRORS_IN_A_ROW, MAX_NESTING, SLOW_PATH_BYTES
from qmpfd.protocol.client import ClientConnection, QMPEvent, Reply
from qmpfd.protocol.connection import Connection, ProtocolError, State
from qmpfd.protocol.request_decoder import Request
from qmpfd.protocol.server import ServerConnection

NEGOTIATE_FIRST = "Expecting capabilities negotiation with 'qmp_capabilities'"


def receive(connection: Connection, data: bytes) -> None:
    """Pass *data*, without descriptors, to the connection, in the reads that it plans."""
    while data:
        (length,), _ = connection.plan(data, False)
        assert 0 < length <= len(data)
        data = data[length:]


def asked(connection: ServerConnection, data: bytes) -> list[tuple[str, Any]]:
    """Return the requests in *data*: names of commands or texts of errors, and ids."""
    receive(connection, data)
    requests = iter(connection.next_request, None)
    return [heard(request, request_id) for request, request_id, _ in requests]


def heard(request: Request | Error, request_id: Any) -> tuple[str, Any]:
    if isinstance(request, Error):
        assert isinstance(request.error, QMPError)
        return request.error.desc, request_id
    return DECODER.names[type(request)], request_id


def state(connection: Connection) -> State:
    """Return the connection's state: mypy assumes that the attribute itself does not change."""
    return connection.state


@pytest.fixture
def server() -> ServerConnection:
    return ServerConnection(DECODER)


@pytest.fixture
def ready(server: ServerConnection) -> ServerConnection:
    server.greeting({})
    server.negotiate([])
    return server


# -- the server's end ------------------------------------------------------------------------------


def test_greeting(server: ServerConnection) -> None:
    assert server.state is State.CONNECTED
    version = {"qemu": {"micro": 3, "minor": 2, "major": 1}, "package": "p"}
    data = server.greeting(version)
    assert state(server) is State.NEGOTIATING
    assert data.endswith(b"\r\n")
    assert json.loads(data) == {"QMP": {"version": version, "capabilities": ["oob"]}}
    with pytest.raises(ProtocolError):
        server.greeting(version)


def test_negotiation(server: ServerConnection) -> None:
    server.greeting({})
    data = (
        b'{"execute":"query-version","id":1}{"execute":"no-such","id":2}'
        b'{"execute":"add-fd","arguments":{"x":1},"id":3}{"execute":1,"id":4}{"oh":1}[]nan '
        b'{"execute":"qmp_capabilities","arguments":{"enable":["x"]},"id":5}'
        b"{'execute':'qmp_capabilities','id':6}"
    )
    assert asked(server, data) == [
        (NEGOTIATE_FIRST, 1),
        (NEGOTIATE_FIRST, 2),
        (NEGOTIATE_FIRST, 3),
        ("QMP input member 'execute' must be a string", 4),
        ("QMP input member 'oh' is unexpected", UNSET),
        ("QMP input must be a JSON object", UNSET),
        ("JSON parse error, invalid keyword 'nan'", UNSET),
        ("Parameter 'null' does not accept value 'x'", 5),
        ("qmp_capabilities", 6),
    ]
    assert server.state is State.NEGOTIATING
    server.negotiate([])
    assert state(server) is State.COMMANDS
    with pytest.raises(CommandNotFound) as caught:
        server.negotiate([])
    assert caught.value.desc == "Capabilities negotiation is already complete, command ignored"


def test_the_class_of_a_command_before_negotiation(server: ServerConnection) -> None:
    server.greeting({})
    for data in (b'{"execute":"query-version"}', b"{'execute':'query-version'}"):
        receive(server, data)
        ((request, _, _),) = iter(server.next_request, None)
        assert isinstance(request, Error)
        assert type(request.error) is CommandNotFound


def test_negotiation_takes_effect_on_what_follows_it(server: ServerConnection) -> None:
    """Requests of one chunk are checked one by one, after the negotiation before them."""
    server.greeting({})
    receive(server, b'{"execute":"query-name","id":1}{"execute":"qmp_capabilities"}' * 2)
    found = []
    for request, request_id, _ in iter(server.next_request, None):
        found.append(heard(request, request_id))
        if found[-1][0] == "qmp_capabilities" and server.state is State.NEGOTIATING:
            server.negotiate([])
    assert found == [
        (NEGOTIATE_FIRST, 1),
        ("qmp_capabilities", UNSET),
        ("query-name", 1),
        ("qmp_capabilities", UNSET),
    ]


@pytest.mark.parametrize("enable", [[], ["oob"], ["oob", "oob"]])
def test_out_of_band(server: ServerConnection, enable: list[str]) -> None:
    server.greeting({})
    server.negotiate(enable)
    expected = (
        "The command query-name does not support OOB"
        if enable
        else "QMP input member 'exec-oob' is unexpected"
    )
    assert asked(server, b'{"exec-oob":"query-name","id":1}') == [(expected, 1)]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_close(server: ServerConnection, steps: int) -> None:
    if steps > 0:
        server.greeting({})
    if steps > 1:
        server.negotiate([])
    server.close()
    assert server.state is State.CLOSED
    assert server.fds_to_close == []
    with pytest.raises(ProtocolError):
        server.greeting({})


@pytest.mark.parametrize(
    "request_id, sent",
    [
        (UNSET, b""),
        (1, b', "id": 1'),
        (None, b', "id": null'),
        ("\u00e9", b', "id": "\\u00E9"'),
        ([1, {"a": "b"}], b', "id": [1, {"a": "b"}]'),
        (2**64 - 1, b', "id": 18446744073709551615'),
    ],
)
def test_reply(ready: ServerConnection, request_id: Any, sent: bytes) -> None:
    assert ready.reply(Value({}), request_id) == b'{"return": {}' + sent + b"}\r\n"
    error = ready.reply(Error(GenericError("no\n")), request_id)
    tail = b'"error": {"class": "GenericError", "desc": "no\\n"}}\r\n'
    assert error == b"{" + (sent[2:] + b", " if sent else b"") + tail


@pytest.mark.parametrize(
    "error, expected",
    [
        (CommandNotFound("x"), "CommandNotFound"),
        (GenericError("x"), "GenericError"),
        (FdNotFound("x"), "GenericError"),
        (FdNotSupplied("x"), "GenericError"),
    ],
)
def test_error_classes_by_dialect(error: QMPError, expected: str) -> None:
    spec, qemu = ServerConnection(DECODER), ServerConnection(DECODER, qemu_classes=True)
    assert json.loads(spec.reply(Error(error), 1))["error"]["class"] == type(error).__name__
    assert json.loads(qemu.reply(Error(error), 1))["error"]["class"] == expected


IDS = [
    b"0",
    b"-0",
    b'"x"',
    b"null",
    b"true",
    b"[]",
    b'{"b":1,"a":[null,"\\u00e9"]}',
    b"1.5",
    b"1e3",
]


@pytest.mark.parametrize(
    "text", [*IDS, b"18446744073709551615", b"1e999", b"'x'", b'"\\ud83d\\ude00"']
)
def test_any_id_is_echoed(ready: ServerConnection, text: bytes) -> None:
    value = json.loads(text.replace(b"'", b'"'))
    receive(ready, b'{"id":' + text + b',"execute":"query-name"}{"id":' + text + b',"execute":"x"}')
    for request, request_id, _ in iter(ready.next_request, None):
        result: Any = request if isinstance(request, Error) else Value({})
        data = ready.reply(result, request_id)
        assert data.isascii()
        assert json.loads(data, parse_constant=pytest.fail)["id"] == value


def test_a_flood_of_errors_is_answered_within_bounds(ready: ServerConnection) -> None:
    answered = reads = 0
    while answered < MAX_ERRORS_IN_A_ROW:
        receive(ready, b"}" * SLOW_PATH_BYTES)
        answered += len(list(iter(ready.next_request, None)))
        reads += 1
    assert answered == MAX_ERRORS_IN_A_ROW + 1
    assert reads <= MAX_ERRORS_IN_A_ROW // SLOW_PATH_BYTES + 1
    for count in (SLOW_PATH_BYTES, 1, 1, 2, SLOW_PATH_BYTES):
        receive(ready, b"}" * count)
        replies = 0
        while ready.ready:
            replies += ready.next_request() is not None
        assert replies == 1
    # A valid request ends the flood, and is always answered.
    found = asked(ready, b"}" * 10 + b'{"execute":"query-name"}' + b"}" * 10)
    assert found[1] == ("query-name", UNSET)
    assert len(found) == 12


def test_the_deepest_honest_mistake_is_no_flood(ready: ServerConnection) -> None:
    """Nesting one level too deep gives one error, and one for each closing bracket, as QEMU."""
    found = asked(ready, b"[" * (MAX_NESTING + 1) + b"]" * (MAX_NESTING + 1))
    assert len(found) == MAX_NESTING + 2


def test_a_request_that_is_refused_is_always_answered(ready: ServerConnection) -> None:
    data = b'{"execute":"no-such","id":1}'
    count = 2 * MAX_ERRORS_IN_A_ROW
    assert len(asked(ready, data * count)) == count


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("quotes", [b'"', b"'"])
@pytest.mark.parametrize("bytes_at_a_time", [7, 100_000])
def test_max_request_bytes(spare: int, quotes: bytes, bytes_at_a_time: int) -> None:
    """The limit is the same on the fast and the slow path, and for any split."""
    data = b'{"execute":"add-fd","arguments":{"opaque":"%s"}}' % (b"x" * 1000)
    data = data.replace(b'"', quotes)
    server = ServerConnection(DECODER, max_request_bytes=len(data) - 1 + spare)
    server.greeting({})
    server.negotiate([])
    found = []
    for at in range(0, len(data), bytes_at_a_time):
        found += asked(server, data[at : at + bytes_at_a_time])
    refused = "JSON token size limit exceeded"
    assert found == [("add-fd" if spare else refused, UNSET)]
    assert asked(server, b'\n{"execute":"query-name","id":1}') == [("query-name", 1)]


@given(st.lists(json_soup | st.sampled_from([b'{"execute":"query-name","id":1}', b"\n"])))
@settings(deadline=None)
def test_any_split_gives_the_same_requests(chunks: list[bytes]) -> None:
    def all_of(parts: Iterator[bytes]) -> list[tuple[str, Any]]:
        server = ServerConnection(DECODER)
        server.greeting({})
        server.negotiate([])
        return [request for part in parts for request in asked(server, part)]

    data = b"".join(chunks)
    whole = all_of(iter([data] if data else []))
    assert all_of(bytewise(data)) == whole
    assert all_of(iter(chunk for chunk in chunks if chunk)) == whole


@given(json_soup)
def test_a_good_request_after_a_reset(data: bytes) -> None:
    server = ServerConnection(DECODER)
    server.greeting({})
    server.negotiate([])
    if data:
        asked(server, data)
    found = asked(server, b'\xff{"execute":"query-name","id":"after"}')
    assert found[-1] == ("query-name", "after")


# -- the client's end ------------------------------------------------------------------------------


@pytest.fixture
def client() -> ClientConnection:
    client = ClientConnection()
    assert messages_in(client, b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n') == []
    return client


def messages_in(client: ClientConnection, data: bytes) -> list[Reply | QMPEvent]:
    receive(client, data)
    return list(client.messages())


def test_client_states(client: ClientConnection) -> None:
    assert client.state is State.NEGOTIATING
    assert client.greeting == {"version": {}, "capabilities": ["oob"]}
    client.negotiated()
    assert state(client) is State.COMMANDS
    with pytest.raises(ProtocolError):
        messages_in(client, b'{"QMP": {}}\r\n')
    client.close()
    assert state(client) is State.CLOSED


def test_a_request(client: ClientConnection) -> None:
    request = client.request("add-fd", {"fdset-id": 3, "opaque": "é"})
    sent = request.data
    assert sent.endswith(b"\n")
    assert sent.isascii()
    assert json.loads(sent) == {
        "execute": "add-fd",
        "arguments": {"fdset-id": 3, "opaque": "é"},
        "id": request.id,
    }
    nothings: list[dict[str, Any] | None] = [None, {}]
    for nothing in nothings:
        request = client.request("x", nothing)
        assert json.loads(request.data) == {"execute": "x", "id": request.id}


STREAM = (
    b'{"return": {"fd": 3}, "id": 1}\r\n'
    b'{"id": 2, "error": {"class": "FdNotFound", "desc": "no\\u00E9"}}\r\n'
    b'{"timestamp": {"seconds": 5, "microseconds": 500000}, "event": "STOP"}\r\n'
    b'{"return": [], "id": "x"}\r\n{"return": {}}\r\n'
    b'{"error": {"class": "Odd", "desc": "d"}}\r\n'
    b'{"event": "FD_ADDED", "data": {"fd": 1}, "timestamp": {"seconds": 1, "microseconds": 0}}\r\n'
)


def shown(message: Reply | QMPEvent) -> object:
    if isinstance(message, QMPEvent):
        return message.name, message.data, message.seconds
    assert message.fds == []
    if (error := message.error) is not None:
        return message.id, type(error), error.error_class, error.desc
    return message.id, message.unwrap()


EXPECTED: list[object] = [
    (1, {"fd": 3}),
    (2, FdNotFound, "FdNotFound", "noé"),
    ("STOP", {}, 5.5),
    ("x", []),
    (None, {}),
    (None, QMPError, "Odd", "d"),
    ("FD_ADDED", {"fd": 1}, 1.0),
]


@given(st.lists(st.integers(1, len(STREAM)), max_size=10))
def test_messages_in_any_split(cuts: list[int]) -> None:
    client = ClientConnection()
    found: list[Reply | QMPEvent] = []
    for chunk in pieces(b'{"QMP": {}}\r\n' + STREAM, cuts):
        found += messages_in(client, chunk)
    assert list(map(shown, found)) == EXPECTED


def test_messages_byte_by_byte(client: ClientConnection) -> None:
    found = [shown(message) for byte in bytewise(STREAM) for message in messages_in(client, byte)]
    assert found == EXPECTED


def test_pretty_replies(client: ClientConnection) -> None:
    """Replies of several lines, as QEMU sends them with pretty=on."""
    pretty = b'{\r\n    "return": {\r\n    },\r\n    "id": 1\r\n}\r\n'
    assert list(map(shown, messages_in(client, pretty * 2))) == [(1, {}), (1, {})]
    found = [shown(message) for byte in bytewise(pretty) for message in messages_in(client, byte)]
    assert found == [(1, {})]


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 400\r\n", b"[]\r\n", b"12\r\n", b"}\r\n", b"\xff\r\n", b'"QMP"\r\n']
)
def test_no_qmp_server(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a QMP server"):
        messages_in(ClientConnection(), data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"event": 1}',
        b'{"event": "X", "timestamp": null}',
        b'{"event": "X", "timestamp": {"seconds": "x"}}',
        b'{"event": "X", "timestamp": {"microseconds": null}}',
        b'{"event": "X", "data": 5}',
        b'{"error": null}',
        b'{"error": {"class": 5}}',
        b'{"return": 1, "id": {}}',
        b"{}",
        b'{"QMP": []}',
    ],
)
def test_invalid_messages_of_a_server(data: bytes) -> None:
    """Invalid messages of a server raise ProtocolError or are decoded; nothing else happens."""
    client = ClientConnection()
    try:
        found = messages_in(client, data + b"\r\n")
    except ProtocolError:
        return
    assert client.greeting is None
    for message in found:
        if isinstance(message, QMPEvent):
            assert isinstance(message.name, str)
            assert isinstance(message.data, dict)
        elif message.error is not None:
            assert isinstance(message.error, QMPError)


def test_a_reply_that_never_ends() -> None:
    client = ClientConnection(max_reply_bytes=1000)
    for _ in range(100):
        assert messages_in(client, b"[1, 2, ") == []
    with pytest.raises(ProtocolError, match="limit exceeded"):
        messages_in(client, b"[1, 2, " * 150)


@pytest.mark.parametrize("output", [b"x", b"[", b'{"a":', b'"text" ', b"{}"])
@pytest.mark.parametrize("end", [b"", b"\n"], ids=["endless", "line"])
def test_a_long_line_that_is_no_message(output: bytes, end: bytes) -> None:
    """A long invalid line is not parsed token by token, which can take 40 s for 1 MiB."""
    client = ClientConnection(max_reply_bytes=1 << 20)
    with pytest.raises(ProtocolError, match="no whole message in a long line"):
        messages_in(client, output * (1 << 20) + output + end)


@pytest.mark.parametrize("output", [b"[", b"]", b"x "])
def test_nothing_is_read_behind_an_error(output: bytes) -> None:
    client = ClientConnection()
    with pytest.raises(ProtocolError, match="not a QMP server"):
        messages_in(client, output * 4096 + b"\n")
    assert not client.ready


@pytest.mark.parametrize("kind", QMPError.__subclasses__())
def test_errors_by_class(kind: type[QMPError]) -> None:
    name = kind.__name__
    error = errors.error_of_class(name, "d")
    assert type(error) is kind
    assert (error.desc, error.error_class, str(error)) == ("d", name, "d")


def test_an_error_of_a_class_of_its_own() -> None:
    error = errors.error_of_class("NoSuch", "d")
    assert (type(error), error.error_class) == (QMPError, "NoSuch")
