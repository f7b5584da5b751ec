"""What a worker says: systemd's protocol, and the lines beside it that the package describes."""

from __future__ import annotations

from .store import is_good_name

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a mebibyte
    from collections.abc import Sequence

#: Variables that mean nothing here, and nothing to the service manager.
_LEFT_OUT = (b"FDPOLL", b"MAINPID")


class Message:
    """One message of a worker.

    Args:
        data: its lines.
    """

    #: The names of the descriptors that it is about: those of them that are well-formed.
    names: Sequence[bytes] = ()
    #: Its descriptors are to be kept; those that are kept are to be closed.
    stores = removes = False
    #: Whose threads are to close them; None where that may be done at once.
    lane: bytes | None = None
    #: What is to be answered once it is carried out; None for nothing.
    sync: bytes | None = None
    #: The worker waits until it is carried out.
    is_answered = False
    #: The files of the listening sockets, each as a SocketFile takes it.
    files: Sequence[bytes] = ()
    #: The names of descriptors that a worker that was a spare one asks for.
    fetches: Sequence[bytes] = ()
    #: The process of a spare worker, whose socket comes with the message.
    spare = b""
    #: Lines that are for the service manager.
    others: Sequence[bytes] = ()

    def __init__(self, data: bytes) -> None:
        for line in data.split(b"\n"):
            key, _, value = line.partition(b"=")
            if key == b"FDNAME":
                self.names = [name for name in value.split(b":") if is_good_name(name)]
            elif key == b"FDSTORE":
                self.stores = value == b"1"
            elif key == b"FDSTOREREMOVE":
                self.removes = value == b"1"
            elif key == b"QMPFD_SYNC":
                self.sync, self.is_answered = value, True
            elif key == b"BARRIER":
                self.is_answered = True
            elif key == b"QMPFD_CLOSE":
                self.lane = value
            elif key == b"QMPFD_SOCKET":
                self.files = [*self.files, value]
            elif key == b"QMPFD_FETCH":
                self.fetches = value.split(b":")
            elif key == b"QMPFD_SPARE":
                self.spare = value
            elif key and key not in _LEFT_OUT:
                self.others = [*self.others, line]
