"""The online store: stored feature rows in LMDB, by view number and entity key.

One environment per path and process, shared by all `OnlineStore` handles on it and counted. A handle may be
used from any thread; reads run side by side, a write transaction waits for the one before it (also for those
of other processes), and the memory map grows only while no transaction of this process runs.

`data.mdb` is checked before anything is read: LMDB reads through a memory map, where a page behind the end of
a file that was cut short kills the process. For the same reason the file is kept as long as the map (the rest
is a hole that takes no disk), so that its length never depends on which pages LMDB chose to write.

A row's key is the view number and the key's hi and lo words, big-endian; its value is as `online_adapter` has
it. Numbers from 0xFFFFFF00 on hold the event log (`event_log`). Number 0 holds what describes the store: its
identity, and the header of each view. A view's rows count only for a reader that names the same tag as the
header: the state of the source that they came from.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb
import numpy as np

from penstock import diskio
from penstock.errors import StoreError
from penstock.features.online_adapter import (
    HEAD_BYTES,
    ORDER_BYTES,
    ViewHeader,
    decode_meta,
    decode_rows,
    encode_rows,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_FIRST_MAP = 16 << 20
_MAX_READERS = 1024
_CHUNK = 16_384  # rows of one write transaction
_IDENTITY = struct.pack(">II", 0, 0)
_TXNID_AT = 144  # of a transaction's number in a meta page
_WORD = struct.Struct("<Q")
_EMPTY = 2**64 - 1  # the root of a tree without pages


def check_file(file: Path) -> int:
    """Check that an LMDB data file has every page that it names.

    Returns:
        The map size in force when it was written, bytes.

    Raises:
        StoreError: it is no LMDB file, or is cut short.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(16 + 136)
            page = int.from_bytes(head[40:44], "little") if len(head) >= 44 else 0
            stream.seek(page)
            metas = [head, stream.read(16 + 136)]
    except OSError as error:
        raise StoreError(f"online store '{file}' cannot be read: {error}") from error
    if page not in (1 << n for n in range(9, 17)) or size < 2 * page:
        raise StoreError(f"online store '{file}' is cut short or no LMDB file: it has {size} bytes")
    if size % page:
        raise StoreError(f"online store '{file}' is cut short: {size} bytes are no whole number of pages")
    map_size = last = 0
    for meta in metas:
        magic, version = struct.unpack_from("<II", meta, 16)
        mapped, free_root, main_root, last_page = (
            struct.unpack_from("<Q", meta, at)[0] for at in (32, 80, 128, 136)
        )
        if (magic, version) != (_MAGIC, _VERSION):
            raise StoreError(f"online store '{file}' is corrupt: a meta page has magic {magic:#x}")
        if any(root != _EMPTY and root > last_page for root in (free_root, main_root)):
            raise StoreError(f"online store '{file}' is corrupt: a tree starts behind the last page")
        map_size, last = max(map_size, mapped), max(last, last_page)
    if size < (last + 1) * page:
        raise StoreError(
            f"online store '{file}' is cut short: it has {size} bytes and names {(last + 1) * page}"
        )
    return int(map_size)


class _Gate:
    """Many transactions, or one that needs that there is none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


class _Environment:
    """The one LMDB environment of a path in this process."""

    def __init__(self, path: Path) -> None:
        self.file = path / "data.mdb"
        self.path = path
        self.pid = os.getpid()
        self.handles = 0
        self.gate = _Gate()
        if not self.file.exists():
            _create(path)
        self._open()

    def _open(self) -> None:
        self.map_size = max(check_file(self.file), _FIRST_MAP)
        try:
            _lengthen(self.file, self.map_size)
            self.env = lmdb.open(
                str(self.path), map_size=self.map_size, max_readers=_MAX_READERS, readahead=False
            )
            self.env.reader_check()  # frees the slots of processes that were killed
            self._map_metas()
        except (lmdb.Error, OSError) as error:
            raise StoreError(f"online store '{self.path}' cannot be opened: {error}") from error

    def _map_metas(self) -> None:
        """Map the two pages of which one names the newest transaction."""
        page = self.env.stat()["psize"]
        with self.file.open("rb") as stream:
            self._metas = mmap.mmap(stream.fileno(), 2 * page, access=mmap.ACCESS_READ)
        self._newest_at = (_TXNID_AT, page + _TXNID_AT)

    def newest(self) -> int:
        """Number of the newest transaction whose end is written, though perhaps not yet on the disk."""
        first, second = self._newest_at
        return max(_WORD.unpack_from(self._metas, first)[0], _WORD.unpack_from(self._metas, second)[0])

    @contextlib.contextmanager
    def read(self) -> Iterator[lmdb.Transaction]:
        try:
            with self._transaction(write=False) as txn:
                yield txn
        except (lmdb.Error, OSError) as error:
            raise StoreError(f"online store '{self.path}' cannot be read: {error}") from error

    def write(self, work: Any) -> Any:
        """Run `work(txn)` in one durable transaction; again from its start after the map had to grow."""
        while True:
            try:
                with self._transaction(write=True) as txn:
                    return work(txn)
            except lmdb.MapFullError:
                self._grow()
            except lmdb.PanicError as error:  # LMDB refuses this environment from now on
                with self.gate.alone():
                    self.env.close()
                    self._open()
                raise StoreError(f"online store '{self.path}' cannot be written: {error}") from error
            except (lmdb.Error, OSError) as error:
                raise StoreError(f"online store '{self.path}' cannot be written: {error}") from error

    @contextlib.contextmanager
    def _transaction(self, write: bool) -> Iterator[lmdb.Transaction]:
        while True:
            try:
                with self.gate.shared():
                    self._check_length()
                    with self.env.begin(write=write) as txn:
                        yield txn
                        return
            except lmdb.MapResizedError:  # raised by begin: another process has grown the map
                with self.gate.alone():
                    self.env.set_mapsize(0)
                    self.map_size = self.env.info()["map_size"]

    def _check_length(self) -> None:
        if self.file.stat().st_size < self.map_size:
            check_file(self.file)

    def _grow(self) -> None:
        with self.gate.alone():
            size = self.map_size * 2
            try:
                _lengthen(self.file, size)
                self.env.set_mapsize(size)
            except (lmdb.Error, OSError) as error:
                raise StoreError(f"online store '{self.path}' cannot grow: {error}") from error
            self.map_size = size

    def close(self) -> None:
        with self.gate.alone():
            self.env.close()


def _create(path: Path) -> None:
    """Make an empty store, whole or absent: a file without its meta pages would look cut short."""
    scratch = path / f".new-{os.getpid()}-{threading.get_ident()}"
    try:
        diskio.make_folders(path)
        lmdb.open(str(scratch), map_size=_FIRST_MAP).close()
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(scratch / "data.mdb", path / "data.mdb")
        diskio.sync_folder(path)
    except (lmdb.Error, OSError) as error:
        raise StoreError(f"online store '{path}' cannot be made: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _lengthen(file: Path, size: int) -> None:
    if file.stat().st_size < size:
        os.truncate(file, size)


_environments: dict[Path, _Environment] = {}
_environments_lock = threading.Lock()


class OnlineStore:
    """A handle on the online store in a folder; close it when done."""

    def __init__(self, path: Path, identity: bytes) -> None:
        """Open the store, or make it.

        Args:
            path: its folder.
            identity: names the registry whose view numbers and key hash the rows use.

        Raises:
            StoreError: it cannot be opened, is cut short, or belongs to another registry.
        """
        self._path = path.resolve()
        with _environments_lock:
            found = _environments.get(self._path)
            if found is None or found.pid != os.getpid():  # LMDB environments do not survive a fork
                found = _environments[self._path] = _Environment(self._path)
            found.handles += 1
        self._env: _Environment | None = found
        try:
            self._claim(identity)
        except BaseException:
            self.close()
            raise

    def _claim(self, identity: bytes) -> None:
        env = self._environment
        with env.read() as txn:
            found = txn.get(_IDENTITY)
        if found is None:
            env.write(lambda txn: txn.put(_IDENTITY, identity, overwrite=False))
            with env.read() as txn:
                found = txn.get(_IDENTITY)
        if found != identity:
            raise StoreError(
                f"online store '{self._path}' was written under another registry; "
                "restore that registry or delete the folder"
            )

    @property
    def _environment(self) -> _Environment:
        if self._env is None:
            raise StoreError(f"online store '{self._path}' is closed")
        return self._env

    def transaction(self) -> contextlib.AbstractContextManager[lmdb.Transaction]:
        """A read transaction, for what lies beside the rows (the event log)."""
        return self._environment.read()

    def change(self, work: Any) -> Any:
        """Run `work(txn)` in one durable write transaction and return its result.

        It may run again from its start. An exception of `work` leaves the store as it was.
        """
        return self._environment.write(work)

    def stamp(self) -> int:
        """Number of the newest write transaction that a read which begins now sees.

        Not `last_txnid` of LMDB's info: that is a transaction whose end still waits for the disk, which reads
        do not see yet, so what they found would be taken for what it has written.
        """
        with self._environment.read() as txn:
            return int(txn.id())

    def newest(self) -> int:
        """As `stamp`, at once, but also of a transaction whose end still waits for the disk.

        Where it is what `stamp` once said, nothing has been written since.
        """
        return self._environment.newest()

    def header(self, view: int) -> ViewHeader | None:
        """The header of a view; None if it has none."""
        with self._environment.read() as txn:
            return _header(txn, view)

    def headers(self) -> dict[int, ViewHeader]:
        """The header of each view number."""
        found = {}
        with self._environment.read() as txn:
            for key, value in _range(txn, 0):
                if key != _IDENTITY:
                    found[struct.unpack(">II", key)[1]] = ViewHeader(**json.loads(value))
        return found

    def get_many(
        self, view: int, tag: str, keys: NDArray[np.uint64], row_words: int, sequence: int = 0
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.bool_]]:
        """As `OnlineAdapter.get_many`, as of one transaction."""
        n, size = len(keys), HEAD_BYTES + 8 * row_words
        rows, meta = np.zeros((n, row_words), np.uint64), np.zeros((n, 4), np.int64)
        found = np.zeros(n, np.bool_)
        with self._environment.read() as txn:
            header = _header(txn, view)
            if header is None or header.tag != tag or header.sequence < sequence:
                return rows, meta, found
            values = [txn.get(key) for key in _row_keys(view, keys)]
        for i, value in enumerate(values):
            found[i] = value is not None
            if value is not None and len(value) != size:
                raise StoreError(
                    f"online store '{self._path}': a row of view {view} has {len(value)} bytes, not {size}"
                )
        rows[found], meta[found] = decode_rows([v for v in values if v is not None], row_words)
        return rows, meta, found

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
        """As `OnlineAdapter.put_many`, in transactions of some thousand rows; the header is in the last.

        Raises:
            StoreError: the disk is full or the store failed; rows of earlier transactions stay.
        """
        whole = encode_rows(rows, meta, sequence)
        order = np.lexsort((keys[:, 0], keys[:, 1]))  # in key order: neighbours share their pages
        for at in range(0, max(len(order), 1), _CHUNK):
            part = order[at : at + _CHUNK]
            pairs = _pairs(view, keys[part], whole[part])
            last = at + _CHUNK >= len(order)

            def work(txn: lmdb.Transaction, pairs: Any = pairs, last: bool = last) -> None:
                with txn.cursor() as cursor:
                    cursor.putmulti(_newer(txn, pairs, replace))
                if last and header is not None:
                    _put_header(txn, view, header)

            self._environment.write(work)

    def put_header(self, view: int, header: ViewHeader) -> None:
        """Replace the header of a view."""
        self._environment.write(lambda txn: _put_header(txn, view, header))

    def scan(self, view: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """All rows of a view in parts: keys uint64[k, 2] as lo, hi, and meta int64[k, 4]."""
        after: bytes | None = None
        while True:
            heads: list[bytes] = []
            with self._environment.read() as txn:
                for key, value in _range(txn, view, after):
                    heads.append(key[4:] + value[:HEAD_BYTES])
                    if len(heads) == _CHUNK:
                        break
            if not heads:
                return
            after = struct.pack(">I", view) + heads[-1][:16]
            flat = np.frombuffer(b"".join(heads), np.uint8).reshape(-1, 16 + HEAD_BYTES)
            keys = np.ascontiguousarray(flat[:, :16]).view(">u8")[:, ::-1].astype(np.uint64)
            yield keys, decode_meta(flat[:, 16:])

    def delete_many(self, view: int, keys: NDArray[np.uint64]) -> int:
        """Delete rows, durable when this returns. Returns how many there were."""
        deleted = 0
        for at in range(0, len(keys), _CHUNK):
            names = _row_keys(view, keys[at : at + _CHUNK])
            deleted += self._environment.write(lambda txn, names=names: sum(map(txn.delete, names)))
        return deleted

    def delete_view(self, view: int) -> None:
        """Delete a view's header and then its rows."""
        self._environment.write(lambda txn: txn.delete(struct.pack(">II", 0, view)))
        for keys, _ in self.scan(view):
            self.delete_many(view, keys)

    def close(self) -> None:
        """Let go of the environment; the last handle closes it. A second close does nothing."""
        with _environments_lock:
            env, self._env = self._env, None
            if env is None:
                return
            env.handles -= 1
            if env.handles == 0 and env.pid == os.getpid():
                del _environments[self._path]
                env.close()


def _row_keys(view: int, keys: NDArray[np.uint64]) -> list[bytes]:
    prefix = struct.pack(">I", view)
    flat = keys[:, ::-1].astype(">u8").tobytes()
    return [prefix + flat[at : at + 16] for at in range(0, len(flat), 16)]


def _pairs(view: int, keys: NDArray[np.uint64], values: NDArray[np.uint8]) -> list[tuple[bytes, bytes]]:
    flat, size = values.tobytes(), values.shape[1]
    return [(key, flat[i * size : (i + 1) * size]) for i, key in enumerate(_row_keys(view, keys))]


def _newer(
    txn: lmdb.Transaction, pairs: list[tuple[bytes, bytes]], replace: bool
) -> list[tuple[bytes, bytes]]:
    """The pairs whose row in the store has no greater order."""
    size = 8 if replace else ORDER_BYTES
    kept = []
    for key, value in pairs:
        old = txn.get(key)
        if old is None or bytes(old[:size]) <= value[:size]:
            kept.append((key, value))
    return kept


def put_rows(
    txn: lmdb.Transaction,
    view: int,
    keys: NDArray[np.uint64],
    rows: NDArray[np.uint64],
    meta: NDArray[np.int64],
    sequence: int,
) -> None:
    """Compare and set rows within a transaction of the caller's."""
    for key, value in _newer(txn, _pairs(view, keys, encode_rows(rows, meta, sequence)), True):
        txn.put(key, value)


def delete_rows(txn: lmdb.Transaction, view: int, keys: NDArray[np.uint64]) -> int:
    """Delete rows within a transaction of the caller's. Returns how many there were."""
    return sum(map(txn.delete, _row_keys(view, keys)))


def header_in(txn: lmdb.Transaction, view: int) -> ViewHeader | None:
    """The header of a view, in a transaction of the caller's."""
    return _header(txn, view)


def put_header_in(txn: lmdb.Transaction, view: int, header: ViewHeader) -> None:
    """Replace the header of a view, in a transaction of the caller's."""
    _put_header(txn, view, header)


def _range(txn: lmdb.Transaction, view: int, after: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
    """Pairs of one view number, from its start or behind a key."""
    prefix = struct.pack(">I", view)
    with txn.cursor() as cursor:
        there = cursor.set_range(prefix if after is None else after)
        if there and after is not None and cursor.key() == after:
            there = cursor.next()
        while there and cursor.key()[:4] == prefix:
            yield bytes(cursor.key()), bytes(cursor.value())
            there = cursor.next()


def _header(txn: lmdb.Transaction, view: int) -> ViewHeader | None:
    found = txn.get(struct.pack(">II", 0, view))
    return None if found is None else ViewHeader(**json.loads(bytes(found)))


def _put_header(txn: lmdb.Transaction, view: int, header: ViewHeader) -> None:
    txn.put(struct.pack(">II", 0, view), json.dumps(asdict(header)).encode())
