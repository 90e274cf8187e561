"""A connection between two processes of one server: calls both ways, in frames of MessagePack.

A frame is its length (uint32, little-endian) and `[0, id, method, params]` (a call), `[1, id, error,
result]` (its answer) or `[2, method, params]` (a note). Frames keep their order. A method named in `inline`
runs on the reading thread, before the frame behind it is read: what it took in is there when a later call
is answered, and a peer that sends faster than it is served waits. Other calls run on the threads of an
executor, bounded.

Any thread may call, note and close. A link that is closed, for whatever reason, fails what waits as
UNAVAILABLE.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgpack

from penstock.errors import (
    DeadlineExceededError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    from_wire,
    to_wire,
)
from penstock.serving.protocol import pack_result

_MAX_FRAME = 256 << 20  # both ends are ours: a longer one is a fault
_SEND_TIMEOUT_S = 10  # a peer that takes nothing for so long is taken for dead
_CALL, _ANSWER, _NOTE = range(3)
_LENGTH = struct.Struct("<I")

_log = logging.getLogger("penstock.serving")

Handler = Callable[[str, list[Any]], Any]


class CallPool:
    """Threads for the calls of any number of links; at most `limit` run or wait."""

    def __init__(self, name: str, threads: int, limit: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._room = threading.Semaphore(limit)
        self._limit = limit

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` soon; ResourceExhaustedError when too many wait."""
        if not self._room.acquire(blocking=False):
            message = f"{self._limit} calls of other workers are waiting, the limit"
            raise ResourceExhaustedError(message, retry_after_ms=100)

        def run() -> None:
            try:
                work()
            finally:
                self._room.release()

        try:
            self._executor.submit(run)
        except RuntimeError as error:
            self._room.release()
            raise UnavailableError("the worker is shutting down") from error

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class Link:
    """One end. `start` begins to read; `closed` is set once nothing more will come."""

    def __init__(
        self,
        sock: socket.socket,
        handle: Handler,
        pool: Callable[[str, list[Any]], CallPool],
        inline: frozenset[str] = frozenset(),
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """`handle(method, params)` answers the peer's calls; `pool` says on which threads one runs."""
        self.closed = threading.Event()
        self._socket = sock
        self._handle, self._pool, self._inline, self._on_close = handle, pool, inline, on_close
        self._sending = threading.Lock()
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        timeout = struct.pack("ll", _SEND_TIMEOUT_S, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self._thread = threading.Thread(target=self._read, name="penstock-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, method: str, params: list[Any], timeout: float) -> Any:
        """The peer's answer. Raises its error, DeadlineExceededError after `timeout` s, UnavailableError."""
        future: Future[Any] = Future()
        number = next(self._ids)
        with self._lock:
            if self.closed.is_set():
                raise UnavailableError("the other worker is gone", retry_after_ms=100)
            self._waiting[number] = future
        try:
            self._send([_CALL, number, method, params])
            return future.result(timeout)
        except TimeoutError as error:
            if future.done():  # the peer's own error
                raise
            raise DeadlineExceededError(
                f"{method}: no answer of the other worker in {timeout:g} s"
            ) from error
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def note(self, method: str, params: list[Any]) -> None:
        """Send without an answer. Raises UnavailableError."""
        self._send([_NOTE, method, params])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def join(self, timeout: float) -> None:
        """Wait for the end of the reading thread."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _send(self, message: list[Any]) -> None:
        body = pack_result(message)
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(body)))
                self._socket.sendall(body)
        except OSError as error:
            self.close()  # a part may have gone out
            raise UnavailableError("the other worker is gone", retry_after_ms=100) from error

    def _read(self) -> None:
        try:
            while (message := self._receive()) is not None:
                self._dispatch(message)
        except (OSError, ValueError, IndexError, TypeError, msgpack.UnpackException):
            _log.exception("the connection to another worker broke")
        finally:
            with self._lock:
                self.closed.set()
                waiting = list(self._waiting.values())
            for future in waiting:
                with contextlib.suppress(Exception):
                    future.set_exception(UnavailableError("the other worker is gone", retry_after_ms=100))
            self._socket.close()
            if self._on_close is not None:
                self._on_close()

    def _receive(self) -> list[Any] | None:
        head = self._exactly(_LENGTH.size)
        if head is None:
            return None
        (size,) = _LENGTH.unpack(head)
        if size > _MAX_FRAME:
            raise ValueError(f"a frame of {size} bytes")
        body = self._exactly(size)
        if body is None:
            return None
        return msgpack.unpackb(body, strict_map_key=False, timestamp=3)  # type: ignore[no-any-return]

    def _exactly(self, size: int) -> bytearray | None:
        """`size` bytes; None at the end of the stream, also within them."""
        data = bytearray(size)
        view = memoryview(data)
        while len(view):
            try:
                n = self._socket.recv_into(view)
            except ConnectionResetError:
                return None
            if n == 0:
                return None
            view = view[n:]
        return data

    def _dispatch(self, message: list[Any]) -> None:
        kind = message[0]
        if kind == _ANSWER:
            _, number, error, result = message
            with self._lock:
                future = self._waiting.pop(number, None)
            if future is not None:
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(from_wire(error))
            return
        number = message[1] if kind == _CALL else None
        method, params = message[-2], message[-1]
        if method in self._inline:
            self._run(number, method, params)
            return
        try:
            self._pool(method, params).submit(lambda: self._run(number, method, params))
        except (ResourceExhaustedError, UnavailableError) as error:
            self._answer(number, to_wire(error), None)

    def _run(self, number: int | None, method: str, params: list[Any]) -> None:
        try:
            result, error = self._handle(method, params), None
        except BaseException as caught:
            if number is None:
                _log.exception("a note of another worker, %s, failed", method)
            result, error = None, to_wire(caught)
        self._answer(number, error, result)

    def _answer(self, number: int | None, error: dict[str, Any] | None, result: Any) -> None:
        if number is not None:
            with contextlib.suppress(UnavailableError):  # the peer is gone: nobody waits
                self._send([_ANSWER, number, error, result])


def unknown_method(method: str) -> NotFoundError:
    """For handlers."""
    return NotFoundError(f"'{method}' is no method between workers")
