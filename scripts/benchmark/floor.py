"""What Python takes for the calls alone: a server that makes those that qmpfd has to make for each
request and each descriptor, and does nothing else.

    python floor.py SOCKET

It looks at what has come before it takes it, receives the descriptor, finds out whether closing it
could block, closes it, checks and decodes the requests, and encodes a reply to each, the same one
whatever was asked.  There is no Trio, nothing is stored, counted, limited or logged, and a client
that does not read holds up everybody.
"""

from __future__ import annotations

import fcntl
import select
import socket
import sys

from qmpfd.commands import VOCABULARY, AddfdInfo
from qmpfd.kernel import fd
from qmpfd.kernel.fdinfo import looker
from qmpfd.protocol.encode import encode

_status = looker()
_REPLY = AddfdInfo(0, 9)

#: Replies that are sent at once.
_MOST = 32


def serve(sock: socket.socket) -> None:
    """Answer what one client has sent.

    Raises:
        ConnectionError: it is gone.
    """
    replies: list[bytes] = []
    while len(replies) < _MOST:
        try:
            data, _, flags, _ = sock.recvmsg(1 << 16, 0, socket.MSG_PEEK)
        except BlockingIOError:
            break
        if not data:
            raise ConnectionResetError
        if flags & socket.MSG_CTRUNC:
            _, fds, _ = fd.receive(sock, len(data.rstrip()))
            for each in fds:
                fcntl.fcntl(each.number, fcntl.F_GETFL)
                _status(each.number)
                each.close()
        else:
            sock.recv(len(data))
        requests = VOCABULARY.decode_chunk(data) or []
        replies += [b'{"return": %b}\r\n' % encode(_REPLY) for _ in requests]
    sock.sendall(b"".join(replies))


def main(path: str) -> None:
    """Accept clients for ever."""
    clients: dict[int, socket.socket] = {}
    poll = select.epoll()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(4096)
        poll.register(listener, select.EPOLLIN)
        while True:
            for number, _ in poll.poll():
                sock = clients.get(number) or listener.accept()[0]
                try:
                    if number in clients:
                        serve(sock)
                    else:
                        sock.sendall(b'{"QMP": {}}\r\n')
                        sock.setblocking(False)
                        clients[sock.fileno()] = sock
                        poll.register(sock, select.EPOLLIN)
                except ConnectionError:
                    clients.pop(number, None)
                    sock.close()


if __name__ == "__main__":
    main(sys.argv[1])
