"""What a worker says: systemd's protocol, and the lines beside it that the package describes."""

from __future__ import annotations

from .store import is_good_name

#: Variables that are between the worker and its parent; all others are for the service manager.
_OWN = {
    b"FDSTORE",
    b"FDSTOREREMOVE",
    b"FDNAME",
    b"FDPOLL",
    b"BARRIER",
    b"MAINPID",
    b"QMPFD_CLOSE",
    b"QMPFD_FETCH",
    b"QMPFD_SPARE",
    b"QMPFD_SYNC",
}


class Message:
    """One message of a worker.

    Args:
        data: its lines.
    """

    def __init__(self, data: bytes) -> None:
        fields = {}
        #: Lines that are for the service manager.
        self.others: list[bytes] = []
        #: The files of the listening sockets, each as a SocketFile takes it.
        self.files: list[bytes] = []
        for line in data.split(b"\n"):
            key, _, value = line.partition(b"=")
            if key == b"QMPFD_SOCKET":
                self.files.append(value)
            elif key in _OWN:
                fields[key] = value
            elif key:
                self.others.append(line)
        #: The names of the descriptors that it is about, as many as there are well-formed ones.
        self.names = [name for name in fields.get(b"FDNAME", b"").split(b":") if is_good_name(name)]
        #: Its descriptors are to be kept; those that are kept are to be closed.
        self.stores = fields.get(b"FDSTORE") == b"1"
        self.removes = fields.get(b"FDSTOREREMOVE") == b"1"
        #: They are to be closed in a thread.
        self.closes_slowly = fields.get(b"QMPFD_CLOSE") == b"slow"
        #: What is to be answered once it is carried out; None for nothing.
        self.sync = fields.get(b"QMPFD_SYNC")
        #: The names of descriptors that a worker that was a spare one asks for.
        self.fetches = (
            fields.get(b"QMPFD_FETCH", b"").split(b":") if b"QMPFD_FETCH" in fields else []
        )
        #: The process of a spare worker, whose socket comes with the message.
        self.spare = fields.get(b"QMPFD_SPARE", b"")
        #: The worker waits until it is carried out.
        self.is_answered = self.sync is not None or b"BARRIER" in fields
