"""The log of pushed events: durable in the online store's LMDB environment, older ones in Parquet segments.

A push is a batch with the next sequence number of its source, 1 or more. Batches, stream offsets and the rows
that they touch are written in one transaction (`Write`), so a crash leaves all of them or none. `compact`
moves the oldest batches into a Parquet file under `data_dir/events/SOURCE/`: the file is whole and on the
disk before one transaction names it and deletes the batches, so an event is in one of the two at any time. A
file that no transaction names is what a killed process left; it is removed later.

Keys begin with a number that no view has: batches (source, sequence), Arrow schemas (source, number), the
head (the newest sequence), segments (source, last sequence), offsets (consumer, partition), what was erased
(source, digest), the newest arrival, and what an erasure still has to remove. Arrivals never go back,
whatever the wall clock does. Any thread and process may read; `Write`s are serialised by LMDB.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from penstock import diskio
from penstock.errors import StoreError

if TYPE_CHECKING:
    import lmdb
    import numpy as np
    from numpy.typing import NDArray

    from penstock.features.online import OnlineStore

_BATCH, _SCHEMA, _HEAD, _SEGMENT, _OFFSET, _ERASED, _CUT, _ARRIVED, _LEFT = (
    0xFFFF_FF00 + i for i in range(9)
)
_HEADER = struct.Struct("<IqII")  # schema number, arrival, rows, CRC-32 of the Arrow message
_ORPHAN_S = 600.0
_READ_TRIES = 20
_MAX_NAME = 128
SEQUENCE, ARRIVAL = "__sequence", "__arrival"


Erased = dict[tuple[str, ...], dict[bytes, int]]
"""When each erased key was erased, by the names of its columns and its digest."""


@dataclass(frozen=True)
class Logged:
    """Some events of a source, as they were pushed.

    Attributes:
        sequence: of the last of them.
        arrival_us: int64[n] Arrow; when each arrived.
        table: their columns.
    """

    sequence: int
    arrival_us: pa.Array
    table: pa.Table


@dataclass(frozen=True)
class Segment:
    """A Parquet file of batches `first` to `last`."""

    file: str
    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class ErasedRows:
    """How many events were removed: of batches in the log, and of segments."""

    log: int
    segments: int


Rows = Sequence[tuple[int, bytes]]
"""Rows of the online store: view numbers, each with keys as the bytes of uint64[k, 2]."""


@dataclass(frozen=True)
class NewBatch:
    """A batch to write.

    Attributes:
        schema, message: of its events, as Arrow IPC.
        offsets: (consumer, partition) -> the position behind it in a stream.
    """

    source: str
    sequence: int
    arrival_us: int
    rows: int
    schema: pa.Schema
    message: bytes
    offsets: Mapping[tuple[str, int], int]


class EventLog:
    """The log of all push sources of one data folder."""

    def __init__(self, store: OnlineStore, folder: Path) -> None:
        """Use the environment of `store` (which stays its owner's to close) and segments below `folder`."""
        self._store, self.folder = store, folder

    # Reading

    def head(self, source: str) -> int:
        """The newest durable sequence number of a source; 0 before its first event."""
        with self._store.transaction() as txn:
            return head_in(txn, source)

    def cut(self, source: str) -> int:
        """The sequence number of the last erasure; a reading from before it must be made again."""
        with self._store.transaction() as txn:
            return _number(txn.get(_key(_CUT, source)))

    def newest_arrival(self, source: str) -> int:
        """When the newest durable event of a source arrived, int64 microseconds; 0 before the first."""
        with self._store.transaction() as txn:
            found = txn.get(_key(_ARRIVED, source))
            if found is not None or not head_in(txn, source):
                return _number(found)
        # A log that an earlier build wrote.
        parts = self.read(source)[0]
        return max((max(part.arrival_us.to_pylist(), default=0) for part in parts), default=0)

    def read(self, source: str, after: int = 0) -> tuple[list[Logged], int]:
        """The events behind a sequence number in order, and the head that they lead up to.

        Raises:
            StoreError: the log or a segment is corrupt or cannot be read.
        """
        for _ in range(_READ_TRIES):
            with self._store.transaction() as txn:
                head = head_in(txn, source)
                segments = [segment for segment in _segments(txn, source) if segment.last > after]
                batches = list(self._batches(txn, source, after))
            try:
                found = [self._read_segment(source, segment, after) for segment in segments]
            except FileNotFoundError:
                continue  # an erasure has replaced it meanwhile
            return found + batches, head
        raise StoreError(f"the segments of source '{source}' in '{self.folder}' are missing")

    def _batches(self, txn: lmdb.Transaction, source: str, after: int) -> Iterator[Logged]:
        schemas: dict[int, pa.Schema] = {}
        for key, value in _range(txn, _BATCH, source):
            sequence = struct.unpack(">Q", key[-8:])[0]
            if sequence <= after:
                continue
            number, arrival, rows, crc = _HEADER.unpack_from(value)
            message = value[_HEADER.size :]
            if zlib.crc32(message) != crc:
                raise StoreError(f"the event log is corrupt: batch {sequence} of source '{source}'")
            if number not in schemas:
                schemas[number] = _schema(txn, source, number)
            try:
                batch = pa.ipc.read_record_batch(pa.py_buffer(message), schemas[number])
            except (pa.ArrowException, OSError) as error:
                raise StoreError(
                    f"the event log is corrupt: batch {sequence} of source '{source}': {error}"
                ) from error
            table = pa.Table.from_batches([batch])
            yield Logged(sequence, pa.repeat(pa.scalar(arrival, pa.int64()), rows), table)

    def _read_segment(self, source: str, segment: Segment, after: int) -> Logged:
        import pyarrow.compute as pc

        table = self._open_segment(source, segment)
        if after >= segment.first:
            table = table.filter(pc.greater(table[SEQUENCE], pa.scalar(after, pa.uint64())))
        arrival = table[ARRIVAL].combine_chunks()
        if isinstance(arrival, pa.ChunkedArray):
            arrival = arrival.combine_chunks()
        return Logged(segment.last, arrival, table.drop_columns([SEQUENCE, ARRIVAL]))

    def _open_segment(self, source: str, segment: Segment) -> pa.Table:
        from pyarrow import parquet

        file = self.folder / source / segment.file
        if not file.exists():
            raise FileNotFoundError(file)
        try:
            with parquet.ParquetFile(file) as opened:
                table = opened.read()
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"segment '{file}' cannot be read: {error}") from error
        if table.num_rows != segment.rows:
            raise StoreError(f"segment '{file}' has {table.num_rows} rows; expected {segment.rows}")
        return table

    def offsets(self, consumer: str) -> dict[int, int]:
        """The position behind what was taken in of a stream, by partition."""
        with self._store.transaction() as txn:
            return {
                struct.unpack(">Q", key[-8:])[0]: _number(value)
                for key, value in _range(txn, _OFFSET, consumer)
            }

    def erased(self, source: str) -> Erased:
        """What was erased of a source."""
        found: Erased = {}
        with self._store.transaction() as txn:
            for key, value in _range(txn, _ERASED, source):
                names = tuple(json.loads(value[8:]))
                found.setdefault(names, {})[key[-16:]] = _number(value[:8])
        return found

    def stats(self, source: str) -> dict[str, int]:
        """Batches that wait to be compacted, segments, and their rows."""
        with self._store.transaction() as txn:
            segments = _segments(txn, source)
            batches = sum(1 for _ in _range(txn, _BATCH, source))
            return {
                "head": head_in(txn, source),
                "batches": batches,
                "segments": len(segments),
                "segment_rows": sum(segment.rows for segment in segments),
            }

    # Compaction

    def compact(self, source: str, most_rows: int) -> int:
        """Move the oldest batches, up to about `most_rows` rows, into a segment. Returns how many rows.

        Raises:
            StoreError: the disk is full or failed; the log stays as it was.
        """
        with self._store.transaction() as txn:
            cut = _number(txn.get(_key(_CUT, source)))
            taken: list[Logged] = []
            rows = 0
            for batch in self._batches(txn, source, 0):
                if taken and rows + batch.table.num_rows > most_rows:
                    break
                taken.append(batch)
                rows += batch.table.num_rows
            first = _first_batch(txn, source)
        if not taken:
            return 0
        segment = self.write_segment(source, first, taken)

        def work(txn: lmdb.Transaction) -> bool:
            if _number(txn.get(_key(_CUT, source))) != cut or _first_batch(txn, source) != first:
                return False
            put_segment(txn, source, segment)
            delete_batches(txn, source, segment.last)
            return True

        if not self._store.change(work):
            (self.folder / source / segment.file).unlink(missing_ok=True)
            return 0
        self._sweep(source)
        return rows

    def write_segment(self, source: str, first: int, parts: Sequence[Logged]) -> Segment:
        """Write a file with the events of `parts`, whole and durable, that no transaction names yet."""
        tables = []
        for part in parts:
            sequences = pa.repeat(pa.scalar(part.sequence, pa.uint64()), part.table.num_rows)
            tables.append(
                part.table.append_column(SEQUENCE, sequences).append_column(ARRIVAL, part.arrival_us)
            )
        table = pa.concat_tables(tables, promote_options="default")
        return self._write_file(source, first, parts[-1].sequence, table)

    def _write_file(self, source: str, first: int, last: int, table: pa.Table) -> Segment:
        from pyarrow import parquet

        folder = self.folder / source
        name = f"{first:020d}-{last:020d}-{uuid.uuid4().hex[:12]}.parquet"
        temporary = folder / f"{diskio.PREFIX}{uuid.uuid4().hex}"
        try:
            diskio.make_folders(folder)
            parquet.write_table(table, temporary, compression="zstd")
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.rename(folder / name)
            diskio.sync_folder(folder)
        except (OSError, pa.ArrowException) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise StoreError(f"segment '{folder / name}' cannot be written: {error}") from error
        return Segment(name, first, last, table.num_rows)

    # Erasure

    def erase(
        self,
        source: str,
        matches: Callable[[pa.Table], NDArray[np.bool_]],
        names: Sequence[str],
        digests: Sequence[bytes],
        at_us: int,
        rows: Rows = (),
    ) -> ErasedRows:
        """Remove events for good, in one transaction, and remember the digests of their keys.

        No push may be under way. The log then has a new head and cut: whoever has read it reads it again.
        What the transaction cannot remove it writes down; `finish` ends it, or `left` says it after a crash.

        Args:
            matches: which rows of a table of events to remove, bool[n].
            names, digests, at_us: see `put_erased`.
            rows: of the online store, which must be gone too before `finish`.

        Raises:
            StoreError: the disk is full or failed; the log stays as it was.
        """
        with self._store.transaction() as txn:
            segments = _segments(txn, source)
            head = head_in(txn, source)
            batches = list(self._batches(txn, source, 0))
            schema_of = dict(self._schemas(txn, source))
        replaced: list[tuple[Segment, Segment | None]] = []
        segment_rows = 0
        for segment in segments:
            table = self._open_segment(source, segment)
            gone = matches(table)
            if gone.any():
                segment_rows += int(gone.sum())
                left = table.filter(pa.array(~gone))
                made = None
                if left.num_rows:
                    made = self._write_file(source, segment.first, segment.last, left)
                replaced.append((segment, made))
        rewritten: list[tuple[int, NewBatch]] = []
        log_rows = 0
        for batch in batches:
            gone = matches(batch.table)
            if gone.any():
                log_rows += int(gone.sum())
                left = batch.table.filter(pa.array(~gone)).combine_chunks()
                made_batches = left.to_batches()
                message = (
                    made_batches[0] if made_batches else _no_rows(schema_of[batch.sequence])
                ).serialize()
                arrival = batch.arrival_us[0].as_py()
                rewritten.append(
                    (
                        batch.sequence,
                        NewBatch(
                            source, batch.sequence, arrival, left.num_rows, schema_of[batch.sequence],
                            message.to_pybytes(), {},
                        ),
                    )
                )  # fmt: skip

        def work(txn: lmdb.Transaction) -> None:
            if head_in(txn, source) != head or _segments(txn, source) != segments:
                raise StoreError(f"the log of source '{source}' has changed meanwhile; erase again")
            for old, made in replaced:
                delete_segment(txn, source, old)
                if made is not None:
                    put_segment(txn, source, made)
            for _, new in rewritten:
                put_batch(txn, new)
            for digest in digests:
                put_erased(txn, source, names, digest, at_us)
            put_head(txn, source, head + 1)
            put_cut(txn, source, head + 1)
            # Files that nobody names may hold the events too, and nobody can name them after this cut.
            named = {segment.file for segment in _segments(txn, source)}
            files = sorted({file.name for file in self._files(source)} - named)
            _put_left(txn, source, files, rows)

        try:
            self._store.change(work)
        except BaseException:
            for _, made in replaced:
                if made is not None:
                    (self.folder / source / made.file).unlink(missing_ok=True)
            raise
        self._remove_left(source)
        return ErasedRows(log_rows, segment_rows)

    def left(self) -> dict[str, Rows]:
        """The rows that erasures which did not end have left in the online store, by source."""
        with self._store.transaction() as txn:
            return {source: rows for source, _, rows in _left(txn)}

    def finish(self, source: str) -> None:
        """End an erasure, whose rows are gone from the online store: remove the files, and forget of it."""
        if not self._remove_left(source):
            return  # the next one who opens the log tries again

        def work(txn: lmdb.Transaction) -> None:
            txn.delete(_key(_LEFT, source))

        self._store.change(work)

    def _remove_left(self, source: str) -> bool:
        with self._store.transaction() as txn:
            files = [file for name, names, _ in _left(txn) if name == source for file in names]
        removed = True
        for file in files:
            try:
                (self.folder / source / file).unlink(missing_ok=True)
            except OSError:
                removed = False
        if files and removed:
            diskio.sync_folder(self.folder / source)
        return removed

    def _files(self, source: str) -> list[Path]:
        folder = self.folder / source
        return list(folder.iterdir()) if folder.is_dir() else []

    def _schemas(self, txn: lmdb.Transaction, source: str) -> Iterator[tuple[int, pa.Schema]]:
        known: dict[int, pa.Schema] = {}
        for key, value in _range(txn, _BATCH, source):
            number = _HEADER.unpack_from(value)[0]
            if number not in known:
                known[number] = _schema(txn, source, number)
            yield struct.unpack(">Q", key[-8:])[0], known[number]

    def _sweep(self, source: str) -> None:
        """Remove files that no transaction names and that no writer can be about to name."""
        with self._store.transaction() as txn:
            named = {segment.file for segment in _segments(txn, source)}
        for file in self._files(source):
            with contextlib.suppress(OSError):
                if file.name not in named and time.time() - file.stat().st_mtime > _ORPHAN_S:
                    file.unlink()


# Parts of a write transaction


def head_in(txn: lmdb.Transaction, source: str) -> int:
    """The newest sequence number of a source."""
    return _number(txn.get(_key(_HEAD, source)))


def put_head(txn: lmdb.Transaction, source: str, sequence: int) -> None:
    """Set the newest sequence number."""
    txn.put(_key(_HEAD, source), struct.pack(">Q", sequence))


def put_cut(txn: lmdb.Transaction, source: str, sequence: int) -> None:
    """Say that an erasure has changed what is before `sequence`."""
    txn.put(_key(_CUT, source), struct.pack(">Q", sequence))


def put_batch(txn: lmdb.Transaction, batch: NewBatch) -> None:
    """Write a batch, its offsets, and the head."""
    number = _schema_number(txn, batch.source, batch.schema)
    head = _HEADER.pack(number, batch.arrival_us, batch.rows, zlib.crc32(batch.message))
    txn.put(_key(_BATCH, batch.source, batch.sequence), head + batch.message)
    for (consumer, partition), offset in batch.offsets.items():
        txn.put(_key(_OFFSET, consumer, partition), struct.pack(">Q", offset))
    put_head(txn, batch.source, max(batch.sequence, head_in(txn, batch.source)))
    key = _key(_ARRIVED, batch.source)
    txn.put(key, struct.pack(">Q", max(batch.arrival_us, _number(txn.get(key)), 0)))


def delete_batches(txn: lmdb.Transaction, source: str, last: int) -> None:
    """Delete the batches up to a sequence number."""
    for key, _ in list(_range(txn, _BATCH, source)):
        if struct.unpack(">Q", key[-8:])[0] <= last:
            txn.delete(key)


def delete_batch(txn: lmdb.Transaction, source: str, sequence: int) -> None:
    """Delete one batch."""
    txn.delete(_key(_BATCH, source, sequence))


def put_segment(txn: lmdb.Transaction, source: str, segment: Segment) -> None:
    """Name a segment; one with the same last batch is replaced."""
    value = json.dumps([segment.file, segment.first, segment.last, segment.rows]).encode()
    txn.put(_key(_SEGMENT, source, segment.last), value)


def delete_segment(txn: lmdb.Transaction, source: str, segment: Segment) -> None:
    """Name a segment no more."""
    txn.delete(_key(_SEGMENT, source, segment.last))


def put_erased(txn: lmdb.Transaction, source: str, names: Sequence[str], digest: bytes, at_us: int) -> None:
    """Remember that the key of a digest (16 bytes, of the named columns) was erased at a time."""
    value = struct.pack(">Q", max(at_us, 0)) + json.dumps(list(names)).encode()
    txn.put(_key(_ERASED, source) + digest, value)


def _put_left(txn: lmdb.Transaction, source: str, files: Sequence[str], rows: Rows) -> None:
    """Write down what an erasure has to remove besides, with what an earlier one has left."""
    for name, more, others in _left(txn):
        if name == source:
            files, rows = sorted({*files, *more}), [*others, *rows]
    value = [source, list(files), [[number, keys.hex()] for number, keys in rows]]
    txn.put(_key(_LEFT, source), json.dumps(value).encode())


def _left(txn: lmdb.Transaction) -> Iterator[tuple[str, list[str], Rows]]:
    prefix = struct.pack(">I", _LEFT)
    with txn.cursor() as cursor:
        there = cursor.set_range(prefix)
        while there and bytes(cursor.key()).startswith(prefix):
            source, files, rows = json.loads(bytes(cursor.value()))
            yield source, files, [(number, bytes.fromhex(keys)) for number, keys in rows]
            there = cursor.next()


def segments_in(txn: lmdb.Transaction, source: str) -> list[Segment]:
    """The segments of a source, oldest first."""
    return _segments(txn, source)


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def _key(kind: int, name: str, number: int | None = None) -> bytes:
    if len(name) > _MAX_NAME:  # a path; LMDB's keys are short
        name = hashlib.sha256(name.encode()).hexdigest()
    key = struct.pack(">I", kind) + name.encode() + b"\0"
    return key if number is None else key + struct.pack(">Q", number)


def _number(value: Any) -> int:
    return 0 if value is None else int(struct.unpack(">Q", bytes(value))[0])


def _range(txn: lmdb.Transaction, kind: int, name: str) -> Iterator[tuple[bytes, bytes]]:
    prefix = _key(kind, name)
    with txn.cursor() as cursor:
        there = cursor.set_range(prefix)
        while there and bytes(cursor.key()).startswith(prefix):
            yield bytes(cursor.key()), bytes(cursor.value())
            there = cursor.next()


def _first_batch(txn: lmdb.Transaction, source: str) -> int:
    for key, _ in _range(txn, _BATCH, source):
        return int(struct.unpack(">Q", key[-8:])[0])
    return 0


def _segments(txn: lmdb.Transaction, source: str) -> list[Segment]:
    return [Segment(*json.loads(value)) for _, value in _range(txn, _SEGMENT, source)]


def _schema(txn: lmdb.Transaction, source: str, number: int) -> pa.Schema:
    value = txn.get(_key(_SCHEMA, source, number))
    if value is None:
        raise StoreError(f"the event log is corrupt: schema {number} of source '{source}' is missing")
    return pa.ipc.read_schema(pa.py_buffer(bytes(value)))


def _schema_number(txn: lmdb.Transaction, source: str, schema: pa.Schema) -> int:
    text = schema.serialize().to_pybytes()
    number = 0
    for number, (_, value) in enumerate(_range(txn, _SCHEMA, source), 1):
        if value == text:
            return number
    txn.put(_key(_SCHEMA, source, number + 1), text)
    return number + 1
