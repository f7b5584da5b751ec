"""The service manager's fd store: stored descriptors come back unchanged after a restart.

Tests of server/fdstore/recover.py, server/fdstore/names.py and server/fdstore/sentinel.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from fake_store import INVOCATION, Store, fake_store
from helpers import ADD, CAPABILITIES, ROOT, Wire, daemon, request, send_now, settle, value
from supervised import COMMAND, DEADLINE, connected, lasting, supervised, until

from qmpfd.client.blocking import BlockingClient, NoDaemon
from qmpfd.errors import QMPError
from qmpfd.kernel.fd import Fd, close_all, pipe
from qmpfd.kernel.file_descriptions import Descriptions, compare
from qmpfd.kernel.systemd import Notifier
from qmpfd.server.fdstore.mirror import FdStoreConfig
from qmpfd.server.server import DaemonServer


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with fake_store(tmp_path) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("content")
    return path


def fds(client: BlockingClient) -> list[dict[str, Any]]:
    return lasting(client.execute("query-fds"))


def entries(store: Store) -> list[str]:
    """Return the names of the stored descriptors without the journal."""
    return [name for name in store.names if not name.startswith("qmpfd-")]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_everything_comes_back(store: Store, path: Path, file: Path, how: signal.Signals) -> None:
    socket_option = ["--socket", str(path)]
    r, w = map(Fd, os.pipe())
    with (
        store.service(*socket_option, expected=None) as first,
        BlockingClient(path, DEADLINE) as client,
    ):
        for number in range(40):
            with file.open() as opened:
                arguments = {"opaque": f"n{number}"}
                if number % 4 == 3:
                    arguments["fdset-id"] = number // 4  # type: ignore[assignment]
                client.execute("add-fd", arguments, [opened])
        client.execute("add-fds", {"watch-hangup": True, "expires": 1000, "opaque": "\u2603"}, [r])
        client.execute("add-fds", {"lifetime": "connection"}, [r])
        with file.open() as opened:
            client.execute("getfd", {"fdname": "mine"}, [opened])
        client.execute("remove-fd", {"fdset-id": 5})
        before = [fd for fd in fds(client) if fd["lifetime"] == "daemon"]
        first.send_signal(how)
        first.wait(DEADLINE)
    assert path.exists() == (how is signal.SIGKILL)
    with store.service(*socket_option), BlockingClient(path, DEADLINE) as client:
        assert fds(client) == before
        (watched,) = client.execute("query-fds", {"opaque": "\u2603"})
        assert watched["expires"] == pytest.approx(1000, abs=30)
        for fd in before:
            if fd["kind"] == "file":
                where = {"fdset-id": fd["fdset-id"], "fd": fd["fd"]}
                _, (opened_again,) = client.request("open-fdset", where)
                with opened_again:
                    assert os.pread(opened_again.fileno(), 10, 0) == b"content"
        # The lowest free id and the watched hang-up are restored too.
        with file.open() as opened:
            assert client.execute("add-fd", fds=[opened])["fdset-id"] == 5
        client.execute("watch-fdsets", {"enable": True})
        close_all([r, w])
        assert next(client.events()).data["reason"] == "hangup"
    assert not store.traps


def test_the_same_description_more_than_once(store: Store, path: Path, file: Path) -> None:
    """The store has one descriptor for several duplicates, and drops it with the last of them."""
    options = ["--socket", str(path)]
    with store.service(*options, expected=None) as first, BlockingClient(path, DEADLINE) as client:
        listening = len(entries(store))
        with file.open() as one, file.open() as other:
            client.execute("add-fds", {"opaque": "one"}, [one, one, one])
            client.execute("add-fd", {"opaque": "other"}, [other])
            client.execute("add-fd", {"opaque": "one, later"}, [one])
        assert len(entries(store)) - listening == 2
        before = fds(client)
        first.kill()
        first.wait()
    with store.service(*options, expected=None) as second, BlockingClient(path, DEADLINE) as client:
        assert fds(client) == before
        ones = [fd for fd in before if fd["opaque"] == "one"]
        # The duplicate whose name the stored descriptor has, and others; one duplicate remains.
        for fd in ones:
            client.execute("remove-fd", {"fdset-id": fd["fdset-id"], "fd": fd["fd"]})
        assert len(entries(store)) - listening == 2
        second.kill()
        second.wait()
    with store.service(*options), BlockingClient(path, DEADLINE) as client:
        assert {fd["opaque"] for fd in fds(client)} == {"other", "one, later"}
        for fd in fds(client):
            client.execute("remove-fd", {"fdset-id": fd["fdset-id"]})
        assert len(entries(store)) == listening
    assert not store.traps


def fill(client: BlockingClient, file: Path) -> list[dict[str, Any]]:
    """Add descriptors until one is refused."""
    added: list[dict[str, Any]] = []
    refusal: QMPError | None = None
    while refusal is None:
        with file.open() as opened:
            try:
                added.append(client.execute("add-fd", fds=[opened]))
            except QMPError as exc:
                refusal = exc
    assert "the limit of those kept safe is" in refusal.desc
    return added


def test_a_full_store(tmp_path: Path, path: Path, file: Path) -> None:
    """Descriptors that systemd would drop are refused, without any change."""
    with fake_store(tmp_path, size=10) as store:
        with store.service("--socket", str(path)), BlockingClient(path, DEADLINE) as client:
            added = fill(client, file)
            assert 3 <= len(added) <= 9
            before = client.execute("query-fds")
            opened_files = [file.open() for _ in range(3)]
            with pytest.raises(QMPError, match="kept safe"):
                client.execute("add-fds", fds=opened_files)
            assert lasting(client.execute("query-fds")) == lasting(before)
            # Descriptors of a connection need no place in the store.
            client.execute("add-fds", {"lifetime": "connection"}, opened_files)
            client.execute("getfd", {"fdname": "x"}, opened_files[:1])
            client.execute("remove-fd", added[0])
            client.execute("add-fd", fds=opened_files[:1])
            for each in opened_files:
                each.close()
        assert not store.traps


@pytest.mark.parametrize("size, room", [(1, None), (4, None), (5, 0), (6, 1)])
def test_a_small_store(tmp_path: Path, path: Path, size: int, room: int | None) -> None:
    """Places are reserved for journal and socket; a store without further places is not used."""
    with fake_store(tmp_path, size=size) as store:
        with store.service("--socket", str(path)), BlockingClient(path, DEADLINE) as client:
            added = 0
            for _ in range(3):
                with open("/dev/null") as null, suppress(QMPError):
                    client.execute("add-fd", fds=[null])
                    added += 1
            assert added == (3 if room is None else room)
        assert not store.traps
        assert bool(store.names) == (room is not None)


def test_quit_empties_the_store(store: Store, path: Path, file: Path) -> None:
    with store.service("--socket", str(path)) as process, BlockingClient(path, DEADLINE) as client:
        with file.open() as opened:
            client.execute("add-fd", fds=[opened])
        client.execute("quit")
        process.wait(DEADLINE)
    assert store.names == []


def test_activation_sockets_and_stored_ones(store: Store, path: Path, tmp_path: Path) -> None:
    """The daemon accepts on the manager's sockets, but not on a client's listening sockets."""
    activated, users = tmp_path / "activated", tmp_path / "users"
    with (
        closing(socket.socket(socket.AF_UNIX)) as listener,
        closing(socket.socket(socket.AF_UNIX)) as stored,
    ):
        listener.bind(str(activated))
        listener.listen()
        stored.bind(str(users))
        stored.listen()
        sockets = [("qmp", listener)]
        options = ["--socket", str(path)]
        with store.service(*options, sockets=sockets, expected=None) as first:
            with BlockingClient(activated, DEADLINE) as client:
                client.execute("add-fd", {"opaque": "server"}, [stored])
                # Also the manager's own listening socket.
                client.execute("add-fd", {"opaque": "mine"}, [listener])
            first.kill()
            first.wait()
        with store.service(*options, sockets=sockets):
            for each in (activated, path):
                with BlockingClient(each, DEADLINE) as client:
                    assert {fd["opaque"] for fd in fds(client)} == {"server", "mine"}
            with closing(socket.socket(socket.AF_UNIX)) as nobody:
                nobody.connect(str(users))
                nobody.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    nobody.recv(1)
    assert not store.traps


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_descriptors_without_a_record_are_dropped(
    store: Store, path: Path, file: Path, how: signal.Signals
) -> None:
    """The store has a removed descriptor, because the FDSTOREREMOVE message was not sent any more,
    under any name, also the next one in use.
    """
    options = ["--socket", str(path)]
    with store.service(*options, expected=None) as first, BlockingClient(path, DEADLINE) as client:
        with file.open() as opened:
            client.execute("add-fd", fds=[opened])
        before = fds(client)
        first.send_signal(how)
        first.wait(DEADLINE)
    for name in ("~0", "~2", "~3", "~zz", "qmpfd-previous"):
        if name not in store.names:
            store.put(name, Fd(os.open(file, os.O_RDONLY)))
    for _ in range(2):
        with (
            store.service(*options, expected=None) as again,
            BlockingClient(path, DEADLINE) as client,
        ):
            assert fds(client) == before
            # The socket, the descriptor, the journal and the sentinel.
            until(lambda: len(store.names) == 4)
            again.kill()
            again.wait()


def test_a_takeover_within_one_service(store: Store, path: Path, file: Path) -> None:
    """Predecessor and successor would share one store: refused, and nothing is lost."""
    with store.service("--socket", str(path)), BlockingClient(path, DEADLINE) as client:
        with file.open() as opened:
            client.execute("add-fd", fds=[opened])
        before = fds(client)
        successor = subprocess.run(
            [*COMMAND, "--socket", str(path), "--takeover"],
            cwd=ROOT,
            env={
                **os.environ,
                "NOTIFY_SOCKET": str(store.path),
                "FDSTORE": "100",
                "INVOCATION_ID": INVOCATION,
            },
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert successor.returncode == 3
        assert successor.stderr.count("\n") == 1
        assert "restart the service instead" in successor.stderr
        assert fds(client) == before


def test_a_takeover_out_of_a_service(store: Store, path: Path, file: Path) -> None:
    """The predecessor empties its store: systemd would pass it to the next start of the service."""
    with store.service("--socket", str(path)) as old, BlockingClient(path, DEADLINE) as client:
        with file.open() as opened:
            client.execute("add-fd", fds=[opened])
        before = fds(client)
        with supervised(path, "--takeover") as new:
            assert old.wait(DEADLINE) == 0
            assert fds(client) == before
            assert store.names == []
            new.kill_worker()
            with new.client() as again:
                assert fds(again) == before


def test_a_takeover_while_the_manager_is_busy(store: Store, path: Path, file: Path) -> None:
    """The predecessor sends what empties its store, although no barrier is acknowledged."""
    with store.service("--socket", str(path)) as old:
        with BlockingClient(path, DEADLINE) as client, file.open() as opened:
            client.execute("add-fd", fds=[opened])
        store.sync()
        store.pause()
        with supervised(path, "--takeover"):
            assert old.wait(DEADLINE) == 0
            store.pause(False)
            store.sync()
            assert store.names == []


def test_a_record_without_its_descriptor(store: Store, path: Path, file: Path) -> None:
    """A journal record without descriptor is dropped: its reply had not been sent."""
    options = ["--socket", str(path)]
    with store.service(*options, expected=None) as first, BlockingClient(path, DEADLINE) as client:
        for text in ("lost", "kept"):
            with file.open() as opened:
                client.execute("add-fd", {"opaque": text}, [opened])
        first.kill()
        first.wait()
    store.lose("~1")
    with store.service(*options), BlockingClient(path, DEADLINE) as client:
        assert [fd["opaque"] for fd in fds(client)] == ["kept"]


def test_one_descriptor_of_a_command_is_lost(store: Store, path: Path) -> None:
    """One descriptor of an acknowledged add-fds is lost: all others of the command come back."""
    options = ["--socket", str(path)]
    with store.service(*options, expected=None) as first, BlockingClient(path, DEADLINE) as client:
        for count in (5, 1):
            memory = [Fd(os.memfd_create("x")) for _ in range(count)]
            client.execute("add-fds", fds=memory)
            close_all(memory)
        before = fds(client)
        first.kill()
        first.wait()
    store.lose("~1")
    with store.service(*options), BlockingClient(path, DEADLINE) as client:
        back = fds(client)
        assert len(back) == 5
        assert all(fd in before for fd in back)


def test_a_journal_that_cannot_be_read(store: Store, path: Path, file: Path) -> None:
    """The daemon does not start with an unreadable journal, and leaves the store as it is."""
    options = ["--socket", str(path)]
    with store.service(*options, expected=None) as first, BlockingClient(path, DEADLINE) as client:
        with file.open() as opened:
            client.execute("add-fd", fds=[opened])
        first.kill()
        first.wait()
    store.sync()
    journal = next(name for name in store.names if name.startswith("qmpfd-journal"))
    with store.take(journal) as memory:
        content = os.pread(memory.fileno(), 1 << 20, 0)
        os.pwrite(memory.fileno(), b"junk", 8)
        before = sorted(store.names)
        with store.service(*options, ready=False, expected=2) as process:
            process.wait(DEADLINE)
        assert sorted(store.names) == before
        os.pwrite(memory.fileno(), content, 0)
    with store.service(*options), BlockingClient(path, DEADLINE) as client:
        assert len(fds(client)) == 1


@pytest.mark.parametrize("before", [True, False], ids=["first start", "restart"])
@pytest.mark.parametrize("name", ["journal-1", "journal-9", "sentinel", "lifeline", "previous"])
def test_a_foreign_descriptor_with_our_name(
    store: Store, path: Path, tmp_path: Path, name: str, before: bool
) -> None:
    """A socket unit has FileDescriptorName=qmpfd-journal-1: its clients are served, and all that is
    stored comes back.
    """
    other = tmp_path / "other"
    added: list[dict[str, Any]] = []
    if not before:
        with store.service("--socket", str(path), expected=None) as first:
            with BlockingClient(path, DEADLINE) as client, Fd(os.memfd_create("x")) as memory:
                client.execute("add-fd", {"opaque": "mine"}, [memory])
                added = fds(client)
            first.kill()
            first.wait()
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(other))
        listener.listen()
        sockets = [(f"qmpfd-{name}", listener)]
        for _ in range(2):
            with (
                store.service("--socket", str(path), sockets=sockets),
                BlockingClient(other, DEADLINE) as client,
            ):
                assert fds(client) == added
                assert kept_safe(client)


def test_a_new_journal_when_it_has_grown(store: Store, path: Path, file: Path) -> None:
    options = ["--socket", str(path)]
    with store.service(*options, expected=None) as first, BlockingClient(path, DEADLINE) as client:
        (journal,) = (name for name in store.names if name.startswith("qmpfd-journal"))
        with file.open() as opened:
            client.execute("add-fd", {"opaque": "before"}, [opened])
            for _ in range(12):
                info = client.execute("add-fd", {"opaque": "x" * 100_000}, [opened])
                client.execute("remove-fd", info)
            client.execute("add-fd", {"opaque": "after"}, [opened])
        until(lambda: journal not in store.names, "another journal")
        assert sum(name.startswith("qmpfd-journal") for name in store.names) == 1
        before = fds(client)
        first.kill()
        first.wait()
    with store.service(*options), BlockingClient(path, DEADLINE) as client:
        assert fds(client) == before
        assert {fd["opaque"] for fd in before} == {"before", "after"}


def cpu(pid: int) -> float:
    """Return the CPU time of a process in seconds (proc(5), schedstat)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def test_a_manager_that_does_not_answer(store: Store, path: Path, file: Path) -> None:
    """Acknowledged changes are listed, others wait; the end of the daemon does not wait."""
    options = ["--socket", str(path), "--drain-timeout", "1"]
    with store.service(*options) as process, BlockingClient(path, DEADLINE) as client:
        with file.open() as opened:
            client.execute("add-fd", {"opaque": "settled"}, [opened])
            store.pause()
            assert len(client.execute("query-fds")) == 1
            with BlockingClient(path, 0.5) as other:
                begun = cpu(process.pid)
                with pytest.raises(NoDaemon):
                    other.execute("add-fd", {"opaque": "waits"}, [opened])
                assert cpu(process.pid) - begun < 0.2
            with BlockingClient(
                path, DEADLINE
            ) as other:  # a reply without store changes does not wait
                assert other.execute("query-name") == {}
        process.terminate()
        process.wait(DEADLINE)
        store.pause(False)


def test_readiness_comes_after_the_restore(store: Store, path: Path) -> None:
    with store.service("--socket", str(path)):
        store.until("READY=1")
        assert any(name.startswith("qmpfd-journal") for name in store.names)
        store.until("STATUS=")
    store.until("STOPPING=1")


def test_supervise_starts_no_parent_with_an_fd_store(store: Store, path: Path) -> None:
    with store.service("--socket", str(path), "--supervise") as process:
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert b"supervisor" not in command
        with connected(path) as client:
            assert client.execute("query-fds") == []


def kept_safe(client: BlockingClient) -> bool:
    return bool(client.execute("query-stats")["kept-safe"])


def refused(client: BlockingClient) -> str:
    """Return the error of an add-fd that must fail."""
    with open("/dev/null") as null, pytest.raises(QMPError) as caught:
        client.execute("add-fd", fds=[null])
    return str(caught.value)


#: Service managers: as systemd before 254, as systemd since, and one that watches nothing.
MANAGERS = [
    pytest.param({}, id="closes at once"),
    pytest.param({"closes": False}, id="closes late"),
    pytest.param({"watches": False}, id="does not watch"),
]


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_manager_that_stores_nothing(
    tmp_path: Path,
    path: Path,
    capfd: pytest.CaptureFixture[str],
    size: int,
    manager: dict[str, bool],
) -> None:
    """A manager that answers barriers but stores nothing, because of NotifyAccess= or a wrapper; or
    only the sentinel, the journal and the socket.
    """
    with fake_store(tmp_path, size=size, **manager) as store:
        env = {"FDSTORE": "512"}
        with (
            store.service("--socket", str(path), env=env),
            BlockingClient(path, DEADLINE) as client,
        ):
            assert not kept_safe(client)
            assert "cannot be kept safe" in refused(client)
        assert "NotifyAccess=" in capfd.readouterr().err


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("size", [20, 90])
def test_a_store_smaller_than_fdstore_says(
    tmp_path: Path, path: Path, size: int, manager: dict[str, bool]
) -> None:
    """$FDSTORE is larger than the store: descriptors without a place are refused, and all others
    come back.  The daemon probes the size at the start, and a large store on demand.
    """
    options = ["--socket", str(path)]
    with fake_store(tmp_path, size=size, **manager) as store:
        env = {"FDSTORE": "512"}
        with (
            store.service(*options, env=env, expected=None) as first,
            BlockingClient(path, DEADLINE) as client,
        ):
            added = 0
            with suppress(QMPError):
                for _ in range(size + 10):
                    with Fd(os.memfd_create("x")) as memory:
                        client.execute("add-fd", fds=[memory])
                    added += 1
            assert size - 10 < added < size
            assert kept_safe(client)
            before = fds(client)
            first.kill()
            first.wait()
        with store.service(*options, env=env), BlockingClient(path, DEADLINE) as client:
            assert fds(client) == before
            assert kept_safe(client)


@pytest.mark.parametrize("left", [3, 30, 48])
def test_a_maximum_that_is_lowered(tmp_path: Path, path: Path, left: int) -> None:
    """systemd drops the oldest descriptors, perhaps with the journal.  The daemon notices at once;
    after a restart it has the remaining ones, and they stay in the store.
    """
    options = ["--socket", str(path)]
    with fake_store(tmp_path) as store:
        with (
            store.service(*options, expected=None) as first,
            BlockingClient(path, DEADLINE) as client,
        ):
            for _ in range(50):
                with Fd(os.memfd_create("x")) as memory:
                    client.execute("add-fd", fds=[memory])
            assert kept_safe(client)
            store.lower(left)
            until(lambda: not kept_safe(client))
            assert "cannot be kept safe" in refused(client)
            first.kill()
            first.wait()
        there = [name for name in store.names if name.startswith("~")]
        env = {"FDSTORE": str(left)}
        with store.service(*options, env=env), BlockingClient(path, DEADLINE) as client:
            assert len(fds(client)) == len(there)
            assert set(there) <= set(store.names)


def test_a_maximum_that_is_lowered_again_after_a_restart(tmp_path: Path, path: Path) -> None:
    """The daemon notices the loss of the oldest stored descriptor."""
    options = ["--socket", str(path)]
    with fake_store(tmp_path) as store:
        with (
            store.service(*options, expected=None) as first,
            BlockingClient(path, DEADLINE) as client,
        ):
            for _ in range(20):
                with Fd(os.memfd_create("x")) as memory:
                    client.execute("add-fd", fds=[memory])
            first.kill()
            first.wait()
        with store.service(*options), BlockingClient(path, DEADLINE) as client:
            assert len(fds(client)) == 20
            assert kept_safe(client)
            store.lower(len(store.names) - 1)
            until(lambda: not kept_safe(client))
            assert "cannot be kept safe" in refused(client)
        assert not store.traps


def test_a_listening_socket_that_is_none(store: Store, path: Path, file: Path) -> None:
    """Another one is bound at its path, and all that is stored comes back."""
    options = ["--socket", str(path)]
    with store.service(*options, expected=None) as first, BlockingClient(path, DEADLINE) as client:
        (listener,) = entries(store)
        with file.open() as opened:
            client.execute("add-fd", fds=[opened])
        before = fds(client)
        first.kill()
        first.wait()
    store.lose(listener)
    store.put(listener, Fd(os.memfd_create("x")))
    with store.service(*options), BlockingClient(path, DEADLINE) as client:
        assert fds(client) == before
        assert kept_safe(client)


@asynccontextmanager
async def kept_daemon(
    path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[DaemonServer]:
    """Run a daemon in this process, as the service of *store*."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(store.path))
    notifier = Notifier.connect()
    assert notifier is not None
    with closing(notifier):
        fd_store = FdStoreConfig(notifier, 512, Descriptions())
        async with daemon(path, fd_store=fd_store) as server:
            yield server


async def test_more_places_than_are_probed(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the places probed at the start, an add-fd without a place is refused."""
    monkeypatch.setattr("qmpfd.server.fdstore.sentinel.MAX_PROBES", 8)
    with fake_store(tmp_path, size=40) as store:
        async with kept_daemon(path, store, monkeypatch):
            with await Wire.session(path) as wire:
                added, reply = 0, dict[str, Any]()
                while "error" not in reply:
                    assert len(entries(store)) == added + 1  # 1: the socket
                    with Fd(os.memfd_create("x")) as memory:
                        reply = await wire.call("add-fd", None, [memory])
                    added += 1
                assert "cannot be kept safe" in reply["error"]["desc"]
                assert value(await wire.call("query-stats"))["kept-safe"]
                assert 20 < added < 40


async def test_added_while_the_daemon_ends(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new descriptor gets the number of the closed listening socket, and is stored."""
    async with kept_daemon(path, store, monkeypatch) as server:
        with (
            await Wire.session(path) as wire,
            Fd(os.memfd_create("x")) as memory,
            ExitStack() as fillers,
        ):
            (listener,) = server.listeners
            number = listener.socket.fileno()
            while fillers.enter_context(memory.dup()).fileno() < number:
                pass
            async with server.services.lock:
                wire.send(ADD, [memory])
                server.stop()
                await settle()
            assert value(await wire.reply())["fd"] == number
            await server.ended.wait()
            (name,) = entries(store)
            with store.take(name) as kept:
                assert compare(kept.fileno(), memory.fileno()) == 0
    assert not store.traps


def _pipelined(path: Path, count: int) -> list[str]:
    """Send *count* add-fd; return the text of each error, empty for a success."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as lines:
        sock.settimeout(DEADLINE)
        sock.connect(str(path))
        sock.sendall(CAPABILITIES)
        for _ in range(count):
            with Fd(os.memfd_create("x")) as memory:
                send_now(sock, ADD, [memory])
        replies = [json.loads(next(lines)) for _ in range(2 + count)][2:]
        return [reply.get("error", {"desc": ""})["desc"] for reply in replies]


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("at_once", [1, 7, 40])
def test_a_maximum_lowered_above_the_number_stored(
    tmp_path: Path, path: Path, at_once: int, manager: dict[str, bool]
) -> None:
    """A lowered maximum above the number of stored descriptors: systemd drops only new ones.  Those
    are refused, and all others stay safe.
    """
    options = ["--socket", str(path)]
    with fake_store(tmp_path, **manager) as store:
        with (
            store.service(*options, expected=None) as first,
            BlockingClient(path, DEADLINE) as client,
        ):
            assert set(_pipelined(path, 5)) == {""}
            store.size = 30
            refusals: list[str] = []
            for _ in range(50 // at_once):
                refusals += _pipelined(path, at_once)
            assert kept_safe(client)
            added = refusals.count("")
            assert 0 < added < 25
            assert {text for text in refusals if text} == {
                "The file descriptor cannot be kept safe: the service manager has no room"
            }
            before = fds(client)
            assert len(before) == 5 + added == len(entries(store)) - 1  # 1: the socket
            client.remove_fd(0)
            assert _pipelined(path, 1) == [""]
            before = fds(client)
            first.kill()
            first.wait()
        store.size = 512
        with store.service(*options), BlockingClient(path, DEADLINE) as client:
            assert fds(client) == before
            assert kept_safe(client)


async def _fill(wire: Wire, count: int) -> None:
    for _ in range(count):
        with Fd(os.memfd_create("x")) as memory:
            value(await wire.call("add-fd", None, [memory]))


async def test_a_removal_while_others_wait_for_the_store(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that becomes free does not show that there was room for descriptors sent before."""
    async with kept_daemon(path, store, monkeypatch), AsyncExitStack() as stack:
        wires = [stack.enter_context(await Wire.session(path)) for _ in range(4)]
        await _fill(wires[0], 5)
        reader, writer = pipe()
        with reader:
            value(await wires[3].call("add-fds", {"watch-hangup": True}, [reader]))
        store.sync()
        store.pause()
        store.size = len(store.names) + 2  # the next descriptor and its probe
        for wire in wires[:3]:
            with Fd(os.memfd_create("x")) as memory:
                wire.send(ADD, [memory])
            await settle()
        writer.close()
        await settle()
        store.pause(False)
        assert ["error" in await each.reply() for each in wires[:3]] == [False, True, True]
        assert len(value(await wires[3].call("query-fds"))) == len(entries(store)) - 1 == 6


async def test_a_removal_half_sent(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has no room for all removals behind an added descriptor.  When more descriptors
    are added before the barrier is sent, the first one is still proven by its own probe.
    """
    count = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 5
    async with kept_daemon(path, store, monkeypatch):
        with await Wire.session(path) as wire, await Wire.session(path) as other:
            await _fill(wire, count)
            store.sync()
            store.pause()
            store.size = len(store.names)
            with Fd(os.memfd_create("x")) as memory, Fd(os.memfd_create("y")) as later:
                wire.send(request("remove-fds", {"added-by-pid": os.getpid()}) + ADD, [memory])
                await settle()
                other.send(ADD, [later])
                await settle()
            store.pause(False)
            assert len(value(await wire.reply())) == count
            assert ["error" in await each.reply() for each in (wire, other)] == [True, True]
            assert value(await wire.call("query-fds")) == []
            assert len(entries(store)) == 1  # 1: the socket


def test_no_room_for_a_new_journal(tmp_path: Path, path: Path) -> None:
    """The daemon continues with the old journal."""
    options = ["--socket", str(path)]
    with fake_store(tmp_path) as store:
        with (
            store.service(*options, expected=None) as first,
            BlockingClient(path, DEADLINE) as client,
        ):
            assert set(_pipelined(path, 5)) == {""}
            journal = [name for name in store.names if name.startswith("qmpfd-journal")]
            store.size = sum(not name.startswith("qmpfd-probe") for name in store.names)
            opaque = "o" * 100_000
            for _ in range(30):  # a journal larger than 1 MiB is replaced
                with Fd(os.memfd_create("x")) as memory, suppress(QMPError):
                    client.add_fds([memory], opaque=opaque)
            assert [name for name in store.names if name.startswith("qmpfd-journal")] == journal
            client.remove_fd(2)
            before = fds(client)
            assert len(before) == 4
            assert kept_safe(client)
            first.kill()
            first.wait()
        store.size = 512
        store.size = 512
        with store.service(*options), BlockingClient(path, DEADLINE) as client:
            assert fds(client) == before
            assert kept_safe(client)
