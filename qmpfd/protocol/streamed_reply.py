"""Reply that is encoded in parts, because it may be long; a successor daemon can resume it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from .encode import JSONStream, iter_encode

#: The text before a result.
_RETURN = b'{"return": '


@dataclass(eq=False)
class StreamedReply:
    """Iterable over the parts of a reply's text.

    A result that is produced while it is sent, such as a listing, keeps its own position.  The
    position in all other text is the number of bytes yielded.

    Args:
        members: the members of the reply, built of JSON's types.
        result: the ``return`` member, if it is produced while it is sent.
        written: bytes of the reply that were yielded before, not counting those of *result*.
        source: the object that *members* were built from; a reference keeps it alive.
    """

    members: dict[str, Any]
    result: JSONStream | None = None
    written: int = 0
    source: object = None

    def __iter__(self) -> Iterator[bytes]:
        self._skip = self.written
        if self.result is None:
            yield from self._count(chain(iter_encode(self.members), (b"\r\n",)))
        else:
            yield from self._count((_RETURN,))
            for bit in self.result.bits:  # noqa: UP028 - "yield from" would close the generator
                yield bit
            rest = [
                chain((b', "%b": ' % name.encode(),), iter_encode(value))
                for name, value in self.members.items()
            ]
            yield from self._count(chain(*rest, (b"}\r\n",)))

    def _count(self, bits: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the parts without the bytes that were yielded before.

        A part that is skipped whole is yielded empty: encoding it took time, so the consumer should
        get its turn.
        """
        for bit in bits:
            skip = min(self._skip, len(bit))
            self._skip -= skip
            self.written += len(bit) - skip
            yield bit[skip:]
