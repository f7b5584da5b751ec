"""What the methods of both clients send, and what they make of the replies."""

from __future__ import annotations

from typing import Any, TypedDict, TypeVar

from ..kernel.fd import Fd, close_all
from ..protocol.connection import ProtocolError

ResultT = TypeVar("ResultT")


class Selector(TypedDict, total=False):
    """Which stored descriptors a call is about; what is given has to hold together.

    Args:
        opaque: its opaque text, the whole of it.
        name: the same, by the word that the command line has for it.
        opaque_prefix: how its opaque text begins.
        added_by_pid: the process that added it.
        added_by_uid: the user who added it.
    """

    opaque: str
    name: str
    opaque_prefix: str
    added_by_pid: int
    added_by_uid: int


def members(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None, under their names on the wire.

    Raises:
        TypeError: *name* and *opaque* are both given: they are the same.
    """
    if (name := arguments.pop("name", None)) is not None:
        if arguments.get("opaque") is not None:
            raise TypeError("name and opaque are the same: give one of them")
        arguments["opaque"] = name
    return {k.replace("_", "-"): v for k, v in arguments.items() if v is not None}


def typed(value: Any, kind: type[ResultT]) -> ResultT:
    """A reply's ``return`` member as what the command is documented to return.

    Raises:
        ProtocolError: it is something else.
    """
    import msgspec  # noqa: PLC0415 - twice as long to load as a short verb runs

    try:
        return msgspec.convert(value, kind)
    except (msgspec.MsgspecError, UnicodeError, OverflowError) as exc:
        raise ProtocolError(f"the server's reply is not what the command returns: {exc}") from exc


def one_fd(fds: list[Fd]) -> Fd:
    """The one descriptor that came with a reply.

    Raises:
        ProtocolError: there is none, or more than one.
    """
    if len(fds) != 1:
        close_all(fds)
        raise ProtocolError("the server has answered without a descriptor")
    return fds[0]
