"""Rows that are collected by part: in memory up to a bound, beyond it in a file without a name.

A flush writes what is in memory as one Arrow message for each part that has rows. Parts that follow one
another are read together, as many as the bound allows; the rows of a part come in the order in which they
were added. The file has no name (or loses it at once), so it goes with the process, however that ends. Of
one thread.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa

from penstock.errors import UnavailableError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Spill:
    """Tables of one schema, row by row in parts 0..n_parts-1.

    Attributes:
        spilled_bytes: bytes in the file.
    """

    def __init__(self, schema: pa.Schema, n_parts: int, most_bytes: int, folder: str) -> None:
        """Nothing is written yet.

        Args:
            schema: of the tables; without dictionaries.
            n_parts: at most 65 536.
            most_bytes: of rows in memory, and of parts that are read together.
            folder: for the file; empty: the system's for temporary files.
        """
        self._schema, self._n_parts, self._most, self._folder = schema, n_parts, most_bytes, folder
        self._waiting: list[tuple[pa.Table, NDArray[np.uint16]]] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self._where: list[list[tuple[int, int]]] = [[] for _ in range(n_parts)]  # offset and length
        self.spilled_bytes = 0

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the rows and the file."""
        self._waiting = []
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, table: pa.Table, parts: NDArray[np.uint16]) -> None:
        """Add rows with the part of each.

        Raises:
            UnavailableError: they cannot be written.
        """
        if table.num_rows == 0:
            return
        self._waiting.append((table, parts))
        self._bytes += table.nbytes + parts.nbytes
        if self._bytes > self._most:
            self._flush()

    def groups(self) -> Iterator[tuple[int, int, pa.Table]]:
        """First part, the part after the last, and their rows. Every part is in one group.

        Raises:
            UnavailableError: the file cannot be written or read.
        """
        if self._file is None:
            yield 0, self._n_parts, self._concatenated()[0]
            return
        self._flush()
        sizes = [sum(length for _, length in places) for places in self._where]
        first = 0
        while first < self._n_parts:
            last, total = first + 1, sizes[first]
            while last < self._n_parts and total + sizes[last] <= self._most:
                total += sizes[last]
                last += 1
            yield first, last, self._read(first, last)
            first = last

    def _concatenated(self) -> tuple[pa.Table, NDArray[np.uint16]]:
        table = pa.concat_tables([self._schema.empty_table(), *(table for table, _ in self._waiting)])
        parts = np.concatenate([np.zeros(0, np.uint16), *(parts for _, parts in self._waiting)])
        self._waiting, self._bytes = [], 0
        return table, parts

    def _flush(self) -> None:
        table, parts = self._concatenated()
        if table.num_rows == 0:
            return
        order = np.argsort(parts, kind="stable")
        table = table.combine_chunks().take(order).combine_chunks()
        parts = parts[order]
        (batch,) = table.to_batches()
        starts = np.flatnonzero(np.r_[True, parts[1:] != parts[:-1]])
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 - closed by `close`
                    prefix="penstock-join-", dir=self._folder or None, buffering=0
                )
            for start, stop in zip(starts, np.append(starts[1:], len(parts))):
                message = batch.slice(start, stop - start).serialize()
                self._where[parts[start]].append((self.spilled_bytes, message.size))
                self._write(self._file, memoryview(message))
        except OSError as error:
            folder = self._folder or tempfile.gettempdir()
            raise UnavailableError(
                f"join.spill_dir '{folder}' cannot take the rows of a join ({self.spilled_bytes} bytes "
                f"so far): {error}"
            ) from error

        del table, batch, message
        pa.default_memory_pool().release_unused()

    def _write(self, file: IO[bytes], message: memoryview) -> None:
        while len(message):
            written = file.write(message)
            self.spilled_bytes += written
            message = message[written:]

    def _read(self, first: int, last: int) -> pa.Table:
        batches = []
        for places in self._where[first:last]:
            for offset, length in places:
                data = memoryview(bytearray(length))
                self._fill(data, offset)
                batches.append(pa.ipc.read_record_batch(pa.py_buffer(data), self._schema))
        return pa.Table.from_batches(batches, self._schema)

    def _fill(self, data: memoryview, offset: int) -> None:
        assert self._file is not None
        while len(data):
            try:
                got = os.preadv(self._file.fileno(), [data], offset)
            except OSError as error:
                raise UnavailableError(f"spilled rows of a join cannot be read: {error}") from error
            if got == 0:
                raise UnavailableError(f"spilled rows of a join end after {offset} bytes")
            data, offset = data[got:], offset + got
