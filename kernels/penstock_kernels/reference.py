"""What the kernels mean, in plain numpy: the oracle that C++, Numba and Triton must equal.

Promises, whatever the device: counts equal slot for slot; KS bands equal bit for bit (integers up to one
division); `ratio_age` equal bit for bit; PSI within `psi_tolerance`, as logarithms and sums round.
A column's slots are its fine bins (e[k-1], e[k]] with open ends (or one bin a code), then missing, unseen,
-inf, +inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

EXTRA_SLOTS = 4
DEFAULT_FINE_BINS = 1280
MAX_CODES = 1 << 24
EXACT_KS_ROWS = 10_000
# Below this, products of two window sizes and the sums of two such products fit int64.
MAX_INT_PRODUCT = 1 << 62
DAY_US = 86.4e9
RATIO_CAP = 10.0
RATIO_DAYS = 90.0

Floats = NDArray[np.float32]
Counts = NDArray[np.uint64]
# Values [n] and their validity, bool [n]; None: all are valid.
Column = tuple[NDArray[Any], NDArray[np.bool_] | None]


@dataclass(frozen=True)
class ColumnCounts:
    """One column's counts: `bins` uint64 [bins] and the four extra slots."""

    bins: Counts
    missing: int
    unseen: int
    neg_inf: int
    pos_inf: int


class HistogramSpec:
    """Columns of a histogram: float32 edges [m] (strictly increasing, finite), or an int number of codes.

    `offsets` int64 [columns + 1] are the first slots of each column. Raises ValueError naming the column.
    """

    def __init__(self, columns: Sequence[Floats | int]) -> None:
        self.columns: list[Floats | int] = []
        widths = []
        for j, column in enumerate(columns):
            if isinstance(column, int):
                if not 1 <= column <= MAX_CODES:
                    raise ValueError(f"columns[{j}] is {column}; expected 1 to {MAX_CODES} codes")
                widths.append(column + EXTRA_SLOTS)
                self.columns.append(column)
                continue
            edges = np.ascontiguousarray(column)
            if edges.dtype != np.float32 or edges.ndim != 1:
                raise ValueError(f"columns[{j}] is {edges.dtype} {edges.shape}; expected 1-D float32 edges")
            if not (np.isfinite(edges).all() and (edges[:-1] < edges[1:]).all()):
                raise ValueError(f"columns[{j}]: expected finite, strictly increasing edges")
            widths.append(len(edges) + 1 + EXTRA_SLOTS)
            self.columns.append(edges)
        self.offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)

    @property
    def n_slots(self) -> int:
        """Length of the counts of all columns."""
        return int(self.offsets[-1])

    def column(self, counts: Counts, j: int) -> ColumnCounts:
        """Column j's part of `counts` uint64 [n_slots]."""
        part = counts[self.offsets[j] : self.offsets[j + 1]]
        missing, unseen, neg_inf, pos_inf = (int(c) for c in part[-EXTRA_SLOTS:])
        return ColumnCounts(part[:-EXTRA_SLOTS], missing, unseen, neg_inf, pos_inf)

    @cached_property
    def flat(self) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
        """All edges in one array, its offsets int64 [columns + 1], codes int64 [columns] (0: numeric)."""
        parts = [np.empty(0, np.float32) if isinstance(c, int) else c for c in self.columns]
        starts = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
        codes = np.array([c if isinstance(c, int) else 0 for c in self.columns], dtype=np.int64)
        return np.concatenate([*parts, np.empty(0, np.float32)]), starts, codes

    @cached_property
    def wide(self) -> NDArray[np.uint8]:
        """uint8 [n_slots]: 1 for a numeric column's fine bin that may hold more than one float32 value."""
        out = np.zeros(self.n_slots, dtype=np.uint8)
        for j, column in enumerate(self.columns):
            if not isinstance(column, int):
                out[self.offsets[j] : self.offsets[j + 1] - EXTRA_SLOTS] = ~single_bins(column)
        return out

    def check_counts(self, counts: Counts, name: str) -> None:
        """Raises ValueError unless counts, called `name`, is uint64 [n_slots]."""
        if counts.dtype != np.uint64 or counts.shape != (self.n_slots,):
            raise ValueError(f"{name} is {counts.dtype} {counts.shape}; expected uint64 [{self.n_slots}]")

    def check_rows(self, rows: Floats) -> None:
        """Raises ValueError unless rows is float32 [n, columns]."""
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != len(self.columns):
            raise ValueError(f"rows is {rows.dtype} {rows.shape}; expected float32 [n, {len(self.columns)}]")


def capture_edges(values: ArrayLike, n_bins: int = DEFAULT_FINE_BINS) -> Floats:
    """Fine edges, float32, from a reference sample [n]: order statistics of the inverted CDF, NaN dropped.

    Edge k is the ceil(k n / n_bins)-th smallest value, so the reference ECDF is exact at every edge. A value
    with reference mass >= 1/n_bins is fenced into a bin of its own by an edge at the next float32 below it.
    Infinities are ordered values but never edges. Raises ValueError on n_bins < 1.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}; expected at least 1")
    # Adding 0.0 turns -0.0 into 0.0: one value, one edge.
    x = np.asarray(values, dtype=np.float32).ravel() + np.float32(0.0)
    x = np.sort(x[~np.isnan(x)])
    n = len(x)
    if n == 0:
        return np.empty(0, np.float32)
    ranks = (np.arange(1, n_bins, dtype=np.int64) * n + n_bins - 1) // n_bins - 1
    distinct, counts = np.unique(x, return_counts=True)
    atoms = distinct[counts * n_bins >= n]
    with np.errstate(over="ignore"):  # below the least finite value comes -inf
        below = np.nextafter(atoms, np.float32(-np.inf))
    edges = np.unique(np.concatenate([x[ranks], atoms, below]))
    return edges[np.isfinite(edges)]


def count_rows(spec: HistogramSpec, rows: Floats) -> Counts:
    """Counts uint64 [n_slots] of float32 rows [n, columns]. Raises ValueError on another shape or dtype."""
    spec.check_rows(rows)
    out = np.zeros(spec.n_slots, dtype=np.uint64)
    for j, column in enumerate(spec.columns):
        x = rows[:, j]
        part = out[spec.offsets[j] : spec.offsets[j + 1]]
        n_bins = len(part) - EXTRA_SLOTS
        part[n_bins] = np.isnan(x).sum()
        x = x[~np.isnan(x)]
        if isinstance(column, int):
            known = (x >= 0) & (x < column) & (x == np.floor(x))
            part[:n_bins] = np.bincount(x[known].astype(np.int64), minlength=n_bins)
            part[n_bins + 1] = (~known).sum()
        else:
            part[:n_bins] = np.bincount(np.searchsorted(column, x, side="left"), minlength=n_bins)
            part[n_bins + 2] = (x == -np.inf).sum()
            part[n_bins + 3] = (x == np.inf).sum()
    return out


def group_starts(reference_bins: Counts, n_groups: int = 10) -> NDArray[np.int64]:
    """First fine bins of at most n_groups groups of near equal reference mass; starts with 0.

    Depends on the reference alone, so that groups of two windows stay comparable.
    """
    if n_groups < 1:
        raise ValueError(f"n_groups is {n_groups}; expected at least 1")
    cumulative = np.cumsum(reference_bins.astype(np.int64))
    targets = np.arange(1, n_groups, dtype=np.int64) * cumulative[-1]
    ends = np.searchsorted(cumulative * n_groups, targets, side="left") + 1
    starts = np.unique(np.concatenate([[0], ends]))
    return starts[starts < len(cumulative)].astype(np.int64)


def psi_of_shares(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Sum of (q - p) ln(q / p), natural log; p and q positive float64 [k], each summing to 1."""
    return float(np.sum((q - p) * np.log(q / p)))


@dataclass(frozen=True)
class PsiResult:
    """PSI of two windows; `psi`, `adjusted` and `p_value` are None, with a `reason`, on an empty window."""

    psi: float | None
    adjusted: float | None
    p_value: float | None
    n_reference: int
    n_current: int
    n_bins: int
    reason: str | None = None


def jeffreys_shares(counts: Counts) -> NDArray[np.float64]:
    """(c + 1/2) / (n + k/2), float64 [k]: never zero, sums to 1."""
    c = counts.astype(np.float64)
    return (c + 0.5) / (c.sum() + 0.5 * len(c))


def psi_table(
    reference: ColumnCounts, current: ColumnCounts, n_groups: int, missing: str
) -> tuple[Counts, Counts]:
    """Grouped counts of both windows, with missing and unseen appended where either window holds any."""
    if missing not in ("bin", "omit"):
        raise ValueError(f"missing is {missing!r}; expected 'bin' or 'omit'")
    if len(reference.bins) != len(current.bins):
        raise ValueError(f"current has {len(current.bins)} bins; expected {len(reference.bins)}")
    starts = group_starts(reference.bins, n_groups)
    ref, cur = np.add.reduceat(reference.bins, starts), np.add.reduceat(current.bins, starts)
    pairs = [(reference.unseen, current.unseen)]
    if missing == "bin":
        pairs.append((reference.missing, current.missing))
    for r, c in pairs:
        if r or c:
            ref = np.append(ref, np.uint64(r))
            cur = np.append(cur, np.uint64(c))
    return ref, cur


def psi(
    reference: ColumnCounts, current: ColumnCounts, *, n_groups: int = 10, missing: str = "bin"
) -> PsiResult:
    """PSI with Jeffreys counts over groups of fine bins, and its null: (1/n + 1/m) chi2 with k - 1 degrees
    (Yurdakul and Naranjo, J. Risk Model Validation). `adjusted` is PSI less the null mean, at least 0.
    """
    ref, cur = psi_table(reference, current, n_groups, missing)
    return psi_of_counts(ref, cur)


def psi_of_counts(ref: Counts, cur: Counts) -> PsiResult:
    """`psi` of counts uint64 [k] already grouped."""
    n, m, k = int(ref.sum()), int(cur.sum()), len(ref)
    if n == 0 or m == 0:
        which = "reference" if n == 0 else "current"
        return PsiResult(None, None, None, n, m, k, f"the {which} window is empty")
    value = psi_of_shares(jeffreys_shares(ref), jeffreys_shares(cur))
    scale = 1.0 / n + 1.0 / m
    p_value = chi2_sf(value / scale, k - 1) if k > 1 else 1.0
    return PsiResult(value, max(0.0, value - scale * (k - 1)), p_value, n, m, k)


def check_psi_tables(ref: Counts, cur: Counts) -> None:
    """Raises ValueError unless both are uint64 of one 2-D shape [windows, k], k at least 1."""
    kinds = (ref.dtype, cur.dtype) == (np.uint64, np.uint64)
    if not kinds or ref.ndim != 2 or ref.shape != cur.shape or ref.shape[1] < 1:
        raise ValueError(
            f"got {ref.dtype} {ref.shape} and {cur.dtype} {cur.shape}; expected uint64 [windows, k] twice"
        )


def psi_values(ref: Counts, cur: Counts) -> NDArray[np.float64]:
    """PSI float64 [windows] of grouped counts uint64 [windows, k], Jeffreys; NaN for an empty window."""
    check_psi_tables(ref, cur)
    results = [psi_of_counts(a, b).psi for a, b in zip(ref, cur)]
    return np.array([math.nan if v is None else v for v in results], dtype=np.float64)


def psi_tolerance(value: float, k: int) -> float:
    """How far two right PSIs over k bins may lie apart, for windows of fewer than 2^53 rows.

    Shares, their difference and quotient are the same bits everywhere, and no term is negative. A term has
    the error of a logarithm within 1 ulp and of a product (3/2 epsilon), each of the k - 1 additions 1/2, and
    two values are compared: k + 2 epsilons.
    """
    return (k + 2) * 2.0**-52 * value


def chi2_sf(x: float, df: int) -> float:
    """P(chi2_df > x): the regularised upper incomplete gamma function, by series or continued fraction."""
    if df < 1:
        raise ValueError(f"df is {df}; expected at least 1")
    if x <= 0:
        return 1.0
    a, h = df / 2.0, x / 2.0
    front = math.exp(a * math.log(h) - h - math.lgamma(a))
    if h < a + 1.0:
        term = total = 1.0 / a
        k = a
        while term > total * 1e-17:
            k += 1.0
            term *= h / k
            total += term
        return max(0.0, 1.0 - total * front)
    # Lentz's form of the continued fraction.
    b = h + 1.0 - a
    c, d = math.inf, 1.0 / b
    value = d
    for i in range(1, 100_000):
        an = -i * (i - a)
        b += 2.0
        d = 1.0 / (an * d + b)
        c = b + an / c
        value *= d * c
        if abs(d * c - 1.0) < 1e-16:
            break
    return front * value


@dataclass(frozen=True)
class KsBand:
    """Certified bounds of the exact two-sample KS distance: lower <= D <= upper."""

    lower: float
    upper: float


def single_bins(edges: Floats) -> NDArray[np.bool_]:
    """bool [m + 1]: fine bins that can hold one float32 value only."""
    single = np.zeros(len(edges) + 1, dtype=np.bool_)
    if len(edges) > 1:
        single[1:-1] = np.nextafter(edges[:-1], np.float32(np.inf)) >= edges[1:]
    return single


def _exact_ints(n: int, m: int) -> type:
    return np.int64 if n * m < MAX_INT_PRODUCT else object


def ks_band(edges: Floats, reference: ColumnCounts, current: ColumnCounts) -> KsBand | None:
    """L <= D <= U from the fine-bin counts of both windows; None when a window is empty. NaN is left out.

    L is the greatest gap at an edge. Inside a bin that may hold more than one value the order is unknown, so
    the gap is at most max(F_k - G_{k-1}, G_k - F_{k-1}); U is the greatest of those and L. Infinities are
    split off the end bins into bins of their own, so they never widen the band.
    """
    ref, cur = _with_infinities(reference), _with_infinities(current)
    if not len(ref) == len(cur) == len(edges) + 3:
        raise ValueError(f"got {len(ref) - 2} and {len(cur) - 2} bins; expected {len(edges) + 1} of each")
    n, m = int(ref.sum()), int(cur.sum())
    if n == 0 or m == 0:
        return None
    # In units of 1/(n m) all is integer, so the bounds are exact up to one division.
    kind = _exact_ints(n, m)
    f: NDArray[Any] = np.cumsum(ref).astype(kind) * m
    g: NDArray[Any] = np.cumsum(cur).astype(kind) * n
    lower = int(np.max(np.abs(f - g)))
    wide = np.concatenate([[False], ~single_bins(edges), [False]])
    f_before, g_before = np.concatenate([[0], f[:-1]]), np.concatenate([[0], g[:-1]])
    upper = max(lower, int(np.max((f - g_before)[wide])), int(np.max((g - f_before)[wide])))
    return KsBand(lower / (n * m), upper / (n * m))


def _with_infinities(counts: ColumnCounts) -> NDArray[np.int64]:
    """Counts int64 [bins + 2] of -inf, the finite values of each bin, +inf."""
    bins = np.concatenate([[counts.neg_inf], counts.bins.astype(np.int64), [counts.pos_inf]])
    bins[1] -= counts.neg_inf
    bins[-2] -= counts.pos_inf
    return bins


def ks_bands(spec: HistogramSpec, reference: Counts, current: Counts) -> list[KsBand | None]:
    """`ks_band` of each column from two counts uint64 [n_slots]; None for codes and for an empty window."""
    spec.check_counts(reference, "reference")
    spec.check_counts(current, "current")
    return [_column_band(spec, reference, current, j) for j in range(len(spec.columns))]


def _column_band(spec: HistogramSpec, reference: Counts, current: Counts, j: int) -> KsBand | None:
    edges = spec.columns[j]
    if isinstance(edges, int):
        return None
    return ks_band(edges, spec.column(reference, j), spec.column(current, j))


def bands_of_bounds(
    spec: HistogramSpec, bounds: NDArray[np.int64], counts: Callable[[], tuple[Counts, Counts]]
) -> list[KsBand | None]:
    """What a kernel's exact integers mean: bounds int64 [columns, 4] = lower, upper (in 1/(n m)), n, m.

    Where n m leaves int64 the column is done again from `counts()`, the reference's and the current counts.
    """
    out: list[KsBand | None] = []
    for j, (lower, upper, n, m) in enumerate(bounds.tolist()):
        if isinstance(spec.columns[j], int) or n == 0 or m == 0:
            out.append(None)
        elif n * m >= MAX_INT_PRODUCT:
            out.append(_column_band(spec, *counts(), j))
        else:
            out.append(KsBand(lower / (n * m), upper / (n * m)))
    return out


def ks_numerator(x: NDArray[np.floating], y: NDArray[np.floating]) -> tuple[int, int, int]:
    """(h, n, m) with D = h / (n m) exact, NaN omitted; right-continuous ECDFs at all values."""
    x, y = np.sort(x[~np.isnan(x)]), np.sort(y[~np.isnan(y)])
    n, m = len(x), len(y)
    if n == 0 or m == 0:
        return 0, n, m
    union = np.concatenate([x, y])
    kind = _exact_ints(n, m)
    f: NDArray[Any] = np.searchsorted(x, union, side="right").astype(kind) * m
    g: NDArray[Any] = np.searchsorted(y, union, side="right").astype(kind) * n
    return int(np.max(np.abs(f - g))), n, m


def ks_exact_p(h: int, n: int, m: int) -> float:
    """P(D >= h / (n m)) under no drift without ties, exact (Viehmann, arXiv 2102.08037).

    A[i, j], the chance that a random path through (i, j) has touched the bound, is 1 beyond the bound and
    else i/(i+j) A[i-1, j] + j/(i+j) A[i, j-1]: averages only, hence stable. Time O(n m), by antidiagonals.
    """
    if n < m:
        n, m = m, n
    # i counts the smaller sample, so the vectors are short.
    a = np.zeros(m + 1)
    a[0] = 1.0 if h <= 0 else 0.0
    i = np.arange(m + 1, dtype=np.int64)
    for s in range(1, n + m + 1):
        lo, hi = max(0, s - n), min(m, s)
        k = i[lo : hi + 1]
        left = a[lo - 1 : hi] if lo > 0 else np.concatenate([[0.0], a[:hi]])
        mixed = (k * left + (s - k) * a[lo : hi + 1]) / s
        a[lo : hi + 1] = np.where(np.abs(k * n - (s - k) * m) >= h, 1.0, mixed)
    return float(a[m])


def kolmogorov_sf(x: float) -> float:
    """Q(x), the limit law of sqrt(en) D: the alternating series, or its theta dual for small x."""
    if x <= 0.0:
        return 1.0
    if x >= 1.18:
        total = sum((-1.0) ** (k - 1) * math.exp(-2.0 * k * k * x * x) for k in range(1, 12))
        return min(1.0, 2.0 * total)
    if x < 0.04:
        return 1.0
    t = math.pi * math.pi / (8.0 * x * x)
    cdf = math.sqrt(2.0 * math.pi) / x * sum(math.exp(-((2 * k - 1) ** 2) * t) for k in range(1, 12))
    return max(0.0, 1.0 - cdf)


def ks_asymptotic_p(d: float, en: float) -> float:
    """P(D >= d) at effective size en = n m / (n + m), with the second-order correction of the limit law."""
    if d <= 0.0:
        return 1.0
    z = math.sqrt(en) * d
    return kolmogorov_sf(z + 1.0 / (6.0 * math.sqrt(en)) + (z - 1.0) / (4.0 * en))


def ks_p_value(h: int, n: int, m: int) -> float:
    """P(D >= h / (n m)): exact up to 10,000 rows a side, else by the corrected limit law."""
    if n < 1 or m < 1:
        raise ValueError(f"n is {n}, m is {m}; expected at least 1 of each")
    if max(n, m) <= EXACT_KS_ROWS:
        return ks_exact_p(h, n, m)
    return ks_asymptotic_p(h / (n * m), n * m / (n + m))


def check_ratio_age(now: NDArray[np.int64], last: Column, amount: Column, mean: Column) -> None:
    """Raises ValueError, naming the argument, unless all are of the types and the length of `ratio_age`."""
    parts: list[tuple[str, Any, Any]] = [("now", now, np.int64)]
    for name, (values, valid), dtype in zip(
        ("last", "amount", "mean"), (last, amount, mean), (np.int64, np.float32, np.float64)
    ):
        parts.append((name, values, dtype))
        if valid is not None:
            parts.append((f"{name}'s validity", valid, np.bool_))
    for name, array, dtype in parts:
        if array.dtype != dtype or array.ndim != 1 or len(array) != len(now):
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}; expected {np.dtype(dtype).name} [{len(now)}]"
            )


def ratio_age(now: NDArray[np.int64], last: Column, amount: Column, mean: Column) -> Floats:
    """An amount against its usual mean, faded by the days since the last event: a request-time expression.

    now and last are microseconds, int64 [n]; amount float32 [n]; mean float64 [n]. With days = (now - last) /
    86.4e9: where(days <= 90, clip(amount / mean, 0, 10) / maximum(days, 1), 0), in float64, rounded once to
    float32 [n]. A row is null, written as the one NaN 0x7fc00000, when last is null or when the branch that
    it takes reads a null. Each operation is exact (IEEE 754), so every device gives the same bits.
    """
    check_ratio_age(now, last, amount, mean)
    (at, at_valid), (x, x_valid), (usual, usual_valid) = last, amount, mean
    days = (now - at).astype(np.float64) / DAY_US
    recent = days <= RATIO_DAYS
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        ratio = x.astype(np.float64) / usual
        # Compare and choose: numpy's minimum and maximum do not promise a sign of zero.
        ratio = np.where(ratio > 0.0, ratio, np.where(np.isnan(ratio), np.nan, 0.0))
        ratio = np.where(ratio >= RATIO_CAP, RATIO_CAP, ratio)
        value = np.where(recent, ratio / np.where(days > 1.0, days, 1.0), 0.0).astype(np.float32)
    valid = np.ones(len(now), dtype=np.bool_) if at_valid is None else at_valid.copy()
    for other in (x_valid, usual_valid):
        if other is not None:
            valid &= other | ~recent
    return np.where(valid & ~np.isnan(value), value, np.float32(np.nan))
