"""Events of a source grouped by entity key and put in order: (key, event time, known-at, source row).

The last of equal events is the one that counts. Rows with a null key are left out: null matches nothing.
An index is immutable; any thread may read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from penstock import _core
from penstock.features.sources import SourceColumn

if TYPE_CHECKING:
    from numpy.typing import NDArray


def entity_keys(
    columns: Sequence[SourceColumn], n: int, seed: bytes
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Keys uint64[n, 2] and nulls bool[n] of join-key columns (int64 or string), in key order."""
    nulls = np.zeros(n, np.bool_)
    for column in columns:
        if column.valid is not None:
            nulls |= ~column.valid
    if not columns:  # a view without entities: one key
        return np.zeros((n, 2), np.uint64), nulls
    if len(columns) == 1 and columns[0].dictionary is not None:
        texts = columns[0].dictionary
        per_code, _ = _core.keys128([texts], seed)
        keys = per_code[columns[0].values] if texts else np.zeros((n, 2), np.uint64)
    else:
        keys, _ = _core.keys128([_parts(column, nulls) for column in columns], seed)
    keys[nulls] = 0
    return keys, nulls


def _parts(column: SourceColumn, nulls: NDArray[np.bool_]) -> Any:
    if column.dictionary is None:
        return column.values
    if not column.dictionary:
        return [""] * len(nulls)
    return np.array(column.dictionary, dtype=object)[column.values].tolist()


@njit(cache=True, nogil=True)
def _hash(lo, hi):  # type: ignore[no-untyped-def]
    x = (lo ^ (hi * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(32))


@njit(cache=True, nogil=True)
def _fill_slots(keys, slots):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(slots) - 1)
    for i in range(len(keys)):
        at = _hash(keys[i, 0], keys[i, 1]) & mask
        while slots[at] >= 0:
            at = (at + np.uint64(1)) & mask
        slots[at] = i


@njit(cache=True, nogil=True)
def _find(keys, slots, asked, nulls, out):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(slots) - 1)
    for i in range(len(asked)):
        out[i] = -1
        if nulls[i]:
            continue
        at = _hash(asked[i, 0], asked[i, 1]) & mask
        while slots[at] >= 0:
            k = slots[at]
            if keys[k, 0] == asked[i, 0] and keys[k, 1] == asked[i, 1]:
                out[i] = k
                break
            at = (at + np.uint64(1)) & mask


class EventIndex:
    """Events by key and time.

    Attributes:
        order: int64[e]; the source row of each event.
        keys: uint64[m, 2]; the distinct keys, ascending.
        starts: int64[m + 1]; events of key i are starts[i] to starts[i + 1].
        event_time, known_at: int64[e], in index order.
    """

    def __init__(
        self,
        keys: NDArray[np.uint64],
        nulls: NDArray[np.bool_],
        event_time: NDArray[np.int64],
        known_at: NDArray[np.int64],
    ) -> None:
        rows = np.flatnonzero(~nulls) if nulls.any() else np.arange(len(nulls))
        kept = keys[rows]
        columns: list[NDArray[Any]] = [event_time[rows], kept[:, 0]]
        if known_at is not event_time:
            columns.insert(0, known_at[rows])
        if kept[:, 1].any():
            columns.append(kept[:, 1])
        permutation = np.lexsort(columns)  # stable, so ties stay in source order
        self.order: NDArray[np.int64] = rows[permutation]
        sorted_keys = kept[permutation]
        first = np.ones(len(rows), np.bool_)
        first[1:] = (sorted_keys[1:] != sorted_keys[:-1]).any(axis=1)
        begins = np.flatnonzero(first)
        self.keys: NDArray[np.uint64] = np.ascontiguousarray(sorted_keys[begins])
        self.starts: NDArray[np.int64] = np.append(begins, len(rows)).astype(np.int64)
        self.event_time: NDArray[np.int64] = event_time[self.order]
        self.known_at: NDArray[np.int64] = self.event_time if known_at is event_time else known_at[self.order]
        self._slots = np.full(1 << max(3, int(2 * len(self.keys)).bit_length()), -1, np.int64)
        _fill_slots(self.keys, self._slots)

    def find(self, keys: NDArray[np.uint64], nulls: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Position in `keys` of each key asked, -1 where it is unknown or null."""
        out = np.empty(len(keys), np.int64)
        _find(self.keys, self._slots, keys, nulls, out)
        return out
