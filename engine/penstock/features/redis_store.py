"""The online store in Redis: rows by view number and key, in the bytes of `online_adapter`.

A key is 8 bytes that name the registry, the view number and the entity key's hi and lo words, big-endian; its
value is a row and the CRC-32 of key and row, so that whatever else an answer holds is an error and never a
value. Writes go through a script that compares the order of what is there, so an older row never replaces a
newer one, whoever writes. Reads are MGETs of some hundred keys, sent together.

A call that fails is made once. After `breaker_failures` of them in a row, calls fail at once for
`breaker_open_ms`; then one is let through, and decides. While reads fail, rows read at most `stale_ms` ago
are served from memory, if that is allowed; else StoreError. A remembered row counts under the header with
which it was read, so one from before a push is not taken for one from after it. Any thread may call; each
takes a connection of the pool for its call.
"""

from __future__ import annotations

import json
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from penstock.errors import FailedPreconditionError, StoreError
from penstock.features.online_adapter import (
    HEAD_BYTES,
    ORDER_BYTES,
    ViewHeader,
    decode_meta,
    decode_rows,
    encode_rows,
)
from penstock.features.store_settings import OnlineStoreSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
_KEYS = 512  # of one command
_COMMANDS = 16  # sent together
_PUT = """
local n = tonumber(ARGV[1])
local written = 0
for i, key in ipairs(KEYS) do
  local new = ARGV[i + 1]
  local old = redis.call('GETRANGE', key, 0, n - 1)
  local newer = true
  if #old == n and redis.call('STRLEN', key) == #new then
    for j = 1, n do
      local a, b = string.byte(old, j), string.byte(new, j)
      if a ~= b then
        newer = a < b
        break
      end
    end
  end
  if newer then
    redis.call('SET', key, new)
    written = written + 1
  end
end
return written
"""


class Breaker:
    """Says whether a call may be made. Any thread.

    Attributes:
        opened: how often it has opened.
    """

    def __init__(self, failures: int, open_s: float) -> None:
        self._most, self._open_s = failures, open_s
        self._lock = threading.Lock()
        self._failed = 0
        self._until: float | None = None  # None: closed
        self._probing = False
        self.opened = 0

    def allow(self, now_s: float) -> bool:
        """Whether a call may be made at a monotonic time; whoever makes one reports its end."""
        with self._lock:
            if self._until is None:
                return True
            if now_s < self._until or self._probing:
                return False
            self._probing = True
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._failed, self._until, self._probing = 0, None, False

    def failed(self, now_s: float) -> None:
        with self._lock:
            self._failed += 1
            if self._probing or self._failed >= self._most:
                self.opened += self._until is None
                self._until = now_s + self._open_s
            self._probing = False


class RedisStore:
    """An `OnlineAdapter` over one Redis server."""

    def __init__(self, settings: OnlineStoreSettings, identity: bytes) -> None:
        """Nothing is connected before the first call.

        Args:
            settings: where, and its bounds.
            identity: names the registry whose view numbers and key hash the rows use.

        Raises:
            FailedPreconditionError: the package `redis` is not installed.
            StoreError: the address is none.
        """
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise FailedPreconditionError(
                "online_store.type is redis, but the package is not installed; install penstock[redis]"
            ) from error
        seconds = settings.timeout_ms / 1000
        self._settings, self._id = settings, identity[:8]
        try:
            self._pool = redis.BlockingConnectionPool.from_url(
                settings.url,
                max_connections=settings.pool_size,
                timeout=seconds,
                socket_timeout=seconds,
                socket_connect_timeout=seconds,
                retry=Retry(NoBackoff(), 0),
                health_check_interval=0,
                protocol=2,
            )
        except ValueError as error:
            raise StoreError(f"online_store.url is no address of Redis: {error}") from error
        self._client = redis.Redis(connection_pool=self._pool)
        self._refused = redis.ResponseError  # an answer, though not the wanted one
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_open_ms / 1000)
        self._stale_lock = threading.Lock()
        # Values with that of the header which was read with them, and when.
        self._stale: OrderedDict[bytes, tuple[bytes | None, bytes | None, float]] = OrderedDict()
        self.stale_reads = 0
        self._closed = False

    # Calls

    def _call(self, what: str, work: Callable[[], T]) -> T:
        if self._closed:
            raise StoreError("the online store in Redis is closed")
        if not self.breaker.allow(time.monotonic()):
            raise StoreError(f"Redis cannot be {what}: it has failed {self._settings.breaker_failures} times")
        try:
            made = work()
        except StoreError:  # what was read makes no sense
            self.breaker.failed(time.monotonic())
            raise
        except Exception as error:  # the parser of a garbled answer may raise anything
            self.breaker.failed(time.monotonic())
            if not isinstance(error, self._refused):
                self._pool.disconnect(inuse_connections=False)
            raise StoreError(f"Redis cannot be {what}: {type(error).__name__}: {error}") from error
        except BaseException:
            self.breaker.failed(time.monotonic())
            raise
        self.breaker.succeeded()
        return made

    def _pipelined(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        found: list[Any] = []
        for at in range(0, len(commands), _COMMANDS):
            part = commands[at : at + _COMMANDS]
            pipeline = self._client.pipeline(transaction=False)
            for command in part:
                pipeline.execute_command(*command)
            answers = pipeline.execute()
            if len(answers) != len(part):
                raise StoreError(f"Redis gave {len(answers)} answers to {len(part)} commands")
            found += answers
        return found

    def _name(self, view: int) -> bytes:
        return self._id + struct.pack(">I", view)

    def _names(self, view: int, keys: NDArray[np.uint64]) -> list[bytes]:
        prefix = self._name(view)
        flat = keys[:, ::-1].astype(">u8").tobytes()
        return [prefix + flat[at : at + 16] for at in range(0, len(flat), 16)]

    def _header_name(self, view: int) -> bytes:
        return self._name(0) + struct.pack(">I", view)

    def _values(self, names: list[bytes]) -> list[bytes | None]:
        commands = [("MGET", *names[at : at + _KEYS]) for at in range(0, len(names), _KEYS)]
        found: list[bytes | None] = []
        for command, answer in zip(commands, self._pipelined(commands)):
            if not isinstance(answer, list) or len(answer) != len(command) - 1:
                raise StoreError("Redis gave something else than the values asked for")
            found += answer
        return found

    # Reading

    def header(self, view: int) -> ViewHeader | None:
        name = self._header_name(view)
        return _header(self._call("read", lambda: self._values([name]))[0])

    def headers(self) -> dict[int, ViewHeader]:
        def work() -> dict[int, ViewHeader]:
            names = [name for part in self._scan(self._name(0)) for name in part if len(name) == 16]
            found = zip(names, self._values(names))
            made = {struct.unpack(">I", name[12:])[0]: _header(value) for name, value in found}
            return {view: header for view, header in made.items() if header is not None}

        return self._call("read", work)

    def get_many(
        self, view: int, tag: str, keys: NDArray[np.uint64], row_words: int, sequence: int = 0
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.bool_]]:
        n = len(keys)
        rows, meta = np.zeros((n, row_words), np.uint64), np.zeros((n, 4), np.int64)
        found = np.zeros(n, np.bool_)
        names = [self._header_name(view), *self._names(view, keys)]
        values = self._read(names, HEAD_BYTES + 8 * row_words)
        counts: dict[bytes | None, bool] = {}
        for told in {told for told, _ in values}:
            header = _header(told)
            counts[told] = header is not None and header.tag == tag and header.sequence >= sequence
        there = [value if counts[told] else None for told, value in values]
        found[:] = [value is not None for value in there]
        rows[found], meta[found] = decode_rows([value for value in there if value is not None], row_words)
        return rows, meta, found

    def _read(self, names: list[bytes], size: int) -> list[tuple[bytes | None, bytes | None]]:
        """The header's value and the row of each name but the header's; from memory where Redis fails."""

        def work() -> list[bytes | None]:
            values = self._values(names)
            if values[0] is not None:
                _header(values[0])
            return [values[0], *(self._row(name, value, size) for name, value in zip(names[1:], values[1:]))]

        stale_s = self._settings.stale_ms / 1000
        now = time.monotonic()
        try:
            values = self._call("read", work)
        except StoreError:
            remembered = self._remembered(names[1:], now - stale_s) if stale_s else None
            if remembered is None:
                raise
            return remembered
        if stale_s:
            with self._stale_lock:
                for name, value in zip(names[1:], values[1:]):
                    self._stale[name] = value, values[0], now
                    self._stale.move_to_end(name)
                while len(self._stale) > self._settings.stale_rows:
                    self._stale.popitem(last=False)
        return [(values[0], value) for value in values[1:]]

    def _row(self, name: bytes, value: Any, size: int) -> bytes | None:
        """The bytes of a row. One that is corrupt is removed, so that it can be written again."""
        try:
            return _row(name, value, size)
        except StoreError:
            self._pipelined([("UNLINK", name)])
            raise

    def _remembered(self, names: list[bytes], since: float) -> list[tuple[bytes | None, bytes | None]] | None:
        with self._stale_lock:
            found = [self._stale.get(name) for name in names]
        if any(entry is None or entry[2] < since for entry in found):
            return None
        self.stale_reads += 1
        return [(entry[1], entry[0]) for entry in found if entry is not None]

    def scan(self, view: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        parts = self._scan(self._name(view))
        while (names := self._call("read", lambda: next(parts, None))) is not None:
            commands = [("GETRANGE", name, 0, HEAD_BYTES - 1) for name in names]
            heads = self._call("read", lambda commands=commands: self._pipelined(commands))  # type: ignore[misc]
            there = [(name, head) for name, head in zip(names, heads) if len(head) == HEAD_BYTES]
            if there:
                flat = np.frombuffer(b"".join(name[12:] for name, _ in there), ">u8").reshape(-1, 2)
                meta = np.frombuffer(b"".join(head for _, head in there), np.uint8).reshape(-1, HEAD_BYTES)
                yield np.ascontiguousarray(flat[:, ::-1].astype(np.uint64)), decode_meta(meta)

    def _scan(self, prefix: bytes) -> Iterator[list[bytes]]:
        pattern = b"".join(b"\\" + bytes([c]) if c in b"*?[]\\^-" else bytes([c]) for c in prefix) + b"*"
        cursor: Any = 0
        while True:
            cursor, names = self._client.scan(cursor, match=pattern, count=1000)
            if names:
                yield [bytes(name) for name in dict.fromkeys(names)]
            if not cursor:
                return

    # Writing

    def put_many(
        self,
        view: int,
        keys: NDArray[np.uint64],
        rows: NDArray[np.uint64],
        meta: NDArray[np.int64],
        header: ViewHeader | None = None,
        *,
        sequence: int = 0,
        replace: bool = False,
    ) -> None:
        whole = encode_rows(rows, meta, sequence)
        flat, size = whole.tobytes(), whole.shape[1]
        names = self._names(view, keys)
        values = [_checked(name, flat[i * size : (i + 1) * size]) for i, name in enumerate(names)]
        compared = 8 if replace else ORDER_BYTES
        commands = [
            ("EVAL", _PUT, len(part := names[at : at + _KEYS]), *part, compared, *values[at : at + _KEYS])
            for at in range(0, len(names), _KEYS)
        ]

        def work() -> None:
            for answer in self._pipelined(commands):
                if not isinstance(answer, int):
                    raise StoreError("Redis gave something else than a count of rows")

        self._call("written", work)
        if header is not None:
            self.put_header(view, header)

    def put_header(self, view: int, header: ViewHeader) -> None:
        value = json.dumps(asdict(header)).encode()
        self._call("written", lambda: self._pipelined([("SET", self._header_name(view), value)]))

    def delete_many(self, view: int, keys: NDArray[np.uint64]) -> int:
        names = self._names(view, keys)
        commands = [("UNLINK", *names[at : at + _KEYS]) for at in range(0, len(names), _KEYS)]
        with self._stale_lock:
            for name in names:
                self._stale.pop(name, None)
        return sum(self._call("written", lambda: self._pipelined(commands)))

    def delete_view(self, view: int) -> None:
        self._call("written", lambda: self._pipelined([("UNLINK", self._header_name(view))]))
        for keys, _ in self.scan(view):
            self.delete_many(view, keys)

    def close(self) -> None:
        self._closed = True
        self._pool.disconnect()


def _checked(name: bytes, value: bytes) -> bytes:
    return value + struct.pack(">I", zlib.crc32(value, zlib.crc32(name)))


def _row(name: bytes, value: Any, size: int) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, bytes) or len(value) != size + 4:
        length = len(value) if isinstance(value, bytes) else "no"
        raise StoreError(f"the value of a row in Redis has {length} bytes, not {size + 4}")
    if _checked(name, value[:-4]) != value:
        raise StoreError("the value of a row in Redis is corrupt: its checksum differs")
    return value[:-4]


def _header(value: Any) -> ViewHeader | None:
    if value is None:
        return None
    try:
        header = ViewHeader(**json.loads(value))
        if not isinstance(header.tag, str) or not isinstance(header.sequence, int):
            raise TypeError("its fields")
        return header
    except (ValueError, TypeError) as error:
        raise StoreError(f"the header of a view in Redis is corrupt: {error}") from error
