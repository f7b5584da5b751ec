"""The policy: who may connect and do what; its file; and changes of it.

Tests of cli/check_policy.py and kernel/credentials.py.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import PATIENCE, Pipe, Wire, daemon, daemon_process, pipes, request, value

from qmpfd.cli import main
from qmpfd.errors import PermissionDenied
from qmpfd.fdsets import Peer
from qmpfd.kernel.credentials import is_owner
from qmpfd.limits import MAX_POLICY_BYTES, Limits
from qmpfd.policy import RIGHTS, Access, BadPolicy, Grant, Policy, Rule, load_policy
from qmpfd.server.listen.admission import admit

NOBODY = 65534
#: A group without members.
GROUP = 54321

#: Program that changes its user, sends commands with or without descriptors, and prints replies.
CLIENT = """
import array, json, os, socket, sys
path, uid, gid, groups, calls = json.loads(sys.argv[1])
os.setgroups(groups); os.setgid(gid); os.setuid(uid)
sock = socket.socket(socket.AF_UNIX)
sock.connect(path)
lines = sock.makefile("rb")
print(lines.readline().decode(), end="", flush=True)
for command, arguments, fds in calls:
    data = json.dumps({"execute": command, "arguments": arguments}).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * fds))] if fds else []
    sock.sendmsg([data], rights)
    print(lines.readline().decode(), end="", flush=True)
"""

Call = tuple[str, dict[str, Any], int]
CAPABILITIES: Call = ("qmp_capabilities", {}, 0)


async def _ask(
    path: Path, *calls: Call, uid: int = NOBODY, gid: int = NOBODY, groups: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Send commands as another user; return the greeting and the replies."""
    output = json.dumps([os.fspath(path), uid, gid, groups, calls])
    command = [sys.executable, "-S", "-E", "-c", CLIENT, output]
    run = partial(
        subprocess.run,
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=PATIENCE,
    )
    ran = await trio.to_thread.run_sync(run)
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.fixture
def open_path() -> Iterator[Path]:
    """Path in a folder that every user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="qmpfd-"))
    folder.chmod(0o755)
    yield folder / "q.sock"
    shutil.rmtree(folder)


def _policy(folder: Path, text: str) -> Policy:
    file = folder / "policy.toml"
    file.write_text(text)
    return load_policy(file)


def _denied(reply: dict[str, Any], right: str) -> bool:
    output = reply["error"]
    return output["class"] == "PermissionDenied" and f"'{right}'" in output["desc"]


# -- who ---------------------------------------------------------------------------------------

WHO = {
    "uid": (f"uid = {NOBODY}", True),
    "user": (f'user = "{pwd.getpwuid(NOBODY).pw_name}"', True),
    "gid": (f"gid = {NOBODY}", True),
    "group": (f'group = "{grp.getgrgid(NOBODY).gr_name}"', True),
    "supplementary": (f"gid = {GROUP}", True),
    "everybody": ("", True),
    "uid and gid": (f"uid = {NOBODY}\ngid = {GROUP}", True),
    "another uid": ("uid = 4711", False),
    "another gid": ("gid = 4711", False),
    "uid, but another gid": (f"uid = {NOBODY}\ngid = 4711", False),
    "no right": (f"uid = {NOBODY}\nallow = []", False),
}


@pytest.mark.root
@pytest.mark.parametrize("who, admitted", WHO.values(), ids=WHO)
async def test_who_a_rule_is_for(who: str, admitted: bool, open_path: Path) -> None:
    allow = "" if "allow" in who else 'allow = ["query"]'
    policy = _policy(open_path.parent, f"[[rule]]\n{who}\n{allow}\n")
    async with daemon(open_path, socket_mode=0o666, policy=policy):
        replies = await _ask(open_path, CAPABILITIES, groups=(4712, GROUP)) if admitted else []
        if admitted:
            assert replies[1] == {"return": {}}
        else:
            [output] = (await _ask(open_path, groups=(GROUP,)))[:1]
            assert output["error"]["class"] == "PermissionDenied"
            assert f"uid {NOBODY} may not connect" in output["error"]["desc"]


@pytest.mark.root
async def test_more_groups_than_fit(open_path: Path) -> None:
    """More than 256 groups, the size of Python's getsockopt buffer for SO_PEERGROUPS."""
    policy = _policy(open_path.parent, f'[[rule]]\ngid = {GROUP}\nallow = ["query"]\n')
    async with daemon(open_path, socket_mode=0o666, policy=policy):
        groups = (*range(10_000, 10_900), GROUP)
        assert (await _ask(open_path, CAPABILITIES, groups=groups))[1] == {"return": {}}


@pytest.mark.root
async def test_root_and_ourselves_may_everything(path: Path, tmp_path: Path) -> None:
    policy = _policy(tmp_path, "[[rule]]\nuid = 0\nallow = []\n")
    async with daemon(path, policy=policy), qmpfd_session(path) as wire:
        with Pipe() as pipe:
            value(await wire.call("add-fd", None, [pipe]))
        value(await wire.call("quit"))


def qmpfd_session(path: Path) -> Any:
    """Return a session, closed at the end."""

    class _Session:
        async def __aenter__(self) -> Wire:
            self.wire = await Wire.session(path)
            return self.wire

        async def __aexit__(self, *exc_info: object) -> None:
            self.wire.close()

    return _Session()


# -- rights ------------------------------------------------------------------------------------

#: A command, its arguments, its descriptors, and the right that it needs.
NEEDS: dict[str, tuple[Call, str]] = {
    "query-fdsets": (("query-fdsets", {}, 0), "query"),
    "query-fds": (("query-fds", {}, 0), "query"),
    "query-fds of a set": (("query-fds", {"fdset-id": 0}, 0), "query"),
    "query-stats": (("query-stats", {}, 0), "query"),
    "watch-fdsets": (("watch-fdsets", {"enable": True}, 0), "query"),
    "open-fdset": (("open-fdset", {"fdset-id": 0}, 0), "open"),
    "remove-fds": (("remove-fds", {"fdset-id": 0}, 0), "remove"),
    "add-fd": (("add-fd", {}, 1), "add"),
    "add-fd to a set": (("add-fd", {"fdset-id": 0}, 1), "add"),
    "add-fds": (("add-fds", {}, 3), "add"),
    "getfd": (("getfd", {"fdname": "n"}, 1), "add"),
    "remove-fd": (("remove-fd", {"fdset-id": 0}, 0), "remove"),
    "quit": (("quit", {}, 0), "admin"),
    "takeover": (("takeover", {"format": 1}, 0), "admin"),
}


@pytest.mark.root
@pytest.mark.parametrize("rights, uids", [(["query"], {NOBODY}), (["query", "admin"], {0, NOBODY})])
async def test_who_sees_whom(rights: list[str], uids: set[int], open_path: Path) -> None:
    """A client with the right to quit sees all peers; others see those of their own uid."""
    policy = _policy(open_path.parent, f"[[rule]]\nuid = {NOBODY}\nallow = {rights}\n")
    running = daemon(open_path, socket_mode=0o666, policy=policy)
    async with running, qmpfd_session(open_path):
        output = (await _ask(open_path, CAPABILITIES, ("query-stats", {}, 0)))[-1]
        assert {peer["uid"] for peer in value(output)["peers"]} == uids
        assert value(output)["connections"] == 2


@pytest.mark.root
@pytest.mark.parametrize("call, right", NEEDS.values(), ids=NEEDS)
async def test_each_command_needs_its_right(call: Call, right: str, open_path: Path) -> None:
    """A command fails without its right, which the error names, and works with that right alone."""
    everything = sorted(RIGHTS - {right}), [right]
    for allow in everything:
        rule = f"[[rule]]\nallow = {json.dumps(allow)}\n"
        if allow == ["add"] and call[1]:  # without the right to query, the rule must name the set
            rule += "fdsets = [0]\n"
        policy = _policy(open_path.parent, rule)
        async with daemon(open_path, socket_mode=0o666, policy=policy):
            with pipes(1) as made, await Wire.session(open_path) as root:
                value(await root.call("add-fd", {"opaque": "x"}, made))
                reply = (await _ask(open_path, CAPABILITIES, call))[2]
                if allow == [right]:
                    value(reply)
                else:
                    assert _denied(reply, right), reply
                    [fdset] = value(await root.call("query-fdsets"))
                    assert len(fdset["fds"]) == 1


async def test_a_refused_quit_ends_nothing(path: Path) -> None:
    """After a refused quit, pipelined and later commands are executed."""
    async with daemon(path) as server:
        with await Wire.session(path) as wire, Pipe() as pipe:
            [session] = server.sessions
            session.context.change_access(Access((Grant(frozenset({"query", "add"})),)))
            wire.send(request("quit") + request("add-fd") + request("query-fdsets"), [pipe])
            refused, added, listed = await wire.replies(3)
            assert _denied(refused, "admin")
            assert value(listed)[0]["fds"] == [{"fd": value(added)["fd"]}]
            assert value(await wire.call("query-name")) == {}


@pytest.mark.root
async def test_what_may_not_be_queried_is_not_shown(open_path: Path) -> None:
    policy = _policy(
        open_path.parent,
        '[[rule]]\nallow = ["query"]\nfdsets = [0, 2]\nopaque = ["vm1:*"]\n'
        '[[rule]]\nallow = ["query"]\nopaque = ["public", "also-[ab]"]\n',
    )
    texts = {0: "vm1:disk", 1: "vm1:disk", 2: "vm2:disk", 3: "public", 4: None, 5: "also-b"}
    async with daemon(open_path, socket_mode=0o666, policy=policy):
        with pipes(1) as made, await Wire.session(open_path) as root:
            for text in texts.values():
                value(await root.call("add-fd", {} if text is None else {"opaque": text}, made))
            _, _, sets, fds, one, other = await _ask(
                open_path,
                CAPABILITIES,
                ("query-fdsets", {}, 0),
                ("query-fds", {}, 0),
                ("query-fds", {"fdset-id": 0}, 0),
                ("query-fds", {"fdset-id": 1}, 0),
            )
    assert [fdset["fdset-id"] for fdset in value(sets)] == [5, 3, 0]
    assert [fd["fdset-id"] for fd in value(fds)] == [5, 3, 0]
    assert [fd["opaque"] for fd in value(one)] == ["vm1:disk"]
    assert value(other) == []


@pytest.mark.root
@pytest.mark.parametrize("command, right", [("open-fdset", "open"), ("remove-fds", "remove")])
@pytest.mark.parametrize("query", [False, True])
async def test_an_opaque_text_is_not_shown_either(
    command: str, right: str, query: bool, open_path: Path
) -> None:
    """A command that names the set does not reveal the opaque text without the right to query."""
    allow = json.dumps([right, *(["query"] if query else [])])
    policy = _policy(open_path.parent, f"[[rule]]\nallow = {allow}\n")
    async with daemon(open_path, socket_mode=0o666, policy=policy):
        with pipes(1) as made, await Wire.session(open_path) as root:
            value(await root.call("add-fd", {"opaque": "secret"}, made))
            reply = (await _ask(open_path, CAPABILITIES, (command, {"fdset-id": 0}, 0)))[2]
    assert isinstance(value(reply), dict | list)
    assert ("secret" in json.dumps(reply)) == query


async def test_what_several_rules_give_adds_up(path: Path, tmp_path: Path) -> None:
    policy = _policy(
        tmp_path,
        '[[rule]]\nallow = ["query"]\n'
        f'[[rule]]\nuid = {NOBODY}\nallow = ["open"]\nfdsets = [1]\n'
        '[[rule]]\ngid = 36\nallow = ["open"]\nopaque = ["kvm-?"]\n',
    )
    access = policy.access(NOBODY, [NOBODY, 36])
    assert access.may("query", 7, None)
    assert access.may("open", 1, None)
    assert access.may("open", 7, "kvm-1")
    assert not access.may("open", 7, "kvm-12")
    assert not access.may("open", 7, None)
    assert not policy.access(NOBODY, [NOBODY]).may("open", 7, "kvm-1")
    assert not policy.access(4711, [36]).may("open", 1, None)


def test_a_rule_for_a_set_is_for_none_else() -> None:
    access = Access((Grant(frozenset({"add"}), frozenset({3})),))
    access.require("add", 3)
    access.require("add")
    for right, fdset_id in (("add", 4), ("remove", 3)):
        with pytest.raises(PermissionDenied, match=f"'{right}'.*fdset-id:{fdset_id}"):
            access.require(right, fdset_id)  # type: ignore[arg-type]


@pytest.mark.root
async def test_removing_a_set_needs_the_right_for_all_of_it(open_path: Path) -> None:
    policy = _policy(open_path.parent, '[[rule]]\nallow = ["remove"]\nopaque = ["mine"]\n')
    async with daemon(open_path, socket_mode=0o666, policy=policy):
        with pipes(1) as made, await Wire.session(open_path) as root:
            mine = value(await root.call("add-fd", {"opaque": "mine"}, made))["fd"]
            value(await root.call("add-fd", {"opaque": "other", "fdset-id": 0}, made))
            whole, one = (
                await _ask(
                    open_path,
                    CAPABILITIES,
                    ("remove-fd", {"fdset-id": 0}, 0),
                    ("remove-fd", {"fdset-id": 0, "fd": mine}, 0),
                )
            )[2:]
            assert _denied(whole, "remove")
            assert one == {"return": {}}
            [fdset] = value(await root.call("query-fdsets"))
            assert [fd["opaque"] for fd in fdset["fds"]] == ["other"]


async def test_events_show_only_what_may_be_queried(path: Path, tmp_path: Path) -> None:
    policy = _policy(tmp_path, '[[rule]]\nallow = ["query"]\nopaque = ["mine"]\n')
    async with daemon(path) as server:
        with await Wire.session(path) as watcher:
            [session] = server.sessions
            with pipes(1) as made, await Wire.session(path) as root:
                session.context.change_access(policy.access(NOBODY, []))
                value(await watcher.call("watch-fdsets", {"enable": True}))
                for text in ("other", "mine"):
                    value(await root.call("add-fd", {"opaque": text}, made))
                for number in (0, 1):
                    value(await root.call("remove-fd", {"fdset-id": number}))
                events = await watcher.replies(2)
            assert [event["data"]["opaque"] for event in events] == ["mine", "mine"]
            assert value(await watcher.call("query-fdsets")) == []


# -- the file ----------------------------------------------------------------------------------

BAD = {
    "no TOML": ("rule = [", "policy.toml"),
    "not UTF-8": (b"\xff", "policy.toml"),
    "no list": ('rule = "x"', "$.rule"),
    "right": ('[[rule]]\nallow = ["everything"]', "$.rule[0].allow[0]"),
    "no rights": ("[[rule]]\nuid = 1", "allow"),
    "member": ('[[rule]]\nallow = []\nusers = "x"', "users"),
    "outside": ("[rules]", "rules"),
    "type": ('[[rule]]\nallow = []\nuid = "x"', "$.rule[0].uid"),
    "no such user": ('[[rule]]\nallow = []\nuser = "no-such-user"', "no user 'no-such-user'"),
    "no such group": ('[[rule]]\nallow = []\ngroup = "no-such-group"', "$.rule[0].group"),
    "two users": ('[[rule]]\nallow = []\nuser = "root"\nuid = 0', "$.rule[0]"),
    "two groups": ('[[rule]]\nallow = []\ngroup = "root"\ngid = 0', "$.rule[0]"),
    "admin for a set": ('[[rule]]\nallow = ["query", "admin"]\nfdsets = [1]', "admin is about"),
    "admin for texts": ('[[rule]]\nallow = ["admin"]\nopaque = ["*"]', "admin is about"),
    "admin for no set": ('[[rule]]\nallow = ["admin"]\nfdsets = []', "admin is about"),
    "NUL in a user": ('[[rule]]\nallow = []\nuser = "a\\u0000b"', "null"),
    "NUL in a group": ('[[rule]]\nallow = []\ngroup = "\\u0000"', "null"),
    "nested brackets": ("rule = " + "[" * 20_000, "nested"),
    "nested tables": ("rule = " + "{a=" * 20_000, ""),
    "nested names": (".".join(["a"] * 2_000) + " = 1", ""),
    "digits": ("[[rule]]\nallow = []\nuid = " + "1" * 5_000, "digits"),
    "hexadecimal digits": ("[[rule]]\nallow = []\nuid = 0x" + "f" * 5_000, ""),
    "a negative uid": ("[[rule]]\nallow = []\nuid = -1", "$.rule[0].uid"),
    "uid -1 of chown": ("[[rule]]\nallow = []\nuid = 4294967295", "$.rule[0].uid"),
    "a negative set": ("[[rule]]\nallow = []\nfdsets = [0, -1]", "$.rule[0].fdsets[1]"),
    "a date": ("[[rule]]\nallow = []\nuid = 1979-05-27", "$.rule[0].uid"),
    "infinity": ("[[rule]]\nallow = []\nuid = inf", "$.rule[0].uid"),
    "an impossible date": ("a = 2026-02-31", ""),
    "UTF-16": ("[[rule]]\n".encode("utf-16"), "utf-8"),
    "control characters": ("a = \x01", ""),
    "too long": ("#" * MAX_POLICY_BYTES + "\n", "longer than"),
    "a carriage return": ("a = 1\rb = 2", ""),
}

#: Errors: the text, its line, and the correction that the message suggests.
TOLD = {
    "right": ("allow = ['query']\n[[rule]]\nuid = 1\nallow = ['opne']", 5, "query, open, add"),
    "member": ("allow = []\nusr = 'x'", 3, "user, uid, group, gid, fdsets, opaque"),
    "type": ("allow = []\n# a comment\n\nuid = 'x'", 5, ""),
    "user": ("allow = []\n  user = 'no-such-user'", 3, "no user"),
    "missing": ("uid = 1\n[[rule]]\nuid = 2", 1, "allow"),
    "admin": ("uid = 1\nallow = ['admin']\nfdsets = [1]", 3, "a rule of its own"),
    "syntax": ("allow = [query]", 2, ""),
}


@pytest.mark.parametrize("text, line, output", TOLD.values(), ids=TOLD)
def test_where_it_is_and_what_would_do(text: str, line: int, output: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("[[rule]]\n" + text)
    with pytest.raises(BadPolicy) as caught:
        load_policy(file)
    assert f"line {line}" in str(caught.value)
    assert output in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [b"a\0b", b"x" * 300, b"loop"])
def test_a_path_that_cannot_be_opened(name: bytes, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BadPolicy):
        load_policy(tmp_path / os.fsdecode(name))


@pytest.mark.parametrize(
    "raised", [OSError(5, "EIO"), RuntimeError("x"), SystemError(), KeyError(1)]
)
def test_whatever_the_name_service_raises(
    raised: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NSS modules, such as sssd, LDAP and systemd-userdb, may raise anything."""

    def getpwnam(name: str) -> pwd.struct_passwd:
        raise raised

    monkeypatch.setattr(pwd, "getpwnam", getpwnam)
    file = tmp_path / "policy.toml"
    file.write_text("[[rule]]\nallow = []\nuser = 'x'\n")
    with pytest.raises(BadPolicy) as caught:
        load_policy(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_the_overflow_uid_is_nobodys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a uid map, every user has the overflow uid, the daemon's own user too."""
    overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
    for own, theirs, expected in [
        (overflow, overflow, False),
        (overflow, 0, True),
        (1000, 1000, True),
        (1000, overflow, False),
        (0, overflow, False),
    ]:
        monkeypatch.setattr(os, "geteuid", lambda own=own: own)
        assert is_owner(theirs) is expected
        assert bool(Policy().access(theirs, [])) is expected


@pytest.mark.parametrize("own, named", [(1000, "uid 1000, root"), (65534, "root")])
def test_who_may_connect(own: int, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal names the daemon's own user, unless that user may not connect itself."""
    monkeypatch.setattr(os, "geteuid", lambda: own)
    with pytest.raises(PermissionDenied, match=f"uid 65534 may not connect: only {named} and "):
        admit(Peer(1, 65534, 65534), frozenset(), Policy(), Limits(), ())


@pytest.mark.parametrize("text, output", BAD.values(), ids=BAD)
def test_a_bad_file(text: str | bytes, output: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(BadPolicy) as caught:
        load_policy(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert output in str(caught.value)


@pytest.mark.parametrize(
    "member, output",
    [
        ({"allow": "query"}, "array"),
        ({"allow": ["look"]}, "look"),
        ({"opaque": "vm1:*"}, "array"),
        ({"fdsets": [True]}, "bool"),
        ({"uid": "0"}, "str"),
    ],
)
def test_a_bad_rule_from_python(member: dict[str, Any], output: str) -> None:
    """As in a file: of the text ``vm1:*`` in place of a list, each character would be a pattern."""
    with pytest.raises(BadPolicy, match=output):
        Policy([Rule(**{"allow": ["query"], **member})])


def test_a_path_as_text(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('[[rule]]\nallow = ["query"]\n')
    assert len(load_policy(str(file)).rules) == 1


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadPolicy, match="No such file"):
        load_policy(tmp_path / "none")
    with pytest.raises(BadPolicy, match="Is a directory"):
        load_policy(tmp_path)


def test_a_daemon_with_a_bad_file_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("[[rule]]\n")
    words = [sys.executable, "-m", "qmpfd", "serve", "--policy", os.fspath(tmp_path / "bad")]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("qmpfd: bad policy: ")
    assert ran.stderr.count("\n") == 1


@pytest.mark.root
async def test_sighup(open_path: Path) -> None:
    """SIGHUP reloads the policy, also for connected clients; an invalid one is only logged."""
    file = open_path.parent / "policy.toml"
    good = '[[rule]]\nallow = ["query"]\n'
    file.write_text(good)
    options = ["--policy", os.fspath(file), "--socket-mode", "666"]
    ask = partial(_ask, open_path, CAPABILITIES, ("query-fdsets", {}, 0), ("open-fdset", {}, 0))
    with daemon_process(open_path, *options) as process:
        assert value((await ask())[2]) == []
        for bad in ("rule = [", '[[rule]]\nallow = ["all"]', None):
            file.unlink() if bad is None else file.write_text(bad)
            process.signal(signal.SIGHUP)
            process.await_line(lambda line: "the policy stays as it was" in line)
            assert os.fspath(file) in process.log[-1]
            assert value((await ask())[2]) == []
        file.write_text('[[rule]]\nallow = ["remove"]\n')
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "the policy is read again" in line)
        assert _denied((await ask())[2], "query")
        file.write_text("")
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "the policy is read again" in line)
        assert "may not connect" in (await _ask(open_path))[0]["error"]["desc"]


@pytest.mark.root
async def test_who_is_connected_loses_its_rights(open_path: Path) -> None:
    policy = _policy(open_path.parent, '[[rule]]\nallow = ["query"]\n')
    async with daemon(open_path, socket_mode=0o666, policy=policy) as server:
        replies: list[dict[str, Any]] = []

        async def client() -> None:
            calls: list[Call] = [("query-fdsets", {}, 0)] * 3000
            replies.extend(await _ask(open_path, CAPABILITIES, *calls))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            with await Wire.session(open_path) as root:
                while server.daemon.stats.commands["query-fdsets"] < 3:
                    await root.call("query-name")
            server.change_policy(Policy())
        assert replies[2] == {"return": []}
        assert _denied(replies[-1], "query")


# -- check-policy ------------------------------------------------------------------------------

RULES = """
[[rule]]
user = "nobody"
allow = ["query", "open"]
fdsets = [3, 0]
opaque = ["vm1:*", "vm2:*"]
[[rule]]
allow = ["add"]
[[rule]]
gid = 0
allow = ["admin"]
"""


def _check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["check-policy", *words])
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.fixture
def rules(tmp_path: Path) -> str:
    file = tmp_path / "policy.toml"
    file.write_text(RULES)
    return os.fspath(file)


def test_check_policy(rules: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The output lists the grants of each rule, or those of one user."""
    first = "open, query; in fd sets 0, 3; with opaque text like vm1:* or vm2:*"
    whole = (
        f"{rules} is a valid policy\n"
        "root and the daemon's own user: all rights, whatever the rules say\n"
        f"rule 1, line 2: uid {NOBODY}: {first}\n"
        "rule 2, line 7: everybody: add\n"
        "rule 3, line 9: gid 0: admin\n"
    )
    assert _check(capsys, rules) == (0, whole, "")
    expected = (
        f"uid {NOBODY} may\n"
        f"  {first} (rule 1, line 2: uid {NOBODY})\n"
        "  add (rule 2, line 7: everybody)\n"
    )
    for name in ("nobody", str(NOBODY)):
        assert _check(capsys, "--user", name, rules) == (0, expected, "")
    assert _check(capsys, "--user", "4711", rules)[1] == (
        "uid 4711 may\n  add (rule 2, line 7: everybody)\n"
    )
    assert "uid 0 has all rights" in _check(capsys, "--user", "root", rules)[1]


@pytest.mark.parametrize(
    "member, words",
    [
        ("fdsets = []", "; in no fd set"),
        ("opaque = []", "; with no opaque text"),
        ('opaque = ["", "a"]', "; with opaque text like '' or a"),
    ],
)
def test_check_policy_of_empty_lists(
    member: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p").write_text(f'[[rule]]\nallow = ["query"]\n{member}')
    output = _check(capsys, os.fspath(tmp_path / "p"))[1]
    assert output.endswith(f"rule 1, line 1: everybody: query{words}\n")


def test_check_policy_as_json(rules: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = {
        "rule": 1,
        "line": 2,
        "uid": NOBODY,
        "allow": ["open", "query"],
        "fdsets": [0, 3],
        "opaque": ["vm1:*", "vm2:*"],
    }
    second = {"rule": 2, "line": 7, "allow": ["add"]}
    output = json.loads(_check(capsys, "--json", rules)[1])
    third = {"rule": 3, "line": 9, "gid": 0, "allow": ["admin"]}
    assert output == {"valid": True, "rules": [first, second, third]}
    output = json.loads(_check(capsys, "--json", "--user", "nobody", rules)[1])
    assert NOBODY in output.pop("gids")
    assert output == {"uid": NOBODY, "everything": False, "rules": [first, second]}


def test_check_policy_of_nobody_who_may(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p").write_text("")
    output = _check(capsys, "--user", "nobody", os.fspath(tmp_path / "p"))
    assert output == (0, f"uid {NOBODY} may not connect\n", "")


@pytest.mark.parametrize(
    "words",
    [
        ["--user", "no-such-user"],
        ["--user", "4294967295"],  # (uid_t) -1
        ["--user", "9" * 5000],
        ["--user", "\u0661"],
        [],
    ],
    ids=["user", "no uid", "long", "digits of another script", "file"],
)
def test_check_policy_fails(
    words: list[str], rules: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not words:
        Path(rules).write_text("[[rule]]")
    status, out, err = _check(capsys, *words, rules)
    assert (status, out, err.count("\n")) == (2, "", 1)
