"""Bytes and descriptors over a Unix stream socket, for Trio: what client and server share.

The socket itself is trio.socket's, but reads and writes are tried without waiting first, and
Trio is asked to wait only where there is nothing to do: measured, a turn costs 24 us of CPU so,
28 to 32 with trio.socket's own calls, and 40 with trio.SocketStream, which drops descriptors too.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum, auto
from functools import partial

import trio

from .kernel import fd
from .kernel.fd import Fd, FileDescriptorLike
from .limits import READ_BYTES
from .protocol.connection import Connection

#: Seconds until the next try where too many descriptors are in flight.
_IN_FLIGHT_RETRY = 0.01


class Arrival(Enum):
    """What :meth:`FdStream.receive_nowait` has found."""

    NOTHING = auto()  #: nothing is there yet
    ALL = auto()  #: all that was there, as far as is known
    SOME = auto()  #: some; more waits
    END = auto()  #: the peer is gone


# A module's own names are found faster than the members of an enumeration.
_NOTHING, _ALL, _SOME, _END = Arrival


class FdStream:
    """A connected Unix socket that carries descriptors.

    Args:
        sock: the socket; owned from here on.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._trio_sock = sock
        #: The same descriptor, for its options and for calls that never wait.
        self.socket = socket.socket(socket.AF_UNIX, sock.type, 0, fileno=sock.fileno())
        self.socket.setblocking(False)
        # A byte sent with MSG_OOB (unix(7)) stays one of the stream: else the socket is readable
        # for ever, and bytes are told apart wrongly.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        #: Wait until something is there, or the peer is gone.
        self.wait_readable = partial(trio.lowlevel.wait_readable, sock)

    def receive_nowait(
        self,
        connection: Connection,
        max_bytes: int = READ_BYTES,
        max_fds: Callable[[], int] = lambda: 1,
    ) -> Arrival:
        """Hand what is there to *connection*, bytes and descriptors.

        Each read ends with descriptors, if some come; what is done once for all that is read is
        most of the work.  Nothing in here waits or can be cancelled, so no descriptor is ever
        without an owner.

        Args:
            connection: who takes it.
            max_bytes: bytes to look at; where there are as many, or more, none are taken.
            max_fds: tells after how many descriptors no more are read.
        """
        sock = self.socket
        arrival = _NOTHING
        left, count, most = max_bytes, 0, 0
        while True:
            try:
                data, fds_follow = fd.peek(sock, max_bytes)
            except BlockingIOError:
                return arrival
            except ConnectionError:  # the peer was closed before it had read all
                data, fds_follow = b"", False
            size = len(data)
            if not size:
                return _END if arrival is _NOTHING else _ALL
            if size == max_bytes < READ_BYTES:
                return _SOME
            lengths, blank = connection.plan(data, fds_follow)
            if not fds_follow:
                fd.discard(sock, lengths[0])
                return _ALL if lengths[0] == size else _SOME
            number, fds, lost = fd.receive_planned(sock, lengths)
            connection.received(number, fds, lost)
            # Of a client of which several commands have come, more are likely to wait.
            if len(connection.ready) == 1 and (fds or lost) and fd.unread_bytes(sock) <= blank:
                if blank:
                    fd.discard(sock, blank)
                return _ALL
            arrival = _ALL
            count += len(fds)
            left -= size
            # When this process is out of descriptors, the next may need the places of these; and
            # where some wait for a command, newer ones take their places only once that is known.
            most = most or max_fds()
            if count >= most or left <= 0 or not fds or connection.has_unassigned_fds:
                return _SOME

    def max_unreceived_messages(self) -> int:
        """How many messages the peer can have left unread; 0 once this end is closed."""
        return 0 if self.closed else fd.max_unreceived_messages(self.socket)

    @property
    def closed(self) -> bool:
        """Whether this end is closed."""
        return self.socket.fileno() < 0

    async def wait_writable(self) -> None:
        """Wait until the peer takes more, or is gone."""
        await trio.lowlevel.wait_writable(self._trio_sock)

    def send_nowait(self, data: bytes | memoryview, fds: Sequence[FileDescriptorLike] = ()) -> int:
        """Send what the peer has room for; how many bytes that was.

        Args:
            data: what to send, not empty.
            fds: descriptors whose duplicates go with the first byte.

        Raises:
            trio.BrokenResourceError: the peer is gone.
            trio.ClosedResourceError: this end is closed.
            OSError: *fds* cannot be passed: closed, or more than 253.
        """
        try:
            return fd.send(self.socket, data, fds)
        except BlockingIOError:
            return 0
        except OSError as exc:
            if self.closed:
                raise trio.ClosedResourceError from None
            if exc.errno == errno.ETOOMANYREFS:  # see unix(7)
                return 0
            if not isinstance(exc, ConnectionError):
                raise
            raise trio.BrokenResourceError("the peer is gone") from exc

    async def send_some(
        self, data: bytes | memoryview, fds: Sequence[FileDescriptorLike] = ()
    ) -> int:
        """Send as :meth:`send_nowait`, but wait until something went; how many bytes that was.

        Raises:
            trio.BrokenResourceError: the peer is gone.
        """
        waited = False
        while not (went := self.send_nowait(data, fds)):
            if waited:
                # There is room, but too many descriptors of this user are in flight: others have
                # to receive theirs first, and nothing tells when they have.
                await trio.sleep(_IN_FLIGHT_RETRY)
            await self.wait_writable()
            waited = True
        return went

    async def send_all(
        self, data: bytes | memoryview, fds: Sequence[FileDescriptorLike] = ()
    ) -> None:
        """Send all of *data*; returns without a checkpoint when that needs no waiting.

        Raises:
            trio.BrokenResourceError: the peer is gone.
        """
        sent = 0
        while sent < len(data):
            sent += await self.send_some(data[sent:], () if sent else fds)

    def close(self) -> None:
        """Close the socket; tasks that wait for it get ClosedResourceError."""
        self.socket.detach()
        self._trio_sock.close()

    def shutdown(self) -> Fd | None:
        """As :meth:`close`, but where the peer has sent what was not read, the socket is returned:
        descriptors that were sent with it are closed with the socket, and that can take its time.
        """
        if self.closed:
            return None
        with suppress(OSError):  # nothing else can come from here on
            self.socket.shutdown(socket.SHUT_RDWR)
        if not fd.unread_bytes(self.socket):
            self.close()
            return None
        trio.lowlevel.notify_closing(self._trio_sock)
        self.socket.detach()
        return Fd(self._trio_sock.detach())

    def __enter__(self) -> FdStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
