"""Targets: how the command line names stored descriptors."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from qmpfd.cli.targets import Target, stored_target, target


@pytest.mark.parametrize(
    "word, fdset_id, name, fd, access, at",
    [
        ("0", 0, None, None, None, None),
        ("7/12", 7, None, 12, None, None),
        ("0:r", 0, None, None, "rdonly", None),
        ("0/3:rw=9", 0, None, 3, "rdwr", 9),
        ("0:wronly=0", 0, None, None, "wronly", 0),
        ("@web", None, "web", None, None, None),
        ("@web=3", None, "web", None, None, 3),
        ("@rdwr:disk.img:r", None, "rdwr:disk.img", None, "rdonly", None),
        ("@a=b", None, "a=b", None, None, None),
        ("@a=b=4", None, "a=b", None, None, 4),
        ("@/dev/vfio/12", None, "/dev/vfio/12", None, None, None),
        ("@vm1:*", None, "vm1:*", None, None, None),
        ("@two\nlines:r", None, "two\nlines", None, "rdonly", None),
    ],
)
def test_words(word: str, fdset_id: Any, name: Any, fd: Any, access: Any, at: Any) -> None:
    assert target(word) == Target(word, fdset_id, name, fd, access, at)


@pytest.mark.parametrize(
    "word",
    ["", "x", "-1", "0/", "0/x", "0:", "0:x", "0=", "0=-1", "0=x", "@", "@=3", "@:r", "1e3", "0x1"],
)
def test_no_targets(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        target(word)


@pytest.mark.parametrize("word", ["0:r", "0=3", "@web=3", "@web:rw"])
def test_where_nothing_is_handed_out(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="SET/FD or @NAME"):
        stored_target(word)


@pytest.mark.parametrize("name", ["a:r", "a:rw", "a=1", "a:rdonly=12"])
def test_a_name_that_ends_like_another_part(name: str) -> None:
    """The error says which pattern matches the name."""
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        stored_target(f"@{name}")
    pattern = str(raised.value).rpartition(": ")[2].removesuffix(")")
    assert stored_target(pattern).matches(0, {"fd": 3, "opaque": name})


def test_a_name_that_ends_like_a_number() -> None:
    """The whole word is tried as a name first, then as a name with a descriptor number."""
    first, second = target("@/dev/vfio/12").alternatives()
    assert first.selector == {"opaque": "/dev/vfio/12"}
    assert second.selector == {"opaque": "/dev/vfio", "fd": 12}


@pytest.mark.parametrize(
    "word, found",
    [
        ("0", True),
        ("1", False),
        ("0/5", True),
        ("0/6", False),
        ("@vm1:disk", True),
        ("@vm1", False),
        ("@vm1:*", True),
        ("@vm[12]:dis?", True),
        ("@vm1:disk/5", True),
        ("@vm1:disk/6", False),
        ("@*/5", True),
    ],
)
def test_what_matches(word: str, found: bool) -> None:
    assert target(word).matches(0, {"fd": 5, "opaque": "vm1:disk"}) == found


def test_what_has_no_name_matches_no_pattern() -> None:
    assert not target("@*").matches(0, {"fd": 5})
