"""The parent of ``serve --supervise``: keeps duplicates of the descriptors that its worker, the
daemon, stores, and restarts the worker when it dies or hangs.

The parent is a program of its own, run by the path of this folder in an interpreter without the
rest of the package: it needs little memory, and has little that can fail.  To its worker, the
parent is what systemd is to a service: it receives readiness, heartbeats and descriptors to store
(sd_notify(3), sd_pid_notify_with_fds(3)) over a socket that only the worker has.  All other
messages of the worker are forwarded to the parent's own service manager.

Each worker is started as a *spare worker*, which waits (:mod:`qmpfd.cli.spare`), by execve(2) or by
the worker before it.  To start it as the worker, the parent sends ``NAMES=NAME:NAME...`` of the
stored descriptors, and ``START``.  The first one inherits the descriptors of the service manager
(sd_listen_fds(3)) and of the command line; once it serves, they are stored, and no other worker has
them.

Beyond systemd's protocol, ``FDNAME=`` may have several names, separated by colons, one for each
descriptor to store or remove, and a message may have these lines:

==================================  ===============================================================
``QMPFD_SYNC=N``                    answer ``SYNCED=N`` once this message is handled
``QMPFD_CLOSE=LANE``                close removed descriptors in a thread, then send
                                    ``CLOSED=NAME``; a close that hangs delays no other lane
``QMPFD_SOCKETS=D:I:HEXPATH ...``   the files of the listening sockets, by device, inode and path,
                                    to be removed if the parent ends and the worker cannot
``QMPFD_SPARE=PID``                 a spare worker, which this worker has forked, waits at the other
                                    end of the socket that comes with the message
``QMPFD_FETCH=NAME:NAME...``        answer ``FETCHED=NAME:NAME...`` with the descriptors of these
                                    names
==================================  ===============================================================

Unrequested messages of the parent are: ``LOST=NAME``, there was no room for a descriptor;
``SIGNALS=N``, the number of terminating signals forwarded so far, including the next one.
"""
