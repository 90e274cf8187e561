"""Pushed events: into the computers of the views that they feed, then into the log, then acknowledged.

A push is checked, appended to the computers (from then on reads see it) and queued; one committer thread
takes all that wait and writes them, the rows that they touch and the heads in one durable transaction, so
concurrent pushes share one sync. Only then does `push` return. While a row waits for its commit, reads
compute it instead of taking the store's (`pending`).

The order of a source's events is that of their sequence numbers: they are given, appended and queued under
`LiveViews.locked`. A reading made meanwhile first waits until what was pushed is durable (`settle`), so it
misses nothing. When a commit fails, the pushes of its group and those behind it fail, and the views are read
again (`_repair`, by whoever comes first): what was not durable is gone from the reads too. When `committed`
fails, its pushes fail too, though they are durable, and the committer tells it again until it succeeds.

Locks, in this order: `LiveViews.locked`, `_order` (appended and queued, or taken as a group), `committing` (a
group, or the header that ends a materialisation), `_changed`. The committer never takes the first.

Another process may have written to the log: `catch_up` takes that in before a read. Any thread may call.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.clock import SystemClock
from penstock.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    PenstockError,
    ResourceExhaustedError,
)
from penstock.features import event_log, push_rows
from penstock.features.compute import ViewRows, stored_texts
from penstock.features.event_log import EventLog, NewBatch
from penstock.features.index import entity_keys
from penstock.features.live import LiveView, LiveViews
from penstock.features.online import OnlineStore
from penstock.features.online_adapter import OnlineAdapter
from penstock.features.push_coding import PushCoding
from penstock.features.push_commit import (
    Arrivals,
    Compaction,
    ConflictError,
    Entry,
    Group,
    PendingRows,
    RowWriter,
    Touched,
)
from penstock.features.push_table import columns_of, logged_table, pushed_table, with_roles
from penstock.features.registry import Registry
from penstock.features.source_definitions import PushSource
from penstock.features.sources import SourceTable
from penstock.features.store_settings import PushSettings
from penstock.features.text_codes import TextCodes

if TYPE_CHECKING:
    import lmdb
    from numpy.typing import NDArray

    from penstock import _core

_log = logging.getLogger("penstock.features")
_RETRY_MS = 50
_RETELL_S = 0.05
_CONFLICTS = 100
_NO_KEYS = np.zeros((0, 2), np.uint64)

Committed = Callable[[Touched], None]
"""Told the rows of touched keys once they are durable, before the pushes are acknowledged. Must not wait for
anything of the store."""


class Pushes:
    """The push path of one store.

    Attributes:
        committed: see `Committed`. untold: how often it has failed.
        lost: told the rows of keys whose events did not become durable, as they are without them.
        touched: told a view and the keys whose rows have just changed, before a push returns or is durable.
    """

    def __init__(
        self,
        live: LiveViews,
        log: EventLog,
        local: OnlineStore,
        online: OnlineAdapter,
        registry: Registry,
        clock: SystemClock,
        settings: PushSettings,
    ) -> None:
        """`local` has the log; `online` the rows, which may be the same store."""
        self._live, self._log, self._local, self._online = live, log, local, online
        self._registry, self._clock, self._settings = registry, clock, settings
        self.committed: Committed = lambda touched: None
        self.lost: Committed = lambda touched: None
        self.touched: Callable[[LiveView, NDArray[np.uint64]], None] = lambda live, keys: None
        self.committing = threading.Lock()
        self._order = threading.Lock()
        self._changed = threading.Condition()  # guards the next six
        self._queue: deque[Entry] = deque()
        self._queued_bytes = 0
        self._begun = self._ended = 0  # pushes that were queued, and that are durable or failed
        self._broken: dict[str, dict[str, NDArray[np.uint64]]] = {}  # sources to read again, and their keys
        self._closed = False
        self.failures = self.untold = 0
        self._to_tell: dict[str, NDArray[np.uint64]] = {}  # keys by view; the committer's
        self._thread: threading.Thread | None = None
        self._texts = TextCodes(registry)
        self._codings: dict[str, PushCoding] = {}
        self._pending = PendingRows()
        self._rows = RowWriter(online)
        self._durable: dict[str, int] = {}  # head of the log, by source, as last seen
        self._seen: dict[str, int] = {}  # stamp of the store when that was
        self._arrivals = Arrivals(log, clock)
        self._compaction = Compaction(log, settings)
        live.settle = self.settle

    def push(self, source: str, rows: Any, offsets: Mapping[tuple[str, int], int] | None = None) -> int:
        """Take in events; they are durable when this returns. Returns how many.

        Args:
            source: name of a push source.
            rows: see `push_rows.read_rows`.
            offsets: positions of a stream that become durable with them.

        Raises:
            NotFoundError, InvalidArgumentError: nothing has changed.
            ResourceExhaustedError: too many pushes wait; nothing has changed.
            StoreError: the disk is full or failed; the events are gone from the reads again.
            InternalError: the events are durable, but caches may still give older rows for a while.
        """
        for _ in range(_CONFLICTS):
            try:
                return self.wait(self.begin(source, rows, offsets))
            except ConflictError:
                continue
        raise ResourceExhaustedError(
            f"other processes push to '{source}' all the time", retry_after_ms=_RETRY_MS
        )

    def begin(
        self, source: str, rows: Any, offsets: Mapping[tuple[str, int], int] | None = None
    ) -> Entry | None:
        """Make events visible and queue them; `wait` for them to be durable."""
        if not isinstance(source, str):
            raise InvalidArgumentError(f"source is {source!r}; expected the name of a push source")
        while True:
            coding = self._coding(source)  # a name that is unknown is told first
            coded = coding.code(rows)
            if coded is None:
                break
            entry = self._begin_coded(coding, coded, offsets)
            if entry is not None:
                return entry
        definition = coding.source
        keys = {key for live in coding.views for key in live.computer.view.join_keys}
        table = push_rows.read_rows(definition, rows, keys)
        if not table.num_rows and not offsets:
            return None
        batches = table.to_batches()
        batch = batches[0] if batches else push_rows.empty_batch(definition)
        message = batch.serialize().to_pybytes()
        with self._live.locked():
            self._repair()
            self._check_room(len(message))
            for live in self._live.fed_by(source):
                self._catch_up(live)
            views = self._live.fed_by(source)  # other readings, where others have erased
            arrival = self._arrivals.next(source)
            sequence = max(live.sequence for live in views) + 1
            arrivals = np.full(table.num_rows, arrival, np.int64)
            pushed = self._source_table(definition, table, arrivals, views)
            keys_of = [self._keys_of(live, pushed) for live in views]
            entry = self._enter(
                views, keys_of, sequence, lambda i: views[i].computer.append(pushed), len(message),
                lambda: NewBatch(
                    source, sequence, arrival, table.num_rows, table.schema, message, offsets or {}
                ),
            )  # fmt: skip
            if views == coding.views:
                coding.sync()
        return entry

    def _coding(self, source: str) -> PushCoding:
        """How a source's pushes are coded, over the newest readings of its views."""
        coding = self._codings.get(source)
        if coding is None or coding.readings is not self._live.readings:
            self._live.fed_by(source)  # the views are read outside the lock
            with self._live.locked():
                views, readings = self._live.fed_by(source), self._live.readings
                definition = self._live.push_sources()[source]
                coding = PushCoding(definition, views, readings, self._registry.seed)
            self._codings[source] = coding
        return coding

    def _begin_coded(
        self, coding: PushCoding, rows: _core.PushedRows, offsets: Mapping[tuple[str, int], int] | None
    ) -> Entry | None:
        """As `begin`; None if the codes no longer fit. What a reader must wait for comes before the rest."""
        views, name = coding.views, coding.source.name
        with self._live.locked():
            if self._broken:
                self._repair()
            self._check_room(rows.bytes)
            for live in views:
                self._catch_up(live)
            if coding.readings is not self._live.readings:
                return None
            arrival = self._arrivals.next(name)
            sequence = max(live.sequence for live in views) + 1
            return self._enter(
                views, [coding.keys(i, rows) for i in range(len(views))], sequence,
                lambda i: coding.append(i, rows, arrival), rows.bytes,
                lambda: NewBatch(name, sequence, arrival, rows.n, coding.schema, b"", offsets or {}),
                lambda: coding.message(rows),
            )  # fmt: skip

    def _enter(
        self, views: list[LiveView], keys: list[NDArray[np.uint64]], sequence: int,
        append: Callable[[int], object], size: int, batch: Callable[[], NewBatch],
        pack: Callable[[], bytes] | None = None,
    ) -> Entry:  # fmt: skip
        """Append a batch to its views and queue it; under `locked`."""
        try:
            with self._order:
                touched = self._append(views, keys, append, sequence)
                entry = Entry(batch(), touched, pack)
                with self._changed:
                    self._queue.append(entry)
                    self._begun += 1
                    self._queued_bytes += size
                    self._start()
                    self._changed.notify_all()
        except BaseException:
            self._repair()  # one view may have taken the events before another refused them
            raise
        return entry

    def wait(self, entry: Entry | None) -> int:
        """Wait until a push is durable. Returns its rows."""
        if entry is None:
            return 0
        with entry.done:
            pass
        if entry.error is not None:
            with self._live.locked():
                self._repair()
            raise entry.error
        return entry.batch.rows

    def _check_room(self, size: int) -> None:
        with self._changed:
            if self._closed:
                raise FailedPreconditionError("the store is closed")
            waiting, limits = len(self._queue), self._settings
            if waiting >= limits.queue or (waiting and self._queued_bytes + size > limits.queue_bytes):
                raise ResourceExhaustedError(
                    f"{waiting} pushes wait for the disk, the limit", retry_after_ms=_RETRY_MS
                )

    def _append(
        self,
        views: list[LiveView],
        keys: list[NDArray[np.uint64]],
        append: Callable[[int], object],
        sequence: int,
    ) -> dict[str, NDArray[np.uint64]]:
        touched: dict[str, NDArray[np.uint64]] = {}
        try:
            for i, live in enumerate(views):
                name = live.computer.view.name
                # Before they are visible: who sees them, or a row made of them, sees that the row waits.
                touched[name] = keys[i]
                self._pending.mark(name, keys[i], 1)
                live.sequence = sequence
                append(i)
                self.touched(live, keys[i])
        except BaseException:
            for name, marked in touched.items():
                self._pending.mark(name, marked, -1)
            with self._changed:
                self._break(views[0].source or "", touched)
            raise
        return touched

    def _keys_of(self, live: LiveView, table: SourceTable) -> NDArray[np.uint64]:
        joins = [table.columns[name] for name in live.computer.view.join_keys]
        keys, nulls = entity_keys(joins, table.n_rows, self._registry.seed)
        return keys if len(keys) == 1 else np.unique(keys[~nulls], axis=0)

    def _break(self, source: str, touched: Mapping[str, NDArray[np.uint64]]) -> None:
        """Have a source read again; under `_changed`."""
        known = self._broken.setdefault(source, {})
        for view, keys in touched.items():
            known[view] = np.concatenate([known.get(view, _NO_KEYS), keys])

    def _repair(self) -> None:
        """Take events that did not become durable out of the reads; under `locked`."""
        with self._changed:
            broken, self._broken = self._broken, {}
        touched: Touched = {}
        now_us = self._clock.now_us()
        for source, found in broken.items():
            try:
                self._live.reread_source(source)
            except BaseException:
                with self._changed:
                    self._break(source, found)
                raise
            for view, keys in found.items():
                keys = np.unique(keys, axis=0)
                rows = self._live.view(view).computer.rows_at(keys, np.full(len(keys), now_us, np.int64))
                touched[view] = keys, rows.words(), rows.meta
        if touched:
            try:
                self.lost(touched)
            except BaseException:
                with self._changed:
                    for source, found in broken.items():
                        self._break(source, found)
                raise

    def _source_table(
        self, definition: PushSource, table: Any, arrival: NDArray[np.int64], views: list[LiveView]
    ) -> SourceTable:
        """The events with the registry's codes, which are durable then."""
        plain = set().union(*(stored_texts(live.computer.view) for live in views))
        texts = {c for c in plain if definition.schema.get(c) == "string"}
        columns = columns_of(definition, definition.schema)
        others = [name for name in columns if name not in texts]
        made = pushed_table(definition, table, arrival, {}, others)
        found = dict(made.columns)
        for name in sorted(texts):
            found[name] = self._texts.encode(definition.name, name, table[name])
        return with_roles(definition, found, arrival)

    def pending(self, view: str, keys: NDArray[np.uint64]) -> NDArray[np.bool_] | None:
        """Which keys uint64[n, 2] have a row in the store that is older than what was pushed; None: none."""
        return self._pending.among(view, keys)

    def settle(self) -> None:
        """Wait until everything that was pushed is durable or has failed."""
        with self._changed:
            until = self._begun
            self._changed.wait_for(lambda: self._ended >= until)

    # The log as others write it

    def catch_up(self, live: LiveView) -> int:
        """Take in what the log has and the view has not. Returns the head of the log that its rows need."""
        source = live.source
        assert source is not None
        self._look(source)
        if self._durable[source] > live.sequence:
            with self._live.locked():
                self._catch_up(self._live.view(live.computer.view.name))
        return self._durable[source]

    def _look(self, source: str) -> None:
        """Learn the head of the log, if anything was written that is not known to be of this store."""
        seen = self._seen.get(source)
        if seen is not None and seen == self._local.newest():
            return
        stamp = self._local.stamp()
        if seen != stamp:
            head = self._log.head(source)
            self._durable[source] = max(head, self._durable.get(source, 0))
            self._seen[source] = stamp
            self._arrivals.look(source)

    def _catch_up(self, live: LiveView) -> None:
        """As `catch_up`, under `locked`."""
        source = live.source
        assert source is not None
        self._look(source)
        if self._durable[source] <= live.sequence:
            return
        if self._log.cut(source) > live.sequence:
            self._live.reread_source(source)
            return
        view = live.computer.view
        logged, head = self._log.read(source, live.sequence)
        if head <= live.sequence:
            return
        definition = self._live.push_sources()[source]
        self._registry.reload()
        plain = {c for c in stored_texts(view) if definition.schema.get(c) == "string"}
        known = {column: self._texts.known(source, column) for column in plain}
        table = logged_table(definition, logged, known, columns_of(definition, definition.schema))
        grown = {name: table.dictionaries[name] for name in plain}
        if not self._registry.extend_dictionaries(source, grown):
            self._live.reread_source(source)
            return
        live.sequence = head
        if table.n_rows:
            self.touched(live, live.computer.append(table))

    # Materialisation beside pushes

    @contextlib.contextmanager
    def writing(self, live: LiveView) -> Iterator[LiveView]:
        """While the rows of a view are materialised, pushes write theirs though it may have no header yet.

        Gives the view's newest reading: what others have erased meanwhile is not in it.
        """
        if live.source is None:
            yield live
            return
        self.catch_up(live)
        with self._live.locked():
            self._repair()
            self.settle()
            live = self._live.view(live.computer.view.name)
            self._rows.writing[live.number] = live.sequence
        try:
            yield live
        finally:
            self._rows.writing.pop(live.number, None)

    def durable_rows(
        self, live: LiveView, keys: NDArray[np.uint64], now_us: NDArray[np.int64]
    ) -> tuple[int, ViewRows]:
        """Rows of events that are all durable, and the number up to which they have them for sure."""
        while True:
            with self._live.locked():
                self._repair()
                newest = self._live.view(live.computer.view.name)
                if (newest.number, newest.tag) == (live.number, live.tag):
                    live = newest  # a reading that was repaired still has what did not become durable
                sequence = live.sequence
            failures = self.failures
            rows = live.computer.rows_at(keys, now_us)
            self.settle()
            if failures == self.failures:
                return sequence, rows

    def arrived(self, live: LiveView, after: int) -> NDArray[np.uint64]:
        """The keys uint64[k, 2] of the events behind a sequence number."""
        assert live.source is not None
        logged, _ = self._log.read(live.source, after)
        if not logged:
            return _NO_KEYS
        definition = self._live.push_sources()[live.source]
        columns = columns_of(definition, live.computer.view.join_keys)
        return np.unique(self._keys_of(live, logged_table(definition, logged, {}, columns)), axis=0)

    def is_cut(self, live: LiveView, sequence: int) -> bool:
        """Whether something was erased of a view's source behind a sequence number."""
        return live.source is not None and self._log.cut(live.source) > sequence

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Nobody pushes meanwhile, and all that was pushed is durable."""
        with self._live.locked(), self._compaction.running:
            self._repair()
            self.settle()
            yield

    def written_up_to(self, number: int) -> int:
        """Number up to which pushes have written the rows of a view, since `writing` began."""
        return self._rows.writing.get(number, 0)

    # The committer

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="penstock-push", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                wait_s = _RETELL_S if self._to_tell else None
                self._changed.wait_for(lambda: bool(self._queue) or self._closed, wait_s)
                if not self._queue and self._closed:
                    return
            group = Group([], self._clock.now_us(), [])
            error: BaseException | None = None
            try:
                self._take(group)
                if group.entries:
                    with self.committing:
                        self._commit(group)
            except BaseException as caught:
                error = caught
                if not isinstance(caught, PenstockError):
                    _log.exception("pushed events could not be written")
            self._finish(group, error)

    def _take(self, group: Group) -> None:
        """Everything that waits, and the rows that it leads to: of no event behind it."""
        with self._order:
            with self._changed:
                group.entries += self._queue
                self._queue.clear()
                self._queued_bytes = 0
            # With those that could not be told of before, as they are now.
            parts = {view: [keys] for view, keys in self._to_tell.items()}
            for entry in group.entries:
                for view, keys in entry.touched.items():
                    parts.setdefault(view, []).append(keys)
            for view, found in parts.items():
                keys = found[0] if len(found) == 1 else np.unique(np.concatenate(found), axis=0)
                live = self._live.view(view)
                rows = live.computer.rows_at(keys, np.full(len(keys), group.now_us, np.int64))
                group.rows.append((live, keys, rows.words(), rows.meta))

    def _commit(self, group: Group) -> None:
        firsts: dict[str, int] = {}
        lasts: dict[str, int] = {}
        for entry in group.entries:
            firsts.setdefault(entry.batch.source, entry.batch.sequence)
            lasts[entry.batch.source] = entry.batch.sequence
        embedded = self._online is self._local
        batches = [entry.packed() for entry in group.entries]

        def work(txn: lmdb.Transaction) -> int:
            for source, first in firsts.items():
                if event_log.head_in(txn, source) != first - 1:
                    raise ConflictError(f"another process has pushed to '{source}' meanwhile")
            for batch in batches:
                event_log.put_batch(txn, batch)
            for live, keys, rows, meta in group.rows if embedded else ():
                if live.source in firsts:
                    self._rows.put(txn, live, keys, rows, meta, firsts[live.source], lasts[live.source])
            return int(txn.id())

        number: int = self._local.change(work)
        for source, last in lasts.items():
            self._durable[source] = last
            self._seen[source] = number
        for source, stamp in list(self._seen.items()):
            if stamp == number - 1:  # nobody else wrote between
                self._seen[source] = number
        for source, last in lasts.items():
            self._compaction.count(source, last - firsts[source] + 1)
        if not embedded:
            for live, keys, rows, meta in group.rows:
                if live.source in firsts:
                    self._rows.put_remote(live, keys, rows, meta, firsts[live.source], lasts[live.source])

    def _finish(self, group: Group, error: BaseException | None) -> None:
        entries = group.entries
        if error is not None and not entries:
            return  # what was to be told is told later
        if error is None:
            self._pending.release(entries)
            try:
                self.committed(group.touched())
                self._to_tell = {}
            except Exception as caught:
                if not self._to_tell:
                    _log.exception("the caches could not be told of pushed events")
                self.untold += 1
                self._to_tell = {live.computer.view.name: keys for live, keys, _, _ in group.rows}
                for entry in entries:
                    entry.error = InternalError(
                        "the events are durable, but the caches could not be told of them and may give older "
                        f"rows until they are: {type(caught).__name__}: {caught}; do not push them again"
                    )
        with self._order, self._changed:
            if error is not None:  # what is behind was appended to what is gone
                entries = [*entries, *self._queue]
                self._queue.clear()
                self._queued_bytes = 0
                self.failures += 1
                self._pending.release(entries)
                for entry in entries:
                    entry.error = error
                    self._break(entry.batch.source, entry.touched)
            self._ended += len(entries)
            self._changed.notify_all()
        for entry in entries:
            entry.done.release()
        self._compaction.start_due()

    def compact(self, source: str) -> int:
        """Move the batches of a source into segments now. Returns how many rows were moved."""
        return self._compaction.compact(source)

    def close(self) -> None:
        """Wait for what was pushed, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self._compaction.running:
            pass
