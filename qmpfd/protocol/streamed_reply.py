"""A reply that is made bit by bit, because it may be long, and can be gone on with elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from .encode import JSONStream, iter_encode

#: What stands before a result.
_RETURN = b'{"return": '


class StreamedReply:
    """Gives the text of a reply, bit by bit.

    A result that is made while it is sent, such as a listing, knows itself how far it is; of the
    text of everything else the bytes are counted.

    Args:
        members: the members of the reply, built of JSON's types.
        result: the ``return`` member, if that is made while it is sent.
        written: bytes of the reply that were given already, those of *result* not counted.
        source: what it was made of, which lives as long.
    """

    def __init__(
        self,
        members: dict[str, Any],
        result: JSONStream | None = None,
        written: int = 0,
        source: object = None,
    ) -> None:
        self.members = members
        self._source = source
        self.result = result
        self.written = written

    def __iter__(self) -> Iterator[bytes]:
        self._skip = self.written
        if self.result is None:
            yield from self._count(chain(iter_encode(self.members), (b"\r\n",)))
        else:
            yield from self._count((_RETURN,))
            for bit in self.result.bits:  # noqa: UP028 - that would end them with this iteration
                yield bit
            rest = [
                chain((b', "%b": ' % name.encode(),), iter_encode(value))
                for name, value in self.members.items()
            ]
            yield from self._count(chain(*rest, (b"}\r\n",)))

    def _count(self, bits: Iterable[bytes]) -> Iterator[bytes]:
        """The bits that were not given already: empty where they were, as making them takes time
        as well.
        """
        for bit in bits:
            skip = min(self._skip, len(bit))
            self._skip -= skip
            self.written += len(bit) - skip
            yield bit[skip:]
