"""The live model versions: what each consists of, how one is loaded, and how another takes its place.

A version is loaded and warmed before it is live; it goes live by one pointer swap in the native core. The
version before it stays warm, so that a rollback is one swap too; the one before that is stopped. All of them
together stay within `caches.models.memory`: previous versions are dropped to make room for a new one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock import _core
from penstock.clock import SystemClock
from penstock.config import Config, ModelConfig
from penstock.errors import BundleError, FailedPreconditionError, NotFoundError, PenstockError
from penstock.features.plan import ServicePlan
from penstock.features.store import FeatureStore
from penstock.models import backends
from penstock.models.bundle import ModelBundle
from penstock.models.child import ChildSettings
from penstock.monitoring.drift import DriftMonitor
from penstock.monitoring.freshness import FreshnessMonitor
from penstock.monitoring.performance import PerformanceTracker
from penstock.monitoring.served_log import ServedLog
from penstock.monitoring.vector_log import VectorLog

_IDLE_POLL_S = 0.001
_PRECOMPUTE_S = 5.0  # beside a busy lane, which goes first
SHADOW_ROW = 0x80  # in a row's status: a shadow scored it, unseen (csrc/engine/served_model.h)
_DRAIN_ROWS = 1024  # at once: no step over them may hold the loop thread up for long


@dataclass
class LiveModel:
    """A loaded version. `plan` is None for a model on bare vectors, `performance` unless it scores 0 to 1."""

    bundle: ModelBundle
    plan: ServicePlan | None
    served: _core.ServedModel
    backend: backends.Backend
    isolation: str
    lane_bytes: int
    drift: DriftMonitor
    freshness: FreshnessMonitor
    performance: PerformanceTracker | None
    log: ServedLog
    ring_rows: int  # that `served` holds for the monitors
    newest_us: int | None = None  # request time of the newest row served
    forward: Callable[[LiveModel, tuple[Any, ...]], None] | None = None  # instead of the monitors here
    unseen: PerformanceTracker | None = None  # of the rows that it scored as a shadow
    vectors: VectorLog | None = None  # of a sample of what it was given
    _draining: threading.Lock = field(default_factory=threading.Lock)

    def memory_bytes(self) -> int:
        """What it takes of memory: the model (see `backends.Backend`) and the buffers of its lane."""
        return self.backend.bytes_now() + self.lane_bytes

    def finish(self, seconds: float) -> None:
        """Stop a version that gets no new requests, once it has answered all, `seconds` from now at most."""
        until = time.monotonic() + seconds
        while not self.served.idle() and time.monotonic() < until:
            time.sleep(_IDLE_POLL_S)
        self.stop()

    def stop(self) -> None:
        """End what is unanswered, stop the lane and the model, and take in the last rows. Idempotent."""
        self.served.stop()
        self.backend.close()
        self.drain()

    def drain(self) -> None:
        """Take every row served so far into the monitors and the log. Any thread.

        Drift is native and has counted them then. At most as many as can have waited: those that come
        meanwhile, perhaps faster than they are taken, must not keep it from ending.
        """
        with self._draining:
            if self.vectors is not None:
                self.vectors.take(self.bundle, self.served)
            for _ in range(-(-self.ring_rows // _DRAIN_ROWS)):
                part = self.served.drain(_DRAIN_ROWS)
                if not len(part[0]):
                    return
                if self.forward is None:
                    self.take_in(*part)
                else:
                    self.forward(self, part)

    def take_in(
        self,
        ids: NDArray[np.uint64],
        now_us: NDArray[np.int64],
        rows: NDArray[np.float32],
        scores: NDArray[np.float64],
        status: NDArray[np.uint8],
        event_time: NDArray[np.int64],
        *,
        counted: bool = True,
    ) -> None:
        """Take served rows, as `_core.ServedModel.drain` gives them, into the monitors and the log.

        `counted`: they are in the drift counts already, as those of this process are.
        """
        shadow = (status & SHADOW_ROW) != 0
        if event_time.shape[1]:
            self.freshness.add(now_us, event_time, status & np.uint8(SHADOW_ROW - 1))
        newest = int(now_us.max())
        self.newest_us = newest if self.newest_us is None else max(self.newest_us, newest)
        first = np.ascontiguousarray(scores[:, 0])
        if not counted:
            self.drift.add(now_us, rows, first)
        for tracker, mine in ((self.performance, ~shadow), (self.unseen, shadow)):
            if tracker is not None and mine.any():
                tracker.record(ids[mine], now_us[mine], first[mine], self.bundle.version)
        self.log.append(
            self.bundle.name,
            self.bundle.version,
            [name for name, _ in self.bundle.inputs],
            ids,
            now_us,
            rows,
            first,
            status,
        )

    def watched(self, end_us: int | None, window_us: int | None) -> dict[str, Any]:
        """What `drift` says of it: of `window_us` of request time up to `end_us`."""
        return {
            "version": self.bundle.version,
            "drift": self.drift.report(end_us=end_us, window_us=window_us).to_dict(),
            "freshness": self.freshness.report(end_us=end_us, window_us=window_us).to_dict(),
        }

    def entities(self) -> list[str]:
        """The entity columns of a request; none for a model on bare vectors."""
        return [] if self.plan is None else [name for name, _ in self.plan.entities]

    def describe(self) -> dict[str, Any]:
        """What `models` says of it."""
        return {
            "version": self.bundle.version,
            "backend": backends.describe(self.bundle, self.isolation),
            "memory_bytes": self.memory_bytes(),
            "service": self.bundle.service,
            "entities": self.entities(),
            "inputs": [] if self.plan is None else [list(pair) for pair in self.plan.inputs],
            "features": [list(pair) for pair in self.bundle.inputs],
            "output": {"kind": self.bundle.output_kind, "classes": list(self.bundle.classes or [])},
            "fingerprint": self.bundle.fingerprint,
            "metrics": dict(self.bundle.metrics),
        }


@dataclass(frozen=True)
class LiveTrial:
    """A version on trial: a "canary" answers `share` of the sticky keys, a "shadow" scores them unseen."""

    model: LiveModel
    mode: str
    share: float


class LiveModels:
    """The live version of each model name, the one before it, and the feature caches that they share.

    Reads from any thread; the engine lets one thread change it at a time.
    """

    def __init__(
        self,
        config: Config,
        core: _core.ServingCore,
        store: FeatureStore | None,
        log: ServedLog,
        clock: SystemClock,
        worker: int = 0,
    ) -> None:
        self._config, self._core, self._store, self._log = config, core, store, log
        skew = config.monitoring.skew
        self.vectors = VectorLog(config.data_dir / "log", worker, skew.log_bytes) if skew.share else None
        self._clock = clock
        self.new_cache: Callable[[str, int], _core.FeatureCache] = self._private_cache  # (view, row words)
        self.cache_owner = 0
        self.counts_drift = True  # of what this process serves; not where rows are forwarded
        self.live: dict[str, LiveModel] = {}
        self.previous: dict[str, LiveModel] = {}  # the one least recently live comes first
        self.performance: dict[str, PerformanceTracker] = {}  # by name: its versions share it
        self.unseen: dict[str, PerformanceTracker] = {}  # by name, of the rows that shadows scored
        self.trials: dict[str, LiveTrial] = {}
        self.caches: dict[str, _core.FeatureCache] = {}  # by view

    def get(self, name: str) -> LiveModel:
        """The live version of `name`; NotFoundError names those that are loaded."""
        found = self.live.get(name) if isinstance(name, str) else None
        if found is None:
            known = ", ".join(sorted(self.live)) or "none is loaded"
            raise NotFoundError(f"model '{name}' is unknown; expected one of: {known}")
        return found

    def all(self) -> list[LiveModel]:
        """Live and previous versions, and those on trial."""
        tried = [trial.model for trial in list(self.trials.values())]
        return [*list(self.live.values()), *list(self.previous.values()), *tried]

    def load(self, bundle: ModelBundle) -> LiveModel:
        """Load and warm a version; it is not live yet. Previous versions are dropped if it needs their room.

        Raises:
            BundleError: its features are not those of the store, or its files do not fit each other.
            FailedPreconditionError: its backend is not there or does not start, or there is no room for it.
        """
        serving, monitoring = self._config.serving, self._config.monitoring
        plan = self._plan(bundle)
        settings = self._config.models.get(bundle.name, ModelConfig())
        lane_bytes = self._lane_bytes(bundle, 0 if plan is None else len(plan.views))
        self._check_room(bundle, backends.expected_bytes(bundle) + lane_bytes)
        native_plan = None if plan is None else self._native_plan(plan, settings.on_missing)
        backend = backends.open_backend(
            bundle,
            threads=settings.threads,
            isolation=settings.isolation,
            settings=ChildSettings(**settings.process.model_dump()),
        )
        served: _core.ServedModel | None = None
        try:
            served = self._core.load(
                bundle.name,
                bundle.version,
                backend.model,
                native_plan,
                max_batch_rows=serving.max_batch_size,
                max_latency_ms=serving.max_latency_ms,
                guard_ms=min(serving.guard_ms, serving.max_latency_ms / 4),
                inline_limit_us=serving.inline_limit_us,
                max_rows_per_request=serving.max_rows_per_request,
                max_requests=serving.max_requests,
                max_queued_rows=serving.max_queued_rows,
                allow_replay=serving.allow_replay,
                served_capacity=monitoring.ring_rows,
                low_share=serving.low_share,
                breaker_timeout_ms=serving.breaker_timeout_ms,
                breaker_probe_ms=serving.breaker_probe_ms,
                breaker_failures=serving.breaker_failures,
                edge=self._edge(),
                sample_share=monitoring.skew.share,
                sample_bytes=monitoring.skew.memory,
            )
            self._make_room(bundle, backend.bytes_now() + lane_bytes)
        except BaseException as error:
            if served is not None:
                served.stop()
            backend.close()
            if isinstance(error, ValueError):
                raise BundleError(f"model '{bundle.name}' version {bundle.version}: {error}") from error
            raise
        pane_us, window_us = int(monitoring.pane * 1e6), int(monitoring.window * 1e6)
        performance = None
        if bundle.output_kind == "probability":
            performance = self._tracker(self.performance, bundle.name)
        views = {} if plan is None else dict(zip(plan.view_names, (view.ttl_us for view in plan.views)))
        drift = DriftMonitor(bundle.reference, pane_us=pane_us, window_us=window_us)
        if self.counts_drift:
            served.count_drift(drift.panes)
        if monitoring.tracing is not None:
            served.trace(monitoring.tracing.capacity)
        return LiveModel(
            bundle,
            plan,
            served,
            backend,
            settings.isolation,
            lane_bytes,
            drift,
            FreshnessMonitor(views, pane_us=pane_us, window_us=window_us),
            performance,
            self._log,
            monitoring.ring_rows,
            vectors=None if plan is None else self.vectors,
        )

    def _tracker(self, trackers: dict[str, PerformanceTracker], name: str) -> PerformanceTracker:
        if name not in trackers:
            monitoring = self._config.monitoring
            trackers[name] = PerformanceTracker(
                capacity=monitoring.label_capacity,
                pane_us=int(monitoring.pane * 1e6),
                horizon_us=int(monitoring.window * 1e6),
                bins=monitoring.score_bins,
            )
        return trackers[name]

    def check_trial(self, bundle: ModelBundle, mode: str) -> None:
        """Raises FailedPreconditionError if a version cannot be tried beside the live one of its name."""
        live = self.get(bundle.name).bundle
        where = f"version '{bundle.version}' of model '{bundle.name}'"
        if bundle.version == live.version:
            raise FailedPreconditionError(f"{where} is live; expected another one")
        if mode == "shadow" and not self._same_features(bundle, live):
            raise FailedPreconditionError(
                f"{where} has features of fingerprint {bundle.fingerprint}; a shadow needs those of the live "
                f"version, {live.fingerprint}"
            )
        if mode == "shadow" and list(bundle.inputs) != list(live.inputs):
            raise FailedPreconditionError(
                f"{where} takes other inputs than the live version; a shadow needs the same ones in order"
            )

    def _same_features(self, bundle: ModelBundle, live: ModelBundle) -> bool:
        """Whether two versions are given the same rows; they may differ in how many texts they know."""
        if bundle.fingerprint == live.fingerprint:
            return True
        if self._store is None or bundle.service is None or bundle.service != live.service:
            return False
        return all(
            self._store.fitting_plan(bundle.service, one.fingerprint, one.text_counts) is not None
            for one in (bundle, live)
        )

    def put_on_trial(self, model: LiveModel, mode: str, share: float) -> None:
        """Try a loaded version beside the live one of its name, in place of the one on trial before."""
        name = model.bundle.name
        before = self.trials.get(name)
        if model.performance is not None and mode == "shadow":
            model.unseen = self._tracker(self.unseen, name)
        if before is None or before.model is not model:
            self.precompute(model, self.live[name])
        self._core.put_on_trial(name, model.served, mode == "shadow", share)
        self.trials[name] = LiveTrial(model, mode, share)
        if self.previous.get(name) is model:
            del self.previous[name]
        if before is not None and before.model is not model:
            self._finish(before.model)

    def end_trial(self, name: str) -> None:
        """Stop the version on trial, if there is one."""
        trial = self.trials.get(name)
        if trial is None:
            return
        self._core.put_on_trial(name, None)
        self._finish(trial.model)
        del self.trials[name]

    @contextmanager
    def publishing(self, model: LiveModel) -> Iterator[None]:
        """Publish a loaded version once the block has recorded the choice; else it is let go."""
        try:
            yield
        except BaseException:
            if all(model is not known for known in self.all()):
                model.stop()
            raise
        self.publish(model)

    def publish(self, model: LiveModel) -> None:
        """Make it live. Another live version than before ends the trial."""
        name = model.bundle.name
        before = self.live.get(name)
        if before is model:
            return
        if before is not None:
            self.precompute(model, before)
        self._core.publish(model.served)
        self.live[name] = model
        if before is None:
            return
        trial = self.trials.pop(name, None)
        if trial is not None and trial.model is not model:
            self._finish(trial.model)
        stale = self.previous.pop(name, None)
        self.previous[name] = before
        if stale is not None and stale is not model:
            self._finish(stale)

    def precompute(self, model: LiveModel, source: LiveModel | None = None, now_us: int | None = None) -> int:
        """Compute what the edge cache of `model` lacks of the most frequent inputs of `source` (default: its
        own), as of request time `now_us` (default: now). Loads the features that they need.

        Returns how many were computed: none where the cache is not in use.
        """
        hot = (source or model).served.hot_inputs()
        now_us = self._clock.now_us() if now_us is None else now_us
        for view, keys in model.served.hot_misses(hot, now_us):
            assert self._store is not None
            stamp = self._store.stamp()
            rows, meta = self._store.load_rows(view, keys, np.full(len(keys), now_us, np.int64))
            self.caches[view].put_many(keys, rows, meta, stamp, self._clock.mono_ns())
        return model.served.precompute(hot, now_us, _PRECOMPUTE_S)

    def warm(self, name: str, version: str) -> LiveModel | None:
        """The version, if it is the previous one of `name` or on trial."""
        trial = self.trials.get(name)
        for model in (self.previous.get(name), None if trial is None else trial.model):
            if model is not None and model.bundle.version == version:
                return model
        return None

    def retire_strangers(self) -> list[str]:
        """Stop the versions whose features the store no longer defines as they were trained.

        Returns the names that are not served any more.
        """
        found = []
        for name, trial in list(self.trials.items()):
            try:
                self._plan(trial.model.bundle)
            except PenstockError:
                self.end_trial(name)
        for versions in (self.previous, self.live):
            for name, model in list(versions.items()):
                try:
                    self._plan(model.bundle)
                except PenstockError:
                    if versions is self.live:
                        self.end_trial(name)
                        self._core.retire(name)
                        found.append(name)
                    del versions[name]
                    self._finish(model)
        return found

    def clear_caches(self, stamp: int = 0) -> None:
        """Empty the feature caches; rows with a stamp below `stamp` are refused from then on."""
        for cache in self.caches.values():
            cache.clear(self.cache_owner, stamp)

    def cache_settings(self, row_words: int) -> dict[str, Any]:
        """Arguments of a `_core.FeatureCache` of rows of `row_words`."""
        settings = self._config.caches.features
        return {
            "capacity": settings.capacity,
            "row_words": row_words,
            "ttl_ns": int(settings.ttl * 1e9) if settings.ttl else 0,
            "negative_ttl_ns": int(settings.negative_ttl * 1e9) if settings.negative_ttl else 0,
            "refresh_ahead": settings.refresh_ahead,
        }

    def _private_cache(self, view: str, row_words: int) -> _core.FeatureCache:
        return _core.FeatureCache(**self.cache_settings(row_words))

    def stop(self) -> None:
        """Stop every version and take in its last rows."""
        for model in self.all():
            model.stop()
        if self.vectors is not None:
            self.vectors.close()

    def memory(self) -> dict[str, Any]:
        """The budget and what it went for, bytes by "name/version"."""
        return {
            "budget_bytes": self._config.caches.models.memory,
            "versions": {f"{m.bundle.name}/{m.bundle.version}": m.memory_bytes() for m in self.all()},
        }

    def _lane_bytes(self, bundle: ModelBundle, views: int) -> int:
        """Buffers of its lane and of its served rows: features, scores, event times, id, status, time."""
        serving = self._config.serving
        row = 4 * len(bundle.inputs) + 8 * bundle.n_outputs + 8 * views + 24
        return (2 * serving.max_queued_rows + self._config.monitoring.ring_rows) * row

    def _check_room(self, bundle: ModelBundle, need: int) -> None:
        """Raises FailedPreconditionError if `need` bytes do not fit beside the live versions."""
        budget = self._config.caches.models.memory
        tried = [trial.model for trial in self.trials.values()]
        live = sum(model.memory_bytes() for model in [*self.live.values(), *tried])
        if live + need > budget:
            raise FailedPreconditionError(
                f"model '{bundle.name}' version {bundle.version} needs {need} bytes of memory; of "
                f"caches.models.memory ({budget}) the live versions have {live}"
            )

    def _make_room(self, bundle: ModelBundle, need: int) -> None:
        """Drop previous versions until `need` bytes more fit, or raise and drop none."""
        self._check_room(bundle, need)
        used = sum(model.memory_bytes() for model in self.all())
        for name, model in list(self.previous.items()):
            if used + need <= self._config.caches.models.memory:
                return
            used -= model.memory_bytes()
            del self.previous[name]
            self._finish(model)

    def _finish(self, model: LiveModel) -> None:
        """Every request it still has was to be answered within the limit."""
        model.finish(self._config.serving.max_latency_ms / 1000)

    def _edge(self) -> dict[str, Any]:
        settings = self._config.caches.edge
        return {
            "mode": settings.mode,
            "capacity": settings.capacity,
            "ttl_ns": int(settings.ttl * 1e9),
            "precompute": settings.precompute,
            "seed": os.urandom(16) if self._store is None else self._store.key_seed,
        }

    def _plan(self, bundle: ModelBundle) -> ServicePlan | None:
        if bundle.service is None:
            return None
        where = f"model '{bundle.name}' version {bundle.version}"
        if self._store is None:
            raise BundleError(
                f"{where} reads the feature service '{bundle.service}'; set feature_store.repo_path"
            )
        plan = self._store.fitting_plan(bundle.service, bundle.fingerprint, bundle.text_counts)
        if plan is None:
            now = self._store.service_plan(bundle.service).fingerprint
            raise BundleError(
                f"{where} was trained on other definitions of the service '{bundle.service}' "
                f"(fingerprint {bundle.fingerprint}, now {now}); train it again or restore them"
            )
        return plan

    def _native_plan(self, plan: ServicePlan, on_missing: str) -> dict[str, Any]:
        assert self._store is not None
        views: list[Mapping[str, Any]] = []
        for name, view, keys in zip(plan.view_names, plan.views, plan.view_keys):
            computer = self._store.computer(view.name)
            if view.name not in self.caches:
                self.caches[view.name] = self.new_cache(view.name, computer.row_schema.row_words)
            # One row of each view is computed here, so that no request waits for a compiler.
            some = computer.keys[:1] if len(computer.keys) else np.zeros((1, 2), np.uint64)
            for now_us in (0, self._clock.now_us()):
                computer.rows_at(some, np.array([now_us], np.int64)).words()
            self._store.load_rows(view.name, some, np.zeros(1, np.int64))
            views.append(
                {
                    "name": name,
                    "rows_of": view.name,
                    "cache": self.caches[view.name],
                    "fields": computer.schema,
                    "key_columns": list(keys),
                }
            )
        return {
            "entities": list(plan.entities),
            "views": views,
            "request_source": plan.request_name or "",
            "inputs": list(plan.inputs),
            "program": plan.program,
            "key_seed": self._store.key_seed,
            "error_on_missing": "error" in (plan.on_missing, on_missing),
        }
