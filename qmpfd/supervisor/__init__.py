"""The parent of ``serve --supervise``: keeps duplicates of the descriptors that its worker, the
daemon, stores, and restarts the worker when it dies or hangs.

The parent is a program of its own, run by the path of this folder in an interpreter without the
rest of the package: it needs little memory, and has little that can fail.  To its worker, the
parent is what systemd is to a service: it passes descriptors with $LISTEN_FDS (sd_listen_fds(3)),
and receives readiness, heartbeats and descriptors to store (sd_notify(3),
sd_pid_notify_with_fds(3)) over a socket that only the worker inherits.  All other messages of the
worker are forwarded to the parent's own service manager.

Beyond systemd's protocol, ``FDNAME=`` may have several names, separated by colons, one for each
descriptor to store or remove, and a message may have these lines:

==================================  ===============================================================
``QMPFD_SYNC=N``                    answer ``SYNCED=N`` once this message is handled
``QMPFD_CLOSE=LANE``                close removed descriptors in a thread, then send
                                    ``CLOSED=NAME``; a close that hangs delays no other lane
``QMPFD_SOCKETS=D:I:HEXPATH ...``   the files of the listening sockets, by device, inode and path,
                                    to be removed if the parent ends and the worker cannot
``QMPFD_SPARE=PID``                 a spare worker waits at the other end of the socket that comes
                                    with the message (:mod:`qmpfd.cli.spare`)
``QMPFD_FETCH=NAME:NAME...``        answer ``FETCHED=NAME:NAME...`` with the descriptors of these
                                    names: the request of a former spare worker
==================================  ===============================================================

The parent sends a spare worker ``WAIT``, and to start it as the worker: ``SOCKETS=NAME:NAME...``
with the service manager's sockets, ``NAMES=NAME:NAME...`` of the descriptors to fetch, ``START``.

Unrequested messages of the parent are: ``LOST=NAME``, there was no room for a descriptor;
``SIGNALS=N``, the number of terminating signals forwarded so far, including the next one.
"""
