"""Drift of served rows: counts against a recount, statistics against scipy, states against the rules."""

import json
import threading

import numpy as np
import pytest
from drift_oracle import OracleMonitor
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from penstock.errors import InvalidArgumentError
from penstock.models.reference import ReferenceDistribution
from penstock.monitoring.drift import DriftMonitor
from penstock.monitoring.drift_stats import (
    DriftThresholds,
    bh_q_values,
    required_rows,
    two_proportion_p,
)

PANE = 1_000


def reference_of(rows, scores=None, categorical=None, names=None):
    rows = np.asarray(rows, np.float32)
    scores = rows[:, 0].astype(np.float64) if scores is None else scores
    return ReferenceDistribution.capture(
        names or [f"x{j}" for j in range(rows.shape[1])], rows, scores, categorical
    )


def column(values):
    return np.asarray(values, np.float32).reshape(-1, 1)


def one_window(reference, rows, scores=None, **thresholds):
    rows = np.asarray(rows, np.float32)
    monitor = DriftMonitor(reference, pane_us=PANE, window_us=PANE, thresholds=DriftThresholds(**thresholds))
    scores = np.nan_to_num(rows[:, 0].astype(np.float64)) if scores is None else scores
    monitor.add(np.zeros(len(rows), np.int64), rows, scores)
    return monitor.report(end_us=0)


def normal_quantiles(n, mean=0.0, sd=1.0):
    return stats.norm.ppf((np.arange(n) + 0.5) / n) * sd + mean


small_reference = reference_of(np.random.default_rng(0).normal(size=(500, 2)))


def recount(times, rows, end_pane, panes):
    """Counts of a window by a plain look at each value of each row."""
    spec = small_reference.spec
    out = np.zeros(spec.n_slots, np.int64)
    for t, row in zip(times, rows):
        if not end_pane - panes < t // PANE <= end_pane:
            continue
        for j, x in enumerate(row.tolist()):
            start, n_bins = spec.offsets[j], len(spec.columns[j]) + 1
            if np.isnan(x):
                out[start + n_bins] += 1
                continue
            out[start + sum(x > edge for edge in spec.columns[j].tolist())] += 1
            if np.isinf(x):
                out[start + n_bins + (2 if x < 0 else 3)] += 1
    return out


times_and_cuts = st.tuples(
    st.lists(st.integers(0, 9 * PANE), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=4),
    st.integers(0, 2**32),
)


@given(times_and_cuts)
@settings(max_examples=60, deadline=None)
def test_any_split_of_the_rows_gives_equal_reports(case):
    times, cuts, seed = case
    rng = np.random.default_rng(seed)
    times = np.array(times, np.int64)
    rows = rng.choice(np.float32([np.nan, np.inf, -np.inf, 0.1, -0.7, 1.3, -2.0]), (len(times), 2))
    scores = rng.normal(size=len(times))
    whole, parts = (DriftMonitor(small_reference, pane_us=PANE, window_us=4 * PANE) for _ in range(2))
    whole.add(times, rows, scores)
    for part in np.split(np.arange(len(times)), sorted(min(c, len(times)) for c in cuts)):
        parts.add(times[part], rows[part], scores[part])
    for end in (None, int(times.max()), 5 * PANE):
        assert whole.report(end_us=end) == parts.report(end_us=end)


@given(times_and_cuts)
@settings(max_examples=60, deadline=None)
def test_every_row_is_held_expired_or_late_and_the_held_are_counted_exactly(case):
    times, cuts, seed = case
    rng = np.random.default_rng(seed)
    times = np.array(times, np.int64)
    rows = rng.choice(np.float32([np.nan, np.inf, -np.inf, 0.1, -0.7, 1.3]), (len(times), 2))
    monitor = DriftMonitor(small_reference, pane_us=PANE, window_us=4 * PANE)
    late = 0
    for part in np.split(np.arange(len(times)), sorted(min(c, len(times)) for c in cuts)):
        late += monitor.add(times[part], rows[part], np.zeros(len(part)))
    report = monitor.report()
    newest = int(times.max()) // PANE
    held = times // PANE > newest - 4
    assert report.n == held.sum()
    assert report.late == late
    # A pane older than the window may still be held in a slot that nothing newer took.
    slot_newest = {pane % 4: max(p for p in times // PANE if p % 4 == pane % 4) for pane in times // PANE}
    resident = sum(slot_newest[p % 4] == p for p in times // PANE)
    assert report.rows == len(times) == resident + report.expired + report.late
    counts = recount(times, rows, newest, 4)
    for j, item in enumerate(report.features):
        part = small_reference.spec.column(counts.astype(np.uint64), j)
        assert item.missing == part.missing / report.n
        labels = item.groups["labels"]
        numeric = item.groups["current"][: len(labels) - labels.count("missing")]
        assert sum(numeric) == int(part.bins.sum())


@given(times_and_cuts, st.booleans())
@settings(max_examples=80, deadline=None)
def test_native_counts_equal_those_of_the_plain_monitor(case, far):
    times, cuts, seed = case
    rng = np.random.default_rng(seed)
    times = np.array(times, np.int64)
    if far:
        times[rng.integers(len(times))] = 2**62
    rows = rng.choice(np.float32([np.nan, np.inf, -np.inf, 0.1, -0.7, 1.3, -2.0]), (len(times), 2))
    scores = rng.choice(np.array([np.nan, np.inf, 1e300, -1e300, 0.25, -0.5]), len(times))
    native = DriftMonitor(small_reference, pane_us=PANE, window_us=4 * PANE)
    plain = OracleMonitor(small_reference, pane_us=PANE, window_us=4 * PANE)
    with np.errstate(over="ignore"):
        for part in np.split(np.arange(len(times)), sorted(min(c, len(times)) for c in cuts)):
            assert native.add(times[part], rows[part], scores[part]) == plain.add(
                times[part], rows[part], scores[part]
            )
            for end, width in ((None, None), (int(times.max()), None), (5 * PANE, 2 * PANE)):
                assert native.report(end_us=end, window_us=width) == plain.report(end_us=end, window_us=width)
    other, plain_other = (
        kind(small_reference, pane_us=PANE, window_us=4 * PANE) for kind in (DriftMonitor, OracleMonitor)
    )
    other.add(times // 2, rows, scores)
    plain_other.add(times // 2, rows, scores)
    native.merge(other)
    plain.merge(plain_other)
    assert native.report() == plain.report()


def test_a_monitor_merged_with_itself_is_doubled():
    monitor = DriftMonitor(small_reference, pane_us=PANE, window_us=4 * PANE)
    monitor.add(np.arange(8) * PANE, np.zeros((8, 2), np.float32), np.zeros(8))
    n = monitor.report().n
    monitor.merge(monitor)
    assert (monitor.report().n, monitor.report().rows) == (2 * n, 16)


def test_shuffled_rows_give_the_same_window():
    rng = np.random.default_rng(5)
    times = rng.integers(0, 4 * PANE, 2_000)
    rows = rng.normal(size=(2_000, 2)).astype(np.float32)
    scores = rng.normal(size=2_000)
    a, b = (DriftMonitor(small_reference, pane_us=PANE, window_us=4 * PANE) for _ in range(2))
    a.add(times, rows, scores)
    for part in np.array_split(rng.permutation(2_000), 37):
        b.add(times[part], rows[part], scores[part])
    assert a.report() == b.report()


def test_merged_monitors_equal_one_that_saw_all_rows():
    rng = np.random.default_rng(6)
    times = rng.integers(0, 9 * PANE, 3_000)
    rows = rng.normal(size=(3_000, 2)).astype(np.float32)
    scores = rng.normal(size=3_000)
    whole, a, b = (DriftMonitor(small_reference, pane_us=PANE, window_us=4 * PANE) for _ in range(3))
    whole.add(times, rows, scores)
    a.add(times[:1_000], rows[:1_000], scores[:1_000])
    b.add(times[1_000:], rows[1_000:], scores[1_000:])
    before = b.report()
    a.merge(b)
    merged, expected = a.report(), whole.report()
    assert merged.features == expected.features
    assert merged.score == expected.score
    assert (merged.rows, merged.n) == (expected.rows, expected.n)
    assert merged.late + merged.expired == expected.late + expected.expired
    assert b.report() == before


def test_merge_refuses_another_reference():
    other = reference_of(np.random.default_rng(1).normal(size=(500, 2)))
    a = DriftMonitor(small_reference, pane_us=PANE, window_us=PANE)
    b = DriftMonitor(other, pane_us=PANE, window_us=PANE)
    with pytest.raises(InvalidArgumentError, match="same inputs and bins"):
        a.merge(b)
    c = DriftMonitor(small_reference, pane_us=PANE, window_us=2 * PANE)
    with pytest.raises(InvalidArgumentError, match="window_us"):
        a.merge(c)


def test_a_row_far_ahead_takes_one_pane_and_not_the_ring():
    monitor = DriftMonitor(small_reference, pane_us=PANE, window_us=4 * PANE)
    rows = np.zeros((4, 2), np.float32)
    monitor.add(np.arange(4) * PANE, rows, np.zeros(4))
    assert monitor.add(np.array([2**62]), rows[:1], np.zeros(1)) == 0
    report = monitor.report(end_us=3 * PANE)
    assert (report.n, report.expired, report.late) == (3, 1, 0)
    assert monitor.add(np.arange(4) * PANE, rows, np.zeros(4)) == 1


def test_old_panes_leave_the_window_and_wide_counts_survive_closing():
    monitor = DriftMonitor(small_reference, pane_us=PANE, window_us=3 * PANE)
    zeros = np.zeros((70_000, 2), np.float32)
    for pane in (0, 1, 2, 0, 1, 2):  # each pane is opened and closed twice, past 2**16 a slot
        monitor.add(np.full(70_000, pane * PANE), zeros, np.zeros(70_000))
    assert monitor.report(end_us=2 * PANE).n == 420_000
    assert monitor.report(end_us=2 * PANE, window_us=PANE).n == 140_000
    assert sum(monitor.report(end_us=2 * PANE).features[0].groups["current"]) == 420_000
    monitor.add(np.array([4 * PANE]), zeros[:1], np.zeros(1))
    report = monitor.report()
    assert (report.start_us, report.end_us) == (2 * PANE, 5 * PANE)
    assert (report.n, report.expired) == (140_001, 140_000)


@pytest.mark.parametrize(
    ("mean", "sd", "expected"),
    [
        (0.25, 1.0, 0.0598155818),
        (0.5, 1.0, 0.2377492047),
        (1.0, 1.0, 0.9261424243),
        (0.0, 1.5, 0.1935430253),
    ],
)
def test_decile_psi_of_normals_meets_the_analytic_value(mean, sd, expected):
    n = 200_000
    report = one_window(reference_of(column(normal_quantiles(n))), column(normal_quantiles(n, mean, sd)))
    assert report.features[0].psi == pytest.approx(expected, abs=3e-4)


@pytest.mark.parametrize(
    ("shift", "distance"), [(0.25, 0.09947644966), (0.5, 0.19741265137), (1, 0.38292492255)]
)
def test_ks_band_of_shifted_normals_holds_the_analytic_distance(shift, distance):
    n = 100_000
    item = one_window(reference_of(column(normal_quantiles(n))), column(normal_quantiles(n, shift))).features[
        0
    ]
    assert item.ks_low <= distance + 1e-5
    assert item.ks_high >= distance - 1e-5
    assert item.ks_high - item.ks_low <= 2 / 1280 + 1 / n
    assert item.ks_low == pytest.approx(distance, abs=1e-3)


def test_lognormal_doubled_is_seen():
    rng = np.random.default_rng(3)
    ref = rng.lognormal(0, 2, 10_000)
    item = one_window(reference_of(column(ref)), column(2 * rng.lognormal(0, 2, 10_000))).features[0]
    assert item.psi == pytest.approx(0.12, abs=0.02)
    assert item.state == "alert"  # KS: 2 Phi(ln 2 / 4) - 1 = .138
    assert "KS distance" in item.reason


@given(st.integers(0, 2**32), st.integers(200, 3_000), st.floats(0, 0.6), st.floats(0, 0.5))
@settings(max_examples=25, deadline=None)
def test_figures_agree_with_scipy(seed, n, shift, missing):
    rng = np.random.default_rng(seed)
    ref, cur = rng.normal(size=4_000), rng.normal(shift, size=n)
    ref[rng.random(4_000) < 0.1] = np.nan
    cur[rng.random(n) < missing] = np.nan
    ref, cur = ref.astype(np.float32), cur.astype(np.float32)
    item = one_window(reference_of(column(ref)), column(cur)).features[0]
    a, b = ref[~np.isnan(ref)], cur[~np.isnan(cur)]
    if len(b) >= 200:
        exact = stats.ks_2samp(a, b, method="asymp")
        assert item.ks_low - 1e-12 <= exact.statistic <= item.ks_high + 1e-12
        if item.ks_p > 1e-6:
            en = len(a) * len(b) / (len(a) + len(b))
            assert item.ks_p == pytest.approx(stats.kstwo.sf(item.ks_low, round(en)), rel=0.1)
    ranks = [-(-k * len(a) // 10) - 1 for k in range(1, 10)]
    edges = np.sort(a)[ranks]
    # Groups end on fine edges, every 128th of 1280: the order statistics of the deciles.
    p = np.bincount(np.searchsorted(edges, a), minlength=10).tolist() + [int(np.isnan(ref).sum())]
    q = np.bincount(np.searchsorted(edges, b), minlength=10).tolist() + [int(np.isnan(cur).sum())]
    p, q = np.array(p) + 0.5, np.array(q) + 0.5
    p, q = p / p.sum(), q / q.sum()
    psi = float(((q - p) * np.log(q / p)).sum())
    scale = 1 / 4_000 + 1 / n
    assert item.psi == pytest.approx(psi, rel=1e-9)
    assert item.psi_adj == pytest.approx(max(0, psi - 10 * scale), abs=1e-9)
    assert item.psi_p == pytest.approx(stats.chi2.sf(psi / scale, 10), rel=1e-6, abs=1e-300)
    table = [[np.isnan(cur).sum(), len(b)], [np.isnan(ref).sum(), len(a)]]
    if table[0][0]:
        expected = stats.chi2_contingency(table, correction=False).pvalue
        assert item.missing_p == pytest.approx(expected, rel=1e-6, abs=1e-300)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_q_values_are_those_of_scipy(p):
    np.testing.assert_allclose(bh_q_values(p), stats.false_discovery_control(p), rtol=1e-12)


def test_required_rows_is_where_the_null_reaches_the_limit():
    needed = required_rows(1_000_000, 10, DriftThresholds())
    null = stats.chi2.isf(0.001, 9)
    assert null * (1 / needed + 1e-6) <= 0.1 < null * (1 / (needed - 1) + 1e-6)
    assert required_rows(150, 10, DriftThresholds()) is None
    assert required_rows(250, 10, DriftThresholds()) is None  # its own noise is too much for 10 bins
    assert required_rows(300, 2, DriftThresholds()) == 200
    assert required_rows(199, 2, DriftThresholds()) is None


def test_no_drift_is_ok_and_not_significant_drift_is_ok():
    rng = np.random.default_rng(11)
    rows = rng.normal(size=(20_000, 8))
    report = one_window(reference_of(rows), rng.normal(size=(5_000, 8)))
    assert report.state == "ok"
    assert report.drifted == []
    # A tiny shift of many rows is significant and still no drift: the effect is below every floor.
    shifted = one_window(reference_of(rows), rng.normal(0.06, 1, size=(20_000, 8)))
    assert shifted.features[0].psi_q < 0.05
    assert shifted.state == "ok"


def test_a_shifted_feature_warns_or_alerts_and_is_named():
    rng = np.random.default_rng(12)
    ref = rng.normal(size=(20_000, 3))
    cur = rng.normal(size=(5_000, 3))
    cur[:, 1] += 0.2  # D = .08, PSI = .04
    cur[:, 2] += 1.0
    report = one_window(reference_of(ref), cur)
    assert [item.state for item in report.features] == ["ok", "warn", "alert"]
    assert report.drifted == ["x1", "x2"]
    assert report.state == "alert"
    assert "psi_adj" in report.features[2].reason
    assert "KS distance" in report.features[1].reason


def test_the_score_is_judged_on_its_own():
    rng = np.random.default_rng(13)
    ref, cur = rng.normal(size=(5_000, 1)), rng.normal(size=(5_000, 1))
    reference = reference_of(ref, rng.random(5_000))
    report = one_window(reference, cur, rng.random(5_000) ** 3)
    assert report.features[0].state == "ok"
    assert report.score.state == "alert"
    assert report.score.psi_q == report.score.psi_p
    assert report.drifted == ["score"]


def test_too_few_rows_are_insufficient_whatever_they_hold():
    rng = np.random.default_rng(14)
    reference = reference_of(rng.normal(size=(50_000, 1)))
    report = one_window(reference, np.full((150, 1), 9.0))
    assert (report.state, report.drifted) == ("insufficient", [])
    assert report.features[0].reason.startswith("150 rows; at least ")
    assert report.features[0].psi > 1
    assert report.features[0].psi_q is None


def test_a_small_reference_is_insufficient():
    reference = reference_of(np.random.default_rng(15).normal(size=(100, 1)))
    report = one_window(reference, np.zeros((5_000, 1)))
    assert report.features[0].state == "insufficient"
    assert "reference has only 100 rows" in report.features[0].reason


def test_an_empty_window_is_insufficient_and_json_able():
    monitor = DriftMonitor(small_reference, pane_us=PANE, window_us=PANE)
    for end in (None, 17 * PANE):
        report = monitor.report(end_us=end)
        assert report.state == "insufficient"
        assert report.n == 0
        assert report.features[0].reason == "no rows in the window"
        assert report.features[0].psi is None
        decoded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert decoded["features"][1]["missing"] is None
    assert monitor.report().end_us is None
    assert monitor.report(end_us=17 * PANE).end_us == 18 * PANE


def test_an_all_missing_column_alerts_by_its_missing_share():
    rng = np.random.default_rng(16)
    ref, cur = rng.normal(size=(5_000, 2)), rng.normal(size=(5_000, 2))
    cur[:, 1] = np.nan
    item = one_window(reference_of(ref), cur).features[1]
    assert item.state == "alert"
    assert item.missing == 1.0
    assert item.ks_low is None
    assert "missing share moved 1, from 0 to 1" in item.reason


def test_a_column_missing_from_the_reference_too_is_ok():
    rows = np.full((5_000, 1), np.nan)
    item = one_window(reference_of(rows, np.zeros(5_000)), rows).features[0]
    assert (item.state, item.missing, item.ks_low) == ("ok", 1.0, None)


def test_missing_values_below_the_psi_floor_still_warn():
    rng = np.random.default_rng(17)
    ref, cur = rng.normal(size=(20_000, 1)), rng.normal(size=(5_000, 1))
    ref[rng.random(20_000) < 0.3] = np.nan
    cur[rng.random(5_000) < 0.37] = np.nan
    item = one_window(reference_of(ref), cur).features[0]
    assert item.psi_adj < 0.1
    assert item.ks_low < 0.05
    assert item.state == "warn"
    assert "missing share" in item.reason


def test_a_constant_feature_is_ok_until_it_moves():
    reference = reference_of(np.full((5_000, 1), 3.0))
    assert one_window(reference, np.full((1_000, 1), 3.0)).features[0].state == "ok"
    for value in (2.0, 4.0):
        item = one_window(reference, np.full((1_000, 1), value)).features[0]
        assert item.state == "alert"
        assert item.ks_low == 1.0


def test_an_unseen_category_alerts():
    rng = np.random.default_rng(18)
    ref = rng.integers(0, 3, (5_000, 1))
    cur = rng.integers(0, 3, (5_000, 1))
    reference = reference_of(ref, categorical={"x0": 3})
    assert one_window(reference, cur).features[0].state == "ok"
    cur[:100] = 7
    item = one_window(reference, cur).features[0]
    assert item.unseen == 0.02
    assert item.state == "warn"
    assert "unseen share" in item.reason
    cur[:400] = -1
    assert one_window(reference, cur).features[0].state == "alert"
    assert item.ks_low is None


def test_adjacent_categories_are_not_pooled():
    # Codes 4 and 5 swap their shares; groups of equal mass over neighbouring codes would hide it.
    ref = np.repeat(np.arange(30), [10] * 4 + [900, 100] + [10] * 24).reshape(-1, 1)
    cur = np.repeat(np.arange(30), [10] * 4 + [100, 900] + [10] * 24).reshape(-1, 1)
    item = one_window(reference_of(ref, categorical={"x0": 30}), cur).features[0]
    assert item.state == "alert"
    assert item.groups["labels"][:2] == ["code 4", "code 5"]
    assert item.groups["labels"][-1] == "other codes"
    assert sum(item.groups["reference"]) == len(ref)


def test_a_report_survives_json_unchanged():
    rng = np.random.default_rng(19)
    report = one_window(reference_of(rng.normal(size=(500, 2))), rng.normal(size=(500, 2)))
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["drifted"] == report.drifted
    assert data["features"][0]["name"] == "x0"
    assert data["state"] == report.state


def test_threads_lose_no_row():
    monitor = DriftMonitor(small_reference, pane_us=PANE, window_us=4 * PANE)
    rng = np.random.default_rng(20)
    rows = rng.normal(size=(64, 2)).astype(np.float32)

    def feed(seed):
        times = np.random.default_rng(seed)
        for _ in range(50):
            monitor.add(times.integers(0, 4 * PANE, 64), rows, np.zeros(64))
            monitor.report()

    threads = [threading.Thread(target=feed, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = monitor.report(end_us=3 * PANE)
    assert (report.n, report.rows, report.late) == (9_600, 9_600, 0)


@pytest.mark.parametrize(
    ("times", "rows", "scores", "text"),
    [
        (np.zeros(2, np.int64), np.zeros((2, 2)), np.zeros(2), r"rows is float64 \(2, 2\)"),
        (np.zeros(2, np.int64), np.zeros((2, 3), np.float32), np.zeros(2), r"float32 \[n, 2\]"),
        (np.zeros(3, np.int64), np.zeros((2, 2), np.float32), np.zeros(2), "now_us is int64"),
        (np.zeros(2), np.zeros((2, 2), np.float32), np.zeros(2), "now_us is float64"),
        (np.array([5, -1]), np.zeros((2, 2), np.float32), np.zeros(2), r"now_us\[1\] is -1"),
        (np.zeros(2, np.int64), np.zeros((2, 2), np.float32), np.zeros(3), "scores is float64"),
    ],
)
def test_bad_rows_are_refused_and_change_nothing(times, rows, scores, text):
    monitor = DriftMonitor(small_reference, pane_us=PANE, window_us=PANE)
    before = monitor.report(end_us=0)
    with pytest.raises(InvalidArgumentError, match=text):
        monitor.add(times, rows, scores)
    assert monitor.report(end_us=0) == before


def test_bad_windows_and_thresholds_are_refused():
    with pytest.raises(InvalidArgumentError, match="window_us is 1500"):
        DriftMonitor(small_reference, pane_us=PANE, window_us=1_500)
    with pytest.raises(InvalidArgumentError, match="pane_us is 0"):
        DriftMonitor(small_reference, pane_us=0, window_us=1_500)
    monitor = DriftMonitor(small_reference, pane_us=PANE, window_us=4 * PANE)
    with pytest.raises(InvalidArgumentError, match="window_us is 5000"):
        monitor.report(window_us=5 * PANE)
    with pytest.raises(InvalidArgumentError, match="end_us is -1"):
        monitor.report(end_us=-1)
    with pytest.raises(InvalidArgumentError, match=r"psi_warn is 0\.5"):
        DriftThresholds(psi_warn=0.5)
    with pytest.raises(InvalidArgumentError, match="q is 1"):
        DriftThresholds(q=1.0)


def test_a_large_effect_without_significance_is_ok():
    item = one_window(
        reference_of(column(normal_quantiles(20_000))), column(normal_quantiles(300, 0.15))
    ).features[0]
    assert item.ks_low >= 0.05
    assert item.ks_q > 0.05
    assert item.state == "ok"


def test_two_proportions_without_rows_have_no_p():
    assert two_proportion_p(0, 0, 1, 5) is None
    assert two_proportion_p(0, 10, 0, 5) == 1.0
