"""Every bound of the daemon, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

#: The kernel passes at most this many descriptors in one message (``SCM_MAX_FD``, unix(7)).
SCM_MAX_FD = 253

#: Nesting of ``{`` and ``[`` together (QEMU's ``MAX_NESTING``).  Ours to keep: the limits of the
#: interpreter differ tenfold between Python versions.
MAX_NESTING = 1024

#: Tokens in one JSON value (QEMU's ``MAX_TOKEN_COUNT``).
MAX_TOKENS = 2 << 20

#: Bytes of one request, all its tokens together.  QEMU allows 64 MiB; nothing that a client of an
#: fd holder has to say comes near a mebibyte, and a hundred clients may try at once.
MAX_REQUEST_BYTES = 1 << 20

#: Bytes of one reply that our client accepts: a listing of 100,000 descriptors with long opaques.
MAX_REPLY_BYTES = 256 << 20

#: Bytes that the incomplete requests of all connections together may take in memory.
MAX_INCOMPLETE_BYTES = 32 << 20

#: Bytes of all opaque texts together: what clients can make the daemon remember; and how much of
#: it those of one user may, other than root and the daemon's own.
MAX_OPAQUE_TOTAL = 32 << 20
MAX_OPAQUE_PER_UID = 8 << 20

#: Bytes of a policy file: some thousand rules.
MAX_POLICY_BYTES = 256 << 10

#: Bytes of lines that wait to be written to the audit trail.
MAX_AUDIT_BYTES = 4 << 20

#: Bytes that a token takes in memory on top of its text, at most: an empty array's.
TOKEN_BYTES = 72

#: Seconds within which a client has to say ``qmp_capabilities``.
NEGOTIATION_TIMEOUT = 60.0

#: Seconds between two writes of the metrics, and between two looks for clients to be evicted.
METRICS_INTERVAL = 10.0
EVICTION_INTERVAL = 1.0

#: Seconds until a background task of the daemon's own runs again after an exception: the first
#: time, and at most.
MIN_RESTART_DELAY, MAX_RESTART_DELAY = 0.1, 60.0

#: Seconds between two looks at all clients for what they have taken of their replies.
LOOK_INTERVAL = 0.1

#: Seconds between two lines of the log about clients that are turned away.
REFUSAL_LOG_INTERVAL = 0.2

#: Seconds that a client's requests are carried out in a row before others have their turn: of one
#: that asks for little, and of one that asks for much.
LIGHT_SECONDS, TURN_SECONDS = 0.0005, 0.002

#: Seconds that those who ask for little are served before the event loop goes round.
PASS_SECONDS = 0.001

#: Seconds within which each of those who ask for much has had a turn, as far as turns can be that
#: short.
LAP_SECONDS = 0.04

#: Bytes that a client may have sent to be served without queueing: to decode more takes a while.
FEW_BYTES = 4096

#: Seconds that events are sent to one watcher after the other before everybody else is served.
HERALD_SECONDS = 0.001

#: Bytes of replies that wait for their clients, of all connections together.
MAX_UNSENT_BYTES = 16 << 20

#: Seconds between two status lines for the service manager.
STATUS_INTERVAL = 5.0

#: Seconds until a notification that the service manager could not take is sent again.
NOTIFY_RETRY = 0.5

#: The format of the journal of what is kept safe.
JOURNAL_FORMAT = 1

#: Bytes that a journal has before another one is begun: 20,000 changes, so that it is seldom done.
MIN_JOURNAL_BYTES = 1 << 20

#: Places of the fd store that are reserved: for a journal, the one that replaces it, and two pipes
#: that show whether anything is kept at all.  A store of no more places is unusable.
KEEPER_SPARE = 4

#: Places of the service manager's fd store that are tried out at the start; whether there are more
#: is found out when they are needed.  It compares each descriptor with all others: 1,024 places,
#: with 500 descriptors stored, took systemd 3 s of each restart.
MAX_PROBES = 64

#: Bytes of one string of a process's environment (MAX_ARG_STRLEN, execve(2)).
MAX_ARGUMENT_BYTES = 128 << 10

#: Seconds that it can take a daemon that was asked to let go to do so, or not.
LETTING_GO_TIMEOUT = 3.0

#: Seconds that the daemon's end waits for the service manager to let go of what it kept.
FORGET_TIMEOUT = 1.0

#: Seconds that a reply waits at most for the close of what its command has removed.
CLOSE_TIMEOUT = 1.0

#: The format in which a daemon's state is handed over to its successor: the newest that it reads.
TAKEOVER_FORMAT = 1

#: Seconds that a takeover may take.
TAKEOVER_TIMEOUT = 10.0

#: Seconds of those in which nobody is served: 10,000 descriptors take less than 0.1, and where they
#: go to a service manager's store as well, 0.5.
MAX_PAUSE = 6.0

#: Seconds that the end of a connection waits for the store: longer than a takeover has it.
LOCK_TIMEOUT = TAKEOVER_TIMEOUT + 5

#: Errors in a row, without one valid request between them, that are each answered.  The deepest
#: honest case is a value nested one level too deep: QEMU answers one error for it and one for
#: each of its closers, and so do we.  Beyond this it is a flood, and answered once per read.
MAX_ERRORS_IN_A_ROW = MAX_NESTING + 16

#: Bytes looked at in one read.  The kernel's send buffer holds 208 KiB at most by default and
#: splits it in pieces of up to 36 KiB, each of which is seen whole.
READ_BYTES = 64 << 10

#: Bytes that descriptors can have been sent with, at most, as far as the kernel still tells: one of
#: those pieces.
SEGMENT_BYTES = 36 << 10

#: Bytes that the careful parser takes in one step, at up to 3 us a byte with the replies, so
#: that no other client waits for longer than a few milliseconds.
SLOW_PATH_BYTES = 512

#: Bytes of replies, and descriptors with them, after which a client's replies are sent before
#: more of its requests are carried out: what waits to be sent is bounded by it.
REPLY_BYTES_A_TURN = 256 << 10
MAX_FDS_A_TURN = 64

#: Descriptors that a client has sent one by one and that are taken before the first of the requests
#: that they came with is carried out: what is done once for all of them is most of the work.
FDS_AT_ONCE = 16

#: Seconds that cleaning up after a connection may wait for the store.
CLEANUP_TIMEOUT = 5.0

#: Events that wait for those who watch, the newest; whoever misses older ones is told how many.
MAX_EVENTS = 4096

#: Bytes that those events take in memory: an opaque text in one may be as long as a request, and
#: takes six times as much in JSON at worst.
MAX_EVENT_BYTES = 4 << 20

#: Bytes of events that are given to a client at a time: what it does not take waits for it alone.
EVENT_BYTES_A_TURN = 32 << 10

#: Processes that one reply names as connected; a terminal has no room for more.
MAX_PEERS = 256

#: Seconds between two looks at stored sockets and pipes whose other end is gone and that hold
#: data: nothing tells when it has been read.
HANGUP_RECHECK = 1.0

#: Ids of fd sets and numbers in QMP's ``int`` (QAPI ``int64``).
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


#: Places in the process's table of descriptors that stored ones do not take.
TABLE_SPARE = 1024


class Limits(NamedTuple):
    """The limits of a daemon.

    Args:
        max_connections: connections at a time.
        max_connections_per_uid: connections of one user at a time.
        max_fds: stored descriptors at a time, those of ``getfd`` included.
        max_fds_per_uid: stored descriptors of one user at a time.
        max_request_bytes: bytes of one request.
        idle_timeout: seconds without a request after which a client that does not watch is
            disconnected; None: never.
        write_timeout: seconds after which a client that reads no reply is disconnected.
        drain_timeout: seconds within which the daemon stops when it is told to.
    """

    max_connections: int = 4096
    max_connections_per_uid: int = 2048
    max_fds: int = 65536
    max_fds_per_uid: int = 32768
    max_request_bytes: int = MAX_REQUEST_BYTES
    idle_timeout: float | None = None
    write_timeout: float = 30.0
    drain_timeout: float = 5.0

    def within(self, table: int) -> Limits:
        """The limits as they hold in this process: room is left for connections and for descriptors
        that wait, and one user is allowed no more than all.

        Args:
            table: descriptors that the process may have open (RLIMIT_NOFILE).
        """
        room = max(1, table - min(TABLE_SPARE, table // 4))
        max_fds = min(self.max_fds, room)
        return self._replace(
            max_fds=max_fds,
            max_fds_per_uid=min(self.max_fds_per_uid, max_fds),
            max_connections_per_uid=min(self.max_connections_per_uid, self.max_connections),
        )
