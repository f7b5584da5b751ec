"""QMP errors: one exception per error class, for both roles.

The server raises them in commands and sends them as replies; the client raises them for error
replies.  The texts are QEMU's (``qapi/qmp/qerror.h`` and the commands' sources), because existing
clients compare them.
"""

from __future__ import annotations


class QMPError(Exception):
    """An error reply of the QMP server.

    Args:
        desc: the error text, the reply's ``desc`` member.
        error_class: the reply's ``class`` member; by default the exception's own name.
    """

    def __init__(self, desc: str, error_class: str | None = None) -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class or type(self).__name__

    def __str__(self) -> str:
        return self.desc


class GenericError(QMPError):
    """Any other error (QMP specification, "Error", class ``GenericError``)."""


class CommandNotFound(QMPError):
    """The command does not exist, or not in this state of the connection."""


class FdNotSupplied(QMPError):
    """The command needs a descriptor, and none was passed with it (SCM_RIGHTS)."""


class FdNotFound(QMPError):
    """The fd set, or the descriptor in it, does not exist."""


class FdExists(QMPError):
    """A descriptor with that opaque text is stored already (``add-fds`` with ``if-exists``)."""


class InvalidParameterValue(QMPError):
    """A parameter has the right type, but its value cannot be used."""


class PermissionDenied(QMPError):
    """The daemon's policy does not give the peer the right that the command needs."""


_BY_NAME = {cls.__name__: cls for cls in QMPError.__subclasses__()}

#: The classes of current QEMU (``qapi/error.json``, ``QapiErrorClass``) that occur here; in the
#: ``qemu`` dialect, all others are sent as ``GenericError``.
QEMU_CLASSES = frozenset({"GenericError", "CommandNotFound"})


def error_of_class(error_class: str, desc: str) -> QMPError:
    """Return the exception for an error reply; a QMPError itself for an unknown class."""
    return _BY_NAME.get(error_class, QMPError)(desc, error_class)
