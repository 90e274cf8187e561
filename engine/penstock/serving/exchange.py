"""The requests of one connection that wait for a reply, and the replies in the bytes that arrive: what both
clients do alike, without a socket, a thread or a loop. The owner serialises all calls but `replies`, which
the one reader makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgpack

from penstock.errors import InternalError, PenstockError, from_wire
from penstock.serving.protocol import NOTIFICATION, RESPONSE, Address, unpacker

W = TypeVar("W")
Reply = tuple[int, PenstockError | None, Any]  # msgid, error, result


class Exchange(Generic[W]):
    """A connection's requests by msgid, each with its waiter (a ticket, a future)."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._unpacker = unpacker()
        self._pending: dict[int, W] = {}
        self._next_id = 0
        self.leaving = False  # no new requests: it ends when the last reply has come

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def finished(self) -> bool:
        return self.leaving and not self._pending

    def open(self, waiter: W) -> int:
        """Return the msgid of a new request, whose reply is for `waiter`."""
        while self._next_id in self._pending:
            self._next_id = (self._next_id + 1) & 0xFFFFFFFF
        msgid = self._next_id
        self._next_id = (self._next_id + 1) & 0xFFFFFFFF
        self._pending[msgid] = waiter
        return msgid

    def take(self, msgid: int) -> W | None:
        """Remove the request and return who waits for it; None if nobody does any more."""
        return self._pending.pop(msgid, None)

    def take_all(self) -> list[W]:
        """Remove every request."""
        waiters = list(self._pending.values())
        self._pending.clear()
        return waiters

    def waiters(self) -> Iterator[W]:
        """Iterate over those who wait, longest first."""
        return iter(self._pending.values())

    def replies(self, data: bytes) -> Iterator[Reply | None]:
        """Yield the replies that `data` completes, and None for a goaway.

        A PenstockError ends it: the server gave up on the connection and said why, or what it sent is no
        reply; nothing later on the stream can be trusted.
        """
        try:
            self._unpacker.feed(data)
            for message in self._unpacker:
                if message[0] == RESPONSE:
                    _, msgid, error, result = message
                    if msgid is None:  # about the connection as a whole, which the server now closes
                        raise from_wire(error)
                    yield msgid, None if error is None else from_wire(error), result
                elif message[0] == NOTIFICATION and message[1] == "goaway":
                    yield None
        except PenstockError:  # before its other bases
            raise
        except (ValueError, msgpack.UnpackException, TypeError, IndexError) as error:
            raise InternalError(f"{self._address} sent what is no reply: {error}") from error
