"""The edge cache under the engine: the same answers as without it, its keys, its statistics, its settings."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lightgbm import LGBMClassifier

from penstock import Engine, FeatureStore
from penstock.config import check_text
from penstock.models.bundle import save_bundle

HOUR_US = 3_600_000_000
NOW_US = int(pd.Timestamp("2026-03-15T12:10:00Z").value // 1000)
USERS = 12
DEFINITIONS = """
from penstock import Entity, FeatureService, FeatureView, ParquetSource, RequestSource, col, mean, now, sum

user = Entity("user", join_keys=["user_id"])
events = ParquetSource("data/events.parquet", timestamp="ts")
f = FeatureView("f", entities=[user], source=events, features={
    "spend": sum(col("amount"), window="2d"),
    "evening": (now().hour() > 17) & (col("kind") > 0),
    "weekday": now().weekday() * 1.0 + col("kind"),
    "age": (now() - col("born")).days(),
})
r = RequestSource("r", {"x": "float64", "n": "int64"})
calendar = FeatureService("calendar", features=["f:spend", "f:evening", "f:weekday", "r:x", "r:n"], request=r)
ageing = FeatureService("ageing", features=["f:spend", "f:age", "r:x"], request=r)
"""
CALENDAR = ["spend", "evening", "weekday", "x", "n"]
AGEING = ["spend", "age", "x"]


def events_of(seed: int, n: int = 400) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    age_us = rng.integers(0, 3 * 24 * HOUR_US, n)
    return pd.DataFrame(
        {
            "user_id": rng.integers(0, USERS, n),
            "ts": pd.to_datetime(NOW_US - age_us, unit="us", utc=True),
            "amount": rng.gamma(2.0, 10.0, n),
            "kind": rng.integers(0, 2, n),
            "born": pd.to_datetime(NOW_US - rng.integers(1, 900, n) * 24 * HOUR_US, unit="us", utc=True),
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the repository and bundles: `cal` 1 and 2, `old` 1 and, on vectors, `bare` 1."""
    home = tmp_path_factory.mktemp("edge")
    (home / "repo" / "data").mkdir(parents=True)
    (home / "repo" / "feature_store.yaml").write_text("project: edge\n")
    (home / "repo" / "features.py").write_text(DEFINITIONS)
    events_of(0).to_parquet(home / "repo" / "data" / "events.parquet", index=False)
    rng = np.random.default_rng(2)
    n = 500
    visits = pd.DataFrame(
        {
            "user_id": rng.integers(0, USERS, n),
            "x": rng.normal(size=n),
            "n": rng.integers(0, 5, n),
            "event_timestamp": pd.to_datetime(NOW_US - rng.integers(0, 30 * HOUR_US, n), unit="us", utc=True),
        }
    )
    with FeatureStore(home / "repo", data_dir=home / "data") as store:
        for name, service, columns in (("cal", "calendar", CALENDAR), ("old", "ageing", AGEING)):
            frame = store.get_historical_features(visits, service).to_df()
            training = frame[columns].astype(np.float32)
            sums = training.fillna(0.0).sum(axis=1).to_numpy() + rng.normal(size=n)
            training["y"] = sums > np.median(sums)
            for trees in (8, 16) if name == "cal" else (8,):
                model = LGBMClassifier(n_estimators=trees, num_leaves=15, min_child_samples=5, verbose=-1)
                model.fit(training[columns], training["y"])
                save_bundle(
                    model,
                    training,
                    name=name,
                    directory=home / "bundles",
                    label="y",
                    plan=store.service_plan(service),
                )
        save_bundle(model, training, name="bare", directory=home / "bundles", label="y", inputs=AGEING)
    return home


@pytest.fixture
def start(trained: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Path, Engine]]]:
    """Start an engine with `caches.edge` as given, in a folder of its own."""
    engines: list[Engine] = []

    def make(edge: str = "{mode: on}") -> tuple[Path, Engine]:
        home = tmp_path / str(len(engines))
        shutil.copytree(trained, home, ignore=shutil.ignore_patterns("LOCK"))
        text = f"""
serving: {{allow_replay: true, max_latency_ms: 20000}}
feature_store: {{repo_path: {home}/repo}}
caches: {{edge: {edge}}}
models:
  cal: {{path: {home}/bundles/cal/1}}
  old: {{path: {home}/bundles/old/1}}
  bare: {{path: {home}/bundles/bare/1}}
monitoring: {{pane: 1d, window: 10d}}
data_dir: {home}/data
"""
        config, faults = check_text(text)
        assert config is not None, faults
        engines.append(Engine(config))
        return home, engines[-1]

    yield make
    for engine in engines:
        engine.close()


def ask(
    engine: Engine, users: list[int], *, x: float = 0.5, n: int = 1, now: int = NOW_US, **more: Any
) -> Any:
    inputs = {"x": [x] * len(users), "n": [n] * len(users)}
    return engine.predict("cal", {"user_id": users}, inputs, now=now, **more)


def edge_of(engine: Engine, model: str = "cal") -> dict[str, Any]:
    found: dict[str, Any] = engine.stats()["models"][model]["edge"]
    return found


def test_a_repeat_is_a_hit_and_counts_like_any_row(start: Any) -> None:
    _, engine = start()
    first = ask(engine, [3])
    again = ask(engine, [3])
    np.testing.assert_array_equal(first.scores, again.scores)
    assert first.request_ids[0] != again.request_ids[0]
    stats = engine.stats()["models"]["cal"]
    assert (stats["edge"]["hits"], stats["edge"]["size"], stats["edge"]["active"]) == (1, 1, True)
    assert stats["rows"]["ok"] == stats["requests"]["ok"] == stats["latency"]["count"] == 2
    assert sum(runs for runs in stats["batches"].values()) == 1
    served = engine.served_log.read("cal")
    assert served.num_rows == 2
    first_row, second_row = served.drop(["rid"]).to_pylist()
    assert first_row == second_row
    report = engine.drift("cal")["cal"]
    assert {feature["n"] for feature in report["drift"]["features"]} == {2}


def test_keys_are_typed_values_and_calendar_fields_of_now(start: Any) -> None:
    _, engine = start()
    ask(engine, [3])

    def outcome(**asked: Any) -> str:
        before = edge_of(engine)
        ask(engine, [3], **asked)
        after = edge_of(engine)
        (found,) = [what for what in ("hits", "misses", "expired", "stale") if after[what] != before[what]]
        return found

    assert outcome(now=NOW_US + 1) == "hits"
    assert outcome(x=0.25) == "misses"
    assert outcome(n=2) == "misses"
    assert outcome(now=NOW_US + HOUR_US) == "misses"  # another hour
    assert outcome(now=NOW_US + 24 * HOUR_US) == "misses"  # the same hour of another weekday
    # The same fields of the time again, but features that are no longer what they were.
    assert outcome(now=NOW_US + 7 * 24 * HOUR_US) in ("stale", "expired")
    ask(engine, [3])
    assert outcome() == "hits"
    before = edge_of(engine)["hits"]
    engine.predict("cal", {"user_id": 3}, {"x": 0.5, "n": 1}, now=NOW_US)
    assert edge_of(engine)["hits"] == before + 1  # a scalar and a list of one are the same row


def test_a_service_that_reads_the_time_itself_is_not_cached(start: Any) -> None:
    _, engine = start()
    scores = {
        float(engine.predict("old", {"user_id": 3}, {"x": 0.5}, now=NOW_US + d * 24 * HOUR_US).scores[0])
        for d in (0, 0, 300)
    }
    assert scores
    edge = edge_of(engine, "old")
    assert edge["hits"] == edge["misses"] == edge["size"] == 0
    rows = np.zeros((1, len(AGEING)), np.float32)
    for _ in range(2):
        engine.predict_vectors("bare", rows)
    assert edge_of(engine, "bare")["hits"] == 1


def test_answers_are_those_without_it(start: Any) -> None:
    home, engine = start()
    plain_home, plain = start("{mode: off}")
    rng = np.random.default_rng(5)
    for turn in range(300):
        users = rng.integers(0, USERS + 3, rng.choice([1, 1, 1, 2, 5])).tolist()  # some are unknown
        asked = {
            "x": float(rng.choice([0.0, -0.0, 0.5])),
            "n": int(rng.integers(0, 2)),
            "now": NOW_US + int(rng.choice([0, 1, 7, 40, 100])) * HOUR_US // 2,
            "no_cache": bool(rng.random() < 0.1),
        }
        got, want = ask(engine, users, **asked), ask(plain, users, **asked)
        np.testing.assert_array_equal(got.scores, want.scores)
        np.testing.assert_array_equal(
            np.zeros(len(users)) if got.status is None else got.status,
            np.zeros(len(users)) if want.status is None else want.status,
        )
        if turn % 100 == 50:
            for folder, each in ((home, engine), (plain_home, plain)):
                events_of(turn).to_parquet(folder / "repo" / "data" / "events.parquet", index=False)
                each.materialize(NOW_US)
    edge = edge_of(engine)
    assert edge["hits"] >= 20 and edge["stale"] + edge["expired"] > 5
    assert edge_of(plain) == dict.fromkeys(edge, 0) | {"enabled": False, "active": False}


def test_hot_inputs_are_computed_before_a_version_is_live_and_after_a_refresh(start: Any) -> None:
    home, engine = start("{mode: on, precompute: 64}")
    now = engine.clock.now_us()
    for _ in range(100):
        for user in range(4):
            ask(engine, [user], now=now)
    assert len(engine.live.get("cal").served.hot_inputs()) == 4
    engine.registry.add(home / "bundles" / "cal" / "2")
    engine.promote("cal", "2")
    made = edge_of(engine)
    assert made["precomputed"] == 4 and made["misses"] == 0
    scores = [float(ask(engine, [user], now=now).scores[0]) for user in range(4)]
    assert edge_of(engine)["hits"] in (4, 0)  # 0 where the hour has just changed
    whole = [float(ask(engine, [user], now=now, no_cache=True).scores[0]) for user in range(4)]
    assert scores == whole
    events_of(9).to_parquet(home / "repo" / "data" / "events.parquet", index=False)
    engine.materialize(now)
    assert edge_of(engine)["precomputed"] == 8
    runs = sum(engine.stats()["models"]["cal"]["batches"].values())
    fresh = [float(ask(engine, [user], now=now).scores[0]) for user in range(4)]
    assert sum(engine.stats()["models"]["cal"]["batches"].values()) == runs
    assert fresh == [float(ask(engine, [user], now=now, no_cache=True).scores[0]) for user in range(4)]


def test_a_cheap_lane_passes_it_by(start: Any) -> None:
    _, engine = start("{}")
    for _ in range(5):
        ask(engine, [3])
    edge = edge_of(engine)
    assert edge["enabled"]
    if not edge["active"]:  # so on any machine that is not held up for long
        assert edge["hits"] == 0


@pytest.mark.parametrize(
    ("edge", "fault"),
    [
        ("{mode: sometimes}", "caches.edge.mode is 'sometimes'"),
        ("{capacity: 0}", "caches.edge.capacity is 0"),
        ("{ttl: 0s}", "caches.edge.ttl is 0"),
        ("{precompute: -1}", "caches.edge.precompute is -1"),
        ("{capacty: 5}", 'unknown key caches.edge.capacty; did you mean "capacity"?'),
    ],
)
def test_bad_settings_name_field_and_value(edge: str, fault: str) -> None:
    config, faults = check_text(f"caches:\n  edge: {edge}\n")
    assert config is None
    assert fault in str(faults[0]) and str(faults[0]).startswith("line 2")


def test_settings_of_yaml_words() -> None:
    for word in ("on", "off", "auto"):
        config, faults = check_text(f"caches: {{edge: {{mode: {word}, ttl: 5m}}}}\n")
        assert config is not None, faults
        assert (config.caches.edge.mode, config.caches.edge.ttl) == (word, 300.0)
