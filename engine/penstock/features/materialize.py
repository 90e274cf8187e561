"""Writing stored rows into the online store, whole or from a view's cursor on.

A row carries the interval in which it holds, so a reader never depends on a cursor or on a finished run: what
is missing or out of its interval is computed from the source. A view's header, with the cursor, is written in
the transaction of its last rows. While the rows of another state of the source are replaced, the header's tag
is "" and no row counts.

Where events are pushed, the header also says up to which of them (by sequence number, that is by arrival) the
rows take them in, so an event whose time is behind the cursor is no different from others. Pushes go on
meanwhile, and write the rows that they touch; compare-and-set by that number keeps theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from penstock.errors import InvalidArgumentError
from penstock.features.live import LiveView
from penstock.features.online_adapter import OnlineAdapter, ViewHeader
from penstock.features.progress_bars import Progress
from penstock.features.pushes import Pushes
from penstock.features.times import iso

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    online: OnlineAdapter, live: LiveView, pushes: Pushes, end_us: int, progress: Progress | None
) -> NDArray[np.uint64]:
    """Write the row that each key of the source has at `end_us`; returns the keys, uint64[k, 2]."""
    computer, header = live.computer, online.header(live.number)
    replace = header is None or header.tag != live.tag or pushes.is_cut(live, header.sequence)
    if header is not None and replace:
        online.put_header(live.number, ViewHeader("", live.row_words, header.cursor_us))
        for found, _ in online.scan(live.number):
            online.delete_many(live.number, _without(found, computer.keys))
    keys = computer.keys
    _write(online, live, pushes, keys, end_us, progress, replace)
    return keys


def write_changed(
    online: OnlineAdapter, live: LiveView, pushes: Pushes, end_us: int, progress: Progress | None
) -> NDArray[np.uint64]:
    """Write the row of each key whose row changed since the cursor or has run out by `end_us`.

    Returns:
        The keys, uint64[k, 2]. All of them if the view has no rows, or rows of another state of the source.

    Raises:
        InvalidArgumentError: `end_us` is before the cursor.
    """
    header = online.header(live.number)
    if header is None or header.tag != live.tag or pushes.is_cut(live, header.sequence):
        return write_all(online, live, pushes, end_us, progress)
    if end_us < header.cursor_us:
        raise InvalidArgumentError(
            f"end is {iso(end_us)}, but view '{live.computer.view.name}' is materialised up to "
            f"{iso(header.cursor_us)}; to go back use materialize(start, end)"
        )
    parts = [live.computer.changed_keys(header.cursor_us, end_us)]
    parts += [keys[meta[:, 1] <= end_us] for keys, meta in online.scan(live.number)]
    if live.source is not None:
        parts.append(pushes.arrived(live, header.sequence))
    keys = np.unique(np.concatenate(parts), axis=0)
    _write(online, live, pushes, keys, end_us, progress, False)
    return keys


def _write(
    online: OnlineAdapter, live: LiveView, pushes: Pushes, keys: NDArray[np.uint64], end_us: int,
    progress: Progress | None, replace: bool,
) -> None:  # fmt: skip
    name = live.computer.view.name
    for at in range(0, max(len(keys), 1), _CHUNK):
        part = keys[at : at + _CHUNK]
        now = np.full(len(part), end_us, np.int64)
        if live.source is None:
            sequence, rows = 0, live.computer.rows_at(part, now)
        else:
            sequence, rows = pushes.durable_rows(live, part, now)
        last = at + _CHUNK >= len(keys)
        with pushes.committing:  # a push between the header's number and the header would be missed
            header = ViewHeader(live.tag, live.row_words, end_us, pushes.written_up_to(live.number))
            online.put_many(
                live.number,
                part,
                rows.words(),
                rows.meta,
                header if last else None,
                sequence=sequence,
                replace=replace,
            )
        if progress is not None:
            progress(name, at + len(part), len(keys))


def _without(keys: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The keys that are not among the known ones."""
    pair = np.dtype([("lo", np.uint64), ("hi", np.uint64)])
    mine, theirs = (np.ascontiguousarray(k).view(pair).ravel() for k in (keys, known))
    return keys[~np.isin(mine, theirs)]
