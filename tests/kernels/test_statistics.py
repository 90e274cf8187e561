"""PSI and KS against hand values, scipy, and analytic anchors; the certified band against exact D."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from penstock_kernels import reference
from penstock_kernels.cpu import ks as cpu_ks


def column(values: list[int], missing: int = 0, unseen: int = 0) -> reference.ColumnCounts:
    return reference.ColumnCounts(np.array(values, dtype=np.uint64), missing, unseen, 0, 0)


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([0.5, 0.5], [0.6, 0.4], 0.0405465108),
        ([0.9, 0.1], [0.8, 0.2], 0.0810930216),
        ([0.4, 0.3, 0.3], [0.35, 0.25, 0.4], 0.0445608547),
    ],
)
def test_psi_by_hand(p: list[float], q: list[float], expected: float) -> None:
    assert reference.psi_of_shares(np.array(p), np.array(q)) == pytest.approx(expected, abs=1e-10)
    counts = [np.array([round(s * 10**9) for s in shares], dtype=np.uint64) for shares in (p, q)]
    assert reference.psi_of_counts(*counts).psi == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("mean", "sd", "k", "expected"),
    [
        (0.25, 1.0, 10, 0.0598155818),
        (0.5, 1.0, 10, 0.2377492047),
        (1.0, 1.0, 10, 0.9261424243),
        (0.0, 1.5, 10, 0.1935430253),
        (0.5, 1.0, 20, 0.2446713575),
    ],
)
def test_psi_of_normals(mean: float, sd: float, k: int, expected: float) -> None:
    cuts = stats.norm.ppf(np.arange(k + 1) / k)
    q = np.diff(stats.norm.cdf(cuts, mean, sd))
    assert reference.psi_of_shares(np.full(k, 1 / k), q) == pytest.approx(expected, abs=1e-9)


def test_psi_of_exponentials() -> None:
    q = np.diff(stats.expon.cdf(stats.expon.ppf(np.arange(11) / 10), scale=1 / 1.5))
    assert reference.psi_of_shares(np.full(10, 0.1), q) == pytest.approx(0.1533765511, abs=1e-9)


def test_psi_groups_missing_unseen_and_empty_windows() -> None:
    ref = column([10] * 100)
    assert reference.group_starts(ref.bins, 10).tolist() == list(range(0, 100, 10))
    same = reference.psi(ref, ref)
    assert (same.psi, same.adjusted, same.p_value, same.n_bins) == (0.0, 0.0, 1.0, 10)
    gone = column([10] * 100, missing=500)
    assert reference.psi(ref, gone).n_bins == 11
    assert (reference.psi(ref, gone).psi or 0) > 0.25
    assert reference.psi(ref, gone, missing="omit").psi == 0.0
    assert (reference.psi(ref, column([10] * 100, unseen=500), missing="omit").psi or 0) > 0.25
    empty = reference.psi(ref, column([0] * 100))
    assert (empty.psi, empty.adjusted, empty.p_value) == (None, None, None)
    assert empty.reason == "the current window is empty"
    assert reference.psi(column([0] * 100), ref).reason == "the reference window is empty"
    with pytest.raises(ValueError, match="missing"):
        reference.psi(ref, ref, missing="drop")
    with pytest.raises(ValueError, match="bins"):
        reference.psi(ref, column([1]))
    with pytest.raises(ValueError, match="n_groups"):
        reference.psi(ref, ref, n_groups=0)


def test_psi_null_law() -> None:
    """n = m = 500, 10 bins, no drift: mean near (1/n + 1/m) 9, and p-values near uniform."""
    rng = np.random.default_rng(1)
    tables = rng.multinomial(500, [0.1] * 10, size=(2000, 2)).astype(np.uint64)
    results = [reference.psi_of_counts(a, b) for a, b in tables]
    values = np.array([r.psi for r in results])
    p_values = np.array([r.p_value for r in results])
    assert values.mean() == pytest.approx(0.036, rel=0.03)
    assert 0.03 < (p_values < 0.05).mean() < 0.065
    for r in results[:20]:
        assert r.p_value == pytest.approx(stats.chi2.sf((r.psi or 0) / 0.004, 9), rel=1e-10)
        assert r.adjusted == pytest.approx(max(0.0, (r.psi or 0) - 0.036))


@pytest.mark.parametrize("df", [1, 2, 3, 9, 10, 19, 50, 255])
def test_chi2_tail_is_scipys(df: int) -> None:
    for x in [0.0, 1e-6, 0.1, 1.0, df * 0.5, float(df), df + 1.9, df * 2.0, df * 5.0, 700.0]:
        assert reference.chi2_sf(x, df) == pytest.approx(stats.chi2.sf(x, df), rel=1e-9, abs=1e-14)


def repeat(*pairs: tuple[int, int]) -> np.ndarray:
    """Each (count, value) in turn."""
    return np.concatenate([np.full(count, value, dtype=np.float64) for count, value in pairs])


LINE = np.linspace(1, 100, 100)
KS_CASES = [
    (np.array([1, 2]) + 0.01, np.array([1.0, 2, 3]), 1 / 3, 1.0),
    (np.array([1, 2]) - 0.01, np.array([1.0, 2, 3]), 2 / 3, 0.6),
    (np.array([1, 2]) + 0.01, np.array([1.0, 2, 3, 4]), 0.5, 14 / 15),
    (np.array([1, 2]) - 0.01, np.array([1.0, 2, 3, 4]), 0.75, 6 / 15),
    (LINE, np.linspace(1, 100, 110) + 20.1, 232 / 1100, 0.015739183865607353),
    (
        repeat((3, 2), (4, 3), (5, 5), (4, 6)),
        repeat((3, 2), (4, 3), (5, 5), (4, 6)) + 1,
        5 / 16,
        0.4262934613454952,
    ),
    (
        repeat((3, 2), (4, 3), (10, 5), (4, 6)),
        repeat((10, 3), (2, 4), (10, 6), (4, 7)),
        190 / 546,
        0.0919245790168125,
    ),
]


@pytest.mark.parametrize(("x", "y", "d", "p"), KS_CASES)
def test_ks_anchors(x: np.ndarray, y: np.ndarray, d: float, p: float) -> None:
    h, n, m = reference.ks_numerator(x, y)
    assert h / (n * m) == pytest.approx(d, abs=1e-15)
    assert reference.ks_p_value(h, n, m) == pytest.approx(p, rel=1e-12)
    assert cpu_ks.ks_exact_p(h, n, m) == pytest.approx(p, rel=1e-12)


def test_ks_exact_p_of_unequal_sizes() -> None:
    assert reference.ks_exact_p(552750, 10000, 110) == pytest.approx(4.218847493575595e-15, rel=1e-9)
    assert cpu_ks.ks_exact_p(552750, 10000, 110) == pytest.approx(4.218847493575595e-15, rel=1e-9)


def test_ks_against_scipy() -> None:
    rng = np.random.default_rng(5)
    for _ in range(60):
        x = np.round(rng.standard_normal(int(rng.integers(1, 120))), int(rng.integers(0, 4)))
        y = np.round(rng.standard_normal(int(rng.integers(1, 120))) + rng.random(), int(rng.integers(0, 4)))
        h, n, m = reference.ks_numerator(np.append(x, np.nan), y)
        want = stats.ks_2samp(x, y, method="exact")
        assert h / (n * m) == pytest.approx(want.statistic, abs=1e-14)
        assert reference.ks_p_value(h, n, m) == pytest.approx(want.pvalue, rel=1e-9, abs=1e-15)
        assert cpu_ks.ks_exact_p(h, n, m) == pytest.approx(want.pvalue, rel=1e-9, abs=1e-15)


def test_ks_of_empty_samples_and_bad_sizes() -> None:
    assert reference.ks_numerator(np.array([np.nan]), np.array([1.0])) == (0, 0, 1)
    with pytest.raises(ValueError, match="n is 0"):
        reference.ks_p_value(0, 0, 1)
    with pytest.raises(ValueError, match="m is 0"):
        cpu_ks.ks_exact_p(0, 1, 0)
    assert reference.ks_p_value(0, 3, 4) == 1.0
    assert reference.ks_p_value(0, 20_000, 4) == 1.0


def test_limit_law_and_its_correction() -> None:
    for x in np.concatenate([np.linspace(0.001, 4, 400), [1.18, 1.1799999]]):
        assert reference.kolmogorov_sf(float(x)) == pytest.approx(special.kolmogorov(x), rel=1e-11, abs=1e-15)
    for quantile, p in [(1.22385, 0.10), (1.35810, 0.05), (1.62762, 0.01), (1.94947, 0.001)]:
        assert reference.kolmogorov_sf(quantile) == pytest.approx(p, rel=1e-4)
    for d, en, p, rel in [(0.02, 5000, 0.0361394139533, 2e-3), (0.01, 50000, 9.01804881184e-5, 3e-3)]:
        assert reference.ks_asymptotic_p(d, en) == pytest.approx(p, rel=rel)
    assert reference.ks_p_value(4 * 10**6, 20_000, 20_000) == reference.ks_asymptotic_p(0.01, 10_000)


@pytest.mark.parametrize(("shift", "d"), [(0.25, 0.09947644966), (0.5, 0.19741265137), (1.0, 0.38292492255)])
def test_ks_of_shifted_normals(shift: float, d: float) -> None:
    grid = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    h, n, m = reference.ks_numerator(grid, grid + shift)
    assert h / (n * m) == pytest.approx(d, abs=1e-4)


def samples(rng: np.random.Generator, n: int, kind: int) -> np.ndarray:
    x = rng.standard_cauchy(n) if kind == 0 else rng.standard_normal(n)
    if kind == 1:
        x = np.round(x, int(rng.integers(0, 3)))
    elif kind == 2:
        x[rng.random(n) < rng.random()] = rng.choice([0.0, -1.0, np.inf, -np.inf])
    elif kind == 3:
        x = x * rng.random() * 3 + rng.random()
    return x.astype(np.float32)


def test_certified_band_holds_the_exact_distance() -> None:
    rng = np.random.default_rng(11)
    tight = 0
    for _ in range(2500):
        x = samples(rng, int(rng.integers(1, 400)), int(rng.integers(0, 5)))
        y = samples(rng, int(rng.integers(1, 400)), int(rng.integers(0, 5)))
        n_bins = int(rng.integers(1, 100))
        edges = reference.capture_edges(x, n_bins)
        spec = reference.HistogramSpec([edges])
        ref, cur = (spec.column(reference.count_rows(spec, v[:, None]), 0) for v in (x, y))
        band = reference.ks_band(edges, ref, cur)
        assert band is not None
        h, n, m = reference.ks_numerator(x, y)
        assert band.lower <= h / (n * m) <= band.upper
        d = stats.ks_2samp(x, y, method="asymp").statistic
        assert band.lower - 1e-14 <= d <= band.upper + 1e-14
        assert band.upper - band.lower < 2 / n_bins + 1 / n + 1e-12
        tight += band.upper - band.lower < 0.1
    assert tight > 1000


def test_band_of_atoms_is_exact_and_refusals() -> None:
    x = np.repeat(np.arange(4, dtype=np.float32), 25)
    edges = reference.capture_edges(x)
    spec = reference.HistogramSpec([edges])
    y = np.repeat(np.arange(4, dtype=np.float32), [10, 20, 30, 40])
    ref, cur = (spec.column(reference.count_rows(spec, v[:, None]), 0) for v in (x, y))
    band = reference.ks_band(edges, ref, cur)
    assert band is not None
    assert math.isclose(band.lower, 0.2) and band.lower == band.upper
    assert reference.ks_band(edges, ref, column([0] * len(ref.bins))) is None
    with pytest.raises(ValueError, match="bins"):
        reference.ks_band(edges, ref, column([1]))
