"""The skew check: what is served is what the historical join makes; each kind of difference is counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from store_repo import HOUR, MINUTE, make_repo, some_rows, write_events

from penstock.errors import NotFoundError
from penstock.features import skew
from penstock.features.store import FeatureStore
from penstock.monitoring.vector_log import VectorSample

REFS = ["users:n", "pairs:top", "cart:value", "users:age"]
EVER = 2**62


@pytest.fixture
def store(tmp_path):
    with FeatureStore(make_repo(tmp_path / "repo", some_rows())) as opened:
        yield opened


def serve(store, now, users, shops, values, made_us=EVER):
    """What an engine would have logged for one request."""
    rows = {"user_id": users, "shop": shops, "value": values}
    vectors = store.get_online_features("model", rows, now=now).to_numpy()
    plan = store.service_plan("model")
    entities = {"user_id": users, "shop": shops}
    head = ("buy", "1", "model", plan.fingerprint, now, made_us)
    return VectorSample(*head, entities, {"value": values}, vectors)


def requests(store, count=60, seed=5):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        n = int(rng.integers(1, 9))
        yield serve(
            store,
            int(rng.integers(0, 12 * HOUR)),
            rng.integers(0, 24, n).tolist(),
            rng.choice(["a", "b", "c"], n).tolist(),
            [None if rng.random() < 0.1 else float(rng.normal()) for _ in range(n)],
        )


def test_what_is_served_is_what_the_join_makes(store):
    served = list(requests(store))
    (report,) = skew.verify(store, served)
    assert report.service == "model" and report.mismatches == 0 and report.other_definitions == 0
    assert report.vectors == sum(len(one.vectors) for one in served)
    assert list(report.features) == REFS
    assert {found.cells for found in report.features.values()} == {report.vectors}


def test_scalars_are_rows_too(store):
    one = serve(store, 5 * HOUR, [3], ["a"], [1.5])
    scalar = replace(one, entities={"user_id": 3, "shop": "a"}, inputs={"value": 1.5})
    assert skew.verify(store, [scalar])[0].mismatches == 0


def test_each_kind_of_difference_is_counted_by_feature(store):
    one = serve(store, 5 * HOUR, [1, 2, 3], ["a", "a", "b"], [1.0, None, 3.0])
    wrong = one.vectors.copy()
    wrong[0, 2] = np.nan  # a value is missing
    wrong[1, 2] = 7.0  # one is there that should not
    wrong[2, 2] = np.nextafter(np.float32(3.0), np.float32(4.0))  # one bit
    (report,) = skew.verify(store, [replace(one, vectors=wrong)])
    found = report.features["cart:value"]
    assert (found.missing, found.extra, found.different) == (1, 1, 1)
    assert found.largest == pytest.approx(2**-22)
    assert report.mismatches == 3
    assert [e["entities"]["user_id"] for e in found.examples] == [1, 2, 3]
    assert found.examples[0] == {
        "entities": {"user_id": 1, "shop": "a"}, "now_us": 5 * HOUR, "served": None, "made_again": 1.0
    }  # fmt: skip
    assert report.to_dict()["features"]["cart:value"]["mismatches"] == 3


def test_vectors_of_other_definitions_are_counted_and_not_compared(store):
    one = serve(store, 5 * HOUR, [1], ["a"], [1.0])
    other = replace(one, fingerprint="another")
    gone = replace(one, service="gone")
    reports = {r.service: r for r in skew.verify(store, [one, other, gone])}
    assert (reports["model"].vectors, reports["model"].other_definitions) == (1, 1)
    assert (reports["gone"].vectors, reports["gone"].other_definitions) == (0, 1)
    assert [r.service for r in skew.verify(store, [one, gone], "model")] == ["model"]
    with pytest.raises(NotFoundError, match="'gone'"):
        skew.verify(store, [], "gone")


def test_a_source_that_was_changed_behind_the_times_is_found(tmp_path):
    rows = some_rows()
    repo = make_repo(tmp_path / "repo", rows)
    with FeatureStore(repo) as store:
        served = list(requests(store))
        write_events(
            repo, [(at, user, shop, None if x is None else -x, city) for at, user, shop, x, city in rows]
        )
        store.refresh()
        (report,) = skew.verify(store, served)
    assert report.features["pairs:top"].different > 0
    assert report.features["users:n"].mismatches == report.features["cart:value"].mismatches == 0


def test_an_event_that_became_known_later_is_no_difference(tmp_path):
    repo = make_repo(tmp_path / "repo", [(HOUR, 1, "a", 1.0, None)])
    text = (repo / "features.py").read_text()
    (repo / "features.py").write_text(text.replace('timestamp="at"', 'timestamp="at", created="known"'))

    def write(events):
        import pyarrow as pa
        import pyarrow.parquet as pq

        at, known, x = zip(*events)
        utc = pa.timestamp("us", "UTC")
        columns = {"at": pa.array(at, utc), "known": pa.array(known, utc), "user_id": [1] * len(at),
                   "shop": ["a"] * len(at), "x": x, "city": pa.nulls(len(at), pa.string())}  # fmt: skip
        pq.write_table(pa.table(columns), repo / "events.parquet")

    write([(HOUR, HOUR, 1.0)])
    now = HOUR + 30 * MINUTE
    with FeatureStore(repo) as store:
        served = serve(store, now, [1], ["a"], [0.0], made_us=now)
    write([(HOUR, HOUR, 1.0), (HOUR + MINUTE, now + MINUTE, 5.0)])
    with FeatureStore(repo) as store:
        assert skew.verify(store, [served])[0].mismatches == 0
        late = replace(served, made_us=now + MINUTE)
        found = skew.verify(store, [late])[0].features
        assert found["pairs:top"].different == 1 and found["users:n"].different == 1
