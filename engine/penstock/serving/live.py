"""One live model version: its bundle, its native lane, and what watches the rows that it serves."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.monitoring.drift import DriftMonitor
from penstock.monitoring.freshness import FreshnessMonitor
from penstock.monitoring.performance import PerformanceTracker
from penstock.monitoring.served_log import ServedLog

if TYPE_CHECKING:
    from penstock import _core
    from penstock.config import Config
    from penstock.features.plan import ServicePlan
    from penstock.models.bundle import ModelBundle

_DRAIN_ROWS = 16_384


@dataclass
class LiveModel:
    """A loaded version. `plan` is None for a model on bare vectors, `performance` unless it scores 0 to 1."""

    bundle: ModelBundle
    plan: ServicePlan | None
    served: _core.ServedModel
    drift: DriftMonitor
    freshness: FreshnessMonitor
    performance: PerformanceTracker | None
    log: ServedLog
    _draining: threading.Lock = field(default_factory=threading.Lock)

    def drain(self) -> int:
        """Take in every row served so far; returns how many. Any thread."""
        taken = 0
        with self._draining:
            while True:
                ids, now_us, rows, scores, status, event_time = self.served.drain(_DRAIN_ROWS)
                n = len(ids)
                if n == 0:
                    return taken
                taken += n
                first = np.ascontiguousarray(scores[:, 0])
                self.drift.add(now_us, rows, first)
                if event_time.shape[1]:
                    self.freshness.add(now_us, event_time, status)
                if self.performance is not None:
                    self.performance.record(ids, now_us, first, self.bundle.version)
                self.log.append(
                    model=self.bundle.name,
                    version=self.bundle.version,
                    names=[name for name, _ in self.bundle.inputs],
                    rid=ids,
                    now_us=now_us,
                    rows=rows,
                    scores=first,
                    status=status,
                )

    def entities(self) -> list[str]:
        return [] if self.plan is None else [name for name, _ in self.plan.entities]

    def describe(self) -> dict[str, Any]:
        """What `models` says of it."""
        plan = self.plan
        return {
            "version": self.bundle.version,
            "service": self.bundle.service,
            "entities": self.entities(),
            "inputs": [] if plan is None else [list(pair) for pair in plan.inputs],
            "features": [list(pair) for pair in self.bundle.inputs],
            "output": {"kind": self.bundle.output_kind, "classes": list(self.bundle.classes or [])},
            "fingerprint": self.bundle.fingerprint,
            "metrics": dict(self.bundle.metrics),
        }


def new_performance(config: Config) -> PerformanceTracker:
    """The label join of one model name; its versions share it."""
    settings = config.monitoring
    return PerformanceTracker(
        capacity=settings.label_capacity,
        pane_us=int(settings.pane * 1e6),
        horizon_us=int(settings.window * 1e6),
        bins=settings.score_bins,
    )


def watch(
    bundle: ModelBundle,
    plan: ServicePlan | None,
    served: _core.ServedModel,
    config: Config,
    performance: PerformanceTracker | None,
    log: ServedLog,
) -> LiveModel:
    """A LiveModel with empty monitors."""
    pane_us, window_us = int(config.monitoring.pane * 1e6), int(config.monitoring.window * 1e6)
    return LiveModel(
        bundle,
        plan,
        served,
        DriftMonitor(bundle.reference, pane_us=pane_us, window_us=window_us),
        FreshnessMonitor(
            [view.name for view in plan.views] if plan is not None else [],
            pane_us=pane_us,
            window_us=window_us,
        ),
        performance if bundle.output_kind == "probability" else None,
        log,
    )
