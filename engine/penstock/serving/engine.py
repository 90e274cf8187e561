"""The engine: feature store, caches, models and monitors of one process, behind one object.

`predict` runs on the caller's thread through the same native path as the socket's. Beside it run the native
executors, a loader thread (what the caches lack) and a monitor thread (what was served). Any thread may call.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock import _core
from penstock.clock import SystemClock
from penstock.config import Config, ModelConfig, load_config
from penstock.data_lock import DataDirLock
from penstock.errors import (
    BundleError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    StoreError,
    from_wire,
)
from penstock.features.erase import sealed
from penstock.features.push_commit import Touched
from penstock.features.store import FeatureStore
from penstock.models.bundle import load_bundle
from penstock.models.registry import ModelRegistry
from penstock.monitoring.record_log import RecordLog
from penstock.monitoring.served_log import ServedLog
from penstock.serving import protocol
from penstock.serving.filler import CacheFiller
from penstock.serving.labels import Labels
from penstock.serving.live import LiveModel, LiveModels
from penstock.serving.methods import call_method
from penstock.serving.precomputer import Precomputer
from penstock.serving.protocol import Prediction, PredictionBatch, Time
from penstock.serving.refresher import Refresher
from penstock.serving.telemetry import Telemetry
from penstock.serving.trials import Trials

_log = logging.getLogger("penstock.serving")
_LOADER_WAIT_S = 0.2
_REFRESH_WAIT_S = 0.05  # the loader looks this often for rows to read ahead
_MONITOR_WAIT_S = 0.02  # at a million rows a second the ring of served rows is full in three of these
_open_engines: set[Engine] = set()


@atexit.register
def _close_all() -> None:
    """Close what a program left open: no thread may meet the interpreter's end in native code."""
    for engine in list(_open_engines):
        engine.close()


class Engine:
    """Serves the models of a configuration in this process.

    Raises (when made):
        ConfigError, BundleError, StoreError: what cannot be served, by name.
        FailedPreconditionError: another engine holds `data_dir`.
    """

    worker = 0  # index of this process among those that serve together

    def __init__(self, config: Config, *, clock: SystemClock | None = None) -> None:
        self.config = config
        self.clock = clock or SystemClock()
        self.started_ns = time.monotonic_ns()
        self.ready = False
        self.lock = self._take_lock()
        self.core = self._new_core()
        self.store: FeatureStore | None = None
        self._changing = threading.RLock()  # one change of models or sources at a time
        self._generation = 0  # of the sources: rows read under an older one are read again
        self._filling = threading.Lock()
        self._closing = threading.Event()
        self.monitor_errors = self.refresh_errors = 0
        self.telemetry = self._new_telemetry()
        self._threads: list[threading.Thread] = []
        _open_engines.add(self)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_config(cls, path: str | Path, *, clock: SystemClock | None = None) -> Engine:
        """An engine of `inference-config.yaml`; ConfigError lists every fault with its line."""
        return cls(load_config(path), clock=clock)

    def _open(self) -> None:
        config = self.config
        if config.feature_store.repo_path is not None:
            self.store = FeatureStore(
                config.feature_store.repo_path,
                data_dir=config.data_dir,
                clock=self.clock,
                holds_data_dir=True,
            )
        self.registry = ModelRegistry(config.data_dir / "models", config.data_dir / "registry")
        self._open_logs()
        self.live = LiveModels(config, self.core, self.store, self.served_log, self.clock, self.worker)
        self.trials = Trials(config, self.live, self.registry, self.clock)
        self.labels = Labels(self.live, self.served_log, self.label_log, self.clock)
        self.filler = CacheFiller(self.live, self.clock, self._filling)
        self.precomputer = Precomputer(self.live, self._changing)
        self.refresher = Refresher(self.live.caches, self._load_ahead, self.clock, self.live.cache_owner)
        self._prepare()
        self._deploy_all()
        self._replay_logs()
        for target in (self._run_loader, self._run_monitor):
            thread = threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True)
            thread.start()
            self._threads.append(thread)
        if self.store is not None:
            self.store.on_push(self._pushed, self._lost)
            if self.config.caches.edge.precompute:
                run = self.precomputer.run
                thread = threading.Thread(target=run, args=(self._closing,), name="precompute", daemon=True)
                thread.start()
                self._threads.append(thread)
        self.telemetry.start()
        self.ready = True

    # What a process among several does in another way

    def _take_lock(self) -> DataDirLock | None:
        return DataDirLock(self.config.data_dir)

    def _new_telemetry(self) -> Telemetry:
        return Telemetry(self.config, self.stats)

    def _new_core(self) -> _core.ServingCore:
        return _core.ServingCore()

    def _open_logs(self) -> None:
        config, settings = self.config, self.config.monitoring
        self.served_log = ServedLog(
            config.data_dir / "log",
            flush_us=round(settings.log_flush * 1e6),
            max_bytes=settings.log_bytes,
        )
        self.label_log = RecordLog(config.data_dir / "log", "labels")

    def _prepare(self) -> None:
        """Before the models are loaded."""

    def _deploy_all(self) -> None:
        for name, model in self._configured().items():
            self.live.publish(self._deploy(name, model))
        self.trials.restore()

    def _configured(self) -> dict[str, ModelConfig]:
        if self.config.models:
            return dict(self.config.models)
        return {info.name: ModelConfig() for info in self.registry.list()}

    def _deploy(self, name: str, settings: ModelConfig) -> LiveModel:
        """Load what the configuration asks for. A bundle not seen before becomes the champion once loaded."""
        if settings.path is not None:
            bundle = load_bundle(settings.path)
            if bundle.name != name:
                raise BundleError(f"bundle {settings.path} is of model '{bundle.name}'; expected '{name}'")
            if bundle.version not in [info.version for info in self.registry.list() if info.name == name]:
                model = self.live.load(bundle)
                try:
                    self.registry.add(settings.path)
                    self.registry.promote(name, bundle.version)
                except BaseException:
                    model.stop()
                    raise
                return model
            self.registry.add(settings.path)  # refuses other content under a known version
        # A promotion that was acknowledged outlives a restart, whatever the path still says.
        return self.live.load(self.registry.get(name, settings.version))

    def _replay_logs(self) -> None:
        self.labels.replay()

    # Threads

    def _run_loader(self) -> None:
        ahead = self.config.caches.features.refresh_ahead > 0 and self.store is not None
        while not self._closing.is_set():
            wait = self.refresher.wait_s(_REFRESH_WAIT_S) if ahead else _LOADER_WAIT_S
            misses = self.core.wait_misses(wait)
            if misses is not None:
                try:
                    self._load_misses(misses)
                except Exception as error:  # a store that failed is UNAVAILABLE, never NaN
                    self.core.fail_misses(misses, "UNAVAILABLE", f"the feature store failed: {error}")
            if ahead:
                try:
                    self.refresher.run()
                except Exception:  # the rows serve to their end, and are then loaded for a request
                    self.refresh_errors += 1
                    _log.exception("rows could not be read ahead")

    def _load_ahead(
        self, view: str, keys: NDArray[np.uint64], now_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64], int]:
        store = self._store()
        stamp = store.stamp()
        return (*store.load_rows(view, keys, now_us), stamp)

    def _load_misses(self, misses: _core.MissBatch) -> None:
        store = self.store
        if store is None:
            raise StoreError("there is no feature store")
        while True:
            generation = self._generation
            stamp = store.stamp()
            rows = [
                store.load_rows(view, keys, now_us) if len(keys) else _no_rows(self.live.caches[view])
                for view, keys, now_us in misses.views
            ]
            with self._filling:
                if generation == self._generation:
                    self.core.finish_misses(misses, rows, stamp)
                    return

    def _run_monitor(self) -> None:
        while not self._closing.wait(_MONITOR_WAIT_S):
            try:
                self._monitor()
            except Exception:  # what one batch of rows breaks must not end the watch over the next
                self.monitor_errors += 1
                _log.exception("the monitor failed on a batch of served rows")

    def _monitor(self) -> None:
        self._drain_models()
        self.served_log.flush(self.clock.mono_ns() // 1000)

    def drain_served(self) -> None:
        """Take every row served so far into the monitors and the log."""
        self._drain_models()

    def _drain_models(self) -> None:
        for model in self.live.all():
            model.drain()
        self.telemetry.take(self.live.all())

    # Prediction

    def predict(
        self,
        model: str,
        entities: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        *,
        deadline_ms: float | None = None,
        now: Time | None = None,
        request_id: Any = None,
        priority: str | None = None,
        timings: bool = False,
        no_cache: bool = False,
        traceparent: str | None = None,
    ) -> Prediction:
        """Score the rows of `entities` (columns of scalars or lists) and request `inputs`.

        Raises InvalidArgumentError, NotFoundError, DeadlineExceededError, ResourceExhaustedError,
        UnavailableError.
        """
        params = protocol.predict_params(
            model,
            entities,
            inputs,
            now=now,
            request_id=request_id,
            priority=priority,
            timings=timings,
            no_cache=no_cache,
            traceparent=traceparent,
        )
        if deadline_ms is not None:
            params[3]["deadline_ms"] = protocol.check_deadline(deadline_ms)
        return self._call(False, protocol.pack_predict(params), timings)

    def predict_vectors(
        self,
        model: str,
        rows: Any,
        *,
        deadline_ms: float | None = None,
        request_id: Any = None,
        timings: bool = False,
        traceparent: str | None = None,
    ) -> Prediction:
        """Score final model inputs, float32 [n, F] in the order of the bundle's inputs."""
        call = protocol.predict_vectors_call(
            model,
            rows,
            deadline_ms=deadline_ms,
            request_id=request_id,
            timings=timings,
            traceparent=traceparent,
        )
        return self._call(True, call.packed_params(), timings)

    def predict_many(
        self, model: str, table: Any, *, deadline_ms: float | None = None, now: Time | None = None
    ) -> PredictionBatch:
        """Score a table (columns of entities and inputs) in chunks of the low priority class."""
        columns = protocol.to_columns("table", table)
        rows = self.config.serving.max_batch_size
        live = self.live.get(model)
        parts = [
            self.predict(model, entities, inputs, deadline_ms=deadline_ms, now=now, priority="low")
            for entities, inputs in protocol.split_table(columns, live.entities(), rows)
        ]
        return protocol.join_predictions(parts)

    async def predict_async(
        self, model: str, entities: Mapping[str, Any], *args: Any, **options: Any
    ) -> Prediction:
        """As `predict`, on a thread of the running loop's executor."""
        return await asyncio.to_thread(self.predict, model, entities, *args, **options)

    def _call(self, vectors: bool, params: bytes, timings: bool) -> Prediction:
        got = self.core.call(vectors, params, timings)
        if len(got) == 3:
            code, message, retry_after_ms = got
            wire = {"code": code, "message": message}
            if retry_after_ms is not None:
                wire["retry_after_ms"] = retry_after_ms
            raise from_wire(wire)
        return Prediction(*got)

    # State

    def promote(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Make `version` (default: the challenger) the champion, durably, and serve it. Ends a trial."""
        with self._changing:
            live = self.live.get(name)
            bundle = self.registry.get(name, version or "challenger")
            if bundle.version != live.bundle.version:
                live = self.live.warm(name, bundle.version) or self.live.load(bundle)
            with self.live.publishing(live):
                self.registry.promote(name, bundle.version)
            return {"model": name, "version": bundle.version}

    def rollback(self, name: str) -> dict[str, Any]:
        """Serve the champion before this one again. Ends a trial."""
        with self._changing:
            self.live.get(name)
            bundle = self.registry.get(name, "previous")
            model = self.live.warm(name, bundle.version) or self.live.load(bundle)
            with self.live.publishing(model):
                self.registry.rollback(name)
            return {"model": name, "version": bundle.version}

    def canary(self, name: str, version: str | None = None, *, share: float) -> dict[str, Any]:
        """Have `version` (default: the challenger) answer `share` (0 to 1) of the sticky keys; 0 ends it.

        A sticky key is the entities of a request's first row, or that row of bare vectors: one key is
        answered by the same version as long as the trial lasts, and a greater share keeps those it had. The
        trial outlives a restart; another champion ends it.

        Raises InvalidArgumentError, NotFoundError, FailedPreconditionError, BundleError.
        """
        with self._changing:
            return self.trials.change("canary", name, version, share)

    def shadow(self, name: str, version: str | None = None, *, share: float) -> dict[str, Any]:
        """As `canary`, but the champion answers: `version` scores the rows it answered too, unseen.

        It must have the champion's features. What it has no room for it leaves out, counted.
        """
        with self._changing:
            return self.trials.change("shadow", name, version, share)

    def materialize(self, end: Time | None = None, views: Sequence[str] | None = None) -> dict[str, Any]:
        """Bring the online store up to `end` (default: now); reads sources that changed again."""
        store = self._store()
        if views is not None and not isinstance(views, list | tuple):
            raise InvalidArgumentError(f"views is {views!r}; expected a list of names")
        with self._changing:
            self._refresh(store)
            end_us = self.clock.now_us() if end is None else protocol.to_micros(end, "end")
            report = store.materialize_incremental(end_us, views=views)
            for view, keys in report.keys.items():
                self.filler.refill(store, view, keys, end_us)
            for model in self.live.live.values():
                self.live.precompute(model, now_us=end_us)
            return {"end_us": end_us, "rows": dict(report.rows)}

    def push(self, source: str, rows: Any) -> int:
        """Take in events of a push source; they are durable and served when this returns. How many they are.

        `rows`: columns, a list of mappings, or a frame; see `FeatureStore.push`, whose errors this raises.
        """
        return self._store().push(source, rows)

    def erase(self, view: str, keys: Any) -> dict[str, Any]:
        """Erase entities; see `FeatureStore.erase`. The caches of all workers are emptied, so none has them.

        The receipt says what cannot be attributed to an entity: rows of the served log, for instance.
        """
        store = self._store()
        with self._changing:
            try:
                receipt = store.erase(view, keys)
            except BaseException as error:
                if not isinstance(error, InvalidArgumentError | NotFoundError):  # it may have erased already
                    self._refresh(store, always=True)
                raise
            rows = sum(int(cache.stats()["size"]) for cache in self.live.caches.values())
            self._refresh(store, always=True)
            receipt["removed"]["cache_rows_dropped"] = rows
            receipt["kept"] += [
                "rows of the served log and labels: they carry request ids and features, no keys",
                "frequent inputs kept for the edge cache, in memory until their model's version ends",
            ]
            return sealed(receipt)

    def _lost(self, touched: Touched) -> None:
        """Events that were seen did not become durable. A load that saw them has the stamp of now, so the
        rows without them get a later one."""
        self._pushed(touched, later=1)

    def _pushed(self, touched: Touched, later: int = 0) -> None:
        """Put the rows of pushed events into the caches in place of the older ones. On the push thread."""
        self.filler.put_pushed(self._store(), touched, later)
        self.precomputer.note_change()

    def apply(self) -> dict[str, Any]:
        """Record the definitions, fit distributions anew, and read sources that changed again.

        A model whose features are then no longer those of its training is not served any more ("retired").
        "fingerprints" are those of the definitions that were read when the engine started.
        """
        store = self._store()
        with self._changing:
            changes = store.apply()
            self._refresh(store, always=True)
            retired = self.live.retire_strangers()
            self.trials.note_ended()
            found = {"views": changes.views, "services": changes.services, "retired": retired}
            views = {name: view.fingerprint() for name, view in store.views.items()}
            services = {name: service.fingerprint() for name, service in store.services.items()}
            return {**found, "fingerprints": {"views": views, "services": services}}

    def _refresh(self, store: FeatureStore, *, always: bool = False) -> None:
        if store.refresh() or always:
            with self._filling:
                self._generation += 1
                store.epoch = self._next_epoch()
                self.live.clear_caches(store.first_stamp())

    def _next_epoch(self) -> int:
        return self._generation

    def _store(self) -> FeatureStore:
        if self.store is None:
            raise FailedPreconditionError("there is no feature store; set feature_store.repo_path")
        return self.store

    def label(self, request_ids: Any, labels: Any, times: Any = None) -> dict[str, int]:
        """Join labels (0 or 1) by request id; they are on disk when this returns. Counts by outcome."""
        checked = self.labels.check(request_ids, labels, times)
        self.drain_served()
        return self.labels.take(*checked)

    def health(self) -> dict[str, Any]:
        from penstock import __version__

        return {
            "ready": self.ready,
            "penstock": __version__,
            "uptime_s": (time.monotonic_ns() - self.started_ns) / 1e9,
            "models": {name: model.bundle.version for name, model in self.live.live.items()},
        }

    def models(self) -> dict[str, Any]:
        """Live models by name, and every version and alias that the registry holds."""
        versions: dict[str, list[str]] = {}
        for info in self.registry.list():
            versions.setdefault(info.name, []).append(info.version)
        described = {}
        for name, model in self.live.live.items():
            described[name] = {
                **model.describe(),
                "versions": versions.get(name, []),
                "aliases": self.registry.aliases(name),
                **self.trials.describe(name),
            }
        return described

    def stats(self) -> dict[str, Any]:
        """Counters, batch sizes and latency quantiles by model, label metrics, and the caches' counters."""
        self.drain_served()
        models = {}
        window_us = int(self.config.monitoring.window * 1e6)
        for name, model in self.live.live.items():
            entry = dict(model.served.stats())
            entry["batches"] = {str(rows): runs for rows, runs in entry["batches"].items()}
            entry["version"] = model.bundle.version
            entry["limit_ms"] = self.config.serving.max_latency_ms
            if model.performance is not None:
                entry["performance"] = model.performance.metrics(
                    model.newest_us or self.clock.now_us(), window_us
                )
            models[name] = {**entry, **self.trials.stats(name)}
        return {
            "models": models,
            "models_memory": self.live.memory(),
            "caches": {name: cache.stats() for name, cache in self.live.caches.items()},
            "served_log": self.served_log.stats(),
            "refresh": {**self.refresher.stats(), "errors": self.refresh_errors + self.precomputer.errors},
            "monitor_errors": self.monitor_errors,
            **self.telemetry.stats(),
        }

    def drift(
        self, name: str | None = None, window_s: float | None = None, end: Time | None = None
    ) -> dict[str, Any]:
        """Drift and freshness by live model (or of one) over `window_s` seconds of request time up to `end`.

        Defaults: the whole of `monitoring.window`, up to the newest row served.
        """
        self.drain_served()
        if window_s is not None and (type(window_s) not in (int, float) or not 0 < window_s < 1e12):
            raise InvalidArgumentError(f"window_s is {window_s!r}; expected seconds, more than 0")
        window_us = None if window_s is None else round(window_s * 1e6)
        end_us = None if end is None else protocol.to_micros(end, "end")
        reports = {}
        for each in [*self.live.live] if name is None else [name]:
            model = self.live.get(each)
            reports[each] = {
                **model.watched(end_us, window_us),
                **self.trials.drift(each, end_us, window_us),
            }
        return reports

    def features(self, features: Any, entities: Mapping[str, Any], now: Time | None = None) -> dict[str, Any]:
        """Online values of a feature service, or of a list of "view:feature"."""
        columns = protocol.to_columns("entities", entities)
        rows = {name: v if isinstance(v, list) else [v] for name, v in columns.items()}
        when = None if now is None else protocol.to_micros(now)
        result = self._store().get_online_features(features, rows, now=when)
        return {"columns": result.to_dict(), "status": result.statuses()}

    # Life

    def drain(self) -> None:
        """Refuse new work; what is in flight goes on."""
        self.ready = False
        self.core.drain()

    def close(self) -> None:
        """Stop everything and write what is buffered. Idempotent."""
        if self._closing.is_set():
            return
        self.drain()
        self._closing.set()
        _open_engines.discard(self)
        self.telemetry.stop_scrapes()
        self.core.close()
        for thread in self._threads:
            thread.join()
        if self._opened("live"):
            self.live.stop()
            self.telemetry.take(self.live.all())
        self.telemetry.close()
        for part in ("served_log", "label_log", "store"):
            if self._opened(part):
                getattr(self, part).close()
        if self.lock is not None:
            self.lock.release()

    def _opened(self, part: str) -> bool:
        """Whether `_open` came that far."""
        return getattr(self, part, None) is not None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # The socket's other methods

    def call(self, method: str, params: list[Any], *, admin: bool = True) -> Any:
        """Run a method of the wire that is not a predict call, with its decoded params."""
        return call_method(self, method, params)


def _no_rows(cache: _core.FeatureCache) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    return np.empty((0, cache.row_words), np.uint64), np.empty((0, 4), np.int64)
