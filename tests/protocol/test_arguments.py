"""Check of arguments against their types: errors in QEMU's order and words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Struct, UnsetType

from qmpfd.errors import GenericError
from qmpfd.limits import INT64_MAX, INT64_MIN
from qmpfd.protocol.arguments import Int64, bare_type, convert


class Everything(Struct, forbid_unknown_fields=True, rename="kebab"):
    the_number: Int64
    text: str
    flag: bool | UnsetType = UNSET
    choice: Literal["a", "b"] | UnsetType = UNSET
    names: list[str] | UnsetType = UNSET
    choices: list[Literal["oob"]] | UnsetType = UNSET
    maybe: Int64 | UnsetType = UNSET


GOOD: dict[str, Any] = {"the-number": 1, "text": "x"}


def refused(members: dict[str, Any]) -> str:
    with pytest.raises(GenericError) as caught:
        convert(members, Everything)
    assert caught.value.error_class == "GenericError"
    return caught.value.desc


def test_good() -> None:
    assert convert(GOOD, Everything) == Everything(1, "x")
    full = {**GOOD, "flag": False, "choice": "b", "names": [], "choices": ["oob", "oob"]}
    assert convert(full, Everything) == Everything(1, "x", False, "b", [], ["oob", "oob"])


@pytest.mark.parametrize("number", [0, -1, INT64_MIN, INT64_MAX])
def test_integers(number: int) -> None:
    assert convert({**GOOD, "the-number": number}, Everything).the_number == number


@pytest.mark.parametrize("value", [INT64_MAX + 1, INT64_MIN - 1, 1.0, True, "1", None, [], {}])
@pytest.mark.parametrize("name", ["the-number", "maybe"])
def test_no_integer(name: str, value: Any) -> None:
    expected = f"Invalid parameter type for '{name}', expected: integer"
    assert refused({**GOOD, name: value}) == expected


WRONG: list[tuple[str, str, list[Any]]] = [
    ("text", "string", [1, 1.5, True, None, [], {}]),
    ("choice", "string", [1, 1.5, True, None, [], {}]),
    ("flag", "boolean", [0, 1, 1.5, "true", None, [], {}]),
    ("names", "array", [1, 1.5, True, "a", None, {}]),
]


@pytest.mark.parametrize(
    "name, kind, value", [(name, kind, value) for name, kind, values in WRONG for value in values]
)
def test_wrong_type(name: str, kind: str, value: Any) -> None:
    expected = f"Invalid parameter type for '{name}', expected: {kind}"
    assert refused({**GOOD, name: value}) == expected


@pytest.mark.parametrize(
    "members, desc",
    [
        ({}, "Parameter 'the-number' is missing"),
        ({"the-number": 1}, "Parameter 'text' is missing"),
        ({"text": "x"}, "Parameter 'the-number' is missing"),
        ({**GOOD, "choice": "c"}, "Parameter 'choice' does not accept value 'c'"),
        ({**GOOD, "choices": ["c"]}, "Parameter 'null' does not accept value 'c'"),
        (
            {**GOOD, "choices": ["oob", 1]},
            "Invalid parameter type for 'choices[1]', expected: string",
        ),
        (
            {**GOOD, "names": ["a", "b", None]},
            "Invalid parameter type for 'names[2]', expected: string",
        ),
        ({**GOOD, "names": {}}, "Invalid parameter type for 'names', expected: array"),
        ({**GOOD, "other": 1}, "Parameter 'other' is unexpected"),
        ({**GOOD, "the_number": 1}, "Parameter 'the_number' is unexpected"),
        ({**GOOD, "": 1}, "Parameter '' is unexpected"),
        # Missing and wrong members come before unknown ones, in the order of the schema.
        ({"text": "x", "other": 1}, "Parameter 'the-number' is missing"),
        ({**GOOD, "other": 1, "flag": 1}, "Invalid parameter type for 'flag', expected: boolean"),
        ({"the-number": "x"}, "Invalid parameter type for 'the-number', expected: integer"),
        ({"text": 1, "maybe": "x"}, "Parameter 'the-number' is missing"),
    ],
)
def test_refused(members: dict[str, Any], desc: str) -> None:
    assert refused(members) == desc


@given(
    st.dictionaries(
        st.sampled_from(["the-number", "text", "flag", "choice", "names", "choices", "maybe", "x"]),
        st.none()
        | st.booleans()
        | st.sampled_from([0, 1, -1, 2**63, 2**63 - 1, -(2**63), -(2**63) - 1, 1.0, 0.5])
        | st.sampled_from(["", "a", "oob", "x"])
        | st.lists(st.sampled_from(["oob", "a", 1, None]), max_size=2),
    )
)
def test_accepts_what_msgspec_accepts(members: dict[str, Any]) -> None:
    try:
        expected = msgspec.convert(members, Everything)
    except msgspec.ValidationError:
        refused(members)
    else:
        assert convert(members, Everything) == expected


def test_a_type_that_qmp_does_not_have() -> None:
    class Odd(Struct):
        weight: float

    with pytest.raises(TypeError, match="float"):
        convert({"weight": 1.5}, Odd)


def test_bare_type() -> None:
    assert bare_type(int) is int
    assert bare_type(Annotated[int, msgspec.Meta(ge=0)]) is int
    assert bare_type(Int64 | UnsetType) is int
    assert bare_type(Literal["a"] | UnsetType) == Literal["a"]
    assert bare_type(list[str] | UnsetType) == list[str]
