"""The parent of ``serve --supervise``: keeps duplicates of the descriptors that its worker, the
daemon, stores, and starts it again when it dies or hangs.

A program of its own, run by its folder's path in an interpreter without the rest of the package, so
that there is little in it that can fail and little that takes memory.  To its worker it is what
systemd is to a service: it passes descriptors with $LISTEN_FDS (sd_listen_fds(3)) and receives
readiness, heartbeats and descriptors to be kept (sd_notify(3), sd_pid_notify_with_fds(3)) over a
socket that the worker inherits and nobody else can reach.  Everything else that the worker says is
forwarded to the parent's own service manager.

Beside systemd's protocol, ``FDNAME=`` may have several names with colons between, one for each
descriptor that is to be kept or removed, and a message may have these lines:

==================================  ===============================================================
``QMPFD_SYNC=N``                    answer ``SYNCED=N`` once this message is carried out
``QMPFD_CLOSE=LANE``                close in a thread what is removed, then send ``CLOSED=NAME``;
                                    what hangs holds up nothing of another lane
``QMPFD_SOCKETS=D:I:HEXPATH ...``   the files of the listening sockets, by device, inode and path,
                                    to be removed if the parent ends and the worker cannot
``QMPFD_SPARE=PID``                 a spare worker waits at the other end of the socket that comes
                                    with the message (:mod:`qmpfd.cli.spare`)
``QMPFD_FETCH=NAME:NAME...``        answer ``FETCHED=NAME:NAME...`` with the descriptors of these
                                    names: what a worker that was a spare one asks for
==================================  ===============================================================

To a spare worker the parent says ``WAIT``, and when it is needed: ``SOCKETS=NAME:NAME...`` with the
service manager's sockets, ``NAMES=NAME:NAME...`` of what it may fetch, and ``START``.

The parent says by itself: ``LOST=NAME``, a descriptor could not be kept; ``SIGNALS=N``, so many
signals that end the worker have been forwarded, the next one included.
"""
