"""Counts: C++ == Numba == numpy == Triton's interpreter, on every kind of value that may flip a bin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import make_case

from penstock import _core
from penstock_kernels import reference
from penstock_kernels.cpu import histogram as cpu


def slow_counts(spec: reference.HistogramSpec, rows: np.ndarray) -> list[int]:
    """The definition, value by value."""
    out = [0] * spec.n_slots
    for j, column in enumerate(spec.columns):
        at, end = int(spec.offsets[j]), int(spec.offsets[j + 1])
        for v in rows[:, j].tolist():
            if v != v:
                out[end - 4] += 1
            elif isinstance(column, int):
                out[at + int(v) if v in range(column) else end - 3] += 1
            else:
                out[at + sum(e < v for e in column.tolist())] += 1
                out[end - 2] += v == -np.inf
                out[end - 1] += v == np.inf
    return out


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_all_paths_count_alike(seed: int, data: st.DataObject) -> None:
    spec, rows = make_case(seed)
    expected = reference.count_rows(spec, rows)
    assert cpu.count_rows(spec, rows).tolist() == expected.tolist()
    native = _core.HistogramCounts(spec.columns)
    native.count(rows)
    assert native.snapshot().tolist() == expected.tolist()
    # Any split, merged, is the whole.
    cut = data.draw(st.integers(0, len(rows)))
    left, right = _core.HistogramCounts(spec.columns), _core.HistogramCounts(spec.columns)
    left.count(rows[:cut])
    right.count(rows[cut:])
    left.merge(right)
    assert left.snapshot().tolist() == expected.tolist()
    left.clear()
    assert not left.snapshot().any()


@pytest.mark.parametrize("seed", range(12))
def test_reference_counts_follow_the_definition(seed: int) -> None:
    spec, rows = make_case(seed)
    assert reference.count_rows(spec, rows).tolist() == slow_counts(spec, rows)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300))
def test_captured_edges_fence_atoms_and_bound_bins(seed: int, n_bins: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(int(rng.integers(1, 2000))).astype(np.float32)
    x[rng.random(len(x)) < rng.random()] = rng.choice([0.0, -0.0, 1.5, np.nan])
    edges = reference.capture_edges(x, n_bins)
    kept = x[~np.isnan(x)]
    assert edges.dtype == np.float32 and (np.diff(edges) > 0).all()
    assert reference.capture_edges(rng.permutation(x), n_bins).tobytes() == edges.tobytes()
    spec = reference.HistogramSpec([edges])
    bins = spec.column(reference.count_rows(spec, x[:, None]), 0).bins
    # A bin that no atom fills holds less than 2 / n_bins of the reference (and one rank's rounding).
    wide = ~reference.single_bins(edges)
    assert bins[wide].max(initial=0) * n_bins < 2 * len(kept) + n_bins
    values, counts = np.unique(kept + np.float32(0), return_counts=True)
    for atom, count in zip(values, counts):
        if count * n_bins >= len(kept):
            assert bins[np.searchsorted(edges, atom)] == count


@pytest.mark.parametrize(
    "columns",
    [
        [np.array([1.0, 1.0], np.float32)],
        [np.array([2.0, 1.0], np.float32)],
        [np.array([np.nan], np.float32)],
        [np.array([np.inf], np.float32)],
        [np.array([1.0], np.float64)],
        [np.zeros((1, 1), np.float32)],
        [0],
        [-1],
        [(1 << 24) + 1],
    ],
)
def test_bad_columns_are_refused_by_name(columns: list[np.ndarray | int]) -> None:
    with pytest.raises(ValueError, match=r"columns\[0\]"):
        reference.HistogramSpec(columns)
    with pytest.raises(ValueError, match=r"columns\[0\]"):
        _core.HistogramCounts(columns)


def test_bad_rows_and_foreign_counts_are_refused_and_leave_the_counts() -> None:
    spec = reference.HistogramSpec([3, np.array([0.5], np.float32)])
    native = _core.HistogramCounts(spec.columns)
    for bad in (np.zeros((2, 3), np.float32), np.zeros(2, np.float32)):
        with pytest.raises(ValueError, match="rows"):
            native.count(bad)
        with pytest.raises(ValueError, match="rows"):
            reference.count_rows(spec, bad)
        with pytest.raises(ValueError, match="rows"):
            cpu.count_rows(spec, bad)
    with pytest.raises(TypeError):
        native.count(np.zeros((2, 2), np.float64))
    with pytest.raises(ValueError, match="other"):
        native.merge(_core.HistogramCounts([3]))
    assert not native.snapshot().any()
    with pytest.raises(ValueError, match="n_bins"):
        reference.capture_edges([1.0], 0)
