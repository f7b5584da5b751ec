"""Errors between a client and its server, the same for both clients."""

from __future__ import annotations


class NoDaemon(ConnectionError):
    """No server answers at the socket, or not in time, or the connection to it is lost."""

    def __str__(self) -> str:
        """Return the message, without the errno that OSError prefixes."""
        return str(self.args[-1])


class NoAnswer(NoDaemon, TimeoutError):
    """The server does not answer in time."""


class ClientClosed(Exception):
    """The client was closed before the call, or while the call waited."""
