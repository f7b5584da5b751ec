"""Selectors: ``open-fdset``, ``query-fds`` and ``remove-fds`` select alike; for all of them, hidden
descriptors do not exist.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import Pipe, Wire, daemon, error, pipes, request, settle, value

import qmpfd
from qmpfd.limits import MAX_OPAQUE_TOTAL
from qmpfd.policy import Access, Grant, Right

#: The stored descriptors: fd set id and opaque text, by set, the oldest first.
STORED = [(0, "vm1:disk"), (0, "vm1:net"), (1, "vm10:disk"), (2, None), (2, "vm1:disk"), (3, "")]


def grant(*rights: Right, fdsets: list[int] | None = None, opaque: str | None = None) -> Grant:
    """Return a grant for fd sets and a pattern."""
    return Grant(
        frozenset(rights),
        None if fdsets is None else frozenset(fdsets),
        None if opaque is None else (opaque,),
    )


async def fill(wire: Wire, made: list[Pipe]) -> list[int]:
    """Store STORED; return the numbers."""
    numbers = []
    for n, (fdset_id, text) in enumerate(STORED):
        arguments: dict[str, Any] = {} if text is None else {"opaque": text}
        if n and STORED[n - 1][0] == fdset_id:
            arguments["fdset-id"] = fdset_id
        numbers.append(value(await wire.call("add-fd", arguments, [made[n]]))["fd"])
    return numbers


@asynccontextmanager
async def filled(path: Path, **options: Any) -> AsyncIterator[tuple[Wire, list[int]]]:
    """Yield a client of a daemon that holds STORED, and the numbers."""
    async with daemon(path, **options):
        with await Wire.session(path) as wire, pipes(len(STORED)) as made:
            yield wire, await fill(wire, made)


@asynccontextmanager
async def limited(path: Path, *grants: Grant, **options: Any) -> AsyncIterator[tuple[Wire, Wire]]:
    """Yield two clients of a daemon that holds STORED: one with *grants*, one with all rights."""
    async with daemon(path, **options) as server:
        with await Wire.session(path) as client:
            [session] = server.sessions
            session.context.change_access(Access(grants))
            with await Wire.session(path) as root, pipes(len(STORED)) as made:
                await fill(root, made)
                yield client, root


SELECTORS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "a set": ({"fdset-id": 0}, [0, 1]),
    "no such set": ({"fdset-id": 9}, []),
    "a negative set": ({"fdset-id": -1}, []),
    "text": ({"opaque": "vm1:disk"}, [4, 0]),
    "text of a set": ({"fdset-id": 0, "opaque": "vm1:disk"}, [0]),
    "the empty text": ({"opaque": ""}, [5]),
    "no such text": ({"opaque": "vm1:"}, []),
    "prefix": ({"opaque-prefix": "vm1:"}, [4, 0, 1]),
    "any text": ({"opaque-prefix": ""}, [5, 4, 2, 0, 1]),
    "prefix and text": ({"opaque-prefix": "vm1", "opaque": "vm10:disk"}, [2]),
    "prefix, but another text": ({"opaque": "vm10:disk", "opaque-prefix": "vm2"}, []),
    "pid": ({"added-by-pid": os.getpid()}, [5, 3, 4, 2, 0, 1]),
    "uid": ({"added-by-uid": os.geteuid(), "fdset-id": 2}, [3, 4]),
    "another pid": ({"added-by-pid": 1}, []),
    "another uid": ({"added-by-uid": 4711}, []),
}


@pytest.mark.parametrize("selector, expected", SELECTORS.values(), ids=SELECTORS)
async def test_all_three_commands_select_the_same(
    path: Path, selector: dict[str, Any], expected: list[int]
) -> None:
    """All three commands select the same; open-fdset opens the newest."""
    async with filled(path) as (wire, numbers):
        listed = await wire.call("query-fds", selector)
        opened = await wire.call("open-fdset", selector)
        removed = await wire.call("remove-fds", selector)
        left = value(await wire.call("query-fds"))
        if not expected:
            output = ", ".join(f"{name}:{given}" for name, given in selector.items())
            assert error(opened) == error(removed) == "FdNotFound"
            assert removed["error"]["desc"] == f"File descriptor named '{output}' not found"
            assert listed.get("return", []) == []
            assert len(left) == len(STORED)
            return
        chosen = [numbers[n] for n in expected]
        assert [fd["fd"] for fd in value(listed)] == chosen
        assert value(opened)["fd"] == numbers[max(expected)]
        sets = value(removed)
        assert [fd["fd"] for fdset in sets for fd in fdset["fds"]] == chosen
        assert [fdset["fdset-id"] for fdset in sets] == sorted(
            {STORED[n][0] for n in expected}, reverse=True
        )
        for fdset in sets:
            for fd in fdset["fds"]:
                assert (fdset["fdset-id"], fd.get("opaque")) == STORED[numbers.index(fd["fd"])]
        assert {fd["fd"] for fd in left} == set(numbers) - set(chosen)


async def test_by_number_alone(path: Path) -> None:
    async with filled(path) as (wire, numbers):
        [found] = value(await wire.call("query-fds", {"fd": numbers[4]}))
        assert (found["fdset-id"], found["fd"]) == (2, numbers[4])
        [fdset] = value(await wire.call("remove-fds", {"fd": numbers[4]}))
        assert fdset == {"fdset-id": 2, "fds": [{"fd": numbers[4], "opaque": "vm1:disk"}]}


@pytest.mark.parametrize("command", ["open-fdset", "remove-fds"])
async def test_an_empty_selector(path: Path, command: str) -> None:
    """An empty selector is refused: a forgotten member must not remove everything."""
    async with filled(path) as (wire, numbers):
        refused = await wire.call(command)
        assert error(refused) == "GenericError"
        assert "Parameter 'fdset-id' is missing" in refused["error"]["desc"]
        assert len(value(await wire.call("query-fds", {}))) == len(numbers)


async def test_closed_before_the_reply(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(40) as made:
            for n, pipe in enumerate(made):
                value(await wire.call("add-fd", {"opaque": f"job{n % 2}"}, [pipe]))
                pipe.release()
            removed = value(await wire.call("remove-fds", {"opaque": "job1"}))
            assert len(removed) == 20
            assert [pipe.held() for pipe in made] == [n % 2 == 0 for n in range(40)]


async def test_a_long_reply(path: Path) -> None:
    """Many descriptors, and long texts."""
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(100) as made:
            for n in range(4):
                text = "x" * (50_000 if n == 3 else 3)
                value(await wire.call("add-fds", {"opaque": text}, made))
            before = value(await wire.call("query-fdsets"))
            assert value(await wire.call("remove-fds", {"opaque-prefix": "x"})) == before
            assert value(await wire.call("query-fdsets")) == []


# -- open-fdset with remove --------------------------------------------------------------------


async def test_open_and_remove(path: Path) -> None:
    """The daemon sends the descriptor and closes its own in one step."""
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe, await Wire.session(path) as other:
            value(await other.call("watch-fdsets", {"enable": True}))
            value(await wire.call("add-fd", {"opaque": "web"}, [pipe]))
            pipe.release()
            async with qmpfd.connect(path) as client:
                with await client.open_fdset(opaque="web", remove=True):
                    assert value(await wire.call("query-fdsets")) == []
                    assert pipe.held()
                assert not pipe.held()
            events = await other.replies(2)
            assert [event["event"] for event in events] == ["FD_ADDED", "FD_REMOVED"]
            assert error(await wire.call("open-fdset", {"opaque": "web"})) == "FdNotFound"


async def test_not_removed_is_the_default(path: Path) -> None:
    async with filled(path) as (wire, numbers):
        for arguments in ({"opaque": "vm1:disk"}, {"opaque": "vm1:disk", "remove": False}):
            assert value(await wire.call("open-fdset", arguments))["fd"] == numbers[4]


async def test_open_and_remove_needs_both_rights(path: Path) -> None:
    async with limited(path, grant("query", "open"), grant("remove", fdsets=[0])) as (client, root):
        refused = await client.call("open-fdset", {"opaque": "vm10:disk", "remove": True})
        assert error(refused) == "PermissionDenied"
        assert "'remove'" in refused["error"]["desc"]
        assert len(value(await root.call("query-fds"))) == len(STORED)
        value(await client.call("open-fdset", {"fdset-id": 0, "remove": True}))
        assert len(value(await root.call("query-fds"))) == len(STORED) - 1


# -- if-exists ---------------------------------------------------------------------------------


async def texts(wire: Wire) -> list[tuple[int, list[str | None]]]:
    """Return the stored opaque texts by set."""
    return [
        (fdset["fdset-id"], [fd.get("opaque") for fd in fdset["fds"]])
        for fdset in value(await wire.call("query-fdsets"))
    ]


@pytest.mark.parametrize("dialect", ["spec", "qemu"])
async def test_fail_where_there_is_one(path: Path, dialect: str) -> None:
    async with filled(path, dialect=dialect) as (wire, _):
        before = await texts(wire)
        with Pipe() as pipe:
            fail: dict[str, Any] = {"opaque": "vm1:disk", "if-exists": "fail"}
            for arguments in (fail, {**fail, "fdset-id": 0}):
                refused = await wire.call("add-fds", arguments, [pipe])
                assert error(refused) == ("FdExists" if dialect == "spec" else "GenericError")
                assert "opaque:vm1:disk" in refused["error"]["desc"]
            assert await texts(wire) == before
            # The text exists in no other set; a longer text does not match.
            value(await wire.call("add-fds", {**fail, "fdset-id": 1}, [pipe]))
            value(await wire.call("add-fds", {"opaque": "vm1", "if-exists": "fail"}, [pipe]))
            pipe.release()
            assert pipe.held()


async def test_replace(path: Path) -> None:
    """Replace in all sets or in the named one; replaced descriptors are closed before the reply."""
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(5) as made:
            for pipe in made[:2]:
                value(await wire.call("add-fd", {"opaque": "web"}, [pipe]))
                pipe.release()
            value(await wire.call("add-fd", {"opaque": "log", "fdset-id": 1}, made[4:]))
            replace = {"opaque": "web", "if-exists": "replace"}
            added = value(await wire.call("add-fds", {**replace, "fdset-id": 1}, made[2:4]))
            assert added["fdset-id"] == 1
            assert await texts(wire) == [(1, ["log", "web", "web"]), (0, ["web"])]
            assert [pipe.held() for pipe in made[:2]] == [True, False]
            # Set 0 has only the replaced descriptor: the new one gets its place.
            again = value(await wire.call("add-fds", replace, made[4:]))
            assert again["fdset-id"] == 0
            assert await texts(wire) == [(1, ["log"]), (0, ["web"])]
            # No match: the descriptor is added.
            value(await wire.call("add-fds", {"opaque": "new", "if-exists": "replace"}, made[4:]))
            assert await texts(wire) == [(2, ["new"]), (1, ["log"]), (0, ["web"])]


@pytest.mark.parametrize("limit", ["max_fds", "max_fds_per_uid"])
async def test_replace_at_the_limit(limit: str, path: Path) -> None:
    """A replacement works at the limit."""
    async with daemon(path, limits=qmpfd.Limits()._replace(**{limit: 2})):
        with await Wire.session(path) as wire, pipes(2) as made:
            value(await wire.call("add-fds", {"opaque": "a"}, made))
            value(await wire.call("add-fds", {"opaque": "a", "if-exists": "replace"}, made))
            refused = await wire.call("add-fds", {"opaque": "a", "if-exists": "replace"}, made * 2)
            assert "the limit is 2" in refused["error"]["desc"]
            assert await texts(wire) == [(0, ["a", "a"])]


async def test_a_replacement_that_is_refused_changes_nothing(path: Path) -> None:
    async with filled(path) as (wire, _):
        before = await texts(wire)
        with (path.parent / "file").open("wb") as file:
            arguments = {"opaque": "vm1:disk", "if-exists": "replace", "watch-hangup": True}
            assert error(await wire.call("add-fds", arguments, [file])) == "InvalidParameterValue"
        assert await texts(wire) == before


async def test_if_exists_needs_a_text(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            for choice in ("fail", "replace"):
                refused = await wire.call("add-fds", {"if-exists": choice}, [pipe])
                assert error(refused) == "GenericError"
            value(await wire.call("add-fds", {"if-exists": "add"}, [pipe]))
            assert error(await wire.call("add-fds", {"if-exists": "no"}, [pipe])) == "GenericError"


# -- hidden descriptors ------------------------------------------------------------------------

#: Arguments for a hidden fd set, and for one that does not exist.
HIDDEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "open-fdset": ("open-fdset", {"fdset-id": 1}, {"fdset-id": 9}),
    "open-fdset, text": ("open-fdset", {"opaque": "vm10:disk"}, {"opaque": "vm99:disk"}),
    "open-fdset, mode": (
        "open-fdset",
        {"fdset-id": 1, "access": "rdonly"},
        {"fdset-id": 9, "access": "rdonly"},
    ),
    "remove-fd": ("remove-fd", {"fdset-id": 1}, {"fdset-id": 9}),
    "remove-fds": ("remove-fds", {"fdset-id": 1}, {"fdset-id": 9}),
    "remove-fds, prefix": ("remove-fds", {"opaque-prefix": "vm10"}, {"opaque-prefix": "vm99"}),
    "query-fds": ("query-fds", {"fdset-id": 1}, {"fdset-id": 9}),
    "query-fds, text": ("query-fds", {"opaque": "vm10:disk"}, {"opaque": "vm99:disk"}),
    "add-fds": ("add-fds", {"fdset-id": 1, "opaque": "vm1:x"}, {"fdset-id": 9, "opaque": "vm1:x"}),
}


@pytest.mark.parametrize("command, hidden, absent", HIDDEN.values(), ids=HIDDEN)
async def test_hidden_is_absent(
    path: Path, command: str, hidden: dict[str, Any], absent: dict[str, Any]
) -> None:
    """The replies differ only in quotations of the request."""
    rights: tuple[Right, ...] = ("query", "open", "remove", "add")
    async with limited(path, grant(*rights, opaque="vm1:*")) as (client, root):
        before = value(await root.call("query-fds"))
        with Pipe() as pipe:
            fds = [pipe] if command == "add-fds" else []
            output = [await client.call(command, each, fds) for each in (hidden, absent)]
        shown = [str(reply).replace("vm10", "vm99").replace(":1", ":9") for reply in output]
        assert shown[0] == shown[1]
        after = value(await root.call("query-fds"))
        assert [fd["fd"] for fd in after] == [fd["fd"] for fd in before]


async def test_errors_quote_nothing_that_is_hidden(path: Path) -> None:
    """Errors for a partly visible set do not quote hidden texts, numbers or access modes."""
    async with limited(path, grant("query", "open", "remove", opaque="vm1:*")) as (client, root):
        with (path.parent / "file").open("wb") as file:
            secret = {"fdset-id": 2, "opaque": "secret"}
            number = value(await root.call("add-fd", secret, [file]))["fd"]
        for command, arguments in [
            ("open-fdset", {"fdset-id": 2, "access": "rdwr"}),
            ("open-fdset", {"fdset-id": 2, "fd": number}),
            ("open-fdset", {"opaque": "secret"}),
            ("remove-fd", {"fdset-id": 2}),
            ("remove-fd", {"fdset-id": 2, "fd": number}),
            ("remove-fds", {"opaque-prefix": "se"}),
        ]:
            reply = await client.call(command, arguments)
            desc = reply["error"]["desc"]
            if "secret" not in str(arguments):
                assert "secret" not in desc
            assert "rdonly" not in desc.replace("only 'wronly'", "")
            assert error(reply) in ("FdNotFound", "PermissionDenied")
        seen = value(await client.call("open-fdset", {"fdset-id": 2}))
        assert seen["opaque"] == "vm1:disk"  # the newest one is hidden


async def test_descriptors_that_may_only_be_queried(path: Path) -> None:
    async with limited(path, grant("query"), grant("open", "remove", fdsets=[0])) as (client, root):
        for command, right in (("open-fdset", "open"), ("remove-fds", "remove")):
            refused = await client.call(command, {"opaque": "vm10:disk"})
            assert error(refused) == "PermissionDenied"
            assert f"'{right}'" in refused["error"]["desc"]
        # All or none.
        assert error(await client.call("remove-fds", {"opaque": "vm1:disk"})) == "PermissionDenied"
        assert len(value(await root.call("query-fds"))) == len(STORED)


async def test_replacing_sees_what_may_be_queried(path: Path) -> None:
    """A hidden descriptor is not replaced; one that may only be queried is not removed."""
    rights = grant("add", fdsets=[0, 1, 2, 3, 4, 5])
    async with limited(path, rights, grant("query", fdsets=[0]), grant("remove", fdsets=[1])) as (
        client,
        root,
    ):
        with Pipe() as pipe:
            hidden = {"opaque": "vm10:disk"}
            value(await client.call("add-fds", {**hidden, "if-exists": "fail"}, [pipe]))
            value(await client.call("add-fds", {**hidden, "if-exists": "replace"}, [pipe]))
            refused = await client.call(
                "add-fds", {"opaque": "vm1:net", "if-exists": "replace"}, [pipe]
            )
            assert error(refused) == "PermissionDenied"
        assert len(value(await root.call("query-fds"))) == len(STORED) + 2


# -- adding to a set ---------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["spec", "qemu"])
@pytest.mark.parametrize("command", ["add-fd", "add-fds"])
async def test_nobody_adds_in_front_of_a_stranger(path: Path, command: str, dialect: str) -> None:
    """A client may not add to a set with hidden descriptors: others open the set's newest one."""
    mine = grant("add", "query", opaque="vm1:*")
    async with limited(path, mine, dialect=dialect) as (client, root):
        before = await texts(root)
        with Pipe() as pipe:
            for fdset_id in (1, 2, 3):  # hidden, partly visible, hidden
                arguments = {"fdset-id": fdset_id, "opaque": "vm1:x"}
                refused = await client.call(command, arguments, [pipe])
                classes = {"spec": "PermissionDenied", "qemu": "GenericError"}
                if dialect == "spec" and fdset_id != 2:  # as for a set that does not exist
                    assert error(refused) == "InvalidParameterValue"
                else:
                    assert error(refused) == classes[dialect]
                    assert "'query'" in refused["error"]["desc"]
            assert await texts(root) == before
            value(await client.call(command, {"fdset-id": 0, "opaque": "vm1:x"}, [pipe]))
            value(await client.call(command, {"opaque": "vm1:y"}, [pipe]))


async def test_a_rule_that_names_the_set_is_enough(path: Path) -> None:
    async with limited(path, grant("add", fdsets=[1, 7])) as (client, root):
        with Pipe() as pipe:
            value(await client.call("add-fd", {"fdset-id": 1}, [pipe]))
            refused = await client.call("add-fd", {"fdset-id": 0}, [pipe])
            assert error(refused) == "PermissionDenied"
        assert dict(await texts(root))[1] == ["vm10:disk", None]


async def test_a_removal_whose_reply_nobody_reads(path: Path) -> None:
    """The texts of an unsent reply count against the limit on opaque texts."""
    text = "x" * 900_000

    async def store() -> None:
        for number in range(MAX_OPAQUE_TOTAL // len(text)):
            await client.add_fd(0, opaque=f"{number}{text}")

    async with daemon(path), qmpfd.connect(path) as client:
        await store()
        with await Wire.session(path) as wire:
            wire.send(request("remove-fds", {"opaque-prefix": ""}))
            while await client.query_fdsets():
                pass
            with pytest.raises(qmpfd.GenericError, match="Too much opaque text"):
                await store()
        await settle()
        await store()
