"""Errors between a client and its server, the same for both clients."""

from __future__ import annotations


class NoDaemon(ConnectionError):
    """No server answers at the socket, or not in time, or the connection to it is lost."""

    def __str__(self) -> str:
        """The message alone, without the number of the error."""
        return str(self.args[-1])


class NoAnswer(NoDaemon, TimeoutError):
    """The server does not answer in time."""


class ClientClosed(Exception):
    """The client was closed before the call, or while the call waited."""


class _NoSocket(NoDaemon, FileNotFoundError):
    """There is no socket of that name."""


class _NobodyListens(NoDaemon, ConnectionRefusedError):
    """There is a socket, or another file, and nobody listens there."""


class _Forbidden(NoDaemon, PermissionError):
    """The permissions of the socket, or of a folder above it, keep this user out."""


def cannot_connect(message: str, error: OSError) -> NoDaemon:
    """Why connect(2) failed: a NoDaemon that is also caught as what *error* is.

    Args:
        message: what is said.
        error: what connect(2) raised.
    """
    for kind in (_NoSocket, _NobodyListens, _Forbidden):
        if isinstance(error, kind.__bases__[1]):
            return kind(error.errno, message)
    return NoDaemon(error.errno, message)
