"""An append-only log of small records on disk, in numbered segments.

Records of (u32 length, u32 CRC-32, MessagePack value). A tail that a crash cut short fails its length or CRC
and is dropped when the log is opened; a reader stops there. One lock; any thread. One process writes.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack

_HEAD = struct.Struct("<II")


class RecordLog:
    """The log `name` under `folder`.

    Args:
        folder: made if missing.
        name: segments are `name`-NUMBER.log.
        segment_bytes: a segment that has grown to this is closed.
        max_segments: the oldest segments beyond these are deleted.
    """

    def __init__(
        self, folder: Path, name: str, *, segment_bytes: int = 16 << 20, max_segments: int = 64
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name = folder, name
        self._segment_bytes, self._max_segments = segment_bytes, max_segments
        self._lock = threading.Lock()
        segments = segments_of(folder, name)
        self._number = _number(segments[-1]) if segments else 0
        if segments:
            whole = sum(_HEAD.size + len(payload) for payload in _payloads(segments[-1]))
            if whole < segments[-1].stat().st_size:
                os.truncate(segments[-1], whole)
        self._file = self._open()

    def append(self, values: Sequence[Any], *, durable: bool = True) -> None:
        """Write records, on disk then if `durable`. OSError (a full disk) leaves the log as it was."""
        payloads = [msgpack.packb(value) for value in values]
        data = b"".join(_HEAD.pack(len(p), zlib.crc32(p)) + p for p in payloads)
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(data)
                while rest:  # a disk that fills up takes a part, then refuses
                    rest = rest[self._file.write(rest) :]
                if durable:
                    os.fdatasync(self._file.fileno())
            except OSError:
                os.ftruncate(self._file.fileno(), end)
                raise
            if end + len(data) >= self._segment_bytes:
                self._file.close()
                self._number += 1
                self._file = self._open()
                for old in segments_of(self._folder, self._name)[: -self._max_segments]:
                    old.unlink()

    def read(self) -> Iterator[Any]:
        """The records that are on disk, oldest first."""
        return read_records(self._folder, self._name)

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _open(self):  # type: ignore[no-untyped-def]  # FileIO: unbuffered, so that a write is the write
        return (self._folder / f"{self._name}-{self._number:08d}.log").open("ab", buffering=0)


def segments_of(folder: Path, name: str) -> list[Path]:
    """The segments of a log, oldest first."""
    return sorted(folder.glob(f"{name}-{'[0-9]' * 8}.log"), key=_number)


def read_records(folder: Path, name: str) -> Iterator[Any]:
    """The records of a log, oldest first, from any process."""
    for segment in segments_of(folder, name):
        for payload in _payloads(segment):
            yield msgpack.unpackb(payload, timestamp=0, strict_map_key=False)


def _number(segment: Path) -> int:
    return int(segment.stem.rpartition("-")[2])


def _payloads(segment: Path) -> Iterator[bytes]:
    data = segment.read_bytes()
    at = 0
    while at + _HEAD.size <= len(data):
        size, crc = _HEAD.unpack_from(data, at)
        payload = data[at + _HEAD.size : at + _HEAD.size + size]
        if len(payload) < size or zlib.crc32(payload) != crc:
            return
        yield payload
        at += _HEAD.size + size
