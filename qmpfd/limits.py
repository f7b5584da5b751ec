"""Limits, intervals and timeouts of the daemon, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

#: Maximum number of descriptors in one message (the kernel's ``SCM_MAX_FD``, unix(7)).
SCM_MAX_FD = 253

#: Nesting of ``{`` and ``[`` together (QEMU's ``MAX_NESTING``).  The interpreter's limits differ
#: tenfold between Python versions.
MAX_NESTING = 1024

#: Tokens in one JSON value (QEMU's ``MAX_TOKEN_COUNT``).
MAX_TOKENS = 2 << 20

#: Bytes of one request, all its tokens together.  QEMU allows 64 MiB; no real request comes near a
#: mebibyte here, and a hundred clients may send large ones at once.
MAX_REQUEST_BYTES = 1 << 20

#: Bytes of one reply that our client accepts: a listing of 100,000 descriptors with long opaques.
MAX_REPLY_BYTES = 256 << 20

#: Bytes of memory for the incomplete requests of all connections together; twice the size of one
#: request, if that is more.
MAX_INCOMPLETE_BYTES = 32 << 20

#: Bytes of memory for the opaque texts of all users, and of each user except root and the daemon's
#: own.
MAX_OPAQUE_TOTAL = 32 << 20
MAX_OPAQUE_PER_UID = 8 << 20

#: Bytes of a policy file: some thousand rules.
MAX_POLICY_BYTES = 256 << 10

#: Bytes of queued lines of the audit trail.
MAX_AUDIT_BYTES = 4 << 20

#: Maximum bytes of memory of a token besides its text: those of an empty array.
TOKEN_BYTES = 72

#: Seconds within which a client has to send ``qmp_capabilities``.
NEGOTIATION_TIMEOUT = 60.0

#: Seconds between two writes of the metrics, and between two checks for clients to disconnect.
METRICS_INTERVAL = 10.0
EVICTION_INTERVAL = 1.0

#: Seconds until a background task of the daemon is restarted after an exception: at first, and at
#: most.
MIN_RESTART_DELAY, MAX_RESTART_DELAY = 0.1, 60.0

#: Seconds between two checks of how much of their replies all clients have received.
REFRESH_INTERVAL = 0.1

#: Seconds between two log lines about rejected clients.
REFUSAL_LOG_INTERVAL = 0.2

#: Seconds for which a client's requests are executed without a checkpoint: in a light piece of
#: work, and in a turn of a client that has queued at the gate because it has more to do.
LIGHT_SECONDS, TURN_SECONDS = 0.0005, 0.002

#: Seconds for which light pieces of many clients are done before the event loop runs other tasks.
PASS_SECONDS = 0.001

#: Seconds in which all clients queued at the gate get one turn, down to a minimum length of turns.
ROUND_SECONDS = 0.04

#: Bytes of input that a light piece may read: decoding more would take too long.
LIGHT_BYTES = 4096

#: Seconds for which events are sent to watchers before the event loop runs other tasks.
BROADCAST_SECONDS = 0.001

#: Bytes of unsent replies of all connections together.
MAX_UNSENT_BYTES = 16 << 20

#: Seconds between two status lines for the service manager.
STATUS_INTERVAL = 5.0

#: Seconds until a notification that the service manager's full queue refused is sent again.
NOTIFY_RETRY = 0.5

#: Format of the journal in the fd store.
JOURNAL_FORMAT = 1

#: Bytes of a journal before a new one may replace it: 20,000 changes, so that this is rare.
MIN_JOURNAL_BYTES = 1 << 20

#: Reserved places of the fd store: for the journal, its successor, and two pipes that show whether
#: descriptors are stored at all.  A store of no more places is unusable.
RESERVED_PLACES = 4

#: Places of the service manager's fd store that are probed at the start; more are probed when they
#: are needed.  systemd compares each descriptor with all others: probing 1,024 places with 500
#: descriptors stored took 3 s of each restart.
MAX_PROBES = 64

#: Bytes of one string of a process's environment (MAX_ARG_STRLEN, execve(2)).
MAX_ARGUMENT_BYTES = 128 << 10

#: Seconds in which a predecessor either confirms that it has handed over or has not done so.
HANDOVER_TIMEOUT = 3.0

#: Seconds for which the daemon's end waits for the fd store to remove the descriptors.
FORGET_TIMEOUT = 1.0

#: Seconds for which a reply waits at most for the close of the removed descriptors.
CLOSE_TIMEOUT = 1.0

#: Format of the state in a takeover: the newest that this daemon can read.
TAKEOVER_FORMAT = 1

#: Maximum duration of a takeover in seconds.
TAKEOVER_TIMEOUT = 10.0

#: Seconds of a takeover in which no client is served: 10,000 descriptors take less than 0.1 s, and
#: 0.5 s if a service manager's fd store has to store them too.
MAX_PAUSE = 6.0

#: Seconds for which the end of a connection waits for the store's lock: longer than a takeover.
LOCK_TIMEOUT = TAKEOVER_TIMEOUT + 5

#: Number of errors in a row, without a valid request between them, that each get a reply.  A value
#: nested one level too deep needs the most: QEMU replies one error for it and one for each of its
#: closing brackets, and so does qmpfd.  Errors beyond are a flood: one reply a read.
MAX_ERRORS_IN_A_ROW = MAX_NESTING + 16

#: Bytes that one read peeks at.  The kernel's send buffer holds at most 208 KiB by default, in
#: segments of up to 36 KiB, each of which fits whole.
READ_BYTES = 64 << 10

#: Maximum bytes of a segment, the unit with which the kernel associates descriptors.
SEGMENT_BYTES = 36 << 10

#: Bytes that the parser takes in one step, at up to 3 us a byte with the replies: no other client
#: waits longer than a few milliseconds.
SLOW_PATH_BYTES = 512

#: Bytes of a client's replies, and descriptors attached to them, after which they are sent before
#: more of its requests are executed: the limit of its send buffer.
REPLY_BYTES_A_TURN = 256 << 10
MAX_FDS_A_TURN = 64

#: Descriptors, sent one by one, that are received before the first of their requests is executed:
#: a larger batch costs less per request.
FDS_AT_ONCE = 16

#: Seconds for which our client's clean-up waits for the server.
CLEANUP_TIMEOUT = 5.0

#: Number of the newest events that are kept for watchers; one that misses older events is sent
#: their number.
MAX_EVENTS = 4096

#: Bytes of memory of those events: an opaque text in one may be as long as a request, and takes up
#: to six times as much in JSON.
MAX_EVENT_BYTES = 4 << 20

#: Bytes of events that are written to a client at a time; its send buffer holds the rest of them.
EVENT_BYTES_A_TURN = 32 << 10

#: Number of connected processes that one reply lists; a terminal has no room for more.
MAX_PEERS = 256

#: Seconds between two checks of stored sockets and pipes that have hung up with unread data: the
#: kernel does not report when the data has been read.
HANGUP_RECHECK = 1.0

#: Range of QMP's ``int`` (QAPI ``int64``), such as fd set ids.
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


#: Entries of the process's descriptor table that are reserved for connections and the daemon.
RESERVED_FDS = 1024


def left_to_others(most: int) -> int:
    """How much of *most* all users but root and the daemon's own may take together.

    So root and the daemon's own user can always connect, find out what is wrong, and take over.
    """
    return most - most // 16


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
        drain_timeout: seconds within which the daemon stops after a request to stop.
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
        """Return the limits reduced to a process's descriptor table, with a part of it reserved for
        connections and pending descriptors; and each limit by user to the total.

        Args:
            table: size of the table (RLIMIT_NOFILE).
        """
        room = max(1, table - min(RESERVED_FDS, table // 4))
        max_fds = min(self.max_fds, room)
        return self._replace(
            max_fds=max_fds,
            max_fds_per_uid=min(self.max_fds_per_uid, max_fds),
            max_connections_per_uid=min(self.max_connections_per_uid, self.max_connections),
        )
