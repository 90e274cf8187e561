"""Writing stored rows into the online store, whole or from a view's cursor on.

A row carries the interval in which it holds, so a reader never depends on a cursor or on a finished run: what
is missing or out of its interval is computed from the source. A view's header, with the cursor, is written in
the transaction of its last rows. While the rows of another state of the source are replaced, the header's tag
is "" and no row counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from penstock.errors import InvalidArgumentError
from penstock.features.live import LiveView
from penstock.features.online import OnlineStore, ViewHeader
from penstock.features.times import iso

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[str, int, int], None]
"""Called with a view, and the rows written and to write."""

_CHUNK = 65_536


@dataclass(frozen=True, eq=False)
class MaterializeReport:
    """What a materialisation wrote.

    Attributes:
        rows: rows written, by view.
        keys: their keys uint64[k, 2], by view.
        stamp: stamp of the online store afterwards.
    """

    rows: dict[str, int]
    keys: dict[str, NDArray[np.uint64]]
    stamp: int


def write_all(
    online: OnlineStore, live: LiveView, end_us: int, progress: Progress | None
) -> NDArray[np.uint64]:
    """Write the row that each key of the source has at `end_us`; returns the keys, uint64[k, 2]."""
    computer, header = live.computer, online.header(live.number)
    if header is not None and header.tag != live.tag:
        online.put_header(live.number, ViewHeader("", live.row_words, header.cursor_us))
        for found, _ in online.scan(live.number):
            online.delete_many(live.number, _without(found, computer.keys))
    _write(online, live, computer.keys, end_us, progress)
    return computer.keys


def write_changed(
    online: OnlineStore, live: LiveView, end_us: int, progress: Progress | None
) -> NDArray[np.uint64]:
    """Write the row of each key whose row changed since the cursor or has run out by `end_us`.

    Returns:
        The keys, uint64[k, 2]. All of them if the view has no rows, or rows of another state of the source.

    Raises:
        InvalidArgumentError: `end_us` is before the cursor.
    """
    header = online.header(live.number)
    if header is None or header.tag != live.tag:
        return write_all(online, live, end_us, progress)
    if end_us < header.cursor_us:
        raise InvalidArgumentError(
            f"end is {iso(end_us)}, but view '{live.computer.view.name}' is materialised up to "
            f"{iso(header.cursor_us)}; to go back use materialize(start, end)"
        )
    parts = [live.computer.changed_keys(header.cursor_us, end_us)]
    parts += [keys[meta[:, 1] <= end_us] for keys, meta in online.scan(live.number)]
    keys = np.unique(np.concatenate(parts), axis=0)
    _write(online, live, keys, end_us, progress)
    return keys


def _write(
    online: OnlineStore, live: LiveView, keys: NDArray[np.uint64], end_us: int, progress: Progress | None
) -> None:
    header = ViewHeader(live.tag, live.row_words, end_us)
    name = live.computer.view.name
    for at in range(0, max(len(keys), 1), _CHUNK):
        part = keys[at : at + _CHUNK]
        rows = live.computer.rows_at(part, np.full(len(part), end_us, np.int64))
        last = at + _CHUNK >= len(keys)
        online.put_many(live.number, part, rows.words(), rows.meta, header if last else None)
        if progress is not None:
            progress(name, at + len(part), len(keys))


def _without(keys: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The keys that are not among the known ones."""
    pair = np.dtype([("lo", np.uint64), ("hi", np.uint64)])
    mine, theirs = (np.ascontiguousarray(k).view(pair).ravel() for k in (keys, known))
    return keys[~np.isin(mine, theirs)]
