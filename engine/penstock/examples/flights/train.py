"""Train the model of late arrivals on historical features, hold out later days, and save it as a bundle.

The features of a row are those of the historical join at the row's `now`, an hour before departure. A run
whose AUC is too good fails: with what is known an hour ahead 0.9 is out of reach, while the departure delay
alone, which is known too late, gives 0.94.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from penstock.errors import FailedPreconditionError
from penstock.examples.flights.data import to_us

if TYPE_CHECKING:
    from penstock.features.store import FeatureStore
    from penstock.models.bundle import ModelBundle

SERVICE = "arrival_delay"
MODEL = "arrival_delay"
ENTITIES = ("carrier", "origin", "dest", "tailnum")
LEAK_AUC = 0.9
PARAMS: dict[str, Any] = {
    "objective": "binary",
    "num_leaves": 31,
    "learning_rate": 0.05,
    "num_threads": 1,  # LightGBM's threads spin while they wait: on a busy machine more are far slower
    "seed": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}


@dataclass(frozen=True)
class Span:
    """A span of request time [start, end), both in UTC."""

    start: datetime
    end: datetime

    @staticmethod
    def days(month: int, day: int, end_month: int, end_day: int) -> Span:
        """From the first day's midnight to the end day's, both of 2013."""
        return Span(datetime(2013, month, day, tzinfo=UTC), datetime(2013, end_month, end_day, tzinfo=UTC))

    @property
    def start_us(self) -> int:
        return to_us(self.start)

    @property
    def end_us(self) -> int:
        return to_us(self.end)

    def of(self, flights: pa.Table) -> pa.Table:
        """The flights asked for in this span."""
        at = pc.cast(flights["event_timestamp"], pa.int64())
        return flights.filter(pc.and_(pc.greater_equal(at, self.start_us), pc.less(at, self.end_us)))


@dataclass(frozen=True)
class Trained:
    """What a training run made.

    Attributes:
        bundle: the saved bundle.
        holdout_auc: AUC on the days after those trained on.
        train_rows, holdout_rows: labelled flights.
        unlabelled: flights of both spans left out because they never landed.
    """

    bundle: ModelBundle
    holdout_auc: float
    train_rows: int
    holdout_rows: int
    unlabelled: int


def auc(labels: NDArray[Any], scores: NDArray[Any]) -> float:
    """Area under the ROC curve of labels (0 or 1, ``[n]``) by rank sums, ties half; NaN if undefined."""
    _, place, times = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(times) - (times - 1) / 2)[place]
    positive = labels == 1
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    return (float(rank[positive].sum()) - n * (n + 1) / 2) / (n * m)


def refuse_leak(holdout_auc: float) -> None:
    """Raise FailedPreconditionError if the AUC is better than honest features allow."""
    if holdout_auc > LEAK_AUC:
        raise FailedPreconditionError(
            f"the holdout AUC is {holdout_auc:.4f}, above {LEAK_AUC}: a feature knows what was not yet known "
            "an hour before departure; check the time of each source"
        )


def _labelled(flights: pa.Table) -> pa.Table:
    return flights.filter(flights["late"].is_valid())


def join(store: FeatureStore, flights: pa.Table) -> pa.Table:
    """The service's features of each flight at its time, by the historical join; the order is kept."""
    entity_table = flights.select([*ENTITIES, "event_timestamp"])
    return store.get_historical_features(entity_table, features=SERVICE).to_arrow()


def train(
    store: FeatureStore,
    flights: pa.Table,
    directory: Path,
    *,
    span: Span,
    holdout: Span,
    trees: int = 200,
) -> Trained:
    """Train on the labelled flights of `span`, test on those of `holdout`, save a bundle in `directory`.

    Raises:
        FailedPreconditionError: the AUC shows a leak; nothing is saved.
    """
    import lightgbm

    from penstock.models.bundle import save_bundle
    from penstock.models.rows import model_rows

    asked, later = span.of(flights), holdout.of(flights)
    training, testing = _labelled(asked), _labelled(later)
    plan = store.service_plan(SERVICE)
    names = list(plan.output_names)
    rows = join(store, training)
    labels = training["late"].to_numpy()
    data = lightgbm.Dataset(model_rows(rows, names), label=labels, feature_name=names)
    booster = lightgbm.train(PARAMS, data, num_boost_round=trees)
    scores = booster.predict(model_rows(join(store, testing), names), num_threads=1)
    found = auc(testing["late"].to_numpy(), np.asarray(scores))
    refuse_leak(found)
    bundle = save_bundle(
        booster,
        rows.append_column("late", training["late"]),
        name=MODEL,
        directory=directory,
        label="late",
        plan=plan,
        kind="probability",
        metrics={"holdout_auc": found},
        facts={
            "trained_on": [span.start.isoformat(), span.end.isoformat()],
            "holdout": [holdout.start.isoformat(), holdout.end.isoformat()],
            "rows": training.num_rows,
        },
    )
    unlabelled = asked.num_rows + later.num_rows - training.num_rows - testing.num_rows
    return Trained(bundle, found, training.num_rows, testing.num_rows, unlabelled)
