"""Cases and checks that every place of a kernel shares: Numba, Triton's interpreter, and a GPU.

Needs numpy and pytest only. A check takes the module or functions under test, and how to put an array where
they work and get it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from penstock_kernels import reference

INF = np.float32(np.inf)
POOL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, 2.0, 2.5, -1.0, 3e38, -3e38, 1e-45, -1e-45, 16777217.0]


@dataclass(frozen=True)
class Place:
    """The functions under test, by name, and the way to their arrays and back."""

    count_rows: Callable[..., Any]
    psi_values: Callable[..., Any]
    ks_bands: Callable[..., Any]
    ratio_age: Callable[..., Any]
    put: Callable[[np.ndarray], Any] = lambda array: array
    get: Callable[[Any], np.ndarray] = lambda array: array


def make_case(seed: int) -> tuple[reference.HistogramSpec, np.ndarray]:
    """Columns with atoms, ties, infinities and few distinct values; rows on edges and next to them."""
    rng = np.random.default_rng(seed)
    columns: list[np.ndarray | int] = []
    rows = np.empty((int(rng.integers(0, 600)), int(rng.integers(1, 5))), dtype=np.float32)
    for j in range(rows.shape[1]):
        kind = int(rng.integers(0, 5))
        if kind == 0:
            columns.append(int(rng.integers(1, 9)))
            pool = np.array([*POOL, 3.0, 4.0, 7.0, 8.0, 9.0], dtype=np.float32)
        else:
            sample = rng.standard_normal(int(rng.integers(0, 800))).astype(np.float32)
            if kind == 1:
                sample = np.round(sample)
            elif kind == 2:
                sample[:] = 3.25
            elif kind == 3 and len(sample):
                sample[rng.random(len(sample)) < 0.4] = 0.0
                sample[:2] = [np.inf, -np.inf][: len(sample[:2])]
            edges = reference.capture_edges(sample, int(rng.integers(1, 200)))
            columns.append(edges)
            with np.errstate(over="ignore"):
                near = [edges, np.nextafter(edges, INF), np.nextafter(edges, -INF), sample]
            pool = np.concatenate([np.array(POOL, dtype=np.float32), *near])
        rows[:, j] = rng.choice(pool, len(rows))
    return reference.HistogramSpec(columns), rows


def many_bins_case() -> tuple[reference.HistogramSpec, np.ndarray]:
    """More bins than a program takes at once, beside none and codes; more rows than one block."""
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((3000, 3)).astype(np.float32)
    rows[:, 1] = rng.choice([-np.inf, np.inf, 0.0, np.nan], 3000)
    rows[:, 2] = rng.integers(0, 7, 3000)
    edges = reference.capture_edges(rng.standard_normal(9000).astype(np.float32))
    return reference.HistogramSpec([edges, np.empty(0, np.float32), 5]), rows


def check_counts(place: Place, seeds: range) -> None:
    cases = [make_case(seed) for seed in seeds] + [many_bins_case()]
    for spec, rows in cases:
        got = place.get(place.count_rows(spec, place.put(rows)))
        assert got.dtype == np.uint64
        assert got.tolist() == reference.count_rows(spec, rows).tolist()
    spec, rows = many_bins_case()
    # A view with strides counts as its copy does.
    got = place.get(place.count_rows(spec, place.put(rows)[::2]))
    assert got.tolist() == reference.count_rows(spec, rows[::2]).tolist()
    for bad in (rows[:, :2], rows[0], rows.astype(np.float64)):
        with pytest.raises(ValueError, match="rows is"):
            place.count_rows(spec, place.put(bad))


def psi_tables() -> list[tuple[np.ndarray, np.ndarray]]:
    """Grouped counts of few and many bins; windows that are empty, equal, nearly disjoint and huge."""
    rng = np.random.default_rng(3)
    out = []
    for k in (1, 2, 10, 12, 33, 257):
        ref, cur = rng.integers(0, 60, size=(2, 20, k)).astype(np.uint64)
        ref[0], cur[1] = 0, 0
        cur[2] = ref[2]
        cur[3] = 0
        cur[3, -1] = 1_000_000
        ref[4], cur[4] = rng.integers(0, 2**40, size=(2, k), dtype=np.uint64)
        out.append((ref, cur))
    return out


def check_psi(place: Place) -> None:
    for ref, cur in psi_tables():
        got = place.get(place.psi_values(place.put(ref), place.put(cur)))
        want = reference.psi_values(ref, cur)
        assert np.isnan(want[:2]).all()
        for value, right in zip(got.tolist(), want.tolist()):
            if np.isnan(right):
                assert np.isnan(value)
            else:
                assert abs(value - right) <= reference.psi_tolerance(right, ref.shape[1])
        assert got[2] == 0.0
    ref, cur = psi_tables()[1]
    assert place.get(place.psi_values(place.put(ref[:0]), place.put(cur[:0]))).shape == (0,)
    for bad in (cur[:, 1:], cur.astype(np.int64), cur[0]):
        with pytest.raises(ValueError, match="expected uint64"):
            place.psi_values(place.put(ref), place.put(bad))
    with pytest.raises(ValueError, match="expected uint64"):
        place.psi_values(place.put(ref[:, :0]), place.put(cur[:, :0]))


def check_ks(place: Place, seeds: range) -> None:
    for spec, rows in [make_case(seed) for seed in seeds] + [many_bins_case()]:
        cut = len(rows) // 3
        ref, cur = (reference.count_rows(spec, part) for part in (rows[:cut], rows[cut:]))
        got = place.ks_bands(spec, place.put(ref), place.put(cur))
        assert got == reference.ks_bands(spec, ref, cur)
    # Windows whose product leaves int64 are still exact.
    spec = reference.HistogramSpec([np.array([0.5, 1.5], np.float32)])
    ref, cur = np.zeros((2, spec.n_slots), dtype=np.uint64)
    ref[:3] = [2**33, 2**34 + 1, 7]
    cur[:3] = [2**32, 2**33, 2**35 + 3]
    assert place.ks_bands(spec, place.put(ref), place.put(cur)) == reference.ks_bands(spec, ref, cur)
    for bad in (cur[1:], cur.astype(np.int64)):
        with pytest.raises(ValueError, match="current is"):
            place.ks_bands(spec, place.put(ref), place.put(bad))


Columns = tuple[np.ndarray, reference.Column, reference.Column, reference.Column]


def ratio_case(seed: int, n: int = 700) -> Columns:
    """Arguments of ratio_age: both branches and their border, nulls, zeros of both signs, NaN, subnormals."""
    rng = np.random.default_rng(seed)
    now = np.full(n, 1_700_000_000_000_000) + rng.integers(-(10**12), 10**12, n)
    day = 86_400_000_000
    ages = np.array([0, -1, -day, day - 1, day, day + 1, 90 * day, 90 * day + 1, 400 * day])
    last = now - np.where(rng.random(n) < 0.5, rng.choice(ages, n), rng.integers(0, 120 * day, n))
    last[rng.random(n) < 0.02] = np.iinfo(np.int64).min
    pool = np.array([0.0, -0.0, 1.0, -1.0, 1e-40, 1e-45, np.nan, np.inf, -np.inf, 3e38, 0.1, 7.0])
    with np.errstate(under="ignore"):
        amount = np.where(rng.random(n) < 0.5, rng.choice(pool, n), rng.lognormal(0, 2, n)).astype(np.float32)
    usual = np.array([*pool, 1e-308, 5e-324, 1e300])
    mean = np.where(rng.random(n) < 0.4, rng.choice(usual, n), rng.lognormal(0, 2, n))
    valid = [None if rng.random() < 0.25 else rng.random(n) < 0.8 for _ in range(3)]
    return now, (last, valid[0]), (amount, valid[1]), (mean, valid[2])


def put_columns(place: Place, case: Columns) -> list[Any]:
    now, *pairs = case
    return [place.put(now), *(tuple(None if a is None else place.put(a) for a in pair) for pair in pairs)]


def check_ratio_age(place: Place, seeds: range) -> None:
    for seed in seeds:
        case = ratio_case(seed)
        got = place.get(place.ratio_age(*put_columns(place, case)))
        want = reference.ratio_age(*case)
        assert got.dtype == np.float32
        assert got.view(np.uint32).tolist() == want.view(np.uint32).tolist()
    assert place.get(place.ratio_age(*put_columns(place, ratio_case(0, 0)))).shape == (0,)
    now, last, amount, mean = ratio_case(1)
    for name, bad in {
        "last": (now, (last[0][1:], None), amount, mean),
        "amount": (now, last, (amount[0].astype(np.float64), None), mean),
        "mean's validity": (now, last, amount, (mean[0], np.ones(len(now), np.uint8))),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} is"):
            place.ratio_age(*put_columns(place, bad))


def program_ratio_age(now: np.ndarray, *columns: reference.Column) -> np.ndarray:
    """The same expression written with the feature operators and run by the C++ core."""
    from penstock import _core
    from penstock.features.expressions import Expr, col, maximum, where
    from penstock.features.expressions import now as request_time
    from penstock.features.program import compile_program

    days: Expr = (request_time() - col("last")).days()
    faded = (col("amount") / col("mean")).clip(0.0, 10.0) / maximum(days, 1.0)
    expression = where(days <= 90.0, faded, 0.0).cast("float32")
    schema = {"last": "timestamp", "amount": "float32", "mean": "float64"}
    program = _core.FeatureProgram(compile_program([("ratio_age", expression)], schema))
    given = dict(zip(("last", "amount", "mean"), columns)) | {"now": (now, None)}
    inputs = []
    for name, dtype in program.inputs:
        values, valid = given[name]
        inputs.append((values.astype(np.float64) if dtype == "float32" else values, valid))
    ((values, valid),) = program.run(inputs)
    null = np.isnan(values) if valid is None else ~valid | np.isnan(values)
    return np.where(null, np.float32(np.nan), values.astype(np.float32))
