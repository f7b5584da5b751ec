"""Names, several targets, listening sockets, and the environment of exec.

Tests of cli/opening.py and kernel/sockets.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import PATIENCE, ROOT, Pipe, daemon_process, daemon_thread

import qmpfd
from qmpfd.client.blocking import BlockingClient

from .command import (
    DONE,
    ENV,
    NO_DAEMON,
    REFUSED,
    SHOW,
    USAGE,
    Cli,
    run,
    run_as_nobody,
    run_on_full_disk,
    shown,
)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / name for name in ("a", "b", "c")]
    for file in made:
        file.write_text(f"content of {file.name}\n")
    return made


def names(cli: Cli) -> list[tuple[int, str | None]]:
    sets = json.loads(cli.done("ls", "--json"))
    return [(fdset["fdset-id"], fd.get("opaque")) for fdset in sets for fd in fdset["fds"]]


# -- add ---------------------------------------------------------------------------------------


def test_several_files_go_into_one_set(cli: Cli, files: list[Path]) -> None:
    out = cli.done("add", "-q", "--name", "x", *files).split()
    assert len(out) == 4
    assert out[0] == "0"
    assert names(cli) == [(0, "x")] * 3


def test_more_files_than_one_message_takes(cli: Cli, files: list[Path]) -> None:
    assert "at most 253 PATHs" in cli.fails(USAGE, "add", *[files[0]] * 254)
    assert names(cli) == []


def test_all_or_nothing(cli: Cli, files: list[Path]) -> None:
    assert "no-such" in cli.fails(USAGE, "add", files[0], "no-such", files[1])
    assert names(cli) == []


def test_if_exists(cli: Cli, files: list[Path]) -> None:
    for file in files[:2]:
        cli.done("add", "--name", "x", file)
    assert "FdExists" in cli.fails(REFUSED, "add", "--name", "x", "--if-exists", "fail", files[2])
    assert len(names(cli)) == 2
    cli.done("add", "--name", "x", "--if-exists", "replace", files[2])
    assert [name for _, name in names(cli)] == ["x"]
    assert cli.done("exec", "@x=0", "--", "cat") == "content of c\n"
    assert "--name" in cli.fails(USAGE, "add", "--if-exists", "fail", files[0])


def test_expires_and_watch_hangup(cli: Cli) -> None:
    with Pipe() as pipe:
        number = pipe.fileno()
        words = ("--expires", 100, "--watch-hangup", "--fd", number)
        cli.done("add", *words, pass_fds=[number])
        [fd] = json.loads(cli.done("ls", "--long", "--json"))
        assert 90 < fd["expires"] <= 100
        assert fd["watch-hangup"] is True
    cli.fails(USAGE, "add", "--expires", 0, "--fd", 0)


def test_connection(cli: Cli, files: list[Path]) -> None:
    """add --connection: the descriptors are stored while the command runs."""
    process = subprocess.Popen(
        cli.argv("add", "--connection", "--name", "mine", files[0]),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    with process, BlockingClient(cli.path, PATIENCE) as client, client.watch_fdsets() as events:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("fd set 0")
            assert names(cli) == [(0, "mine")]
        finally:
            process.terminate()
        while next(events).name != "FD_REMOVED":
            pass
        assert names(cli) == []


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "localhost:0", "unix"])
def test_listen(cli: Cli, address: str, tmp_path: Path) -> None:
    at = tmp_path / "web.sock"
    out = cli.done("add", "--listen", f"unix:{at}" if address == "unix" else address)
    where = out.rpartition("listening on ")[2].strip()
    if address == "unix":
        assert where == f"unix:{at}"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.fspath(at))
        assert "already in use" in cli.fails(USAGE, "add", "--listen", f"unix:{at}")
        cli.done("rm", 0)
        cli.done("add", "--listen", f"unix:{at}")  # replaces the stale socket file
    else:
        host, _, port = where.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
        assert "in use" in cli.fails(USAGE, "add", "--listen", where)
        [fd] = json.loads(cli.done("ls", "-l", "--json"))
        assert fd["listening"] is True


@pytest.mark.parametrize(
    "address",
    ["", "x", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", "[::1:80", "[]:0", "unix:", "unix:@"],
)
def test_listen_nowhere(cli: Cli, address: str) -> None:
    cli.fails(USAGE, "add", "--listen", address)
    cli.fails(USAGE, "add", "--listen", "127.0.0.1:0", "--mode", "r")
    assert names(cli) == []


def test_a_refused_socket_leaves_no_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "refused"
    words = ("add", "--listen", f"unix:{path}")
    cli.fails(REFUSED, *words, "--fdset", 7)
    assert not path.exists()
    Cli(tmp_path / "none").fails(NO_DAEMON, *words)
    assert not path.exists()
    # The socket is stored, though the output fails.
    ran = run_on_full_disk(cli.argv(*words))
    assert (ran.returncode, path.is_socket()) == (REFUSED, True)
    assert "already in use" in cli.fails(USAGE, *words)
    assert path.is_socket()


def test_line_breaks_in_paths_are_escaped(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "two\nlines"
    assert cli.done("add", "--listen", f"unix:{path}").endswith("two\\nlines\n")
    path.unlink()
    with daemon_thread(path):
        assert r"two\nlines: fd" in cli.done("push", "0", "--to", path)
        path.unlink()


def test_listen_leaves_another_file_alone(cli: Cli, tmp_path: Path) -> None:
    """A regular file is not replaced, though connect(2) fails as for a stale socket file."""
    file = tmp_path / "letter"
    file.write_text("dear")
    assert "not a socket" in cli.fails(USAGE, "add", "--listen", f"unix:{file}")
    assert file.read_text() == "dear"


# -- ls, rm ------------------------------------------------------------------------------------


@pytest.fixture
def named(cli: Cli, files: list[Path]) -> Cli:
    for number, name in enumerate(("vm1:a", "vm1:b", "vm2:a")):
        cli.done("add", "--name", name, files[number])
    return cli


@pytest.mark.parametrize(
    "words, left",
    [
        (["@vm1:a"], ["vm2:a", "vm1:b"]),
        (["@vm1:*"], ["vm2:a"]),
        (["@vm?:a", "1"], []),
        (["0", "@vm2:a"], ["vm1:b"]),
        (["--all"], []),
        (["--pid", "self"], ["vm2:a", "vm1:b", "vm1:a"]),
    ],
)
def test_rm(named: Cli, words: list[str], left: list[str]) -> None:
    if "self" in words:
        with Pipe() as pipe, BlockingClient(named.path, PATIENCE) as client:
            client.add_fd(pipe)
        words = ["--pid", str(os.getpid())]
    removed = json.loads(named.done("rm", "--json", *words))
    assert [name for _, name in names(named)] == left
    assert all("fdset-id" in fdset for fdset in removed)


def test_rm_tries_each(named: Cli) -> None:
    ran = named("rm", "7", "@no", "@vm1:a")
    assert ran.returncode == REFUSED
    assert ran.stdout.startswith("removed fd set 0, fd ")
    assert [line.split(":")[1].strip() for line in ran.stderr.splitlines()] == ["7", "@no"]
    assert [name for _, name in names(named)] == ["vm2:a", "vm1:b"]


def test_rm_what_is_not_there(cli: Cli) -> None:
    for target in ("@x", "@x*", "0", "0/3"):
        assert "FdNotFound" in cli.fails(REFUSED, "rm", target)
    assert cli.done("rm", "--all") == "no fd sets\n"


def test_ls_targets(named: Cli) -> None:
    header, *rows = named.done("ls", "@vm1:*").splitlines()
    assert [row.split()[2] for row in rows] == ["vm1:b", "vm1:a"]
    [fdset] = json.loads(named.done("ls", "--json", "@vm2:a"))
    assert [fd["opaque"] for fd in fdset["fds"]] == ["vm2:a"]
    [fd] = json.loads(named.done("ls", "--long", "--json", "2"))
    assert fd["opaque"] == "vm2:a"
    ran = named("ls", "@vm1:a", "@none")
    assert ran.returncode == REFUSED
    assert "vm1:a" in ran.stdout
    assert ran.stderr == "qmpfd: @none: no such descriptor\n"
    assert header.split() == ["FDSET", "FD", "NAME"]


@pytest.mark.parametrize("dialect", ["spec", "qemu"])
def test_a_name_with_a_number(path: Path, files: list[Path], dialect: str) -> None:
    """A word that is no name is a name and a descriptor's number, whatever the error's class."""
    cli = Cli(path)
    with daemon_thread(path, dialect=dialect):
        first, second = (cli.add(file, os.O_RDONLY, opaque="x") for file in files[:2])
        assert cli.done("exec", f"@x/{first}=0", "--", "cat") == "content of a\n"
        assert cli.done("rm", f"@x/{second}") == f"removed fd set 1, fd {second}  x\n"
        for words in (["rm", f"@x/{second}"], ["rm", "7"], ["exec", "@no", "--", "true"]):
            assert "(qmpfd ls lists the stored descriptors)" in cli.fails(REFUSED, *words)


# -- exec --------------------------------------------------------------------------------------

ENVIRONMENT = """
import json, os
names = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
print(json.dumps([os.getpid(), *map(os.environ.get, names)]))
"""


def test_listen_fds(named: Cli) -> None:
    program = [sys.executable, "-c", ENVIRONMENT]
    ran = named.done("exec", "--listen-fds", "@vm2:a", "@vm1:a", "0=0", "--", *program)
    pid, count, of, found = json.loads(ran)
    assert (count, of, found) == ("2", str(pid), "vm2_a:vm1_a")
    out = named.done("exec", "--listen-fds", "@vm2:a", "@vm1:a", "--", *SHOW)
    assert {number: Path(link).name for number, link in shown(out).items()} == {3: "c", 4: "a"}
    named.fails(USAGE, "exec", "--listen-fds", "@vm2:a=5", "--", "true")
    # Variables for other descriptors are not passed to CMD.
    env = {**ENV, "LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "x"}
    ran = named.done("exec", "0", "--", *program, env=env)
    assert json.loads(ran)[1:] == [None, None, None]


def test_systemd_sees_them(cli: Cli) -> None:
    """CMD's environment passes the checks of sd_listen_fds(3), in systemd's own program."""
    cli.done("add", "--listen", "127.0.0.1:0", "--name", "web")
    check = (
        "import os, socket; n = int(os.environ['LISTEN_FDS']); "
        "assert os.environ['LISTEN_PID'] == str(os.getpid()); "
        "s = socket.socket(fileno=3); "
        "assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN); print(n)"
    )
    assert cli.done("exec", "--listen-fds", "@web", "--", sys.executable, "-c", check) == "1\n"


def test_take(named: Cli) -> None:
    assert named.done("exec", "--take", "@vm1:a=0", "--", "cat") == "content of a\n"
    assert [name for _, name in names(named)] == ["vm2:a", "vm1:b"]
    # All of them or none.
    assert "FdNotFound" in named.fails(REFUSED, "exec", "--take", "@vm1:b", "@no", "--", "true")
    assert [name for _, name in names(named)] == ["vm2:a", "vm1:b"]
    # Nothing is taken for a command that cannot be executed.
    for status, command in ((127, "no-such-program"), (127, ""), (126, os.devnull)):
        named.fails(status, "exec", "--take", "@vm1:b", "--", command)
    assert [name for _, name in names(named)] == ["vm2:a", "vm1:b"]
    named.done("exec", "--take", "@vm1:b", "@vm2:a", "--", "true")
    assert names(named) == []


@pytest.mark.parametrize(
    "status, program, advice",
    [
        (126, "echo no interpreter line", "interpreter in its first line, such as #!/bin/sh"),
        (126, "", "interpreter in its first line"),
        (127, "#!/no/such/interpreter", "its interpreter is missing"),
    ],
)
def test_take_for_what_only_execve_refuses(
    named: Cli, tmp_path: Path, status: int, program: str, advice: str
) -> None:
    """If execve(2) fails, taken descriptors are stored again, with name and fd set."""
    script = tmp_path / "script"
    script.write_text(program)
    script.chmod(0o700)
    before = names(named)
    words = ("--take", "@vm1:a", "@vm1:b=0", "@vm2:a=9", "--", script)
    assert advice in named.fails(status, "exec", *words)
    assert sorted(names(named)) == sorted(before)


@pytest.mark.root
def test_take_gives_back_what_it_took() -> None:
    """If one descriptor may not be removed, all stay, also one that is alone in its set."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path, policy = Path(folder, "q.sock"), Path(folder, "policy")
        policy.write_text(
            '[[rule]]\nallow = ["query", "open", "add"]\n'
            '[[rule]]\nallow = ["remove"]\nopaque = ["a", "b"]\n'
        )
        with daemon_process(path, "--policy", str(policy), "--socket-mode", "666"):
            cli = Cli(path)
            for words in (["a"], ["b"], ["with b", "--fdset", "1"], ["c"]):
                cli.done("add", "--name", *words, "/dev/null")
            at = ["--socket", str(path)]
            ran = run_as_nobody("exec", *at, "--take", "@a", "@b", "@c", "--", "true")
            assert (ran.returncode, ran.stdout) == (REFUSED, "")
            assert "PermissionDenied: The right 'remove' is needed" in ran.stderr
            assert sorted(names(cli)) == [(0, "a"), (1, "b"), (1, "with b"), (2, "c")]


def test_rewind(named: Cli) -> None:
    """--rewind changes the file position, which all duplicates share."""
    cat = ("@vm1:a=0", "--", "cat")
    assert named.done("exec", *cat) == "content of a\n"
    assert named.done("exec", *cat) == ""
    assert named.done("exec", "--rewind", *cat) == "content of a\n"
    with Pipe() as pipe:
        number = pipe.fileno()
        named.done("add", "--name", "pipe", "--fd", number, pass_fds=[number])
        named.done("exec", "--rewind", "@pipe", "--", "true")  # a pipe has no position


def test_one_of_a_set(cli: Cli, files: list[Path]) -> None:
    _, *numbers = cli.done("add", "-q", *files).split()
    assert cli.done("exec", f"0/{numbers[1]}=0", "--", "cat") == "content of b\n"
    assert cli.done("exec", "0=0", "--", "cat") == "content of c\n"


def test_a_name_with_a_number_at_its_end(cli: Cli, files: list[Path]) -> None:
    cli.done("add", "--name", "/dev/vfio/12", files[0])
    assert cli.done("exec", "@/dev/vfio/12=0", "--", "cat") == "content of a\n"
    number = cli.done("add", "-q", "--name", "x", files[1]).split()[1]
    cli.done("add", "--name", "x", files[2])
    assert cli.done("exec", f"@x/{number}=0", "--", "cat") == "content of b\n"


SERVER = """
import http.server, socket
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"served")
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=3)
server.serve_forever()
"""


def test_a_server_restarts_without_losing_a_connection(cli: Cli) -> None:
    """Clients that connect while no server runs wait in the socket's backlog."""
    out = cli.done("add", "--listen", "127.0.0.1:0", "--name", "web")
    port = int(out.rpartition(":")[2])
    served = 0
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:  # no server runs
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            argv = cli.argv("exec", "--listen-fds", "@web", "--", sys.executable, "-c", SERVER)
            with subprocess.Popen(argv, cwd=ROOT, env=ENV) as server:
                try:
                    answer = b""
                    while data := client.recv(4096):
                        answer += data
                    served += answer.endswith(b"served")
                finally:
                    server.send_signal(signal.SIGKILL)
    assert served == 3


# -- push --------------------------------------------------------------------------------------


def test_push_is_all_or_nothing(named: Cli, tmp_path: Path, files: list[Path]) -> None:
    to = tmp_path / "other.sock"
    for file in files:
        named.done("add", "--fdset", 0, file)
    with daemon_thread(to, limits=qmpfd.Limits(max_fds=2)):
        other = Cli(to)
        assert "limit" in named.fails(REFUSED, "push", 0, "--to", to)
        assert names(other) == []
        assert named.done("push", "@vm2:a", "--to", to).startswith("fd set 0 of ")
        assert names(other) == [(0, "vm2:a")]
    assert "=AT" in named.fails(USAGE, "push", "0=3", "--to", to)


def test_hold_ends_with_the_server(named: Cli, tmp_path: Path) -> None:
    to = tmp_path / "other.sock"
    with daemon_thread(to):
        argv = named.argv("push", "@vm1:a", "--to", to, "--hold")
        with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, env=ENV) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"fd set 0 of ")
            assert process.poll() is None
            with BlockingClient(to, PATIENCE) as client:
                client.execute("quit")
            assert process.wait(PATIENCE) == DONE


# -- options around the verb -------------------------------------------------------------------


def test_options_before_the_verb(cli: Cli) -> None:
    for words in (
        ["--socket", str(cli.path), "--json", "ls"],
        [f"--socket={cli.path}", "--timeout", "5", "ls", "--json"],
    ):
        ran = run(*words)
        assert (ran.returncode, ran.stdout) == (DONE, "[]\n"), ran


@pytest.mark.parametrize(
    "words, usage",
    [
        (["help", "ls"], "usage: qmpfd ls "),
        (["--json", "--socket=x", "help", "ls"], "usage: qmpfd ls "),
        (["help", "--socket", "x", "ls", "rm"], "usage: qmpfd ls "),
        (["help", "--json"], "usage: qmpfd [-h]"),
        (["help", "help"], "usage: qmpfd [-h]"),
    ],
)
def test_help_of_a_verb(words: list[str], usage: str) -> None:
    ran = run(*words)
    assert (ran.returncode, ran.stderr) == (DONE, "")
    assert ran.stdout.startswith(usage)


@pytest.mark.parametrize("words", [["--socket"], ["--socket", "ls"], ["--json"], []])
def test_options_without_a_verb(words: list[str]) -> None:
    ran = run(*words)
    assert ran.returncode == USAGE
    assert "required: VERB" in ran.stderr


def test_what_was_done_is_said_where_output_fails(cli: Cli, files: list[Path]) -> None:
    ran = run_on_full_disk(cli.argv("add", files[0]), env=ENV)
    assert ran.returncode == REFUSED
    assert "this was done: fd set 0, fd " in ran.stderr
    assert len(names(cli)) == 1


def test_status_waits(path: Path) -> None:
    argv = [sys.executable, "-m", "qmpfd", "status", "--socket", str(path), "--wait", "20"]
    with (
        subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, env=ENV) as process,
        daemon_thread(path),
    ):
        assert process.wait(PATIENCE) == DONE
    ran = Cli(path)("status", "--wait", "0.1")
    assert ran.returncode == NO_DAEMON
