"""What an online store must do, and the bytes of a stored row, which all of them share.

A row is 24 bytes that order its versions (the log's sequence number, event time and known-at time, each
big-endian, signed ones with the sign bit turned, so that bytes compare as the numbers do), valid_from and
valid_until, then the row's words; the latter little-endian, 8 bytes each.

Rows are compared and set: one with a lesser order never replaces one with a greater. The sequence number
comes first because an event that is deleted or corrected moves a row's event time back; rows of sources
without a log have 0 there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ORDER_BYTES = 24
HEAD_BYTES = 40  # the order and the interval
_SIGN = np.uint64(1 << 63)


@dataclass(frozen=True)
class ViewHeader:
    """What is known of a view's rows.

    Attributes:
        tag: state of the source that the rows came from; "" while they are replaced as a whole.
        row_words: words of a row.
        cursor_us: time up to which the rows are materialised.
        sequence: they take in the pushed events up to this number of the source's log.
    """

    tag: str
    row_words: int
    cursor_us: int
    sequence: int = 0


class OnlineAdapter(Protocol):
    """A store of rows by view number and key. Any thread may call; StoreError where it failed."""

    def header(self, view: int) -> ViewHeader | None:
        """The header of a view; None if it has none."""

    def headers(self) -> dict[int, ViewHeader]:
        """The header of each view number."""

    def get_many(
        self, view: int, tag: str, keys: NDArray[np.uint64], row_words: int, sequence: int = 0
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.bool_]]:
        """Read rows.

        Args:
            view: its number.
            tag, sequence: nothing is found under a header with another tag or a lesser sequence number.
            keys: uint64[n, 2] as lo, hi.
            row_words: words of a row.

        Returns:
            rows uint64[n, row_words], meta int64[n, 4], found bool[n]; zeros where not found.
        """

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
        """Compare and set rows; durable as far as the store is, when this returns.

        Args:
            view: its number.
            keys: uint64[n, 2] as lo, hi.
            rows: uint64[n, row_words].
            meta: int64[n, 4].
            header: written after the rows, never before.
            sequence: the rows take in the log up to this number.
            replace: the order is the sequence number alone: for rows of another state of the source.
        """

    def put_header(self, view: int, header: ViewHeader) -> None:
        """Replace the header of a view."""

    def scan(self, view: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """All rows of a view in parts: keys uint64[k, 2] as lo, hi, and meta int64[k, 4]."""

    def delete_many(self, view: int, keys: NDArray[np.uint64]) -> int:
        """Delete rows. Returns how many there were."""

    def delete_view(self, view: int) -> None:
        """Delete a view's header and then its rows."""

    def close(self) -> None:
        """Let go of it. A second close does nothing."""


def encode_rows(rows: NDArray[np.uint64], meta: NDArray[np.int64], sequence: int) -> NDArray[np.uint8]:
    """The bytes of each row, uint8[n, 40 + 8 * row_words]."""
    n, words = rows.shape
    order = np.empty((n, 3), ">u8")
    order[:, 0] = sequence
    order[:, 1:] = meta[:, 2:].view(np.uint64) ^ _SIGN
    out = np.empty((n, HEAD_BYTES + 8 * words), np.uint8)
    out[:, :ORDER_BYTES] = order.view(np.uint8)
    out[:, ORDER_BYTES:HEAD_BYTES] = np.ascontiguousarray(meta[:, :2], "<i8").view(np.uint8)
    out[:, HEAD_BYTES:] = np.ascontiguousarray(rows, "<u8").view(np.uint8)
    return out


def decode_meta(heads: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Meta int64[n, 4] of the first 40 bytes of rows, uint8[n, 40]."""
    meta = np.empty((len(heads), 4), np.int64)
    meta[:, :2] = np.ascontiguousarray(heads[:, ORDER_BYTES:HEAD_BYTES]).view("<i8")
    order = np.ascontiguousarray(heads[:, 8:ORDER_BYTES]).view(">u8").astype(np.uint64)
    meta[:, 2:] = (order ^ _SIGN).view(np.int64)
    return meta


def decode_rows(values: list[Any], row_words: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Rows uint64[n, row_words] and meta int64[n, 4] of the bytes of rows, all of the right length."""
    size = HEAD_BYTES + 8 * row_words
    flat = np.frombuffer(b"".join(values), np.uint8).reshape(-1, size)
    rows = np.ascontiguousarray(flat[:, HEAD_BYTES:]).view("<u8").astype(np.uint64)
    return rows.reshape(len(flat), row_words), decode_meta(flat)
