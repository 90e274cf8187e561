"""The log of served rows: Arrow IPC streams under ``data_dir/log/``, one row per answered row.

A segment file ``served-MODEL@VERSION-NUMBER.arrow`` holds rows of one model version: `rid` uint64, `now_us`
int64 (request time), `status` uint8 (bit 7: a shadow scored the row, unseen), `score` float64, then each
model input as float32 (NaN is missing). An
input with one of those names, or `version`, is called ``input:NAME``. Model and version are in the schema's
metadata.

Invariants: a file holds whole messages and at most one cut message at its end, which a reader drops; a
segment is never written again once it is closed, nor by another process. Loss is bounded: a killed process
loses what was not yet flushed (`flush_us`, or `flush_rows` if that comes first); rows that a full or failing
disk refuses are counted and dropped. The bytes reach the kernel at a flush and the disk when a segment is
closed.

Threads: appends and flushes hold one lock; reading needs none and works from any process.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from penstock.errors import FailedPreconditionError, InvalidArgumentError

if TYPE_CHECKING:
    import pyarrow as pa

_PREFIX, _SUFFIX = "served-", ".arrow"
_OWN_COLUMNS = ("version", "rid", "now_us", "status", "score")
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_MAX_STREAMS = 64  # open files; the one used least recently is closed
_MAX_NAME = 180  # bytes of a model's and version's escaped names: a file name ends at 255


@dataclass(frozen=True, order=True)
class _Segment:
    number: int
    model: str
    version: str
    path: Path


@dataclass
class _Stream:
    """The open segment and the rows that wait for it, of one model version."""

    names: tuple[str, ...]
    schema: pa.Schema
    pending: list[tuple[NDArray[Any], ...]] = field(default_factory=list)
    n_pending: int = 0
    segment: _Segment | None = None
    fd: int = -1
    size: int = 0


class ServedLog:
    """The writer: one per data_dir, held by the process that serves.

    Args:
        directory: ``data_dir/log``; made if missing.
        flush_us: rows wait this long, by the times passed to `flush`, microseconds.
        flush_rows: and at most so many of one model version. Many more at once would keep a core from those
            who answer requests.
        segment_bytes: a segment that reached this size is closed and the next begun; None: 64 MiB, or a
            quarter of `max_bytes` if that is less.
        max_bytes, max_segments: bounds of the whole log; the oldest segments are deleted, and counted.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        flush_us: int = 1_000_000,
        flush_rows: int = 8_192,
        segment_bytes: int | None = None,
        max_bytes: int = 4 << 30,
        max_segments: int = 1_024,
    ) -> None:
        if segment_bytes is None:
            segment_bytes = max(1, min(64 << 20, max_bytes // 4))
        for name, value in (
            ("flush_us", flush_us),
            ("flush_rows", flush_rows),
            ("segment_bytes", segment_bytes),
            ("max_segments", max_segments),
        ):
            if value < 1:
                raise InvalidArgumentError(f"{name} is {value}; expected at least 1")
        if max_bytes < segment_bytes:
            raise InvalidArgumentError(f"max_bytes is {max_bytes}; expected at least {segment_bytes}")
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._flush_us = flush_us
        self._flush_rows = flush_rows
        self._segment_bytes = segment_bytes
        self._max_bytes = max_bytes
        self._max_segments = max_segments
        self._lock = threading.Lock()
        self._streams: dict[tuple[str, str], _Stream] = {}  # least recently used first
        self._sizes = {segment: segment.path.stat().st_size for segment in _segments(self._directory)}
        self._next = max((segment.number for segment in self._sizes), default=0) + 1
        self._flushed_us: int | None = None
        self._rows = self._written = self._lost = self._errors = self._deleted = 0
        self._last_error: str | None = None
        self._closed = False
        self._trim()

    def append(
        self,
        model: str,
        version: str,
        names: Sequence[str],
        rid: NDArray[np.uint64],
        now_us: NDArray[np.int64],
        rows: NDArray[np.float32],
        scores: NDArray[np.float64],
        status: NDArray[np.uint8],
    ) -> None:
        """Take served rows; they are written by a later `flush`, or now if `flush_rows` wait.

        The arrays are kept until then: the caller must not change them.

        Args:
            names: model inputs in order, [F]; a version keeps its names.
            rid: request ids, uint64 [n].
            now_us: request times, int64 microseconds UTC [n].
            rows: model inputs, float32 [n, F].
            scores: first output, float64 [n].
            status: the worst row status of the row's views, uint8 [n].

        Raises InvalidArgumentError for another shape or dtype, or other names than before,
        FailedPreconditionError after close. A disk error is not raised: it is counted.
        """
        n, names = len(rid), tuple(names)
        for name, given, dtype, shape in (
            ("rid", rid, np.uint64, (n,)),
            ("now_us", now_us, np.int64, (n,)),
            ("rows", rows, np.float32, (n, len(names))),
            ("scores", scores, np.float64, (n,)),
            ("status", status, np.uint8, (n,)),
        ):
            if given.dtype != dtype or given.shape != shape:
                raise InvalidArgumentError(
                    f"{name} is {given.dtype} {given.shape}; expected {np.dtype(dtype).name} {shape}"
                )
        with self._lock:
            if self._closed:
                raise FailedPreconditionError("the log of served rows is closed")
            stream = self._stream(model, version, names)
            if n:
                stream.pending.append((rid, now_us, status, scores, rows))
                stream.n_pending += n
                self._rows += n
            if stream.n_pending >= self._flush_rows:
                self._write(model, version, stream)

    def flush(self, at_us: int | None = None) -> None:
        """Write the rows that wait: at once, or, at a time `at_us`, if `flush_us` passed since the last one.

        `at_us` is microseconds of any clock; one that steps back flushes.
        """
        with self._lock:
            if at_us is not None:
                if self._flushed_us is not None and 0 <= at_us - self._flushed_us < self._flush_us:
                    return
                self._flushed_us = at_us
            self._flush()

    def read(self, model: str, version: str | None = None, since: int | None = None) -> pa.Table:
        """`read_served` of this log, the rows that still wait included (they are flushed first)."""
        self.flush()
        return read_served(self._directory, model, version, since)

    def stats(self) -> dict[str, int | str | None]:
        """Counters since the log was opened, where rows = written + pending + lost, and the log's size now.

        `errors` counts failed disk calls and `last_error` is the text of the last. `deleted_segments` left to
        keep the bounds; `segments` and `bytes` are what is on the disk.
        """
        with self._lock:
            return {
                "rows": self._rows,
                "written": self._written,
                "pending": sum(stream.n_pending for stream in self._streams.values()),
                "lost": self._lost,
                "errors": self._errors,
                "last_error": self._last_error,
                "deleted_segments": self._deleted,
                "segments": len(self._sizes),
                "bytes": sum(self._sizes.values()),
            }

    def close(self) -> None:
        """Flush and close every segment; the log takes no rows afterwards. A second call does nothing."""
        with self._lock:
            self._flush()
            for stream in self._streams.values():
                self._end(stream)
            self._closed = True

    def _stream(self, model: str, version: str, names: tuple[str, ...]) -> _Stream:
        stream = self._streams.pop((model, version), None)
        if stream is not None:
            self._streams[model, version] = stream
            if stream.names != names:
                raise InvalidArgumentError(
                    f"names of {model!r} version {version!r} are {names}; expected {stream.names}"
                )
            return stream
        for name, value in (("model", model), ("version", version)):
            if not value:
                raise InvalidArgumentError(f"{name} is empty; expected a name")
        escaped = len(_escape(model)) + len(_escape(version))
        if escaped > _MAX_NAME:
            raise InvalidArgumentError(
                f"model and version take {escaped} bytes of a file name; expected at most {_MAX_NAME}"
            )
        if len(set(names)) != len(names):
            raise InvalidArgumentError(f"names {sorted(names)} has a repeated name")
        schema = _schema(model, version, names)
        if len(self._streams) == _MAX_STREAMS:
            oldest = next(iter(self._streams))
            if self._streams[oldest].n_pending:
                self._write(*oldest, self._streams[oldest])
            self._end(self._streams.pop(oldest))
        stream = self._streams[model, version] = _Stream(names, schema)
        return stream

    def _flush(self) -> None:
        for (model, version), stream in self._streams.items():
            if stream.n_pending:
                self._write(model, version, stream)

    def _write(self, model: str, version: str, stream: _Stream) -> None:
        """Write the waiting rows as one message; on an error they are lost and the file is cut back."""
        import pyarrow as pa

        columns = [np.concatenate([part[i] for part in stream.pending]) for i in range(4)]
        inputs = np.empty((len(stream.names), stream.n_pending), np.float32)
        at = 0
        for *_, rows in stream.pending:
            inputs[:, at : at + len(rows)] = rows.T
            at += len(rows)
        columns += list(inputs)
        batch = pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=stream.schema)
        stream.pending, n, stream.n_pending = [], stream.n_pending, 0
        try:
            if stream.segment is None:
                self._begin(model, version, stream)
            self._put(stream, batch.serialize())
            self._written += n
        except OSError as error:
            self._lost += n
            self._failed(error)
        if stream.size >= self._segment_bytes:
            self._end(stream)
        self._trim()

    def _begin(self, model: str, version: str, stream: _Stream) -> None:
        name = f"{_PREFIX}{_escape(model)}@{_escape(version)}-{self._next:012d}{_SUFFIX}"
        segment = _Segment(self._next, model, version, self._directory / name)
        stream.fd = os.open(segment.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._next += 1
        stream.segment, stream.size = segment, 0
        self._sizes[segment] = 0
        self._put(stream, stream.schema.serialize())

    def _put(self, stream: _Stream, message: pa.Buffer) -> None:
        """Add one whole message to the segment, or leave it as it was; an OSError passes on."""
        assert stream.segment is not None
        view = memoryview(message)
        try:
            while len(view):
                view = view[os.write(stream.fd, view) :]
        except OSError:
            try:
                os.ftruncate(stream.fd, stream.size)
                os.lseek(stream.fd, stream.size, os.SEEK_SET)
                if stream.size == 0:  # not even its schema: no segment
                    self._drop(stream)
            except OSError:
                self._drop(stream)  # its cut tail stays, and readers drop it
            raise
        stream.size += len(message)
        self._sizes[stream.segment] = stream.size

    def _drop(self, stream: _Stream) -> None:
        """Leave a segment that cannot be written; its file goes if it has no row."""
        segment = stream.segment
        assert segment is not None
        os.close(stream.fd)
        stream.segment, stream.fd = None, -1
        if stream.size == 0:
            del self._sizes[segment]
            segment.path.unlink(missing_ok=True)

    def _end(self, stream: _Stream) -> None:
        """Close the segment of a stream, if it has one: end mark, then to the disk."""
        if stream.segment is None:
            return
        try:
            # A reader does not need the mark, so half of it does no harm.
            self._sizes[stream.segment] += os.write(stream.fd, _END_OF_STREAM)
            os.fdatasync(stream.fd)
        except OSError as error:
            self._failed(error)
        os.close(stream.fd)
        stream.segment, stream.fd = None, -1

    def _trim(self) -> None:
        """Delete the oldest segments until the log is within its bounds."""
        excess = sum(self._sizes.values()) - self._max_bytes
        while self._sizes and (excess > 0 or len(self._sizes) > self._max_segments):
            oldest = min(self._sizes)
            for stream in self._streams.values():
                if stream.segment == oldest:
                    self._end(stream)
            try:
                oldest.path.unlink(missing_ok=True)
            except OSError as error:
                self._failed(error)
                return
            excess -= self._sizes.pop(oldest)
            self._deleted += 1

    def _failed(self, error: OSError) -> None:
        self._errors += 1
        self._last_error = str(error)


def read_served(
    directory: str | Path, model: str, version: str | None = None, since: int | None = None
) -> pa.Table:
    """The rows in the log of a model, oldest segment first; any process may call while another one writes.

    Args:
        directory: ``data_dir/log``.
        version: only this version; None takes all, where an input that a version lacks is null.
        since: only rows with ``now_us >= since``, microseconds UTC.

    Returns columns `version` string, `rid`, `now_us`, `status`, `score` and the inputs; no rows, and no
    inputs, where the log has nothing of the model (and version).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    tables: list[pa.Table] = []
    # One listing may miss a file that is made meanwhile and show a later one. All up to the last of the first
    # listing were there before the second began, so the second shows them.
    last = max((segment.number for segment in _segments(Path(directory))), default=0)
    for segment in sorted(_segments(Path(directory))):
        if segment.number > last:
            break
        if segment.model != model or version not in (None, segment.version):
            continue
        batches = []
        schema: pa.Schema | None = None
        for item in _read_segment(segment.path):
            if isinstance(item, pa.Schema):
                schema = item.remove_metadata()
                continue
            batches.append(item if since is None else item.filter(pc.greater_equal(item["now_us"], since)))
        if schema is None:
            continue  # deleted meanwhile, or not even its schema was written
        table = pa.Table.from_batches([batch.replace_schema_metadata(None) for batch in batches], schema)
        column = pa.repeat(pa.scalar(segment.version, pa.string()), len(table))
        tables.append(table.add_column(0, "version", column))
    if not tables:
        empty = _schema(model, version or "", ()).remove_metadata().empty_table()
        return empty.add_column(0, "version", pa.array([], pa.string()))
    return pa.concat_tables(tables, promote_options="default")


def _read_segment(path: Path) -> Iterator[Any]:
    """The schema and the whole record batches of a segment; a cut message at its end is dropped."""
    import pyarrow as pa

    try:
        data = path.read_bytes()  # not mapped: the writer may cut a failed message off
    except FileNotFoundError:
        return
    # A cut message is ArrowInvalid or, within its length prefix, OSError.
    with contextlib.suppress(pa.ArrowInvalid, OSError), pa.ipc.open_stream(pa.py_buffer(data)) as stream:
        yield stream.schema
        yield from stream


def _segments(directory: Path) -> list[_Segment]:
    found = []
    for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        named, _, number = path.name[len(_PREFIX) : -len(_SUFFIX)].rpartition("-")
        model, at, version = named.partition("@")
        if at and number.isascii() and number.isdigit():
            found.append(_Segment(int(number), unquote(model), unquote(version), path))
    return found


def _escape(name: str) -> str:
    return quote(name, safe="")


def _schema(model: str, version: str, names: Sequence[str]) -> pa.Schema:
    import pyarrow as pa

    inputs = [f"input:{name}" if name in _OWN_COLUMNS else name for name in names]
    return pa.schema(
        [
            ("rid", pa.uint64()),
            ("now_us", pa.int64()),
            ("status", pa.uint8()),
            ("score", pa.float64()),
            *((name, pa.float32()) for name in inputs),
        ],
        metadata={"model": model, "version": version},
    )
