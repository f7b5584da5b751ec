"""Takeovers with another command line, in another namespace, and with a lack of resources.

Tests of cli/takeover.py and server/saved_state.py.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers import Pipe, send_now
from installed import need_namespaces
from stepper import Stepped, Stepper
from supervised import children, connected, lasting, until

from qmpfd.cli.takeover import still_to_bind
from qmpfd.client.blocking import BlockingClient
from qmpfd.kernel.fd import Fd
from qmpfd.limits import TAKEOVER_FORMAT
from qmpfd.server.connection.snapshot import SavedRest
from qmpfd.server.saved_state import SavedState, decode

PATIENCE = 30.0


@pytest.fixture(scope="module")
def stepper() -> Iterator[Stepper]:
    with Stepper() as stepper:
        yield stepper


@pytest.fixture
def start(path: Path, stepper: Stepper) -> Iterator[Callable[..., Stepped]]:
    """Return a function that starts a daemon at *path*."""
    started: list[Stepped] = []

    def start(*arguments: str, **options: Any) -> Stepped:
        log = path.with_suffix(f".{len(started)}.log")
        made = stepper.start(["serve", "--socket", str(path), *arguments], log, **options)
        started.append(made)
        made.until("listening", "STEP")
        return made

    yield start
    for made in started:
        made.end()
        assert "Traceback" not in made.said, made.said


@contextmanager
def served(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon process that must end with status 0."""
    with log.open("wb") as file, subprocess.Popen(command, stderr=file, **options) as process:
        try:
            until(lambda: b"listening" in log.read_bytes() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            assert process.wait(PATIENCE) == 0, log.read_text()


SERVE = [sys.executable, "-m", "qmpfd", "serve"]


# -- the command line --------------------------------------------------------------------------


def test_replace(path: Path, start: Callable[..., Stepped]) -> None:
    """--replace starts a daemon, or takes over from a running one: one command line for both."""
    first = start("--replace")
    with BlockingClient(path, PATIENCE) as client, Pipe() as pipe:
        client.execute("add-fd", {"opaque": "kept"}, [pipe])
        pipe.release()
        second = start("--replace")
        assert first.wait() == 0
        assert len(client.execute("query-fdsets")) == 1
        second.signal(signal.SIGKILL)
        second.wait()
        assert path.exists()
        assert not pipe.held()
    start("--replace")  # over a stale socket file
    with BlockingClient(path, PATIENCE) as client:
        assert client.execute("query-fdsets") == []


def test_replace_and_supervise(path: Path, tmp_path: Path) -> None:
    command = [*SERVE, "--replace", "--supervise", "--socket", str(path)]
    with (
        served(command, tmp_path / "first") as first,
        Pipe() as pipe,
        BlockingClient(path, PATIENCE) as client,
    ):
        info = client.execute("add-fd", {"opaque": "kept"}, [pipe])
        pipe.release()
        with served(command, tmp_path / "second"):
            assert first.wait(PATIENCE) == 0
            assert client.execute("query-fdsets")[0]["fds"][0]["fd"] == info["fd"]
            assert client.execute("query-stats")["kept-safe"]
            client.execute("remove-fd", {"fdset-id": 0})
            assert not pipe.held()


@pytest.mark.parametrize("options,mode", [(("--socket-mode", "666"), 0o666), ((), 0o600)])
def test_the_permissions_of_the_socket(
    path: Path, start: Callable[..., Stepped], options: tuple[str, ...], mode: int
) -> None:
    """The successor sets the permissions of its command line; a failed takeover changes nothing."""
    old = start("--socket-mode", "640")
    inode = path.stat().st_ino
    where = {"restore.py": ["_restore_sessions"]}
    killed = start("--takeover", *options, where=where, step=2)
    assert killed.wait() == -signal.SIGKILL
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    start("--takeover", *options)
    assert old.wait() == 0
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.stat().st_ino == inode


def test_another_socket_whose_file_is_gone(path: Path, start: Callable[..., Stepped]) -> None:
    """The successor binds the socket again, with the permissions of its command line."""
    other = path.with_name("other.sock")
    old = start("--socket", str(other))
    other.unlink()
    start("--takeover", "--socket-mode", "640")
    assert old.wait() == 0
    assert stat.S_IMODE(other.stat().st_mode) == 0o640
    with BlockingClient(other, PATIENCE) as client:
        assert client.execute("query-fdsets") == []


@pytest.mark.parametrize("supervised", [[], ["--supervise"]])
def test_socket_files_that_were_renamed(path: Path, tmp_path: Path, supervised: list[str]) -> None:
    """The successor serves at the paths of its command line, and removes those files at the end."""
    others = [path.with_name(name) for name in ("b", "c", "d")]
    with ExitStack() as stack:
        command = [*SERVE, "--socket", str(path), "--socket", str(others[0])]
        old = stack.enter_context(served(command, tmp_path / "old.log"))
        with BlockingClient(path, PATIENCE) as client:
            client.execute("add-fd", {"opaque": "kept"}, [0])
        path.rename(others[1])
        others[0].rename(others[2])
        command = [*SERVE, *supervised, "--takeover"]
        for moved in others[1:]:
            command += ["--socket", str(moved)]
        log = tmp_path / "new.log"
        stack.enter_context(served(command, log))
        assert old.wait(PATIENCE) == 0
        for moved in others[1:]:
            assert str(moved) in log.read_text()
            with BlockingClient(moved, PATIENCE) as client:
                assert len(client.execute("query-fdsets")) == 1
        assert not path.exists()
        assert not others[0].exists()
    assert not any(moved.exists() for moved in others)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to any group")
def test_the_group_of_the_socket(path: Path, start: Callable[..., Stepped]) -> None:
    old = start("--socket-group", "4242")
    assert path.stat().st_gid == 4242
    second = start("--takeover", "--socket-group", "4243")
    assert old.wait() == 0
    assert path.stat().st_gid == 4243
    start("--takeover")
    assert second.wait() == 0
    assert path.stat().st_gid == os.getegid()


@pytest.mark.parametrize("supervised", [[], ["--supervise"]])
def test_abstract_sockets(path: Path, tmp_path: Path, supervised: list[str]) -> None:
    """Abstract sockets of the same command line, in any order."""
    names = [str(path), f"@qmpfd-test-{os.getpid()}-{len(supervised)}"]
    command = [*SERVE, *supervised]
    with ExitStack() as stack:
        sockets = [word for name in names for word in ("--socket", name)]
        old = stack.enter_context(served([*command, *sockets], tmp_path / "0.log"))
        client = stack.enter_context(BlockingClient(path, PATIENCE))
        client.execute("add-fd", {"opaque": "kept"}, [0])
        for number in (1, 2):
            sockets = [word for name in names for word in ("--socket", name)]
            log = tmp_path / f"{number}.log"
            new = stack.enter_context(served([*command, "--takeover", *sockets], log))
            assert old.wait(PATIENCE) == 0
            old = new
            names.reverse()
            for name in names:
                with BlockingClient(name, PATIENCE) as other:
                    assert len(other.execute("query-fdsets")) == 1


# -- processes and names -----------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="a namespace of processes takes root")
@pytest.mark.parametrize("inside", ["old", "new"])
def test_another_pid_namespace(path: Path, tmp_path: Path, inside: str) -> None:
    """Process ids of one side are not valid on the other."""
    need_namespaces("--pid", "--fork")
    prefix = ["unshare", "--pid", "--fork", "--kill-child"]
    first, second = [*SERVE, "--socket", str(path)], [*SERVE, "--takeover", "--socket", str(path)]
    if inside == "old":
        first = [*prefix, *first]
    else:
        second = [*prefix, *second]
    with ExitStack() as stack, Pipe() as pipe:
        old = stack.enter_context(subprocess.Popen(first, stderr=subprocess.DEVNULL))
        stack.callback(old.kill)
        until(lambda: path.exists() and _answers(path))
        with BlockingClient(path, PATIENCE) as client:
            client.execute("add-fd", {"opaque": "kept"}, [pipe])
            pipe.release()
            log = tmp_path / "new.log"
            file = stack.enter_context(log.open("wb"))
            new = stack.enter_context(subprocess.Popen(second, stderr=file))
            stack.callback(new.kill)
            assert old.wait(PATIENCE) == 0
            until(lambda: b"took over" in log.read_bytes())
            assert client.execute("query-fdsets")[0]["fds"][0]["opaque"] == "kept"
            client.execute("quit")
            assert new.wait(PATIENCE) == 0
            assert not pipe.held()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(os.fspath(path)) == 0


@contextmanager
def activated(
    where: str, log: Path, *options: str, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon that inherits a socket which listens at *where*: a path, or ``@NAME``."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(where.replace("@", "\0", 1))
        listener.listen()
        shell = f'exec 3<&{listener.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        command = ["bash", "-c", shell, "bash", *SERVE, *options]
        with served(command, log, pass_fds=[listener.fileno()], env=env) as process:
            yield process


def test_a_socket_of_a_service_manager(path: Path, tmp_path: Path) -> None:
    """A takeover from a service is refused: its manager would start another daemon."""
    service = {**os.environ, "INVOCATION_ID": "0123456789abcdef"}
    with activated(str(path), tmp_path / "old.log", env=service), connected(path) as client:
        client.execute("add-fd", {"opaque": "kept"}, [0])
        command = [*SERVE, "--takeover", "--socket", str(path)]
        for environment in (os.environ, {**os.environ, "INVOCATION_ID": "fedcba"}):
            done = subprocess.run(
                command, stderr=subprocess.PIPE, env=environment, timeout=PATIENCE, check=False
            )
            assert done.returncode == 3
            assert done.stderr.count(b"\n") == 1
            assert b"service manager" in done.stderr
        assert len(client.execute("query-fdsets")) == 1


def test_a_crash_after_a_takeover_of_an_inherited_socket(path: Path, tmp_path: Path) -> None:
    """The successor has the socket, and does not bind its path when its worker is restarted."""
    with activated(str(path), tmp_path / "old.log") as old:
        with connected(path) as client:
            client.execute("add-fd", {"opaque": "kept"}, [0])
        command = [*SERVE, "--takeover", "--supervise", "--socket", str(path)]
        with served(command, tmp_path / "new.log") as new:
            assert old.wait(PATIENCE) == 0
            (worker,) = children(new.pid)
            os.kill(worker, signal.SIGKILL)
            with connected(path) as client:
                assert client.execute("query-fdsets")[0]["fds"][0]["opaque"] == "kept"


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
@pytest.mark.parametrize("options", [[], ["--replace"], ["--supervise", "--replace"]], ids=" ".join)
def test_an_inherited_socket_at_the_given_path(
    path: Path, tmp_path: Path, options: list[str], abstract: bool
) -> None:
    """``--socket`` names the inherited socket: nothing is bound there, and nobody serves there."""
    where = f"@{path.name}-{os.getpid()}" if abstract else str(path)
    other = tmp_path / "other"
    sockets = ["--socket", where, "--socket", str(other)]
    with activated(where, tmp_path / "log", *options, *sockets) as daemon:
        with connected(Path(where)) as client:
            client.execute("add-fd", {"opaque": "kept"}, [0])
        if "--supervise" in options:
            (worker,) = children(daemon.pid)
            os.kill(worker, signal.SIGKILL)
        for each in (Path(where), other):
            with connected(each) as client:
                assert client.execute("query-fdsets")[0]["fds"][0]["opaque"] == "kept"
    assert abstract or path.exists()  # the service manager's file


def test_an_inherited_socket_whose_file_is_lost(path: Path, tmp_path: Path) -> None:
    """``--socket`` binds the path: clients of the inherited socket could not connect."""
    link = tmp_path / "link"
    link.symlink_to(path)
    with socket.socket(socket.AF_UNIX) as listener, Fd(os.dup(listener.fileno())) as inherited:
        listener.bind(os.fspath(path))
        assert still_to_bind([path, link], (), [inherited]) == []
        path.unlink()
        assert still_to_bind([path], (), [inherited]) == [path]


@pytest.mark.parametrize("supervised", [[], ["--supervise"]])
def test_a_path_that_is_not_utf8(tmp_path: Path, supervised: list[str]) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.sock")
    command = [*SERVE, *supervised, "--socket", os.fspath(path)]
    with (
        served(command, tmp_path / "old.log") as old,
        Fd(os.memfd_create("x")) as file,
        BlockingClient(path, PATIENCE) as client,
    ):
        client.execute("add-fd", {"opaque": "kept"}, [file])
        with served([*command, "--takeover"], tmp_path / "new.log"):
            assert old.wait(PATIENCE) == 0
            assert len(client.execute("query-fdsets")) == 1
    assert not path.exists()


# -- full tables, numbers in use, processes that hang ------------------------------------------


def test_the_same_limit_is_enough(path: Path, start: Callable[..., Stepped]) -> None:
    """A full table: the successor needs no higher RLIMIT_NOFILE than the predecessor."""
    most = 400
    old = start(most_files=most)
    with BlockingClient(path, PATIENCE) as client, ExitStack() as stack:
        client.execute("add-fds", {"opaque": "x"}, [0] * 250)
        client.execute("add-fds", {"opaque": "y"}, [0] * 50)
        others = [stack.enter_context(BlockingClient(path, PATIENCE)) for _ in range(60)]
        before = client.execute("query-fdsets")
        second = start("--takeover", most_files=most)
        assert old.wait() == 0
        assert client.execute("query-fdsets") == before
        start("--takeover", most_files=most)
        assert second.wait() == 0
        assert client.execute("query-fdsets") == before
        for other in others:
            assert other.execute("query-name") == {}


def test_a_number_beyond_the_successors_limit(path: Path, start: Callable[..., Stepped]) -> None:
    """A number beyond the successor's RLIMIT_NOFILE: the descriptor gets another number."""
    old = start()
    with BlockingClient(path, PATIENCE) as client:
        for number in range(20):
            client.execute("add-fd", {"opaque": f"{number}"}, [0])
        with ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(BlockingClient(path, PATIENCE))
            high = client.execute("add-fd", {"opaque": "high"}, [1])["fd"]
        assert high > 300
        before = client.execute("query-fds")
        successor = start("--takeover", most_files=300)
        assert old.wait() == 0
        assert f"descriptor {high} now has the number" in successor.said
        assert f"number {high} is above the limit of open files" in successor.said
        after = client.execute("query-fds")
        assert [fd["opaque"] for fd in after] == [fd["opaque"] for fd in before]
        for fd, known in zip(after, before, strict=True):
            assert fd["target"] == known["target"]
            assert (fd["fd"] == known["fd"]) == (fd["opaque"] != "high")


def test_a_number_that_an_inherited_descriptor_has(path: Path, tmp_path: Path) -> None:
    """An inherited descriptor at a stored descriptor's number is moved aside."""
    command = [*SERVE, "--socket", str(path)]
    with ExitStack() as stack:
        old = stack.enter_context(served(command, tmp_path / "old.log"))
        client = stack.enter_context(BlockingClient(path, PATIENCE))
        files = [stack.enter_context(Fd(os.memfd_create(f"{n}"))) for n in range(20)]
        numbers = [client.execute("add-fd", {"opaque": repr(f)}, [f])["fd"] for f in files]
        stack.enter_context(Fd(os.dup2(files[0].fileno(), 900)))
        shell = f'exec {numbers[7]}<&900 900<&-; exec "$@"'
        bash = ["bash", "-c", shell, "bash", *command, "--takeover"]
        with served(bash, tmp_path / "new.log", pass_fds=[900]):
            assert old.wait(PATIENCE) == 0
            found = {fd["opaque"]: fd for fd in client.execute("query-fds")}
            for n, (file, number) in enumerate(zip(files, numbers, strict=True)):
                assert f"memfd:{n}" in found[repr(file)]["target"]
                assert found[repr(file)]["fd"] == number


def test_changes_while_the_successor_prepares(path: Path, start: Callable[..., Stepped]) -> None:
    """Descriptors added and removed while the successor prepares: all have their numbers."""
    first = start()
    old = start("--takeover")  # leaves low numbers free, which a successor's connections get
    assert first.wait() == 0
    with BlockingClient(path, PATIENCE) as client, ExitStack() as stack:
        made = [stack.enter_context(Pipe()) for _ in range(40)]
        passing = [stack.enter_context(BlockingClient(path, PATIENCE)) for _ in range(8)]
        infos = [client.execute("add-fd", {"opaque": f"{n}"}, [p]) for n, p in enumerate(made[:20])]
        where = {"takeover/receiver.py": ["receive_rest"]}
        successor = start("--takeover", where=where, step=1, number=signal.SIGSTOP)
        assert successor.place
        for other in passing:
            other.close()
        until(lambda: client.execute("query-stats")["connections"] == 2, "the others' end")
        for info in infos[::2]:
            client.execute("remove-fd", info)
        for pipe in made[:20]:
            pipe.release()
        assert [pipe.held() for pipe in made[:20]] == [False, True] * 10  # closed at once, too
        for number, pipe in enumerate(made[20:], 20):
            client.execute("add-fds", {"opaque": f"{number}", "watch-hangup": number > 30}, [pipe])
            pipe.release()
        added = client.execute("add-fds", {"lifetime": "connection"}, [0, 0])
        before = client.execute("query-fdsets")
        successor.signal(signal.SIGCONT)
        successor.until("took over")
        assert old.wait() == 0
        assert client.execute("query-fdsets") == before
        assert [pipe.held() for pipe in made] == [False, True] * 10 + [True] * 20
        client.execute("remove-fd", {"fdset-id": added["fdset-id"]})
        for fdset in client.execute("query-fdsets"):
            client.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})
        assert not any(pipe.held() for pipe in made)


@pytest.mark.parametrize("which", [1, 2])
def test_no_memory_for_the_state(path: Path, start: Callable[..., Stepped], which: int) -> None:
    """RLIMIT_FSIZE limits the memfd of the state: the predecessor logs that, and serves on."""
    old = start()
    with BlockingClient(path, PATIENCE) as client:
        for number in range(20):
            client.execute("add-fd", {"opaque": f"{number}" * 100}, [0])
        _, hard = resource.prlimit(old.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(old.pid, resource.RLIMIT_FSIZE, (500 if which == 1 else 6000, hard))
        if which == 2:  # later additions go into the second part, which gets too large
            where = {"takeover/receiver.py": ["receive_rest"]}
            successor = start("--takeover", where=where, step=1, number=signal.SIGSTOP)
            assert successor.place or successor.poll() is not None
            for number in range(100):
                client.execute("add-fd", {"opaque": f"{number}" * 100}, [0])
            successor.signal(signal.SIGCONT)
        else:
            successor = start("--takeover")
        assert successor.wait() in (1, 3), successor.said
        assert successor.said.replace("STEP", "\n").count("qmpfd:") == 1
        assert old.poll() is None
        assert client.execute("query-name") == {}
        resource.prlimit(old.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert start("--takeover").poll() is None
        assert old.wait() == 0


def limit_memory(pid: int) -> int:
    """Limit the memory of a process: to 4 MiB more than it has, which is enough for a connection,
    but not for the state of a takeover.  Return the hard limit.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    used = next(line.split()[1] for line in status.splitlines() if line.startswith("VmData:"))
    _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
    resource.prlimit(pid, resource.RLIMIT_DATA, ((int(used) << 10) + (4 << 20), hard))
    return hard


def test_no_memory_at_all(path: Path, start: Callable[..., Stepped]) -> None:
    """Without memory on either side, one line is logged, and the predecessor serves on."""
    old = start()
    with BlockingClient(path, PATIENCE) as client:
        for number in range(20):
            client.execute("add-fds", {"opaque": f"{number:05}" * 800}, [0] * 250)
        hard = limit_memory(old.pid)
        successor = start("--takeover")
        assert successor.wait() == 1
        assert successor.said == (
            "qmpfd: GenericError: The daemon cannot hand over: Cannot allocate memory\n"
        )
        assert client.execute("query-name") == {}
        resource.prlimit(old.pid, resource.RLIMIT_DATA, (hard, hard))
        where = {"takeover/receiver.py": ["prepare"]}
        successor = start("--takeover", where=where, step=1, number=signal.SIGSTOP)
        limit_memory(successor.pid)
        successor.signal(signal.SIGCONT)
        assert successor.wait() == 3
        assert "cannot be taken over: this process is out of memory\n" in successor.said
        assert old.poll() is None
        assert len(client.execute("query-fdsets")) == 20
    assert "Traceback" not in old.said


def test_an_old_daemon_that_is_stopped(path: Path, start: Callable[..., Stepped]) -> None:
    """The successor gives up with one line; the predecessor serves when it continues."""
    old = start()
    with BlockingClient(path, PATIENCE) as client:
        client.execute("add-fd", fds=[0])
        old.signal(signal.SIGSTOP)
        successor = start(
            "--takeover", patches={"qmpfd.server.takeover.receiver.TAKEOVER_TIMEOUT": 0.3}
        )
        assert successor.wait() == 3
        old.signal(signal.SIGCONT)
        assert successor.said.endswith(
            "does not answer (it is stopped or busy, or not a QMP server, or a QEMU that serves "
            "another client)\n"
        )
        assert len(client.execute("query-fdsets")) == 1


def test_a_parent_that_is_stopped(path: Path, tmp_path: Path) -> None:
    """A change without acknowledgement does not delay the takeover; its reply is sent later."""
    command = [*SERVE, "--supervise", "--socket", str(path)]
    with ExitStack() as stack:
        old = stack.enter_context(served(command, tmp_path / "old.log"))
        file = stack.enter_context(Fd(os.memfd_create("x")))
        client, other = (stack.enter_context(BlockingClient(path, PATIENCE)) for _ in range(2))
        client.execute("add-fd", {"opaque": "kept"}, [file])
        sock = stack.enter_context(client.detach())
        sock.setblocking(True)
        sock.settimeout(PATIENCE)
        old.send_signal(signal.SIGSTOP)
        stack.callback(old.send_signal, signal.SIGCONT)
        send_now(sock, b'{"execute": "add-fd", "id": 1}', [file])
        assert other.execute("query-name") == {}
        with served([*SERVE, "--takeover", "--socket", str(path)], tmp_path / "new.log"):
            assert b'"id": 1' in sock.recv(1000)
            assert len(other.execute("query-fdsets")) == 2
            old.send_signal(signal.SIGCONT)
            assert old.wait(PATIENCE) == 0


def test_a_supervised_successor_whose_worker_is_killed(
    path: Path, tmp_path: Path, start: Callable[..., Stepped]
) -> None:
    """The worker is killed before the commit: the predecessor serves on, the successor's parent
    closes its descriptors, and its next worker takes over, with the descriptor of --add-fd.
    """
    old = start(where={"takeover/sender.py": ["_send_done"]}, step=1, number=signal.SIGSTOP)
    with ExitStack() as stack:
        client = stack.enter_context(BlockingClient(path, PATIENCE))
        pipe, other = stack.enter_context(Pipe()), stack.enter_context(Pipe())
        client.execute("add-fd", {"opaque": "removed"}, [pipe])
        client.execute("add-fd", {"opaque": "kept"}, [other])
        file = stack.enter_context(Fd(os.memfd_create("x")))
        added = ["--add-fd", f"fd={file.fileno()},set=7,opaque=mine"]
        command = [*SERVE, "--takeover", "--supervise", *added, "--socket", str(path)]
        log = tmp_path / "new.log"
        output = stack.enter_context(log.open("wb"))
        new = stack.enter_context(
            subprocess.Popen(command, stderr=output, pass_fds=[file.fileno()])
        )
        stack.callback(new.terminate)
        until(lambda: old.place, "the successor's confirmation")
        pipe.release()
        other.release()
        (worker,) = children(new.pid)
        os.kill(worker, signal.SIGKILL)
        until(lambda: b"was killed" in log.read_bytes())
        old.signal(signal.SIGCONT)
        client.execute("remove-fd", {"fdset-id": 0})
        assert not pipe.held()  # the successor's parent has closed it too
        until(lambda: "this daemon goes on" in old.said)
        until(lambda: b"took over" in log.read_bytes())
        assert old.wait() == 0
        found = {fd["opaque"]: fd for fd in client.execute("query-fds")}
        assert found.keys() == {"kept", "mine"}
        assert found["mine"]["fdset-id"] == 7
        for fdset in client.execute("query-fdsets"):
            client.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})
        assert not other.held()
        client.execute("quit")
        assert new.wait(PATIENCE) == 0
        assert b"Traceback" not in log.read_bytes()


def test_the_successors_journal_is_written_before_the_pause(
    path: Path, tmp_path: Path, start: Callable[..., Stepped]
) -> None:
    """The successor's journal is written while the predecessor serves; later changes follow."""
    where = {"takeover/sender.py": ["_hand_over_paused"]}
    old = start(where=where, step=1, number=signal.SIGSTOP)
    with BlockingClient(path, PATIENCE) as client, Fd(os.memfd_create("x")) as file:
        for number in range(5):
            client.execute("add-fd", {"opaque": f"text {number}"}, [file])
        command = [*SERVE, "--takeover", "--supervise", "--socket", str(path)]
        log = tmp_path / "new.log"
        with log.open("wb") as output, subprocess.Popen(command, stderr=output) as new:
            try:
                until(lambda: old.place, "the pause")
                (worker,) = children(new.pid)
                journal = b"".join(journals(worker))
                assert all(f"text {number}".encode() in journal for number in range(5))
                old.signal(signal.SIGCONT)
                until(lambda: b"took over" in log.read_bytes())
                before = lasting(client.execute("query-fds"))
                assert len(before) == 5
                os.kill(worker, signal.SIGKILL)
                until(lambda: log.read_bytes().count(b"listening") == 2)
                with connected(path) as other:
                    assert lasting(other.execute("query-fds")) == before
            finally:
                new.terminate()
                assert new.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    "limit,status,reason",
    [("-n 150", 3, "the limit of 150 open files is too low"), ("-f 4", 2, "File too large")],
)
def test_a_supervised_successor_that_cannot_have_all(
    path: Path, start: Callable[..., Stepped], limit: str, status: int, reason: str
) -> None:
    """The successor fails with one line before its parent has stored any descriptor."""
    old = start()
    with BlockingClient(path, PATIENCE) as client, ExitStack() as stack:
        pipe = stack.enter_context(Pipe())
        client.execute("add-fd", {"opaque": "kept"}, [pipe])
        pipe.release()
        for _ in range(200):
            stack.enter_context(BlockingClient(path, PATIENCE))
        command = [*SERVE, "--takeover", "--supervise", "--socket", str(path)]
        shell = ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", *command]
        done = subprocess.run(shell, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == status, done.stderr
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
        assert old.poll() is None
        client.execute("remove-fd", {"fdset-id": 0})
        assert not pipe.held()


def journals(pid: int) -> Iterator[bytes]:
    """Yield the contents of a process's journals."""
    for each in Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:qmpfd-journal" in os.readlink(each):
            yield each.read_bytes()


@pytest.mark.parametrize(
    "where",
    [
        {"takeover/receiver.py": (), "restore.py": ()},
        {
            "takeover/receiver.py": ["receive_rest", "_receive_state", "_receive_fds"],
            "restore.py": ["finish", "_inherit_listeners", "_restore_sessions"],
        },
    ],
    ids=["before the pause", "in the pause"],
)
def test_sigint_to_the_successor(
    path: Path, start: Callable[..., Stepped], where: dict[str, list[str]]
) -> None:
    """SIGINT at any line of the successor: one line at most, and the predecessor serves on."""
    old = start()
    with BlockingClient(path, PATIENCE) as client:
        client.execute("add-fd", {}, [0])
        for step in range(1, 60, 7):
            successor = start("--takeover", where=where, step=step, number=signal.SIGINT)
            assert successor.wait() == 130
            output = [line for line in successor.said.splitlines() if not line.startswith("STEP")]
            assert len(output) <= 2, successor.said
        assert old.poll() is None
        assert len(client.execute("query-fdsets")) == 1


# -- formats -----------------------------------------------------------------------------------

#: A state of format 1, which every version must read.
FORMAT_1 = (
    1,
    {
        "at": 5.0,
        # name, fdset_id, number, opaque, added_by, added_at, expires_at, watch_hangup, owner
        "fds": [["a", "", 0, 9, "x", [1, 2, 3], 3.5, 15.0, False, None]],
        "listeners": [{"path": b"/run/q.sock", "file": [1, 2]}],
        "store": "s",
        "service": "t",
    },
)  # fmt: skip
REST_1 = {
    "at": 6.0,
    "removed": [9],
    "added": [],
    "sessions": [
        {
            "peer": [1, 2, 3], "groups": [4], "idle": 0.5,
            "connection": {
                "state": "commands", "oob_enabled": False, "errors_in_a_row": 0,
                # parser, fds, segment, lost, segment_left
                "receive_buffer": [None, 0, "spent", "", 0],
                "messages": [{"text": b"{}", "error": "", "fds": None, "lost": ""}],
            },
            "names": ["n"], "unsent": [[b"x", 0]],
            "reply": {
                "members": b"\x80", "deep_id": b"", "written": 3, "opaque": None, "fds": 0,
                "listing": {
                    "query": {"fdset-id": 3}, "age": 1.0, "stage": "in set", "below": 4,
                    "fdset_id": 4, "next_fd": 17, "entry": None, "written": 0,
                },
            },
            "watch": {"log": 0, "behind": 1, "lost": 2},
        }
    ],
    "texts": ["t"],
    "logs": [[{"name": "FD_ADDED", "time": 1, "data": {"fdset-id": 0, "fd": 9}}]],
    "others": 2,
    "stats": {
        "started_at": 5.0, "accepted": 1, "turned_away": 0,
        "commands": {"add-fd": 1}, "errors": {},
    },
    "journal": True,
}  # fmt: skip


def test_format_1_is_read() -> None:
    assert TAKEOVER_FORMAT >= 1
    state = decode(msgspec.msgpack.encode(FORMAT_1))
    assert isinstance(state, SavedState)
    assert state.stored_numbers == [9]
    rest = msgspec.msgpack.decode(msgspec.msgpack.encode(REST_1), type=SavedRest)
    # The encoding is unchanged: a new member would need a default.
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(rest)) == REST_1


def test_a_session_in_an_unknown_state() -> None:
    broken = msgspec.to_builtins(REST_1)
    broken["sessions"][0]["connection"]["state"] = "asleep"
    with pytest.raises(msgspec.ValidationError, match="asleep"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(broken), type=SavedRest)
