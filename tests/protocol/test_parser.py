"""JSON values and errors are those of QEMU 7.2, for any split of the input."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splits import bytewise, fed, json_soup, pieces

from qmpfd.errors import GenericError
from qmpfd.limits import MAX_NESTING, MAX_TOKENS
from qmpfd.protocol.budget import Budget
from qmpfd.protocol.parser import Parser

LIMIT = 1 << 20


class Bad(str):
    """Text of an error after "JSON parse error, "."""

    __slots__ = ()


def outcomes(chunks: Iterable[bytes], limit: int = LIMIT) -> list[Any]:
    """Return the values with their types, and the texts of the errors."""
    return results(Parser(limit), chunks)


def results(parser: Parser, chunks: Iterable[bytes]) -> list[Any]:
    found: list[Any] = []
    for value, error, _ in fed(parser.feed, iter(chunks)):
        if error is None:
            found.append(typed(value))
        else:
            assert value is None or isinstance(value, dict | list | str | int | float)
            assert type(error) is GenericError
            found.append(Bad(error.desc))
    return found


def typed(value: Any) -> Any:
    """Return *value* in a form that distinguishes 1, 1.0, True, 0.0 and -0.0; nan equals nan."""
    return json.loads(json.dumps(value), parse_float=lambda text: ("float", text))


def parse_error(text: str) -> Bad:
    return Bad(f"JSON parse error, {text}")


def stray(text: str) -> Bad:
    return parse_error(f"stray '{text}'")


VALUE, KEY, DUPLICATE = map(
    parse_error, ["expecting value", "key is not a string in object", "duplicate key"]
)
COLON = parse_error("missing : in object pair")
IN_DICT, IN_LIST = (parse_error(f"expected separator in {kind}") for kind in ("dict", "list"))

# After each input, another value can follow a line end.
CASES: list[tuple[bytes, list[Any]]] = [
    (b"{}", [{}]),
    (b"[]", [[]]),
    (b' {\t"a"\r:\n1 } ', [{"a": 1}]),
    (b"{'a': 'b'}", [{"a": "b"}]),
    (b'{"a":{"b":[1,2,{"c":[]}]}}', [{"a": {"b": [1, 2, {"c": []}]}}]),
    (b"[[],{},[[]]]", [[[], {}, [[]]]]),
    (b'{"a":1}{"b":2}[3]"x"', [{"a": 1}, {"b": 2}, [3], "x"]),
    (b"true\nfalse\nnull\n", [True, False, None]),
    (b"[true,false,null]", [[True, False, None]]),
    (b"true{}", [True, {}]),
    # Numbers.
    (b"[0,-0,7,-7,120]", [[0, 0, 7, -7, 120]]),
    (b"12 ", [12]),
    (b"12{}", [12, {}]),
    (b"[9223372036854775807,-9223372036854775808]", [[2**63 - 1, -(2**63)]]),
    (b"[9223372036854775808,18446744073709551615]", [[2**63, 2**64 - 1]]),
    (b"[18446744073709551616,-9223372036854775809]", [[2.0**64, -(2.0**63)]]),
    (b"[1.5,1e3,1E+3,1e-3,0.5,-0.0,0e1,1.50]", [[1.5, 1e3, 1e3, 1e-3, 0.5, -0.0, 0.0, 1.5]]),
    (b"[01]", [stray("01"), VALUE]),
    (b"[+1]", [stray("+"), VALUE]),
    (b"[.5]", [stray("."), VALUE]),
    (b"[1.]", [stray("1.]")]),
    (b"[1e]", [stray("1e]")]),
    (b"[-]", [stray("-]")]),
    (b"[NaN]", [stray("N"), VALUE]),
    (b"[Infinity]", [stray("I"), VALUE]),
    (b"[nan]", [parse_error("invalid keyword 'nan'")]),
    (b"[inf]", [parse_error("invalid keyword 'inf'")]),
    (b"nan ", [parse_error("invalid keyword 'nan'")]),
    (b"nan{}", [parse_error("invalid keyword 'nan'"), {}]),
    # Objects.
    (b'{"a":1,"a":2}', [DUPLICATE]),
    (b'{"a":1,"\\u0061":2}', [DUPLICATE]),
    (b"{'a':1,\"a\":2}", [DUPLICATE]),
    (b'{"x":{"a":1,"a":2}}', [DUPLICATE]),
    (b'{"x":{"a":1},"a":{"a":2}}', [{"x": {"a": 1}, "a": {"a": 2}}]),
    (b'{"":1}', [{"": 1}]),
    (b"{1:2}", [KEY]),
    (b"{null:2}", [KEY]),
    (b"{[]:2}", [KEY]),
    (b"{{}:2}", [KEY]),
    (b"{execute:2}", [parse_error("invalid keyword 'execute'")]),
    (b"{,}", [VALUE]),
    (b'{,"a":1}', [VALUE]),
    (b'{"a":1,}', [VALUE]),
    (b'{"a":1,,"b":2}', [VALUE]),
    (b'{"a":}', [VALUE]),
    (b'{"a"}', [COLON]),
    (b'{"a",1}', [COLON]),
    (b'{"a" 1}', [COLON]),
    (b'{"a":1 "b":2}', [IN_DICT]),
    (b'{"a":1:2}', [IN_DICT]),
    # Arrays.
    (b"[1,]", [VALUE]),
    (b"[,1]", [VALUE]),
    (b"[1,,2]", [VALUE]),
    (b"[1 2]", [IN_LIST]),
    (b"[1:2]", [IN_LIST]),
    (b"[:]", [VALUE]),
    # A value ends when braces and brackets balance, or one count is negative.
    (b"}", [VALUE]),
    (b"]", [VALUE]),
    (b"}}]", [VALUE, VALUE, VALUE]),
    (b"{]", [VALUE]),
    (b"[}", [VALUE]),
    (b"{}}", [{}, VALUE]),
    (b",", [VALUE]),
    (b":", [VALUE]),
    (b'{"a":["b"}]', [IN_LIST]),  # the first brace does not end the value
    (b'{"a":1]', [IN_DICT]),
    # Lexical errors: the value and the invalid bytes are dropped; the rest gives further errors.
    (b"@", [stray("@")]),
    (b'{"execute": @}', [stray("@"), VALUE]),
    (b'{"a": @ "x" 1}', [stray("@"), VALUE]),
    (b'{"a": @, 1}', [stray("@"), VALUE, 1, VALUE]),
    (b"@ junk [1]", [stray("@"), [1]]),
    (b"/* */", [stray("/")]),
    (b"// x", [stray("/")]),
    (b"\xef\xbb\xbf{}", [stray("\ufffd"), {}]),
    (b"\x00", [stray("")]),
    (b"\x1b", [stray("\x1b")]),
    (b"\xfe\xff", [stray("\ufffd"), stray("\ufffd")]),
    (b'{"a":1\x1b', [stray("\x1b")]),
    (b'"ab\x00cd\n', [stray('"ab')]),
    (b'"ab\n', [stray('"ab\n')]),
    (b'"a\tb\n', [stray('"a\t')]),
    (b'"\xc3\xa9\xff', [stray('"\u00e9\ufffd')]),
    # Strings.
    (b'"\\"\\\'\\\\\\/\\b\\f\\n\\r\\t"', ["\"'\\/\b\f\n\r\t"]),
    (b"'\\'\\\"'", ["'\""]),
    (b'"\x7f"', ["\x7f"]),
    (b'"\\x"', [parse_error("invalid escape sequence in string")]),
    (b'"\\ud800"', [parse_error("\\ud800 is not a valid Unicode character")]),
    (b'"\xed\xa0\x80"', [parse_error("invalid UTF-8 sequence in string")]),
    (b'{"a":"\\q","b":}', [parse_error("invalid escape sequence in string")]),  # the first
    (b'{"\\ud83d\\ude00":"\xf0\x9f\x98\x80"}', [{"\U0001f600": "\U0001f600"}]),
]


def well(value: Any) -> Any:
    return value if isinstance(value, Bad) else typed(value)


@pytest.mark.parametrize("data, expected", CASES)
def test_three_ways(data: bytes, expected: list[Any]) -> None:
    expected = [well(value) for value in expected]
    assert outcomes([data, b"\n"]) == expected
    assert outcomes([*bytewise(data), b"\n"]) == expected
    assert outcomes([data + b'\n{"next": [1]}']) == [*expected, {"next": [1]}]
    assert outcomes([b'{"before": 1}' + data + b"\n"]) == [{"before": 1}, *expected]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" \n",
        b"{",
        b"[[",
        b'{"a":',
        b'"abc',
        b'"abc\\',
        b'{"a":["b"}',
        b"12",
        b"tru",
        b"-",
        b"[1,2",
    ],
)
def test_an_incomplete_value_waits_and_a_control_byte_ends_it(data: bytes) -> None:
    for reset in (b"\x1b", b"\0", b"\xff", b"\xfe"):
        for chunks in ([data], bytewise(data)):
            parser = Parser(LIMIT)
            assert results(parser, chunks) == []
            after = results(parser, [reset])
            errors = [r for r in after if isinstance(r, Bad) and r.startswith("JSON parse error, ")]
            assert errors[-1:] == after[-1:]
            assert "stray '" in after[-1]
            assert results(parser, [b'{"a": 1}']) == [{"a": 1}]
            assert parser.idle


@pytest.mark.parametrize("reset", [b"\x1b", b"\0", b"\xff", b"\xfe"])
def test_one_error_for_each_control_byte(reset: bytes) -> None:
    """A control byte after an incomplete command gives one error."""
    found = outcomes([b'{"execute": ' + reset * 5 + b"{}"])
    assert len(found) == 6
    assert all(isinstance(error, Bad) for error in found[:5])
    assert found[5] == {}


@given(json_soup, st.lists(st.integers(1, 60), max_size=8))
def test_any_split_gives_the_same(data: bytes, cuts: list[int]) -> None:
    whole = outcomes([data])
    assert outcomes(pieces(data, cuts)) == whole
    assert outcomes(bytewise(data)) == whole


@given(json_soup | st.binary(max_size=50), st.sampled_from([20, LIMIT]))
def test_recovers_from_any_bytes(data: bytes, limit: int) -> None:
    parser = Parser(limit)
    results(parser, [data])
    assert results(parser, [b'\xff{"a": [1]}'])[-1] == {"a": [1]}
    assert parser.idle


@given(json_soup)
def test_ends(data: bytes) -> None:
    """The bytes up to a value's end give the same value."""
    found = list(Parser(LIMIT).feed(data))
    ends = [end for _, _, end in found]
    assert ends == sorted(ends)
    for number, end in enumerate(ends, 1):
        # A number or word is complete only with the next byte, which is not part of it.
        shorter = len(list(Parser(LIMIT).feed(data[:end])))
        assert shorter == number or (
            shorter == number - 1 and len(list(Parser(LIMIT).feed(data[: end + 1]))) >= number
        )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cn", "Cs", "Co"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(
                st.characters(codec="utf-8", exclude_categories=["Cn", "Cs", "Co"]), max_size=5
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@given(json_values, st.booleans(), st.sampled_from([None, 0, 3]))
def test_reads_what_the_json_module_writes(
    value: Any, ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert outcomes([text.encode() + b"\n"]) == [typed(value)]


@given(json_soup)
def test_what_we_accept_the_json_module_accepts(data: bytes) -> None:
    """Except for single quotes, and the overlong NUL."""
    if b"'" in data or b"\xc0\x80" in data:
        return
    for value, error, _ in Parser(LIMIT).feed(data + b"\n"):
        if error is None and isinstance(value, dict | list):
            break
    else:
        return
    decoder = json.JSONDecoder(strict=True)
    text = data.decode("utf-8", "replace")
    found = []
    for at, byte in enumerate(text):
        if byte in "{[":
            try:
                found.append(typed(decoder.raw_decode(text, at)[0]))
            except (ValueError, RecursionError):
                continue
    assert typed(value) in found


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bytes_at_a_time", [1, 7, 1 << 20])
@pytest.mark.parametrize("opener, closer", [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting(opener: bytes, closer: bytes, bytes_at_a_time: int) -> None:
    def chunks(data: bytes) -> Iterator[bytes]:
        return (data[at : at + bytes_at_a_time] for at in range(0, len(data), bytes_at_a_time))

    fill = b"" if opener == b"[" else b"1"
    deepest = opener * MAX_NESTING + fill + closer * MAX_NESTING
    parser = Parser(LIMIT)
    assert [error for _, error, _ in fed(parser.feed, chunks(deepest))] == [None]
    errors = [e for _, e, _ in fed(parser.feed, chunks(opener + deepest + closer))]
    found = [error.desc for error in errors if error is not None]
    assert found[0] == "JSON nesting depth limit exceeded"
    # "each surplus closer gives another error (1024 deep -> 1 + 1025 replies)", and a value that
    # was incomplete inside is an error too.
    assert found[-(MAX_NESTING + 1) :] == [VALUE] * (MAX_NESTING + 1)
    assert len(found) <= 1 + MAX_NESTING + 1 + 1
    assert results(parser, [b"{}"]) == [{}]


def test_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TOKENS == 2 << 20  # QEMU's limit; too high for a fast test
    monkeypatch.setattr("qmpfd.protocol.parser.MAX_TOKENS", 1001)
    parser = Parser(LIMIT)
    assert results(parser, [b"[" + b"1," * 499 + b"1]"]) == [[1] * 500]
    assert results(parser, [b"[" + b"1," * 500]) == []
    assert results(parser, [b"1]"]) == [Bad("JSON token count limit exceeded")]
    assert results(parser, [b"[" + b"1," * 501]) == [Bad("JSON token count limit exceeded")]
    # The rest of the value is dropped.
    assert results(parser, [b'1, {"a": [1, 2, 3], "b": nan}, 5]', b"{}"]) == [{}]


@pytest.mark.parametrize("bytes_at_a_time", [1, 7, 1000])
@pytest.mark.parametrize(
    "data, idle",
    [
        (b'"' + b"x" * 99 + b'"', True),
        (b"1" * 101 + b" ", True),
        (b"a" * 101 + b"\n", True),
        (b"[" + b"1," * 60 + b"1]", True),
        (b'{"a":"' + b"x" * 200 + b'","b":[1,{}]}', True),
        (b'{"a":"' + b"x" * 200 + b'\\"","b":"}', False),
    ],
)
def test_size(data: bytes, idle: bool, bytes_at_a_time: int) -> None:
    parser = Parser(100)
    chunks = [data[at : at + bytes_at_a_time] for at in range(0, len(data), bytes_at_a_time)]
    assert results(parser, chunks) == [Bad("JSON token size limit exceeded")]
    assert parser.idle is idle
    if idle:
        assert results(parser, [b'{"a":1}']) == [{"a": 1}]


@pytest.mark.parametrize("cut", range(200, 214))
def test_the_value_after_one_that_is_too_large(cut: int) -> None:
    """The value after one that is too large is read, for any split between the two."""
    data = b"[" + b"1," * 99 + b'1]{"name": 12}'
    found = results(Parser(100), [data[:150], data[150:cut], data[cut:]])
    assert found == [Bad("JSON token size limit exceeded"), {"name": 12}]


def test_size_at_the_limit() -> None:
    """The limit is on the sum of the tokens; blanks do not count."""
    parser = Parser(100)
    assert results(parser, [b" " * 200 + b'"' + b"x" * 98 + b'"']) == ["x" * 98]
    assert results(parser, [b"[" + b"1 ,  " * 48 + b"10]"]) == [[1] * 48 + [10]]
    too_big = [Bad("JSON token size limit exceeded")]
    assert results(parser, [b"[" + b"1 ,  " * 48 + b"100]"]) == too_big


def test_memory_is_bounded_by_the_limit() -> None:
    """Long input of each kind that never ends a value, with a limit of 2 kB."""
    tracemalloc.start()
    try:
        for data in (b"x", b'"x', b"[", b"[[1,", b'{"a":', b"[1,", b"@ ", b'["a",', b"-1", b"{}"):
            parser = Parser(2_000)
            chunk = data * (4096 // len(data))
            sizes = []
            for _ in range(8):
                for _ in parser.feed(chunk):
                    pass
                now, _ = tracemalloc.get_traced_memory()
                sizes.append(now)
            assert sizes[-1] - sizes[0] < 2_000, data
            assert max(sizes) - sizes[0] < 200_000, data
    finally:
        tracemalloc.stop()


def test_parsers_share_a_budget() -> None:
    budget = Budget(50_000)
    greedy = [Parser(LIMIT, budget) for _ in range(4)]
    modest = Parser(LIMIT, budget)
    too_big = Bad("JSON token size limit exceeded")
    refused: list[Any] = []
    for parser, data in zip(greedy, (b"x", b"1", b"y", b"[],"), strict=True):
        # An incomplete string, number and word, and many small values.
        refused += results(parser, [{b"x": b'["', b"[],": b"["}.get(data, b"")])
        for _ in range(100):
            refused += results(parser, [data * 4096])
    assert set(refused) == {too_big}
    assert budget.used < 50_000 + 4 * 4096
    # A small request is read meanwhile; the end of a value refunds its bytes.
    assert results(modest, [b'{"a": "' + b"x" * 4000, b'"}']) == [{"a": "x" * 4000}]
    for parser in greedy:
        parser.close()
        assert parser.idle
    assert budget.used == 0
    assert results(modest, [b'"', b"x" * 20_000, b"x" * 20_000, b'"']) == ["x" * 40_000]
    assert budget.used == 0


TOO_BIG = Bad("JSON token size limit exceeded")


def test_parsers_without_input_lose_their_budget() -> None:
    """The last parser gets its bytes; the parser without input for the longest time is the victim,
    and reports one error with its next input.
    """
    budget = Budget(100_000)
    silent = [Parser(LIMIT, budget, "same") for _ in range(10)]
    for parser in silent:
        assert results(parser, [b'{"a": ["', b"x" * 9_000]) == []
    assert results(Parser(LIMIT, budget, "same"), [b'"', b"x" * 30_000, b'"']) == ["x" * 30_000]
    assert budget.used <= 100_000
    output = [results(parser, [b'x"', b']} {"b": 1}']) for parser in silent]
    assert output == [[TOO_BIG, {"b": 1}]] * 3 + [[{"a": ["x" * 9_000 + "x"]}, {"b": 1}]] * 7
    assert budget.used == 0


def test_many_of_one_owner_do_not_take_the_budget_of_another() -> None:
    """Many parsers of one uid, all with progress, do not use up another uid's budget."""
    budget = Budget(100_000)
    greedy = [Parser(LIMIT, budget, "greedy") for _ in range(50)]
    modest = Parser(LIMIT, budget, "modest")
    assert results(modest, [b'"']) == []
    refused = 0
    for _ in range(40):
        assert results(modest, [b"x" * 1_000]) == []
        for parser in greedy:
            refused += len(results(parser, [b'["' if parser.idle else b"x" * 1_000]))
    assert results(modest, [b'"']) == ["x" * 40_000]
    assert refused > 10


def test_a_snapshot_of_one_that_was_given_up() -> None:
    """The successor reports the error of a victim that has not reported it yet."""
    budget = Budget(10_000)
    parser = Parser(LIMIT, budget)
    results(parser, [b'["' + b"x" * 9_000])
    assert results(Parser(LIMIT, budget, 1), [b'"' + b"x" * 8_500, b'"']) == ["x" * 8_500]
    other = Parser(LIMIT)
    other.restore(parser.snapshot())
    assert results(other, [b'x"]', b"{}"]) == [TOO_BIG, {}]


@given(st.lists(st.tuples(st.integers(0, 2), json_soup)), st.sampled_from([0, 100, 10_000]))
def test_a_budget_is_given_back_whatever_comes(chunks: list[tuple[int, bytes]], most: int) -> None:
    budget = Budget(most)
    parsers = [Parser(1000, budget) for _ in range(3)]
    for number, data in chunks:
        results(parsers[number], [data])
        assert budget.used >= 0
    for parser in parsers:
        assert results(parser, [b"\xff{}"])[-1] == {}
    assert budget.used == 0


def test_idle() -> None:
    parser = Parser(100)
    assert parser.idle
    for data, idle in [
        (b"{", False),
        (b"}", True),
        (b"1", False),
        (b" ", True),
        (b"@", False),
        (b"\n", True),
        (b'"' + b"x" * 200, False),
        (b'"', True),
    ]:
        results(parser, [data])
        assert parser.idle is idle, data


def test_infinite_numbers_are_kept_as_such() -> None:
    """Infinite numbers are values, as in QEMU; encode.py decides how to write them."""
    values = [value for value, _, _ in Parser(LIMIT).feed(b"1e999 -1e999 ")]
    assert values == [math.inf, -math.inf]


def test_the_work_does_not_grow_with_what_is_pending() -> None:
    """The parser does not scan an incomplete string again for each byte: that would be O(n**2)."""
    parser = Parser(LIMIT)
    list(parser.feed(b'"'))
    for _ in range(500_000):
        assert not list(parser.feed(b"x"))
    ((value, error, _),) = parser.feed(b'"')
    assert (value, error) == ("x" * 500_000, None)
