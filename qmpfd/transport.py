"""Bytes and descriptors over a Unix stream socket, for Trio: what client and server share.

The socket itself is trio.socket's, but reads and writes are tried without waiting first, and
Trio is asked to wait only where there is nothing to do: measured, a turn costs 24 us of CPU so,
28 to 32 with trio.socket's own calls, and 40 with trio.SocketStream, which drops descriptors too.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType

import trio

from .kernel import fd
from .kernel.fd import Fd, FileDescriptorLike
from .limits import FEW_BYTES
from .protocol import Connection

#: Seconds until the next try where too many descriptors are in flight.
_IN_FLIGHT_RETRY = 0.01

#: Reads in a row with nothing behind them, after which one in so many is looked behind.
_LULL = 8


class FdStream:
    """A connected Unix socket that carries descriptors.

    Args:
        sock: the socket; owned from here on.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        kind, number = sock.type, sock.detach()
        self._sock = socket.socket(socket.AF_UNIX, kind, 0, fileno=number)
        self._sock.setblocking(False)
        self._read = partial(fd.receive, self._sock)
        self._left = 0  # bytes that were seen and not read: nothing of interest
        self._queued = 0  # bytes that the kernel has for us, as far as we know
        self._lull = 0  # how often in a row there was not
        #: Whether the peer had sent more already than was looked at the last time.
        self.more = False

    @property
    def socket(self) -> socket.socket:
        """The socket, for its options."""
        return self._sock

    def receive_nowait(
        self, connection: Connection, few: bool = False, most: int = 1
    ) -> bool | None:
        """Hand what is there to *connection*, bytes and descriptors.

        Nothing in here waits or can be cancelled, so no descriptor is ever without an owner.

        Args:
            connection: who takes it.
            few: do so only if there are no more than a few bytes.
            most: descriptors after which no more of them are read, nor after a few bytes; each
                read ends with some.

        Returns:
            Whether something came; False once the peer is gone, None if nothing is there yet.

        Raises:
            Plenty: there are more than a few.
        """
        sock = self._sock
        came: bool | None = None
        total = 0
        self.more = False
        while True:
            try:
                data, fds_follow = fd.peek(sock, few)
            except BlockingIOError:
                return came
            except ConnectionError:  # the peer was closed before it had read all
                return came or False
            except fd.Plenty:
                if came:
                    return True
                raise
            if not data:
                return came or False
            if not fds_follow:
                return self._skip(connection, data, connection.receive(data)) or came
            came = True
            size, count = connection.receive_with_fds(data, self._read)
            self._queued -= size
            self._left = len(data) - size
            self.more = self._queued > self._left or self._look_for_more()
            most -= count
            total += size
            # When this process is out of descriptors, the next may need the places of these; and
            # where some wait for a command, newer ones take their places only once that is known.
            if (
                most <= 0
                or not count
                or not self.more
                or total > FEW_BYTES
                or connection.has_unassigned_fds
            ):
                return True

    def _look_for_more(self) -> bool:
        """Whether the kernel has more than was seen.  Where it had not for a while, it is asked now
        and then only: a client that sends its requests one by one has sent no others yet.
        """
        self._lull += 1
        if self._lull > _LULL and self._lull % _LULL:
            return False
        self._queued = fd.unread_bytes(self._sock)
        if self._queued > self._left:
            self._lull = 0
            return True
        return False

    def _skip(self, connection: Connection, data: bytes, length: int) -> bool | None:
        """Consume so much of *data*, with which no descriptors come; whether that was anything."""
        fd.discard(self._sock, length)
        self._queued -= length
        self.more = length < len(data)
        left, self._left = self._left, 0
        if left == len(data) == length and not connection.has_pending_input:
            # The line end that the last request's descriptors were not read with, and nothing else:
            # no need to look again.
            return None
        return True

    def max_unreceived_messages(self) -> int:
        """How many messages the peer can have left unread; 0 once this end is closed."""
        return fd.max_unreceived_messages(self._sock) if self._sock.fileno() >= 0 else 0

    async def wait_readable(self) -> None:
        """Wait until something is there, or the peer is gone."""
        await trio.lowlevel.wait_readable(self._sock)

    async def wait_writable(self) -> None:
        """Wait until the peer takes more, or is gone."""
        await trio.lowlevel.wait_writable(self._sock)

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
            return fd.send(self._sock, data, fds)
        except BlockingIOError:
            return 0
        except OSError as exc:
            if self._sock.fileno() < 0:
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
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def retire(self) -> Fd | None:
        """As :meth:`close`, but where the peer has sent what was not read, the socket is returned:
        descriptors that were sent with it are closed with the socket, and that can take its time.
        """
        if self._sock.fileno() < 0:
            return None
        trio.lowlevel.notify_closing(self._sock)
        with suppress(OSError):  # nothing else can come from here on
            self._sock.shutdown(socket.SHUT_RDWR)
        if fd.unread_bytes(self._sock):
            return Fd(self._sock.detach())
        self._sock.close()
        return None

    def __enter__(self) -> FdStream:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
