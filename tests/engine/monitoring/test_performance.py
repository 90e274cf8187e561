"""PerformanceTracker against a slow oracle, its bounds and its bad inputs."""

import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import InvalidArgumentError
from penstock.monitoring.performance import PerformanceTracker

PANE = 10
HORIZON = 80


def tracker(**kwargs):
    return PerformanceTracker(**{"capacity": 64, "pane_us": PANE, "horizon_us": HORIZON, "bins": 16} | kwargs)


def exact_auc(positive, negative):
    if not positive or not negative:
        return math.nan
    credit = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return credit / (len(positive) * len(negative))


def close(value, wanted, tolerance=1e-8):
    return (math.isnan(value) and math.isnan(wanted)) or abs(value - wanted) <= tolerance


def oracle(rows, now, window):
    first = now // PANE - window // PANE + 1
    chosen = [r for r in rows.values() if first <= r["time"] // PANE <= now // PANE]
    done = [(r["score"], r["label"]) for r in chosen if r["label"] is not None]
    clip = [(min(max(s, 1e-15), 1 - 1e-15), y) for s, y in done]

    def mean(terms):
        return sum(terms) / len(terms) if terms else math.nan

    return {
        "n": len(chosen),
        "labelled": len(done),
        "coverage": len(done) / len(chosen) if chosen else math.nan,
        "auc": exact_auc([s for s, y in done if y], [s for s, y in done if not y]),
        "logloss": mean([-math.log(s) if y else -math.log1p(-s) for s, y in clip]),
        "brier": mean([(s - y) ** 2 for s, y in done]),
        "accuracy": mean([float((s >= 0.5) == bool(y)) for s, y in done]),
    }


SERVED = st.lists(st.tuples(st.integers(0, HORIZON - 1), st.floats(0, 1)), max_size=40)
LABELS = st.lists(
    st.lists(st.tuples(st.integers(0, 45), st.integers(0, 1), st.integers(0, 5)), max_size=20), max_size=4
)


@settings(deadline=None, max_examples=150)
@given(SERVED, LABELS, st.integers(0, HORIZON + 30), st.integers(1, HORIZON // PANE))
def test_metrics_equal_the_oracle(served, batches, now, panes):
    track = tracker()
    ids = [2**64 - 1 - i for i in range(len(served))]
    track.record(ids, [t for t, _ in served], [s for _, s in served], "1")
    rows = {i: {"time": t, "score": s, "label": None, "at": 0} for i, (t, s) in zip(ids, served)}
    for batch in batches:
        wanted = dict.fromkeys(("matched", "corrected", "duplicate", "late", "orphan"), 0)
        for i, label, at in batch:
            row = rows.get(2**64 - 1 - i)
            if row is None:
                wanted["orphan"] += 1
            elif row["label"] is None:
                wanted["matched"] += 1
                row.update(label=label, at=at)
            elif row["label"] != label and at >= row["at"]:
                wanted["corrected"] += 1
                row.update(label=label, at=at)
            else:
                wanted["duplicate"] += 1
        names, labels, times = ([b[k] for b in batch] for k in range(3))
        assert track.label([2**64 - 1 - i for i in names], labels, times) == wanted
    got, want = track.metrics(now, panes * PANE), oracle(rows, now, panes * PANE)
    bound = got.pop("auc_error_bound")
    assert close(got.pop("auc"), want.pop("auc"), 1e-12 + (0 if math.isnan(bound) else bound))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert close(got[name], value), name


def test_the_auc_bound_is_reached_by_a_bin_of_one_order():
    track = tracker(bins=2)
    track.record([1, 2], 0, [0.1, 0.2], "1")
    track.label([1, 2], [0, 1], 0)
    figures = track.metrics(0, PANE)
    assert (figures["auc"], figures["auc_error_bound"]) == (0.5, 0.5)


def test_a_correction_takes_back_exactly_what_was_added():
    once, thrice = tracker(), tracker()
    for track in (once, thrice):
        track.record([1, 2], 0, [0.3, 0.9], "1")
        track.label([1, 2], [1, 0], 1)
    thrice.label([1], [0], 2)
    assert thrice.metrics(0, PANE) != once.metrics(0, PANE)
    thrice.label([1], [1], 3)
    assert thrice.metrics(0, PANE) == once.metrics(0, PANE)


def test_a_row_that_left_the_ring_is_an_orphan_but_stays_in_the_sums():
    track = tracker(capacity=2)
    track.record([1, 2, 3], 0, [0.1, 0.2, 0.3], "1")
    assert track.label([1, 2, 3], [0, 0, 1], 0) == {
        "matched": 2, "corrected": 0, "duplicate": 0, "late": 0, "orphan": 1,
    }  # fmt: skip
    assert track.metrics(0, PANE)["n"] == 3


def test_a_label_of_a_pane_that_left_is_late():
    track = tracker()
    track.record([1], 0, [0.5], "1")
    track.record([2], HORIZON, [0.5], "1")
    assert track.label([1, 2], [1, 1], HORIZON)["late"] == 1
    assert track.metrics(HORIZON, HORIZON)["labelled"] == 1


def test_a_row_older_than_the_horizon_is_not_kept():
    track = tracker()
    track.record([1], HORIZON, [0.5], "1")
    assert track.record([2, 3], [0, HORIZON], [0.5, 0.5], "1") == 1
    assert track.label([2], [1], 0)["orphan"] == 1


def test_a_used_id_names_its_newest_row():
    track = tracker(capacity=2)
    track.record([7], 0, [0.1], "1")
    track.record([7], PANE, [0.9], "1")
    track.record([8], PANE, [0.9], "1")  # evicts the older row of id 7, not its index entry
    assert track.label([7], [1], PANE)["matched"] == 1
    assert track.metrics(PANE, PANE)["labelled"] == 1
    assert track.metrics(0, PANE)["labelled"] == 0


def test_ids_on_both_sides_of_the_sign_bit_keep_every_bit():
    track = tracker()
    ids = [0, 1, 2**63, 2**63 + 1, 2**64 - 1]
    track.record(ids, 0, [0.5] * 5, "1")
    assert track.label([2**64 - 1, 1, 2**63 + 1], [1, 1, 1], 0)["matched"] == 3
    assert track.label([2, 2**63 + 2], [1, 1], 0)["orphan"] == 2


def test_a_batch_larger_than_the_ring_keeps_its_end():
    track = tracker(capacity=2)
    assert track.record([1, 2, 3, 4, 5], 0, [0.5] * 5, "1") == 5
    assert track.label([1, 2, 3, 4, 5], [1] * 5, 0)["matched"] == 2
    assert track.metrics(0, PANE)["n"] == 5


def test_threads_lose_no_count():
    track = tracker(capacity=4096, max_versions=4)

    def work(lane):
        for start in range(lane * 1000, lane * 1000 + 1000, 50):
            ids = range(start, start + 50)
            track.record(list(ids), 0, [0.5] * 50, str(lane))
            track.label(list(ids), [i % 2 for i in ids], 0)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures = track.metrics(0, PANE)
    assert (figures["n"], figures["labelled"], figures["accuracy"]) == (4000, 4000, 0.5)


def test_versions_are_apart_and_bounded():
    track = tracker(max_versions=2)
    for i, version in enumerate(["a", "b"]):
        track.record([i], 0, [0.5], version)
    assert track.metrics(0, PANE)["n"] == 2
    assert track.metrics(0, PANE, version="a")["n"] == 1
    track.record([9], 0, [0.5], "c")
    assert track.metrics(0, PANE, version="a")["n"] == 0
    assert track.label([0, 1, 9], [1, 1, 1], 0)["late"] == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"capacity": 0}, "capacity is 0"),
        ({"bins": 0}, "bins is 0"),
        ({"horizon_us": 15}, "multiple of pane_us"),
        ({"threshold": 2.0}, "threshold is 2.0"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(InvalidArgumentError, match=message):
        tracker(**kwargs)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([2], 0, [math.nan], "1"), r"scores\[0\] is nan"),
        (([2], 0, [1.5], "1"), r"scores\[0\] is 1.5"),
        (([2], 0, [0.5, 0.5], "1"), "scores has shape"),
        (([2], 0, ["high"], "1"), "scores has dtype"),
        (([2, -(2**64)], 0, [0.5, 0.5], "1"), "ids has dtype object"),
        (([2], [2**63], [0.5], "1"), r"times_us\[0\] is 9223372036854775808"),
        (([-1], 0, [0.5], "1"), r"ids\[0\] is -1"),
        (([1.5], 0, [0.5], "1"), "ids has dtype float64"),
        (([[1]], 0, [0.5], "1"), "ids has 2 dimensions"),
        (([2], [-5], [0.5], "1"), r"times_us\[0\] is -5"),
        (([2], [0.5], [0.5], "1"), "times_us has dtype"),
        (([2], [1, 2], [0.5], "1"), "times_us has shape"),
    ],
)
def test_a_bad_record_changes_nothing(args, message):
    track = tracker()
    with pytest.raises(InvalidArgumentError, match=message):
        track.record(*args)
    assert track.metrics(0, HORIZON)["n"] == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [([1, 2], r"labels\[1\] is 2"), ([1], "labels has shape"), (["1", "0"], "labels has dtype")],
)
def test_a_bad_label_changes_nothing(labels, message):
    track = tracker()
    track.record([1, 2], 0, [0.5, 0.5], "1")
    with pytest.raises(InvalidArgumentError, match=message):
        track.label([1, 2], labels, 0)
    assert track.metrics(0, PANE)["labelled"] == 0


@pytest.mark.parametrize("window", [0, 15, HORIZON + PANE])
def test_a_bad_window(window):
    with pytest.raises(InvalidArgumentError, match="window_us is"):
        tracker().metrics(0, window)
