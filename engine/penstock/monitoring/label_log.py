"""The labels that were acknowledged, on disk before they are.

Records of (u32 length, u32 CRC-32, MessagePack [ids, labels, times]) in numbered segments. A tail that a
crash cut short fails its length or CRC and is dropped when the log is opened. One lock; any thread.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgpack

_HEAD = struct.Struct("<II")


class LabelLog:
    """Append-only log of label calls under `folder`.

    Args:
        folder: made if missing.
        segment_bytes: a segment that has grown to this is closed.
        max_segments: the oldest segments beyond these are deleted.
    """

    def __init__(self, folder: Path, *, segment_bytes: int = 16 << 20, max_segments: int = 64) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._segment_bytes, self._max_segments = folder, segment_bytes, max_segments
        self._lock = threading.Lock()
        segments = self._segments()
        self._number = int(segments[-1].stem.split("-")[1]) if segments else 0
        if segments:
            whole = sum(_HEAD.size + len(payload) for payload in _records(segments[-1]))
            if whole < segments[-1].stat().st_size:
                os.truncate(segments[-1], whole)
        self._file = self._open()

    def append(self, ids: list[int], labels: list[int], times_us: list[int]) -> None:
        """Write one call and wait until it is on disk. OSError (a full disk) leaves the log as it was."""
        payload = msgpack.packb([ids, labels, times_us])
        record = _HEAD.pack(len(payload), zlib.crc32(payload)) + payload
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(record)
                while rest:  # a disk that fills up takes a part, then refuses
                    rest = rest[self._file.write(rest) :]
                os.fdatasync(self._file.fileno())
            except OSError:
                os.ftruncate(self._file.fileno(), end)
                raise
            if end + len(record) >= self._segment_bytes:
                self._file.close()
                self._number += 1
                self._file = self._open()
                for old in self._segments()[: -self._max_segments]:
                    old.unlink()

    def read(self) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """The calls that are on disk, oldest first."""
        for segment in self._segments():
            for payload in _records(segment):
                ids, labels, times = msgpack.unpackb(payload)
                yield ids, labels, times

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _segments(self) -> list[Path]:
        return sorted(self._folder.glob("labels-*.log"))

    def _open(self):  # type: ignore[no-untyped-def]  # FileIO: unbuffered, so that a write is the write
        return (self._folder / f"labels-{self._number:08d}.log").open("ab", buffering=0)


def _records(segment: Path) -> Iterator[bytes]:
    data = segment.read_bytes()
    at = 0
    while at + _HEAD.size <= len(data):
        size, crc = _HEAD.unpack_from(data, at)
        payload = data[at + _HEAD.size : at + _HEAD.size + size]
        if len(payload) < size or zlib.crc32(payload) != crc:
            return
        yield payload
        at += _HEAD.size + size
