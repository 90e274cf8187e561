"""The feature store: one repository's definitions, their sources, the registry and the online store.

A view's source is read when the view is first used, and again when `refresh` finds it changed; the new
reading replaces the old one in one step, and readers on other threads keep the one that they started with.
The layout of a view's rows never changes while a store is open. All methods may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock import _core
from penstock.clock import SystemClock
from penstock.data_lock import lock_holder
from penstock.errors import FailedPreconditionError, InvalidArgumentError, PenstockError, StoreError
from penstock.features import materialize as writing
from penstock.features import offline, sql
from penstock.features.changes import (
    BundleFacts,
    DefinitionChanges,
    bundle_breaks,
    changes,
    declared,
    service_breaks,
    source_breaks,
)
from penstock.features.compute import ViewComputer
from penstock.features.definitions import FeatureService, FeatureView
from penstock.features.erase import erase_keys, finish_erasures
from penstock.features.event_log import EventLog
from penstock.features.live import LiveView, LiveViews
from penstock.features.materialize import MaterializeReport
from penstock.features.online import OnlineStore
from penstock.features.online_adapter import OnlineAdapter
from penstock.features.online_join import online_join
from penstock.features.plan import ServicePlan
from penstock.features.progress_bars import Progress, told_of
from penstock.features.pushes import Committed, Pushes
from penstock.features.reader import OnlineReader, ReaderCaches
from penstock.features.registry import Registry
from penstock.features.repo import Repo, load_repo
from penstock.features.retrieval import OnlineResult, RetrievalJob
from penstock.features.service_plans import ServicePlans, view_dtypes
from penstock.features.source_schema import schema_of
from penstock.features.streamed import StreamedView
from penstock.features.streams import Ingest, StreamSource
from penstock.features.times import Time, iso, to_us

if TYPE_CHECKING:
    from numpy.typing import NDArray

_log = logging.getLogger("penstock.features")
_STAMP_BITS = 40  # of a write transaction's number
_FLOATS = ("float32", "float64")


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
        self,
        repo_path: str | Path | Repo,
        *,
        data_dir: str | Path | None = None,
        clock: SystemClock | None = None,
        holds_data_dir: bool = False,
    ) -> None:
        """Open a repository; `apply` need not have run.

        Args:
            repo_path: folder with `feature_store.yaml` and Python files of definitions, or definitions that
                were read from elsewhere.
            data_dir: folder of the registry and the online store; by default that of `feature_store.yaml`.
            clock: gives `now` where a call names none.
            holds_data_dir: the caller holds the folder's LOCK, as a server does. Else `push`, `ingest`,
                `erase` and `materialize` are refused while somebody does, whose caches would not hear of it.

        Raises:
            ConfigError: there is no repository, or its `feature_store.yaml` is wrong.
            DefinitionError: a definition is wrong; the message names the file and line.
            StoreError: the registry or the online store is corrupt, or cannot be written.
        """
        self._repo = repo_path if isinstance(repo_path, Repo) else load_repo(Path(repo_path))
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
        try:
            finish_erasures(self._log, self._online)
        except StoreError as error:  # Redis, which may be away for now
            _log.warning("an erasure could not be ended: %s", error)
        self._live = LiveViews(self._repo, self._registry, self._log)
        self._pushes = Pushes(
            self._live, self._log, self._local, self._online, self._registry, self._clock,
            self._repo.push_settings,
        )  # fmt: skip
        self._reader_caches = ReaderCaches(self._repo.reader_rows)
        self._pushes.touched = self._reader_caches.touched
        self.epoch = 0
        self._holder = holds_data_dir
        self._writing = threading.Lock()  # one materialisation
        self._plans = ServicePlans(self._repo, self.computer)

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

    def plan(self, bundles: Sequence[BundleFacts] = ()) -> DefinitionChanges:
        """What `apply` would change, and what it would break; nothing is changed.

        Args:
            bundles: models whose fingerprints are compared with those that the services would have. Only
                with some of them are the sources read, as `apply` reads them.
        """
        self._registry.reload()
        breaks = service_breaks(self.services, self.views)
        schemas, faults = source_breaks((view.source for view in self.views.values()), self._repo.path)
        breaks += faults
        used = {bundle.service for bundle in bundles} & self.services.keys()
        if used:
            with self._writing, self._live.locked():
                plans, unmade = self._would_be(sorted(name for name in used if name is not None))
            breaks += bundle_breaks(bundles, self.services, plans, unmade)
        else:
            breaks += bundle_breaks(bundles, self.services, {}, {})
        return changes(self._registry.state, self._declared(), schemas, breaks)

    def _would_be(self, services: Sequence[str]) -> tuple[dict[str, ServicePlan], dict[str, str]]:
        """Plans of services as `apply` would make them, and why others cannot be made."""
        try:
            fresh = self._live.rebuild(only_look=True)
        except PenstockError as error:
            return {}, {name: str(error) for name in services}
        computers = {name: reading.computer for name, reading in fresh.items()}
        return self._plans.compile_each([self.services[name] for name in services], computers)

    def apply(self, bundles: Sequence[BundleFacts] = ()) -> DefinitionChanges:
        """Check all definitions against their sources, fit distributions anew, and record the result.

        The schemas that the sources have now are recorded; later readings are held to them. Rows of views
        that are no longer defined leave the online store. On an error nothing is recorded.
        Serving code must compile its plans again, for distributions may have changed.

        Args:
            bundles: models whose fingerprints are compared with those that the services have now.

        Returns:
            What has changed.

        Raises:
            DefinitionError, InvalidArgumentError: a view or service does not fit its sources.
        """
        with self._writing, self._live.locked():
            fresh = self._live.rebuild()
            computers = {name: reading.computer for name, reading in fresh.items()}
            dtypes = {name: view_dtypes(computer) for name, computer in computers.items()}
            plans = {name: self._plans.compile(service, computers) for name, service in self.services.items()}
            self._live.adopt(fresh)
            self._registry.reload()
            sources = {name: self.views[name].source for name in fresh}
            schemas = {s.key: schema_of(s, fresh[name].schema) for name, s in sources.items()}
            now = self._declared()
            breaks = bundle_breaks(bundles, self.services, plans, {})
            found = changes(self._registry.state, now, schemas, breaks)
            self._registry.record_applied({**now, "sources": schemas, "dtypes": dtypes})
            self._plans.forget()
            numbers = self._live.numbers()
            for number in self._online.headers():
                if number not in numbers:
                    self._online.delete_view(number)
        return found

    def _declared(self) -> dict[str, dict[str, Any]]:
        return declared(self.views, self.services, self._repo.fit_until_us)

    def service_plan(
        self, features: str | FeatureService | Sequence[str], *, full_feature_names: bool = False
    ) -> ServicePlan:
        """Compile a service, given by name or as an object, or a list of "view:feature".

        Raises:
            NotFoundError: an unknown service, view or feature.
            FeatureNameCollisionError: two features with one name.
        """
        return self._plans.get(features, full_feature_names)

    def fitting_plan(
        self, service: str, fingerprint: str | None, text_counts: Mapping[tuple[str, str], int] | None
    ) -> ServicePlan | None:
        """The plan of a service, if it fits; see `ServicePlan.fits`. Errors as `service_plan`."""
        plan = self.service_plan(service)
        if not plan.fits(fingerprint, text_counts):
            for view in plan.views:  # another process may have pushed texts that are not read yet
                self._current(view.name)
            plan = self.service_plan(service)
        return plan if plan.fits(fingerprint, text_counts) else None

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
            self._plans.forget()
        return changed

    def reread(self) -> None:
        """Take over what another process has applied: read every view in use again, with what is recorded.

        Raises:
            FailedPreconditionError, InvalidArgumentError: as `refresh`; the store keeps what it has.
        """
        self._registry.reload()
        self._live.reread()
        self._plans.forget()

    # Retrieval

    def get_historical_features(
        self,
        entity_df: Any = None,
        features: str | FeatureService | Sequence[str] = (),
        full_feature_names: bool = False,
        *,
        start_date: Time | None = None,
        end_date: Time | None = None,
        filter_by_created_timestamp: bool = False,
        known_by: NDArray[np.int64] | None = None,
        with_status: bool = False,
        with_age: bool = False,
        progress: Progress | bool | None = None,
    ) -> RetrievalJob:
        """Features as they were at each row's time.

        A source that takes more memory than `join.memory_bytes` of `feature_store.yaml` (by default a quarter
        of the machine's) is not held: the job reads it in batches, keeps the rows whose keys are asked for,
        and joins these part by part, by way of a file in `join.spill_dir` where they do not fit either. The
        result is the same in every bit. A view that is in memory already is used as it is.

        Args:
            entity_df: pandas, Arrow or polars table of N rows with `event_timestamp` (or one time column),
                the join keys and the request inputs; or a SELECT that gives them, run by DuckDB in the
                repository's folder; or None: every key with an event in [`start_date`, `end_date`], as of
                `end_date`.
            features: "view:feature" names, a service or its name.
            full_feature_names: name columns "view__feature".
            start_date, end_date: of a snapshot; by default `end_date` minus the longest ttl, and now.
            filter_by_created_timestamp: leave out events that became known after the row's time.
            known_by: int64[N], microseconds; leave out events that became known after these times instead.
            with_status: append `<feature>__status` to each feature.
            with_age: append `<feature>__age`, microseconds from the event behind the cell to the row's time.
            progress: called with a view, and the rows joined and to join, while the job runs (with none
                joined while a source is read in batches); or true, for bars on standard error.

        Returns:
            A job; `to_df()`, `to_arrow()` and `to_polars()` give the N rows in order, with the features.

        Raises:
            InvalidArgumentError, NotFoundError, FeatureNameCollisionError: see the message.
        """
        if not features:
            raise InvalidArgumentError("features is empty; expected a service or a list of 'view:feature'")
        used: dict[str, ViewComputer | StreamedView] = {}

        def of(view: str) -> ViewComputer | StreamedView:
            if view not in used:
                used[view] = self._live.for_join(view)
            return used[view]

        plan = self._plans.get(features, full_feature_names, of)
        computers = {view.name: of(view.name) for view in plan.views}
        if isinstance(entity_df, str):
            entity_df = sql.query_table(entity_df, self._repo.path, "entity_df")
        table = offline.asked_rows(entity_df, plan, computers, start_date, end_date, self._clock.now_us)

        join = partial(
            offline.historical_join, table, plan, computers, self.key_seed, known_by=known_by,
            filter_by_created_timestamp=filter_by_created_timestamp,
            with_status=with_status, with_age=with_age,
        )  # fmt: skip
        return RetrievalJob(told_of(lambda told: join(progress=told), progress))

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
        return online_join(plan, entity_rows, now_us, self.key_seed, self._current, self._load)

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
            plan, self._live, self._reader_caches, None if self._online is self._local else self._load,
            self._pushes.catch_up, self._clock, self.key_seed,
        )  # fmt: skip

    # Pushes

    def _check_free(self) -> None:
        found = None if self._holder else lock_holder(self.data_dir)
        if found is not None:
            where = f"at {', '.join(found['listen'])}" if found["listen"] else f"in process {found['pid']}"
            raise FailedPreconditionError(
                f"data_dir {self.data_dir} is served {where}; push, erase and materialize through that server"
            )

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
            FailedPreconditionError: a server holds the data folder; push through it.
            InvalidArgumentError: names the column, the row and what was expected; nothing has changed.
            ResourceExhaustedError: too many pushes wait for the disk; nothing has changed.
            StoreError: the disk is full or failed; the events are gone from the reads again.
            InternalError: they are durable, but who was to be told of them (`on_push`) failed, and is told
                again until it does not. Do not push them again.
        """
        self._check_free()
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
        self._check_free()
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
        self._check_free()
        self._live.fed_by(source)
        return Ingest(
            self._pushes, self._log, source, stream, consumer=consumer or source, most=most, idle_s=idle_s
        )

    def on_push(self, told: Committed, lost: Committed | None = None) -> None:
        """Have `told` called with the rows of what was pushed, before it is acknowledged; see `Committed`.

        `lost` (by default `told`) is called with the rows of events that reads saw and that did not become
        durable, as they are without them. The stamp is then the same as while they were seen.
        """
        self._pushes.committed, self._pushes.lost = told, lost or told

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
            FailedPreconditionError: a server holds the data folder; materialize through it.
            StoreError: the disk is full or the store failed; the cursor stays where it was.
        """
        start_us, end_us = to_us(start, "start"), to_us(end, "end")
        if start_us > end_us:
            raise InvalidArgumentError(
                f"start is {iso(start_us)}, after end {iso(end_us)}; expected an earlier time"
            )
        return self._materialize(writing.write_all, end_us, views, progress)

    def materialize_incremental(
        self, end: Time, *, views: Sequence[str] | None = None, progress: Progress | None = None
    ) -> MaterializeReport:
        """Bring the rows up to `end`: of each key whose row has changed since the view's cursor.

        That is a key with new events, with events that have left a window, or whose ttl has passed, and any
        row that holds no longer than to `end`. Without a cursor, every key.

        Raises:
            FailedPreconditionError: a server holds the data folder; materialize through it.
            InvalidArgumentError: `end` is before the cursor of a view.
            StoreError: the disk is full or the store failed; the cursor stays where it was.
        """
        return self._materialize(writing.write_changed, to_us(end, "end"), views, progress)

    def _materialize(
        self, write: Any, end_us: int, views: Sequence[str] | None, progress: Progress | None
    ) -> MaterializeReport:
        if isinstance(views, str):
            raise InvalidArgumentError(f"views is {views!r}; expected a list of names")
        self._check_free()
        names = list(self.views if views is None else dict.fromkeys(views))
        with self._writing:
            keys = {}
            for name, live in {name: self._live.view(name) for name in names}.items():
                with self._pushes.writing(live) as newest:
                    keys[name] = write(self._online, newest, self._pushes, end_us, progress)
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
