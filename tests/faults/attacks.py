"""Hostile clients, each a process: ``attacks.py KIND SOCKET [NUMBER]``.

The process prints ``ready`` when its attack is under way, and attacks until it is killed.
"""

from __future__ import annotations

import array
import os
import random
import selectors
import socket
import sys
from collections.abc import Iterator

CAPABILITIES = b'{"execute":"qmp_capabilities"}'
NAME = b'{"execute":"query-name"}'


def connect(path: str, *, negotiate: bool = True) -> socket.socket:
    """Connect and negotiate; return a socket that does not block."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    if negotiate:
        sock.sendall(CAPABILITIES)
        seen = b""
        while seen.count(b"\n") < 2:
            data = sock.recv(4096)
            if not data:
                break
            seen += data
    sock.setblocking(False)
    return sock


def send(sock: socket.socket, data: bytes, fds: list[int] | None = None) -> int:
    """Send as much of *data* as the socket takes, with *fds*; return the number of bytes sent."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        return sock.sendmsg([data], rights)
    except (BlockingIOError, OSError):
        return 0


#: By kind: text that is sent repeatedly, and the number of descriptors sent with each.
STREAMS: dict[str, tuple[bytes, int]] = {
    "requests": (NAME * 1000, 0),
    "lines": ((NAME + b"\n") * 1000, 0),
    "closers": (b"}" * 60000, 0),
    "junk": (b"\xff" * 60000, 0),
    "escapes": (b'"' + b"\\u0041" * 10000 + b'"', 0),
    "numbers": (b"1 " * 30000, 0),
    "nested": (b"[" * 1000 + b"]" * 1000, 0),
    "tokens": (b"[" + b"1," * 30000, 0),
    "schemas": (b'{"execute":"query-qmp-schema"}' * 1000, 0),
    "listings": (b'{"execute":"query-fds"}{"execute":"query-fdsets"}' * 500, 0),
    "ids": (b'{"execute":"query-name","id":[' + b"[]," * 300_000 + b"1]}", 0),
    "text": (
        b'{"execute":"closefd","arguments":{"fdname":"' + b"a\xc3\xa9\\n" * 200_000 + b'"}}',
        0,
    ),
    "members": (b"{" + b",".join(b'"%d":1' % n for n in range(90_000)) + b"}", 0),
    "unclaimed": (b" ", 253),
    "adds": (b'{"execute":"add-fd"}{"execute":"remove-fd","arguments":{"fdset-id":0}}', 1),
    "no fds": (b'{"execute":"add-fd"}' * 1000, 0),
    "named": (b'{"execute":"getfd","arguments":{"fdname":"n"}}', 1),
    "opened": (b'{"execute":"open-fdset","arguments":{"fdset-id":0}}' * 1000, 0),
    "watching": (
        (
            b'{"execute":"watch-fdsets","arguments":{"enable":true}}{"execute":"add-fds"}'
            b'{"execute":"remove-fd","arguments":{"fdset-id":0}}'
        ),
        250,
    ),
}


def flood(path: str, kind: str, count: int, *, reading: bool) -> Iterator[None]:
    """Send the text of STREAMS repeatedly over *count* connections; read the replies or not."""
    text, fd_count = STREAMS[kind]
    fds = [os.open("/dev/null", os.O_RDONLY)] * fd_count
    if kind == "opened":
        send(connect(path), b'{"execute":"add-fd"}', [os.open("/dev/null", os.O_RDONLY)])
    socks = [connect(path) for _ in range(count)]
    poll = selectors.DefaultSelector()
    at = dict.fromkeys(socks, 0)
    for sock in socks:
        wanted = selectors.EVENT_WRITE | (selectors.EVENT_READ if reading else 0)
        poll.register(sock, wanted, sock)
    yield
    while at:
        for key, events in poll.select(1.0):
            sock = key.data
            if events & selectors.EVENT_READ:
                try:
                    if not drain(sock):
                        raise ConnectionError
                except ConnectionError:
                    poll.unregister(sock)
                    del at[sock]
                    continue
            if events & selectors.EVENT_WRITE:
                part = text[at[sock] :]
                at[sock] = (at[sock] + send(sock, part, fds if not at[sock] else None)) % len(text)
        yield


def drain(sock: socket.socket) -> bool:
    """Read what the socket holds; return False at the end of the connection."""
    try:
        while data := sock.recv(1 << 16):
            if len(data) < 1 << 16:
                return True
    except BlockingIOError:
        return True
    return False


def fleeting(path: str, count: int) -> Iterator[None]:
    """Add thousands of descriptors that the daemon must close at once: on expiry, and at the end of
    the connection.
    """
    fds = [os.open("/dev/null", os.O_RDONLY)] * 250
    while True:
        sock = connect(path)
        sock.setblocking(True)
        for terms in (b'"expires":1', b'"lifetime":"connection"'):
            for _ in range(count // 250):
                send(sock, b'{"execute":"add-fds","arguments":{%s}}' % terms, fds)
                sock.recv(1 << 16)
            yield
        sock.close()


def half(path: str, count: int) -> Iterator[None]:
    """Send requests that never end, over *count* connections."""
    socks = [connect(path) for _ in range(count)]
    for sock in socks:
        send(sock, b'{"execute": "')
    yield
    while True:
        for sock in socks:
            send(sock, b"x" * 20000)
            yield


def connections(path: str, count: int) -> Iterator[None]:
    """Connect and disconnect repeatedly."""
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(path)
        except OSError:
            pass
        sock.close()
        yield


def holding(path: str, count: int) -> Iterator[None]:
    """Hold *count* connections that send nothing."""
    held = []
    for _ in range(count):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(path)
        held.append(sock)
    while True:
        yield
        signal_wait()


def signal_wait() -> None:
    """Sleep for 50 ms."""
    selectors.DefaultSelector().select(0.05)


def life(path: str, seed: int) -> Iterator[None]:
    """Send random commands, whole and broken; the test kills or stops this process meanwhile."""
    dice = random.Random(seed)
    fds = [os.memfd_create("life") for _ in range(3)]
    pieces = [
        (b'{"execute":"add-fd"}\n', 1),
        (b'{"execute":"add-fds","arguments":{"lifetime":"connection"}}\n', 3),
        (b'{"execute":"add-', 1),
        (b'fd"}', 0),
        (b" ", 2),
        (b'{"execute":"getfd","arguments":{"fdname":"a"}}', 1),
        (b'{"execute":"watch-fdsets","arguments":{"enable":true}}', 0),
        (b'{"execute":"open-fdset","arguments":{"fdset-id":0}}', 0),
        (b'{"execute":"remove-fd","arguments":{"fdset-id":0}}', 0),
        (b'{"execute":"query-fds"}' * 20, 0),
        (b"{{{", 1),
        (b"}}}", 0),
    ]
    sock = connect(path)
    while True:
        data, count = dice.choice(pieces)
        try:
            sock.sendmsg(
                [data],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds[:count]))]
                if count
                else [],
            )
            if dice.random() < 0.5:
                drain(sock)
        except BlockingIOError:
            if dice.random() < 0.1:
                drain(sock)
        except OSError:
            sock.close()
            sock = connect(path)
        yield


def main(kind: str, path: str, number: int) -> None:
    """Run the attack *kind*, with *number* connections, descriptors or as a seed."""
    steps: Iterator[None]
    if kind == "half":
        steps = half(path, number)
    elif kind == "fleeting":
        steps = fleeting(path, number)
    elif kind == "connections":
        steps = connections(path, number)
    elif kind == "holding":
        steps = holding(path, number)
    elif kind == "life":
        steps = life(path, number)
    else:
        way, _, stream = kind.partition(":")
        steps = flood(path, stream, number, reading=way == "reading")
    next(steps)
    print("ready", flush=True)
    for _ in steps:
        pass
    while True:
        signal_wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
