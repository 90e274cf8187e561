"""A ring of panes of request time: which pane a row belongs to, and which panes are still held.

Pane p holds the request times [p * pane_us, (p + 1) * pane_us) and lives in slot ``p % count``. A slot goes
only forward: the highest pane that was ever seen there stays, so the held panes do not depend on how rows
were split into calls, and one row with a time far ahead takes one slot and not the whole ring.

Not thread-safe: the owner holds its lock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import InvalidArgumentError

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """Where the rows of one call go.

    Attributes:
        groups: (pane, rows) of each pane that is held afterwards; rows is int64 [k] of row numbers.
        gone: panes that left the ring, with all that they hold.
        late: rows whose pane had left before they came.
        passed: rows that were in time but whose pane a later row of the same call pushed out.
    """

    groups: list[tuple[int, I64]]
    gone: list[int]
    late: int
    passed: int


class PaneRing:
    """The held panes. Raises InvalidArgumentError unless window_us is a positive multiple of pane_us."""

    def __init__(self, pane_us: int, window_us: int) -> None:
        if pane_us < 1:
            raise InvalidArgumentError(f"pane_us is {pane_us}; expected at least 1")
        if window_us < pane_us or window_us % pane_us:
            raise InvalidArgumentError(
                f"window_us is {window_us}; expected a multiple of pane_us ({pane_us})"
            )
        self.pane_us = pane_us
        self.window_us = window_us
        self._held: I64 = np.full(window_us // pane_us, -1, np.int64)

    @property
    def count(self) -> int:
        """Number of panes."""
        return len(self._held)

    def newest(self) -> int | None:
        """The highest held pane, or None before the first row."""
        pane = int(self._held.max())
        return pane if pane >= 0 else None

    def place(self, times_us: I64) -> Placement:
        """Give rows with these request times int64 [n] (>= 0) their panes, and move the ring forward."""
        panes = times_us // self.pane_us
        distinct, pane_of = np.unique(panes, return_inverse=True)
        slots, slot_of = np.unique(distinct % self.count, return_inverse=True)
        before = self._held[slots]
        late = self._late(distinct, pane_of, slot_of, before)
        after = before.copy()
        np.maximum.at(after, slot_of, distinct)
        self._held[slots] = after
        kept = ~late & (distinct == after[slot_of])[pane_of]
        rows = np.flatnonzero(kept)
        order = rows[np.argsort(pane_of[rows], kind="stable")]
        cuts = np.flatnonzero(np.diff(pane_of[order])) + 1
        groups = [(int(panes[part[0]]), part) for part in np.split(order, cuts) if len(part)]
        gone = before[(after > before) & (before >= 0)]
        n_late = int(late.sum())
        return Placement(groups, gone.tolist(), n_late, len(panes) - n_late - len(rows))

    def _late(self, distinct: I64, pane_of: I64, slot_of: I64, before: I64) -> NDArray[np.bool_]:
        """bool [n]: rows older than the highest pane that their slot has seen up to and with that row."""
        late = (distinct < before[slot_of])[pane_of]
        if len(slot_of) > len(before):  # several panes of one slot in one call: the order of rows decides
            slots = slot_of[pane_of]
            order = np.argsort(slots, kind="stable")
            base = slots[order] * len(distinct)  # keeps the running maximum of one slot from the next
            late[order] |= np.maximum.accumulate(base + pane_of[order]) > base + pane_of[order]
        return np.asarray(late)

    def admit(self, pane: int) -> tuple[bool, int | None]:
        """Hold one pane: (whether it is held, the pane that left for it or None)."""
        slot = pane % self.count
        held = int(self._held[slot])
        if pane < held:
            return False, None
        self._held[slot] = pane
        return True, held if 0 <= held < pane else None

    def window(self, end_us: int | None, window_us: int | None) -> range:
        """The panes of a window that ends with the pane of `end_us` (None: the newest held).

        Empty where there is no newest pane. Raises InvalidArgumentError.
        """
        count = window_panes(self.pane_us, self.window_us, end_us, window_us)
        last = self.newest() if end_us is None else end_us // self.pane_us
        if last is None:
            return range(0)
        return range(max(0, last - count + 1), last + 1)


def window_panes(pane_us: int, longest_us: int, end_us: int | None, window_us: int | None) -> int:
    """How many panes a window of `window_us` (None: `longest_us`) has. Raises InvalidArgumentError."""
    width = longest_us if window_us is None else window_us
    if width < pane_us or width % pane_us or width > longest_us:
        raise InvalidArgumentError(
            f"window_us is {width}; expected a multiple of {pane_us}, at most {longest_us}"
        )
    if end_us is not None and end_us < 0:
        raise InvalidArgumentError(f"end_us is {end_us}; expected microseconds UTC, at least 0")
    return width // pane_us


def request_times(now_us: NDArray[Any], n: int | None = None) -> I64:
    """`now_us` as int64 [n]. Raises InvalidArgumentError for another dtype, shape or a negative time."""
    times = np.asarray(now_us)
    if times.dtype != np.int64 or times.ndim != 1 or (n is not None and len(times) != n):
        shape = "[n]" if n is None else f"[{n}]"
        raise InvalidArgumentError(f"now_us is {times.dtype} {times.shape}; expected int64 {shape}")
    if len(times) and int(times.min()) < 0:
        row = int(np.argmax(times < 0))
        raise InvalidArgumentError(f"now_us[{row}] is {times[row]}; expected 0 to 2**63 - 1")
    return times
