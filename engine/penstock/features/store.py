"""The feature store: one repository's definitions, their sources, the registry and the online store.

A view's source is read when the view is first used, and again when `refresh` finds it changed; the new
reading replaces the old one in one step, and readers on other threads keep the one that they started with.
The layout of a view's rows never changes while a store is open. All methods may be called from any thread.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock import _core
from penstock.clock import SystemClock
from penstock.errors import (
    InvalidArgumentError,
    NotFoundError,
)
from penstock.features import materialize as writing
from penstock.features import offline, retrieval
from penstock.features.compute import NOT_FOUND, PRESENT, ViewComputer
from penstock.features.definitions import FeatureService, FeatureView, RequestSource
from penstock.features.erase import erase_keys
from penstock.features.event_log import EventLog
from penstock.features.fit import rank_arguments
from penstock.features.index import entity_keys
from penstock.features.live import LiveView, LiveViews
from penstock.features.materialize import MaterializeReport, Progress
from penstock.features.online import OnlineStore
from penstock.features.online_adapter import OnlineAdapter
from penstock.features.plan import ServicePlan, compile_plan
from penstock.features.pushes import Committed, Pushes
from penstock.features.reader import OnlineReader, ReaderCaches
from penstock.features.registry import Registry, RegistryState
from penstock.features.repo import load_repo
from penstock.features.retrieval import OnlineResult, RetrievalJob
from penstock.features.streams import Ingest, StreamSource
from penstock.features.times import Time, to_us

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_PLANS = 256
_READ_TRIES = 5
_STAMP_BITS = 40  # of a write transaction's number
_FLOATS = ("float32", "float64")


@dataclass(frozen=True)
class DefinitionChanges:
    """What `apply` changes or has changed in the registry: "added", "changed" or "removed" by name."""

    views: dict[str, str]
    services: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.views or self.services)


class FeatureStore:
    """Features of one repository, offline and online.

    Attributes:
        project: name of the repository.
        views, services: the definitions by name, as they were when the store was opened.
        key_seed: the 16 bytes of the entity hash's key.
        epoch: number of the reading of all sources, below 2**24; whoever serves the store raises it when
            cached rows of an older reading must not be stored any more.
    """

    def __init__(
        self, repo_path: str | Path, *, data_dir: str | Path | None = None, clock: SystemClock | None = None
    ) -> None:
        """Open a repository; `apply` need not have run.

        Args:
            repo_path: folder with `feature_store.yaml` and Python files of definitions.
            data_dir: folder of the registry and the online store; by default that of `feature_store.yaml`.
            clock: gives `now` where a call names none.

        Raises:
            ConfigError: there is no repository, or its `feature_store.yaml` is wrong.
            DefinitionError: a definition is wrong; the message names the file and line.
            StoreError: the registry or the online store is corrupt, or cannot be written.
        """
        self._repo = load_repo(Path(repo_path))
        self._clock = SystemClock() if clock is None else clock
        self.project = self._repo.project
        self.views: Mapping[str, FeatureView] = self._repo.views
        self.services: Mapping[str, FeatureService] = self._repo.services
        self.data_dir = self._repo.data_dir if data_dir is None else Path(data_dir).resolve()
        self._registry = Registry(self.data_dir / "registry")
        self.key_seed: bytes = self._registry.seed
        identity = _core.siphash128(b"penstock online store", self.key_seed)
        self._local = OnlineStore(self.data_dir / "online", identity)
        self._online: OnlineAdapter = self._local
        if self._repo.online_store.type == "redis":
            from penstock.features.redis_store import RedisStore

            self._online = RedisStore(self._repo.online_store, identity)
        self._log = EventLog(self._local, self.data_dir / "events")
        self._live = LiveViews(self._repo, self._registry, self._log)
        self._pushes = Pushes(
            self._live, self._log, self._local, self._online, self._registry, self._clock,
            self._repo.push_settings,
        )  # fmt: skip
        self._reader_caches = ReaderCaches(self._repo.reader_rows)
        self._pushes.touched = self._reader_caches.touched
        self.epoch = 0
        self._writing = threading.Lock()  # one materialisation
        self._plans: dict[Any, ServicePlan] = {}

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what was pushed, and let go of the online store. A second close does nothing."""
        self._pushes.close()
        self._online.close()
        self._local.close()

    # Definitions

    def plan(self) -> DefinitionChanges:
        """What `apply` would change: the definitions in force against those that it recorded last."""
        self._registry.reload()
        return self._changes(self._registry.state)

    def apply(self) -> DefinitionChanges:
        """Check all definitions against their sources, fit distributions anew, and record the result.

        Rows of views that are no longer defined leave the online store. On an error nothing is recorded.
        Serving code must compile its plans again, for distributions may have changed.

        Returns:
            What has changed.

        Raises:
            DefinitionError, InvalidArgumentError: a view or service does not fit its sources.
        """
        with self._writing, self._live.locked():
            fresh = self._live.rebuild()
            computers = {name: reading.computer for name, reading in fresh.items()}
            for service in self.services.values():
                _compile(service.name, service.features, self.views, computers, service.request, service)
            self._live.adopt(fresh)
            self._registry.reload()
            changes = self._changes(self._registry.state)
            self._registry.record_applied(*self._declared())
            self._plans = {}
            numbers = self._live.numbers()
            for number in self._online.headers():
                if number not in numbers:
                    self._online.delete_view(number)
        return changes

    def _declared(self) -> tuple[dict[str, str], dict[str, str]]:
        views = {}
        for name, view in self.views.items():
            parts = [view.fingerprint()] + [self._repo.fit_until_us] * bool(rank_arguments(view))
            views[name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return views, {name: service.fingerprint() for name, service in self.services.items()}

    def _changes(self, state: RegistryState) -> DefinitionChanges:
        applied = state.applied or {"views": {}, "services": {}}
        views, services = self._declared()
        return DefinitionChanges(_diff(applied["views"], views), _diff(applied["services"], services))

    def service_plan(
        self, features: str | FeatureService | Sequence[str], *, full_feature_names: bool = False
    ) -> ServicePlan:
        """Compile a service, given by name or as an object, or a list of "view:feature".

        Raises:
            NotFoundError: an unknown service, view or feature.
            FeatureNameCollisionError: two features with one name.
        """
        if isinstance(features, str):
            if features not in self.services:
                known = ", ".join(sorted(self.services)) or "none"
                raise NotFoundError(f"service '{features}' is unknown; the services are {known}")
            features = self.services[features]
        if isinstance(features, FeatureService):
            service: FeatureService | None = features
            name, refs, request = features.name, features.features, features.request
            key: Any = (features.fingerprint(), full_feature_names)
        else:
            service, name = None, "features"
            refs, request = features, self._request_of(features)
            key = (tuple(refs), full_feature_names)
        plans = self._plans
        if key not in plans:
            used = {ref.split(":")[0] for ref in refs if isinstance(ref, str)}
            computers = {view: self.computer(view) for view in used if view in self.views}
            plan = _compile(name, refs, self.views, computers, request, service, full_feature_names)
            if len(plans) >= _MAX_PLANS:
                plans.clear()
            plans[key] = plan
            return plan
        return plans[key]

    def _request_of(self, refs: Any) -> RequestSource | None:
        if isinstance(refs, str) or not isinstance(refs, Iterable):
            raise InvalidArgumentError(
                f"features is {refs!r}; expected a service or a list of 'view:feature'"
            )
        owners = dict.fromkeys(ref.split(":")[0] for ref in refs if isinstance(ref, str))
        used = [self._repo.requests[owner] for owner in owners if owner in self._repo.requests]
        if len(used) > 1:
            raise InvalidArgumentError(
                f"features read the request sources '{used[0].name}' and '{used[1].name}'; expected one"
            )
        return used[0] if used else None

    # Sources

    def computer(self, view: str) -> ViewComputer:
        """The view's computer over the newest reading of its source."""
        return self._live.view(view).computer

    def refresh(self) -> bool:
        """Read the sources again that have changed since they were read.

        Materialised rows of a changed source no longer count; the next materialisation writes all of them.

        Returns:
            Whether any had changed: then cached rows of this store may be out of date.

        Raises:
            FailedPreconditionError: a column has another type now; open the store again.
            InvalidArgumentError: a source is missing or corrupt. The store keeps what it has.
        """
        changed = self._live.refresh()
        if changed:
            self._plans = {}
        return changed

    def reread(self) -> None:
        """Take over what another process has applied: read every view in use again, with what is recorded.

        Raises:
            FailedPreconditionError, InvalidArgumentError: as `refresh`; the store keeps what it has.
        """
        self._registry.reload()
        self._live.reread()
        self._plans = {}

    # Retrieval

    def get_historical_features(
        self,
        entity_df: Any,
        features: str | FeatureService | Sequence[str],
        full_feature_names: bool = False,
        *,
        filter_by_created_timestamp: bool = False,
        with_status: bool = False,
    ) -> RetrievalJob:
        """Features as they were at each row's time.

        Args:
            entity_df: pandas, Arrow or polars table of N rows with `event_timestamp` (or one time column),
                the join keys and the request inputs.
            features: "view:feature" names, a service or its name.
            full_feature_names: name columns "view__feature".
            filter_by_created_timestamp: leave out events that became known after the row's time.
            with_status: append `<feature>__status` to each feature.

        Returns:
            A job; `to_df()` and `to_arrow()` give the N rows in order with the features appended.

        Raises:
            InvalidArgumentError, NotFoundError, FeatureNameCollisionError: see the message.
        """
        plan = self.service_plan(features, full_feature_names=full_feature_names)
        table = offline.entity_table(entity_df)
        computers = {view.name: self.computer(view.name) for view in plan.views}
        return RetrievalJob(
            lambda: offline.historical_join(
                table,
                plan,
                computers,
                self.key_seed,
                filter_by_created_timestamp=filter_by_created_timestamp,
                with_status=with_status,
            )
        )

    def load_rows(
        self, view: str, keys: NDArray[np.uint64], now_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Stored rows: from the online store where they hold at their time, computed otherwise.

        Args:
            view: its name.
            keys: uint64[n, 2] as lo, hi.
            now_us: int64[n]; request time of each row.

        Returns:
            rows uint64[n, row_words] and meta int64[n, 4]; a key without data has a NOT_FOUND row.

        Raises:
            StoreError: the online store failed.
        """
        return self._load(self._live.view(view), keys, now_us)

    def _current(self, view: str) -> LiveView:
        """A view's newest reading, with what other processes have pushed or erased."""
        live = self._live.view(view)
        if live.source is not None:
            self._pushes.catch_up(live)
            live = self._live.view(view)
        return live

    def _load(
        self, live: LiveView, keys: NDArray[np.uint64], now_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        waiting, sequence = None, 0
        if live.source is not None:
            sequence = self._pushes.catch_up(live)
            live = self._live.view(live.computer.view.name)  # another reading, where others have erased
            waiting = self._pushes.pending(live.computer.view.name, keys)  # before the store is read
            if waiting is not None and waiting.all():
                computed = live.computer.rows_at(keys, now_us)
                return computed.words(), computed.meta
        rows, meta, found = self._online.get_many(live.number, live.tag, keys, live.row_words, sequence)
        if waiting is not None:
            found &= ~waiting
        missing = ~(found & (meta[:, 0] <= now_us) & (now_us < meta[:, 1]))
        if missing.any():
            computed = live.computer.rows_at(keys[missing], now_us[missing])
            rows[missing], meta[missing] = computed.words(), computed.meta
        return rows, meta

    def get_online_features(
        self,
        features: str | FeatureService | Sequence[str],
        entity_rows: Any,
        *,
        now: Time | None = None,
        full_feature_names: bool = False,
    ) -> OnlineResult:
        """Features at `now`: the same bits as a historical join at that time.

        Args:
            features: "view:feature" names, a service or its name.
            entity_rows: list of dicts, dict of lists (or scalars: one row), pandas, polars or Arrow table
                with the join keys and the request inputs.
            now: request time; the clock's by default.
            full_feature_names: name columns "view__feature".

        Raises:
            InvalidArgumentError, NotFoundError, FeatureNameCollisionError: see the message.
            StoreError: the online store failed.
        """
        now_us = self._clock.now_us() if now is None else to_us(now, "now")
        plan = self.service_plan(features, full_feature_names=full_feature_names)
        table, floats = retrieval.entity_row_table(entity_rows)
        retrieval.check_names(plan, table)
        n = table.num_rows
        times = np.full(n, now_us, np.int64)
        keys = [retrieval.key_column(table, name, dtype, floats=floats) for name, dtype in plan.entities]
        columns: dict[str, tuple[NDArray[Any], NDArray[np.bool_] | None]] = {}
        texts: dict[str, list[str]] = {}
        for name, dtype in plan.inputs:
            given = retrieval.input_column(table, name, dtype)
            columns[f"{plan.request_name}:{name}"] = (given.values, given.valid)
            texts[f"{plan.request_name}:{name}"] = given.dictionary or []
        statuses: dict[str, NDArray[np.uint8]] = {}
        event_time = np.empty((n, len(plan.views)), np.int64)
        for at, (view, positions) in enumerate(zip(plan.views, plan.view_keys)):
            live = self._current(view.name)
            computer = live.computer
            words, nulls = entity_keys([keys[i] for i in positions], n, self.key_seed)
            rows, meta = self._load(live, words, times)
            status = (rows[:, 0] & np.uint64(0xFF)).astype(np.uint8)
            statuses[view.name] = np.where(nulls, np.uint8(NOT_FOUND), status)
            event_time[:, at] = np.where(nulls, np.iinfo(np.int64).min, meta[:, 2])
            for (name, dtype), (values, valid) in zip(computer.schema, computer.row_schema.decode(rows)):
                values = np.where(nulls, 0, values).astype(np.float64 if dtype in _FLOATS else np.int64)
                columns[f"{view.name}:{name}"] = (values, valid & ~nulls)
            texts.update({f"{view.name}:{name}": found for name, found in computer.dictionaries.items()})
        outputs = [
            (values, np.ones(n, np.bool_) if valid is None else valid)
            for values, valid in plan.evaluate(columns, (times, None))
        ]
        present = np.full(n, PRESENT, np.uint8)
        status = np.empty((n, len(plan.refs)), np.uint8)
        for i, ref in enumerate(plan.refs):
            status[:, i] = retrieval.cell_status(statuses.get(ref.split(":")[0], present), outputs[i][1])
        entities = table.select([name for name, _ in plan.entities])
        return OnlineResult(plan, now_us, entities, outputs, status, event_time, texts)

    def online_reader(
        self, features: str | FeatureService | Sequence[str], *, full_feature_names: bool = False
    ) -> OnlineReader:
        """A reader of a feature list into float32 rows, to be kept and used again: microseconds a read.

        Its `read(entity_rows, out=None, now=None)` gives the bits of
        `get_online_features(features, entity_rows, now=now).to_numpy()`. It sees what this store's `push`
        takes in at once, and what other processes push within a millisecond or so.

        Raises:
            InvalidArgumentError, NotFoundError, FeatureNameCollisionError: see the message.
        """

        def plan() -> ServicePlan:
            return self.service_plan(features, full_feature_names=full_feature_names)

        return OnlineReader(
            plan, self._live, self._reader_caches, self._load, self._pushes.catch_up, self._clock,
            self.key_seed,
        )  # fmt: skip

    # Pushes

    def push(self, source: str, rows: Any) -> int:
        """Take in events: reads see them at once, and they are durable when this returns.

        Late, repeated and corrected events are welcome: of a key's events the one with the latest time
        counts, of equal times the one known last, of those the one that arrived last; see `PushSource` for
        event ids.

        Args:
            source: name of a `PushSource` of a view.
            rows: dict of columns (or scalars: one row), list of dicts, pandas, polars or Arrow table with the
                columns of the source's schema. Times are datetimes, ISO 8601 texts or int microseconds UTC.

        Returns:
            How many events were taken in.

        Raises:
            NotFoundError: there is no such source.
            InvalidArgumentError: names the column, the row and what was expected; nothing has changed.
            ResourceExhaustedError: too many pushes wait for the disk; nothing has changed.
            StoreError: the disk is full or failed; the events are gone from the reads again.
        """
        return self._pushes.push(source, rows)

    def erase(self, view: str, keys: Any) -> dict[str, Any]:
        """Erase entities for good: from the log of pushed events, the online store, caches and windows.

        Rows of the source's files with these keys are left out from now on, also after a restart; the files
        stay as they are. Events that are later than the erasure count again. Every view on the same source
        loses the rows.

        Args:
            view: whose join keys name the entities.
            keys: dict of columns (or scalars: one entity), list of dicts, or a table with the join keys.

        Returns:
            A receipt: what was removed where ("removed"), what cannot be ("kept"), when, and a digest of it.

        Raises:
            NotFoundError, InvalidArgumentError: nothing has changed.
            StoreError: the disk is full or failed; erase again.
        """
        if not isinstance(view, str):
            raise InvalidArgumentError(f"view is {view!r}; expected a name")
        with self._writing:
            return erase_keys(
                self._live, self._log, self._online, self._pushes, view, keys, self.key_seed,
                self._clock.now_us(),
            )  # fmt: skip

    def ingest(
        self,
        source: str,
        stream: StreamSource,
        *,
        consumer: str | None = None,
        most: int = 1000,
        idle_s: float = 0.05,
    ) -> Ingest:
        """Push what comes in a stream, each event once, from where the last ingest of it ended.

        Args:
            source: name of a `PushSource` of a view.
            stream: see `StreamSource`.
            consumer: under which its positions are kept; the source's name by default.
            most: events of one push.
            idle_s: seconds between two looks at a stream that had nothing.

        Returns:
            The loop: `start()` runs it on a thread until `stop()`; `step()` runs it once.
        """
        self._live.fed_by(source)
        return Ingest(
            self._pushes, self._log, source, stream, consumer=consumer or source, most=most, idle_s=idle_s
        )

    def on_push(self, told: Committed) -> None:
        """Have `told` called with the rows of what was pushed, before it is acknowledged; see `Committed`."""
        self._pushes.committed = told

    # Materialisation

    def materialize(
        self,
        start: Time,
        end: Time,
        *,
        views: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> MaterializeReport:
        """Write the row that every key has at `end`, and set the cursor of each view to `end`.

        A row needs its key's whole history, so keys without an event since `start` are written too.

        Args:
            start, end: times; `start` must not be after `end`.
            views: names; all views by default.
            progress: called as the work goes on.

        Raises:
            StoreError: the disk is full or the store failed; the cursor stays where it was.
        """
        start_us, end_us = to_us(start, "start"), to_us(end, "end")
        if start_us > end_us:
            raise InvalidArgumentError(f"start is {start!r}, after end {end!r}; expected an earlier time")
        return self._materialize(writing.write_all, end_us, views, progress)

    def materialize_incremental(
        self, end: Time, *, views: Sequence[str] | None = None, progress: Progress | None = None
    ) -> MaterializeReport:
        """Bring the rows up to `end`: of each key whose row has changed since the view's cursor.

        That is a key with new events, with events that have left a window, or whose ttl has passed, and any
        row that holds no longer than to `end`. Without a cursor, every key.

        Raises:
            InvalidArgumentError: `end` is before the cursor of a view.
            StoreError: the disk is full or the store failed; the cursor stays where it was.
        """
        return self._materialize(writing.write_changed, to_us(end, "end"), views, progress)

    def _materialize(
        self, write: Any, end_us: int, views: Sequence[str] | None, progress: Progress | None
    ) -> MaterializeReport:
        if isinstance(views, str):
            raise InvalidArgumentError(f"views is {views!r}; expected a list of names")
        names = list(self.views if views is None else dict.fromkeys(views))
        with self._writing:
            keys = {}
            for name, live in {name: self._live.view(name) for name in names}.items():
                with self._pushes.writing(live):
                    keys[name] = write(self._online, live, self._pushes, end_us, progress)
            return MaterializeReport({n: len(k) for n, k in keys.items()}, keys, self.stamp())

    def cursor(self, view: str) -> int | None:
        """Time up to which a view is materialised, microseconds UTC; None if it is not."""
        live = self._live.view(view)
        header = self._online.header(live.number)
        return header.cursor_us if header is not None and header.tag == live.tag else None

    def stamp(self) -> int:
        """A number that grows with each write transaction of the online store, and with `epoch`."""
        return self.first_stamp() | self._local.stamp()

    def first_stamp(self) -> int:
        """The least stamp of this epoch."""
        return self.epoch << _STAMP_BITS


def _compile(
    name: str,
    refs: Sequence[str],
    views: Mapping[str, FeatureView],
    computers: Mapping[str, ViewComputer],
    request: RequestSource | None,
    service: FeatureService | None,
    full_feature_names: bool = False,
) -> ServicePlan:
    return compile_plan(
        name,
        refs,
        views,
        computers,
        request,
        full_feature_names=full_feature_names,
        on_missing="nan" if service is None else service.on_missing,
    )


def _diff(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    found = {name: "removed" for name in before if name not in after}
    for name, fingerprint in after.items():
        if before.get(name) != fingerprint:
            found[name] = "changed" if name in before else "added"
    return dict(sorted(found.items()))
