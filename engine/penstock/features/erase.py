"""Erasing entities: out of the log, the online store, the caches, and of what is read from files.

The log's batches and segments are written again without the rows; a digest of each key is kept, by which rows
of files are left out when they are read, so that they do not come back. A digest is keyed and one-way: it
says of a key whether it was erased, and nothing else. Events of an erased key that are later than the
erasure, by their own time and by when they became known, count as those of any other.

An erasure that a crash cuts short after the log's transaction is ended by the next one who opens the store:
the transaction writes down the files and stored rows that are still to go.

All views on the source lose the rows, whatever their own keys are. What remains is said in the receipt: free
pages of the LMDB file hold old bytes until they are used again, files of the source are its owner's, and rows
of the served log carry no keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.errors import InvalidArgumentError
from penstock.features import push_table, retrieval
from penstock.features.compute import NOT_FOUND
from penstock.features.event_log import EventLog
from penstock.features.index import entity_keys
from penstock.features.live import LiveView, LiveViews
from penstock.features.online_adapter import OnlineAdapter, ViewHeader
from penstock.features.push_commit import Touched
from penstock.features.pushes import Pushes
from penstock.features.sources import SourceColumn, arrow_column
from penstock.features.times import iso

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

_PAIR = np.dtype([("lo", np.uint64), ("hi", np.uint64)])
KEPT = (
    "bytes in free pages of the data folder's LMDB files, until they are used again",
    "the source's own files, and copies and backups of the data folder and of Redis",
)
UNREMOVED = "files of the log that could not be removed, until the data folder is opened again"


def erase_keys(
    live: LiveViews, log: EventLog, online: OnlineAdapter, pushes: Pushes, view: str, keys: Any,
    seed: bytes, now_us: int,
) -> dict[str, Any]:  # fmt: skip
    """Erase the entities of a view that `keys` names; see `FeatureStore.erase`."""
    target = live.view(view)
    definition = target.computer.view
    names = list(definition.join_keys)
    if not names:  # one row of it would name every event
        raise InvalidArgumentError(
            f"view '{view}' has no join keys, so it names no entity; erase by a view that has some"
        )
    table, floats = retrieval.entity_row_table(keys)
    columns = [
        retrieval.key_column(table, name, dtype, floats=floats)
        for name, dtype in zip(names, target.computer.join_dtypes)
    ]
    retrieval.check_keys(table, names, columns)
    n = table.num_rows
    digests = push_table.erased_digests(columns, names, n, seed)
    wanted = {digest.tobytes() for digest in digests}
    asked, _ = entity_keys(columns, n, seed)

    def matching(given: Sequence[SourceColumn], rows: int) -> NDArray[np.bool_]:
        found = push_table.erased_digests(given, names, rows, seed)
        nulls = np.zeros(rows, np.bool_)
        for column in given:
            if column.valid is not None:
                nulls |= ~column.valid
        pairs = np.ascontiguousarray(found).view(_PAIR).ravel()
        return np.isin(pairs, np.ascontiguousarray(digests).view(_PAIR).ravel()) & ~nulls

    def matches(events: pa.Table) -> NDArray[np.bool_]:
        if any(name not in events.column_names for name in names):
            return np.zeros(events.num_rows, np.bool_)  # an earlier schema had no such key
        return matching([arrow_column(events[name], f"column '{name}'") for name in names], events.num_rows)

    with pushes.stopped():
        views = live.on_source(definition.source.name)
        joins = [key for each in views for key in each.computer.view.join_keys]
        history = live.whole_table(view, joins)
        gone = matching([history.columns[name] for name in names], history.n_rows)
        touched: dict[str, NDArray[np.uint64]] = {}
        for each in views:
            mine = [history.columns[key].take(gone) for key in each.computer.view.join_keys]
            found, nulls = entity_keys(mine, int(gone.sum()), seed)
            touched[each.computer.view.name] = np.unique(found[~nulls], axis=0)
        touched[view] = np.unique(np.concatenate([touched[view], asked]), axis=0)
        strange = set(online.headers()) - live.numbers()
        written = [(each.number, touched[each.computer.view.name]) for each in views]
        written += [(number, asked) for number in sorted(strange)]
        rows_left = [(number, np.ascontiguousarray(found).tobytes()) for number, found in written]
        removed = log.erase(definition.source.name, matches, names, sorted(wanted), now_us, rows_left)
        fresh = {each.computer.view.name: each for each in live.reread_source(definition.source.name)}
        rows, online_rows = _write(online, fresh, touched, now_us)
        online_rows += sum(online.delete_many(number, asked) for number in sorted(strange))
        log.finish(definition.source.name)
        pushes.committed(rows)
    receipt: dict[str, Any] = {
        "view": view,
        "source": definition.source.name,
        "keys": n,
        "at": iso(now_us),
        "at_us": now_us,
        "removed": {
            "log_rows": removed.log,
            "segment_rows": removed.segments,
            "file_rows_hidden": int(gone.sum()) - removed.log - removed.segments,
            "online_rows": online_rows,
        },
        "views": sorted(fresh),
        "kept": [*KEPT, *[UNREMOVED] * (definition.source.name in log.left())],
    }
    return sealed(receipt, wanted)


def finish_erasures(log: EventLog, online: OnlineAdapter) -> None:
    """Remove what erasures that were cut short have left in files and in the online store.

    Raises:
        StoreError: the online store failed; what is left stays written down.
    """
    for source, rows in log.left().items():
        for number, keys in rows:
            online.delete_many(number, np.frombuffer(keys, np.uint64).reshape(-1, 2))
        log.finish(source)


def sealed(receipt: dict[str, Any], digests: set[bytes] | None = None) -> dict[str, Any]:
    """The receipt with the SHA-256 of all that it says, and of the keys' digests."""
    body = json.dumps({**receipt, "digest": receipt.get("digest", "")}, sort_keys=True).encode()
    return {**receipt, "digest": hashlib.sha256(body + b"".join(sorted(digests or ()))).hexdigest()}


def _write(
    online: OnlineAdapter, fresh: dict[str, LiveView], touched: dict[str, NDArray[np.uint64]], now_us: int
) -> tuple[Touched, int]:
    """Write what the touched rows are now, delete those without events; returns them and how many went."""
    told: Touched = {}
    deleted = 0
    for name, each in fresh.items():
        keys = touched[name]
        rows = each.computer.rows_at(keys, np.full(len(keys), now_us, np.int64))
        told[name] = keys, rows.words(), rows.meta
        left = rows.status != NOT_FOUND
        header = online.header(each.number)
        # Of files no stored row counts any more, since the stamp of their reading has changed.
        deleted += online.delete_many(each.number, keys if each.source is None else keys[~left])
        if header is None or each.source is None:
            continue
        new = None
        if header.tag == each.tag and header.sequence == each.sequence - 1:
            new = ViewHeader(header.tag, header.row_words, header.cursor_us, each.sequence)
        online.put_many(
            each.number, keys[left], told[name][1][left], rows.meta[left], new,
            sequence=each.sequence, replace=True,
        )  # fmt: skip
    return told, deleted
