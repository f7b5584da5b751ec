"""Fuzz target: a server's end of a connection, with any bytes, splits and descriptors.

The target makes no system calls: the queue is the verified fake of the kernel's
(``fake_kernel.py``), and the descriptors are numbers.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

from fake_kernel import BUFFER_BYTES, FakeQueue, Segment, read_once
from outcome import Error, Value

from qmpfd.commands import DECODER, VERSION
from qmpfd.errors import QMPError
from qmpfd.kernel.fd import Fd
from qmpfd.limits import MAX_ERRORS_IN_A_ROW, SCM_MAX_FD
from qmpfd.protocol.request_decoder import Request
from qmpfd.protocol.server import ServerConnection

#: One send: its bytes, and the number of its descriptors.
Send = tuple[bytes, int]


class Number(Fd):
    """A descriptor without an open file."""

    __slots__ = ("tag",)

    def __init__(self, tag: int) -> None:
        super().__init__(1 << 20)
        self.tag = tag

    def close(self) -> None:
        self.number = -1


class Queue(FakeQueue):
    """Fake queue of bytes and :class:`Number`."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: list[Number] = []

    def put(self, data: bytes, count: int) -> None:
        """Queue *data* with *count* descriptors."""
        numbers = [Number(len(self.passed) + each) for each in range(count)]
        self.passed += numbers
        for at in range(0, len(data), BUFFER_BYTES):
            piece: list[Fd] = [*numbers] if not at else []
            self._segments.append(Segment(data[at : at + BUFFER_BYTES], piece))


def sends_of(text: bytes, dice: random.Random) -> list[Send]:
    """Return *text* as sends of random sizes, some of them with descriptors."""
    sends = []
    most = dice.choice((1, 3, 20, 200, 1 << 20))
    while text:
        size = dice.randint(1, most)
        count = dice.choice((0, 0, 0, 1, 1, 2, 5, SCM_MAX_FD)) if dice.random() < 0.5 else 0
        sends.append((text[:size], count))
        text = text[size:]
    return sends


def converse(sends: list[Send], reads: random.Random | None) -> tuple[list[Any], list[list[int]]]:
    """Send to a connection; return its replies, and the descriptors that each request got.

    Args:
        sends: the sends.
        reads: decides whether the daemon reads after a send; None: always.
    """
    queue = Queue()
    connection = ServerConnection(DECODER, max_request_bytes=4096)
    connection.greeting(VERSION)
    replies: list[Any] = []
    claimed: list[list[int]] = []
    taken: list[Fd] = []

    def read() -> None:
        while read_once(queue, connection):
            for request, request_id, fds in iter(connection.next_request, None):
                if isinstance(request, Request):
                    name = DECODER.names[type(request)]
                    result: Value[object] | Error = Value(name)
                    if name == "qmp_capabilities":
                        try:
                            connection.negotiate([])
                        except QMPError as exc:
                            result = Error(exc)
                    claimed.append([fd.tag for fd in fds if isinstance(fd, Number)])
                else:
                    assert isinstance(request.error, QMPError)
                    result = request
                    assert not fds
                taken.extend(fds)
                reply = connection.reply(result, request_id)
                assert reply.isascii()
                assert reply.endswith(b"\r\n")
                assert reply.count(b"\n") == 1
                replies.append(json.loads(reply))
            waiting = len(queue.passed) - len(taken) - len(connection.fds_to_close)
            unread = sum(len(segment.fds) for segment in queue._segments)
            assert waiting - unread <= 2 * SCM_MAX_FD

    for data, count in sends:
        queue.put(data, count)
        if reads is None or reads.random() < 0.3:
            read()
    read()
    connection.close()
    ended = Counter(id(fd) for fd in [*taken, *connection.fds_to_close])
    assert ended == Counter(map(id, queue.passed)), "a descriptor was lost, or has two owners"
    for number in queue.passed:
        number.close()
    return replies, claimed


def check(data: bytes) -> None:
    """Check that any input leads to no crash, that each descriptor has one owner, and that the
    replies do not depend on when the daemon reads.
    """
    dice = random.Random(data[:2])
    text = b'{"execute":"qmp_capabilities"}' * (dice.random() < 0.9) + data[2:]
    sends = sends_of(text, dice)
    replies, claimed = converse(sends, None)
    for _ in range(2):
        if sum("error" in reply for reply in replies) >= MAX_ERRORS_IN_A_ROW:
            return  # from here on the daemon sends one error a read, so the replies differ
        again = converse(sends, random.Random(dice.random()))
        assert again == (replies, claimed), "it depends on when it is read"
