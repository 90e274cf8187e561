"""What drift means: the comparison of one window of counts with a reference, as states with reasons.

Effect size and significance are both needed for a warning, and too few rows give "insufficient", never "ok".
PSI has Jeffreys counts over groups of the fine bins with missing (and unseen) as bins of their own; KS is the
certified band of the binned distance, NaN left out; the shares of missing and of unseen values are tested
apart. Benjamini-Hochberg runs over the inputs, once per kind of test. The score is a family of its own, so
its q is its p.

Pure functions of immutable arguments; any thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import InvalidArgumentError
from penstock.models.reference import CATEGORICAL, SCORE, SCORE_NAME, ReferenceDistribution
from penstock_kernels.reference import (
    ColumnCounts,
    Counts,
    HistogramSpec,
    chi2_sf,
    group_starts,
    ks_asymptotic_p,
    ks_band,
    psi_of_counts,
    psi_table,
)

OK, WARN, ALERT, INSUFFICIENT = "ok", "warn", "alert", "insufficient"
_MAX_CATEGORIES = 20  # the most common categories have a PSI bin each, the rest share one


@dataclass(frozen=True)
class DriftThresholds:
    """Effect sizes for warn and alert, and what a comparison needs to say anything.

    `missing_*` and `unseen_*` are rises or falls of a share (for missing: the KS distance of its indicator).
    Below `min_rows` rows, or where PSI without drift exceeds `null_psi` more often than `null_level`, a
    feature is insufficient. `q` is the false discovery rate.
    """

    min_rows: int = 200
    q: float = 0.05
    psi_warn: float = 0.1
    psi_alert: float = 0.25
    ks_warn: float = 0.05
    ks_alert: float = 0.1
    missing_warn: float = 0.05
    missing_alert: float = 0.1
    unseen_warn: float = 0.01
    unseen_alert: float = 0.05
    null_psi: float = 0.1
    null_level: float = 0.001
    psi_groups: int = 10

    def __post_init__(self) -> None:
        if self.min_rows < 1 or self.psi_groups < 2:
            raise InvalidArgumentError(
                f"min_rows is {self.min_rows}, psi_groups is {self.psi_groups}; expected at least 1 and 2"
            )
        for name in ("q", "null_level"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        for name in ("psi", "ks", "missing", "unseen"):
            warn, alert = getattr(self, f"{name}_warn"), getattr(self, f"{name}_alert")
            if not 0.0 < warn <= alert:
                raise InvalidArgumentError(
                    f"{name}_warn is {warn}, {name}_alert is {alert}; expected 0 < warn <= alert"
                )


@dataclass(frozen=True)
class FeatureDrift:
    """One input, or the score, of a window against the reference. A figure that has no meaning is None.

    `n` and `n_reference` are rows; `missing`, `unseen` and their references shares of them. `psi_adj` is PSI
    less its mean without drift. `ks_low` <= D <= `ks_high`; `ks_p` belongs to `ks_low`, so ties and binning
    make it larger, never smaller. `groups` are the PSI bins for plots: "labels", and counts "reference",
    "current".
    """

    name: str
    kind: str
    n: int
    n_reference: int
    missing: float | None
    missing_reference: float | None
    unseen: float | None
    unseen_reference: float | None
    psi: float | None
    psi_adj: float | None
    psi_p: float | None
    ks_low: float | None
    ks_high: float | None
    ks_p: float | None
    missing_p: float | None
    unseen_p: float | None
    groups: dict[str, list[Any]]
    psi_q: float | None = None
    ks_q: float | None = None
    missing_q: float | None = None
    unseen_q: float | None = None
    state: str = OK
    reason: str = ""


@dataclass(frozen=True)
class DriftReport:
    """A window of request time [start_us, end_us) against the reference (None: nothing was ever counted).

    `n` rows are in the window. Over the life of the monitor, `rows` came, of which `late` came after their
    pane had left the ring and `expired` left with their pane; the rest is held.
    """

    start_us: int | None
    end_us: int | None
    n: int
    rows: int
    late: int
    expired: int
    features: tuple[FeatureDrift, ...]
    score: FeatureDrift
    thresholds: DriftThresholds

    @property
    def state(self) -> str:
        """The worst state of the inputs and the score; insufficient only where no other was reached."""
        states = {item.state for item in (*self.features, self.score)}
        return next((state for state in (ALERT, WARN, OK) if state in states), INSUFFICIENT)

    @property
    def drifted(self) -> list[str]:
        """Names in warn or alert, inputs in order, then the score."""
        return [item.name for item in (*self.features, self.score) if item.state in (WARN, ALERT)]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers, text and None, as JSON can hold them."""
        return {**asdict(self), "features": [asdict(item) for item in self.features], "state": self.state} | {
            "drifted": self.drifted
        }


def compare(
    reference: ReferenceDistribution,
    counts: Counts,
    score_counts: Counts,
    thresholds: DriftThresholds,
) -> tuple[tuple[FeatureDrift, ...], FeatureDrift]:
    """The inputs and the score of a window: counts uint64 [spec.n_slots], [score_spec.n_slots]."""
    features = [
        _measure(name, kind, reference.spec, j, reference.counts, counts, thresholds)
        for j, (name, kind) in enumerate(zip(reference.names, reference.kinds))
    ]
    score = _measure(
        SCORE_NAME, SCORE, reference.score_spec, 0, reference.score_counts, score_counts, thresholds
    )
    return tuple(_judge(features, thresholds)), _judge([score], thresholds)[0]


def bh_q_values(p: Sequence[float]) -> NDArray[np.float64]:
    """Benjamini-Hochberg q-values float64 [n]: q_(i) = min over j >= i of p_(j) n / j."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values)
    scaled = values[order] * len(values) / np.arange(1, len(values) + 1)
    q = np.empty(len(values))
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def two_proportion_p(a: int, n: int, b: int, m: int) -> float | None:
    """Two-sided p of a/n against b/m by the pooled normal test; None where either has no rows."""
    if n == 0 or m == 0:
        return None
    pooled = (a + b) / (n + m)
    variance = pooled * (1.0 - pooled) * (1.0 / n + 1.0 / m)
    if variance <= 0.0:
        return 1.0
    return math.erfc(abs(a / n - b / m) / math.sqrt(2.0 * variance))


@lru_cache(maxsize=256)
def _chi2_isf(level: float, df: int) -> float:
    low, high = 0.0, df + 10.0
    while chi2_sf(high, df) > level:
        high *= 2.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if chi2_sf(middle, df) > level:
            low = middle
        else:
            high = middle
    return high


def required_rows(n_reference: int, n_bins: int, thresholds: DriftThresholds) -> int | None:
    """Fewest rows at which `n_bins` PSI bins say something; None where the reference itself is too small."""
    if n_reference < thresholds.min_rows:
        return None
    if n_bins < 2:
        return thresholds.min_rows
    room = thresholds.null_psi / _chi2_isf(thresholds.null_level, n_bins - 1) - 1.0 / n_reference
    return max(thresholds.min_rows, math.ceil(1.0 / room)) if room > 0.0 else None


def _measure(
    name: str,
    kind: str,
    spec: HistogramSpec,
    j: int,
    reference_counts: Counts,
    current_counts: Counts,
    thresholds: DriftThresholds,
) -> FeatureDrift:
    """All figures of one column, not yet judged."""
    reference, current = spec.column(reference_counts, j), spec.column(current_counts, j)
    column = spec.columns[j]
    if isinstance(column, int):
        ref_groups, cur_groups, labels = _category_groups(reference, current)
    else:
        ref_groups, cur_groups = psi_table(reference, current, thresholds.psi_groups, "bin")
        labels = _numeric_labels(column, group_starts(reference.bins, thresholds.psi_groups))
        labels += _extra_labels(reference, current)
    psi = psi_of_counts(ref_groups, cur_groups)
    n, m = psi.n_current, psi.n_reference
    low = high = ks_p = None
    if not isinstance(column, int):
        band = ks_band(column, reference, current)
        if band is not None:
            valid, valid_reference = n - current.missing, m - reference.missing
            low, high = band.lower, band.upper
            ks_p = ks_asymptotic_p(low, valid * valid_reference / (valid + valid_reference))
            if min(valid, valid_reference) < thresholds.min_rows:
                ks_p = None
    categorical = kind == CATEGORICAL
    return FeatureDrift(
        name=name,
        kind=kind,
        n=n,
        n_reference=m,
        missing=current.missing / n if n else None,
        missing_reference=reference.missing / m if m else None,
        unseen=current.unseen / n if n and categorical else None,
        unseen_reference=reference.unseen / m if m and categorical else None,
        psi=psi.psi,
        psi_adj=psi.adjusted,
        psi_p=psi.p_value,
        ks_low=low,
        ks_high=high,
        ks_p=ks_p,
        missing_p=two_proportion_p(current.missing, n, reference.missing, m),
        unseen_p=two_proportion_p(current.unseen, n, reference.unseen, m) if categorical else None,
        groups={"labels": labels, "reference": ref_groups.tolist(), "current": cur_groups.tolist()},
    )


def _judge(items: list[FeatureDrift], thresholds: DriftThresholds) -> list[FeatureDrift]:
    """One family of tests: q-values of those with rows enough, and every state."""
    short = [_shortage(item, thresholds) for item in items]
    tested = [
        replace(item, state=INSUFFICIENT, reason=why) if why else item for item, why in zip(items, short)
    ]
    for test in ("psi", "ks", "missing", "unseen"):
        p = {
            i: getattr(item, f"{test}_p")
            for i, item in enumerate(tested)
            if item.state != INSUFFICIENT and getattr(item, f"{test}_p") is not None
        }
        for i, q in zip(p, bh_q_values(list(p.values())).tolist()):
            tested[i] = replace(tested[i], **{f"{test}_q": q})
    return [item if item.state == INSUFFICIENT else _state(item, thresholds) for item in tested]


def _shortage(item: FeatureDrift, thresholds: DriftThresholds) -> str:
    """Why the column has too few rows, or nothing."""
    if item.n == 0:
        return "no rows in the window"
    needed = required_rows(item.n_reference, len(item.groups["labels"]), thresholds)
    if needed is None:
        return f"the reference has only {item.n_reference} rows"
    return f"{item.n} rows; at least {needed} are needed" if item.n < needed else ""


def _state(item: FeatureDrift, thresholds: DriftThresholds) -> FeatureDrift:
    effects = [("psi", item.psi_adj, item.psi_q, "psi_adj is {:.3g}")]
    effects.append(("ks", item.ks_low, item.ks_q, "KS distance is at least {:.3g}"))
    for name, share, before, q in (
        ("missing", item.missing, item.missing_reference, item.missing_q),
        ("unseen", item.unseen, item.unseen_reference, item.unseen_q),
    ):
        if share is not None and before is not None:
            text = f"{name} share moved {{:.3g}}, from {before:.3g} to {share:.3g}"
            effects.append((name, abs(share - before), q, text))
    state, reasons = OK, []
    for name, effect, q, text in effects:
        if effect is None or q is None or q >= thresholds.q:
            continue
        for level in (ALERT, WARN):
            limit = getattr(thresholds, f"{name}_{level}")
            if effect >= limit:
                reasons.append(f"{text.format(effect)} ({level} from {limit:g})")
                state = ALERT if ALERT in (state, level) else WARN
                break
    return replace(item, state=state, reason="; ".join(reasons))


def _category_groups(reference: ColumnCounts, current: ColumnCounts) -> tuple[Counts, Counts, list[str]]:
    """PSI bins of codes: the most common of the reference each, then the others, unseen, missing."""
    order = np.argsort(-reference.bins.astype(np.int64), kind="stable")
    top, rest = order[:_MAX_CATEGORIES], order[_MAX_CATEGORIES:]
    labels = [f"code {code}" for code in top.tolist()]
    ref, cur = reference.bins[top].tolist(), current.bins[top].tolist()
    if len(rest):
        labels.append("other codes")
        ref.append(int(reference.bins[rest].sum()))
        cur.append(int(current.bins[rest].sum()))
    extra = _extra_labels(reference, current)
    for label in extra:
        ref.append(getattr(reference, label))
        cur.append(getattr(current, label))
    return np.array(ref, np.uint64), np.array(cur, np.uint64), labels + extra


def _extra_labels(reference: ColumnCounts, current: ColumnCounts) -> list[str]:
    """The extra PSI bins in use, in the order of `psi_table`."""
    return [name for name in ("unseen", "missing") if getattr(reference, name) or getattr(current, name)]


def _numeric_labels(edges: NDArray[np.float32], starts: NDArray[np.int64]) -> list[str]:
    """Each group of fine bins by its range; fine bin k is (edges[k-1], edges[k]]."""
    bounds = [f"{edges[start - 1]:.5g}" for start in starts[1:].tolist()]
    if not bounds:
        return ["all values"]
    inner = [f"{low} to {high}" for low, high in pairwise(bounds)]
    return [f"up to {bounds[0]}", *inner, f"above {bounds[-1]}"]
