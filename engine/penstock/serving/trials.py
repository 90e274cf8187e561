"""Versions on trial: begun, ended, restored after a restart, and what they report.

A trial is recorded in the model registry before it is acknowledged, so it outlives the process. Another
champion ends it, as does a share of 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

from penstock.clock import SystemClock
from penstock.config import Config
from penstock.errors import InvalidArgumentError, PenstockError
from penstock.models.registry import ModelRegistry, Trial
from penstock.serving.live import LiveModel, LiveModels, LiveTrial

_log = logging.getLogger("penstock.serving")
_STATS = ("requests", "rows", "latency", "run", "slo", "breaker", "queued_rows", "served_dropped")


class Trials:
    """The trials of an engine. Changes: one thread at a time, under the engine's lock; reports: any thread.

    Attributes:
        faults: by model name, why a recorded trial is not on.
    """

    def __init__(self, config: Config, live: LiveModels, registry: ModelRegistry, clock: SystemClock) -> None:
        self._live, self._registry, self._clock = live, registry, clock
        self._window_us = int(config.monitoring.window * 1e6)
        self.faults: dict[str, str] = {}

    def change(
        self, mode: Literal["canary", "shadow"], name: str, version: str | None, share: Any
    ) -> dict[str, Any]:
        """Put `version` (default: the challenger) on trial, durably; a share of 0 ends the trial.

        Raises InvalidArgumentError, NotFoundError, FailedPreconditionError, BundleError; nothing has changed
        then.
        """
        if type(share) not in (int, float) or not 0 <= share <= 1:
            raise InvalidArgumentError(f"share is {share!r}; expected a number from 0 to 1")
        self._live.get(name)
        if share == 0:
            self._registry.set_trial(name, None)
            self._live.end_trial(name)
            self.faults.pop(name, None)
            return {"model": name, "version": None, "mode": mode, "share": 0.0}
        bundle = self._registry.get(name, version or "challenger")
        trial = Trial(bundle.version, mode, float(share))
        self._live.check_trial(bundle, mode)
        model = self._live.warm(name, bundle.version) or self._live.load(bundle)
        try:
            self._registry.set_trial(name, trial)
        except BaseException:
            if all(model is not known for known in self._live.all()):
                model.stop()
            raise
        self._live.put_on_trial(model, mode, trial.share)
        self.faults.pop(name, None)
        return {"model": name, "version": trial.version, "mode": mode, "share": trial.share}

    def restore(self) -> None:
        """Begin the trials that the registry has. One that cannot be loaded keeps nothing else waiting."""
        recorded = {name: self._registry.trial(name) for name in list(self._live.live)}
        self.take_on({name: trial for name, trial in recorded.items() if trial is not None})

    def take_on(
        self, wanted: dict[str, Trial], prepare: Callable[[LiveModel], None] = lambda model: None
    ) -> None:
        """Make the trials those `wanted`; `prepare` is called on each version before it takes requests."""
        self.faults = {}
        for name in list(self._live.trials):
            if name not in wanted:
                self._live.end_trial(name)
        for name, trial in wanted.items():
            now = self._live.trials.get(name)
            if now is not None and _as_recorded(now) == trial:
                continue
            try:
                bundle = self._registry.get(name, trial.version)
                self._live.check_trial(bundle, trial.mode)
                model = self._live.warm(name, bundle.version) or self._live.load(bundle)
                prepare(model)
                self._live.put_on_trial(model, trial.mode, trial.share)
            except (PenstockError, OSError) as error:
                self._live.end_trial(name)
                self.faults[name] = str(error)
                _log.error("version '%s' of model '%s' cannot be tried: %s", trial.version, name, error)

    def note_ended(self) -> None:
        """After `LiveModels.retire_strangers`: say why a recorded trial is not on any more."""
        for name in list(self._live.live):
            trial = self._registry.trial(name)
            if trial is not None and name not in self._live.trials and name not in self.faults:
                self.faults[name] = f"the features of version '{trial.version}' are defined otherwise now"

    def recorded(self) -> dict[str, Trial]:
        """The trials that are on, by name."""
        return {name: _as_recorded(trial) for name, trial in dict(self._live.trials).items()}

    def describe(self, name: str) -> dict[str, Any]:
        """What `models` says of the trial of `name`, under "trial"; nothing without one."""
        trial = self._live.trials.get(name)
        if trial is None:
            return {"trial": {"fault": self.faults[name]}} if name in self.faults else {}
        return {"trial": {"mode": trial.mode, "share": trial.share, **trial.model.describe()}}

    def stats(self, name: str) -> dict[str, Any]:
        """Under "trial": counters, latency and label metrics of the version on trial, and the live one's."""
        trial = self._live.trials.get(name)
        if trial is None:
            return {}
        model, counters = trial.model, trial.model.served.stats()
        entry: dict[str, Any] = {"version": model.bundle.version, "mode": trial.mode, "share": trial.share}
        entry.update({key: counters[key] for key in _STATS})
        tracker = model.unseen if trial.mode == "shadow" else model.performance
        live = self._live.live.get(name)
        if tracker is not None and live is not None and live.performance is not None:
            now_us = model.newest_us or self._clock.now_us()
            window_us = self._window_us
            entry["performance"] = tracker.metrics(now_us, window_us, version=model.bundle.version)
            entry["live_performance"] = live.performance.metrics(
                now_us, window_us, version=live.bundle.version
            )
        return {"trial": entry}

    def drift(self, name: str, end_us: int | None, window_us: int | None) -> dict[str, Any]:
        """Under "trial": drift and freshness of the rows that the version on trial scored."""
        trial = self._live.trials.get(name)
        if trial is None:
            return {}
        return {"trial": {"mode": trial.mode, **trial.model.watched(end_us, window_us)}}


def _as_recorded(trial: LiveTrial) -> Trial:
    return Trial(trial.model.bundle.version, "canary" if trial.mode == "canary" else "shadow", trial.share)
