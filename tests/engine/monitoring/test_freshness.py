"""Ages of served values against a plain recount."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import InvalidArgumentError
from penstock.monitoring.freshness import QUANTILE_ERROR, FreshnessMonitor

PANE = 10**9
NO_EVENT = np.iinfo(np.int64).min
PRESENT, NULL, NOT_FOUND, EXPIRED = range(4)
T0 = 1_700_000_000 * 10**6 // PANE * PANE


def statuses(*values):
    return np.array(values, np.uint8)


def times(*values):
    return np.array(values, np.int64)


@given(
    st.lists(
        st.tuples(st.integers(0, 4 * PANE - 1), st.one_of(st.none(), st.integers(-PANE, 10**13))),
        min_size=1,
        max_size=60,
    ),
    st.lists(st.integers(0, 60), max_size=3),
)
@settings(max_examples=80, deadline=None)
def test_a_window_is_a_recount_of_its_rows(rows, cuts):
    monitor = FreshnessMonitor({"v": None}, pane_us=PANE, window_us=4 * PANE)
    now = times(*(T0 + t for t, _ in rows))
    events = times(*(NO_EVENT if age is None else T0 + t - age for t, age in rows)).reshape(-1, 1)
    status = statuses(*(NOT_FOUND if age is None else PRESENT for _, age in rows))
    for part in np.split(np.arange(len(rows)), sorted(min(c, len(rows)) for c in cuts)):
        assert monitor.add(now[part], events[part], status[part]) == 0
    for panes in (4, 1):
        report = monitor.report(end_us=T0 + 4 * PANE - 1, window_us=panes * PANE)
        inside = [age for t, age in rows if t >= (4 - panes) * PANE]
        ages = sorted(age for age in inside if age is not None and age >= 0)
        view = report.views[0]
        assert report.n == view.rows == len(inside)
        assert view.not_found == inside.count(None)
        assert view.negative == sum(age is not None and age < 0 for age in inside)
        assert view.fresh == len(ages)
        assert view.max_us == (ages[-1] if ages else None)
        for name, q in (("p50_us", 0.5), ("p95_us", 0.95), ("p99_us", 0.99)):
            got = getattr(view, name)
            if not ages:
                assert got is None
                continue
            exact = float(np.quantile(ages, q, method="inverted_cdf"))
            assert abs(got - exact) <= max(512.0, QUANTILE_ERROR * exact + 1)
        every = [T0 + t - age for t, age in rows if age is not None]
        assert view.newest_event_us == (max(every) if every else None)


def test_an_age_past_the_ttl_is_expired_only_for_its_own_view():
    monitor = FreshnessMonitor({"short": 1_000, "long": 10**12, "ever": None}, pane_us=PANE, window_us=PANE)
    ages = np.array([[1_001, 1_001, 1_001], [1_000, 5, 5], [1_001, 5, 5]], np.int64)
    monitor.add(times(T0, T0, T0), T0 - ages, statuses(EXPIRED, EXPIRED, PRESENT))
    short, long, ever = monitor.report().views
    assert (short.expired, short.fresh) == (1, 2)
    assert (long.expired, long.fresh) == (0, 3)
    assert (ever.expired, ever.fresh) == (0, 3)
    assert short.newest_event_us == T0 - 1_000
    assert short.ttl_us == 1_000


def test_a_feed_that_stopped_shows_without_traffic():
    monitor = FreshnessMonitor({"v": None}, pane_us=PANE, window_us=2 * PANE)
    monitor.add(times(T0), times(T0 - 7).reshape(1, 1), statuses(PRESENT))
    report = monitor.report(end_us=T0 + 50 * PANE)
    view = report.views[0]
    assert (report.n, view.fresh, view.p99_us) == (0, 0, None)
    assert view.newest_event_us == T0 - 7
    assert view.newest_age_us == 50 * PANE + 7


def test_rows_older_than_the_ring_are_late_and_old_panes_leave():
    monitor = FreshnessMonitor({"v": None}, pane_us=PANE, window_us=2 * PANE)
    event = times(T0 - 9 * PANE).reshape(1, 1)
    monitor.add(times(T0), event, statuses(PRESENT))
    monitor.add(times(T0 + 2 * PANE), event, statuses(PRESENT))
    assert monitor.add(times(T0 + 5), event, statuses(PRESENT)) == 1
    report = monitor.report()
    assert (report.n, report.late) == (1, 1)
    assert (report.start_us, report.end_us) == (T0 + PANE, T0 + 3 * PANE)


def test_an_empty_monitor_and_a_model_without_views_report():
    empty = FreshnessMonitor({"v": 5}, pane_us=PANE, window_us=PANE).report()
    assert (empty.n, empty.end_us, empty.views[0].p50_us) == (0, None, None)
    assert json.loads(json.dumps(empty.to_dict(), allow_nan=False)) == empty.to_dict()
    monitor = FreshnessMonitor({}, pane_us=PANE, window_us=PANE)
    monitor.add(times(T0, T0), np.empty((2, 0), np.int64), statuses(PRESENT, PRESENT))
    report = monitor.report()
    assert (report.n, report.views) == (2, ())


@pytest.mark.parametrize(
    ("now", "event", "status", "text"),
    [
        (times(1, 2), np.zeros((2, 2), np.int64), statuses(0, 0), r"event_time is int64 \(2, 2\)"),
        (times(1, 2), np.zeros((2, 1)), statuses(0, 0), "event_time is float64"),
        (times(1, 2), np.zeros((2, 1), np.int64), statuses(0), r"status is uint8 \(1,\)"),
        (times(1, -2), np.zeros((2, 1), np.int64), statuses(0, 0), r"now_us\[1\] is -2"),
    ],
)
def test_bad_rows_are_refused_and_change_nothing(now, event, status, text):
    monitor = FreshnessMonitor({"v": None}, pane_us=PANE, window_us=PANE)
    with pytest.raises(InvalidArgumentError, match=text):
        monitor.add(now, event, status)
    assert monitor.report(end_us=0).n == 0


def test_a_negative_ttl_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"views\['v'\] has ttl -1"):
        FreshnessMonitor({"v": -1}, pane_us=PANE, window_us=PANE)
