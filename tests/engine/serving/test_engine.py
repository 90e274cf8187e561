"""The engine in one process, on the shop example: same bits as the join, life cycle, monitors, faults."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from lightgbm import LGBMClassifier

from penstock import Engine, FeatureStore
from penstock.config import check_text
from penstock.errors import (
    BundleError,
    ConfigError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    StoreError,
    UnavailableError,
)
from penstock.examples.shop import data as shop_data
from penstock.models.bundle import ModelBundle, save_bundle

EXAMPLE = Path(shop_data.__file__).parent
NOW = pd.Timestamp("2026-03-15T12:00:00Z")
NOW_US = int(NOW.value // 1000)
COLUMNS = [
    "daily_transactions",
    "weekly_spend",
    "account_age_days",
    "price_percentile",
    "basket_value",
]


def rows_of(n: int, seed: int = 0) -> pd.DataFrame:
    """Entity rows: known and unknown users and items."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "user_id": rng.integers(1, 600, n),
            "item_id": rng.integers(1, 230, n),
            "basket_value": rng.gamma(2.0, 20.0, n),
            "event_timestamp": NOW,
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the repository, its data_dir, and two versions of `buy` and one of `bare`."""
    home = tmp_path_factory.mktemp("shop")
    shutil.copytree(EXAMPLE / "repo", home / "repo")
    shop_data.build(home / "repo")
    with FeatureStore(home / "repo", data_dir=home / "data") as store:
        visits = rows_of(600, seed=1)
        frame = store.get_historical_features(visits, "purchase").to_df()
        bought = (np.nan_to_num(frame["weekly_spend"].to_numpy()) + visits["basket_value"] > 60).to_numpy()
        training = frame[COLUMNS].astype(np.float32).assign(bought=bought)
        for trees in (10, 20):
            model = LGBMClassifier(n_estimators=trees, num_leaves=7, random_state=3, verbose=-1)
            model.fit(training[COLUMNS], training["bought"])
            save_bundle(
                model,
                training,
                name="buy",
                directory=home / "bundles",
                label="bought",
                plan=store.service_plan("purchase"),
            )
        save_bundle(model, training, name="bare", directory=home / "bundles", label="bought", inputs=COLUMNS)
        save_bundle(  # version 2 reads the service
            model,
            training,
            name="bare",
            directory=home / "bundles",
            label="bought",
            plan=store.service_plan("purchase"),
        )
    return home


def config_of(home: Path, **changes: Any) -> Any:
    text = f"""
serving: {{allow_replay: true, max_latency_ms: 5000}}
feature_store: {{repo_path: {home}/repo}}
models:
  buy: {{path: {home}/bundles/buy/1}}
  bare: {{path: {home}/bundles/bare/1}}
monitoring: {{pane: 1d, window: 10d}}
data_dir: {home}/data
"""
    for old, new in changes.items():
        text = text.replace(old, new)
    config, faults = check_text(text)
    assert config is not None, faults
    return config


@pytest.fixture(scope="module")
def shared(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine for tests that leave it as it is."""
    home = tmp_path_factory.mktemp("shared") / "run"
    shutil.copytree(trained, home, ignore=shutil.ignore_patterns("LOCK"))
    with Engine(config_of(home)) as engine:
        yield engine


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("LOCK"))
    return tmp_path / "run"


@pytest.fixture
def engine(home: Path) -> Iterator[Engine]:
    with Engine(config_of(home)) as engine:
        yield engine


def ask(engine: Engine, rows: pd.DataFrame, **options: Any) -> Any:
    return engine.predict(
        "buy",
        rows[["user_id", "item_id"]],
        rows[["basket_value"]],
        now=options.pop("now", NOW_US),
        **options,
    )


def joined_scores(engine: Engine, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The rows by the historical join, as float32, and their scores."""
    assert engine.store is not None
    frame = engine.store.get_historical_features(rows, "purchase").to_df()
    features = np.ascontiguousarray(frame[COLUMNS].astype(np.float64), dtype=np.float32)
    ensemble = engine.live.get("buy").bundle.ensemble()
    return features, ensemble.predict(features)[:, 0]


@pytest.mark.parametrize("n", [1, 2, 64, 65, 300])
def test_scores_are_those_of_the_historical_join(engine: Engine, n: int) -> None:
    rows = rows_of(n, seed=n)
    features, scores = joined_scores(engine, rows)
    for options in ({}, {}, {"no_cache": True}):  # cold, warm, and past the cache
        made = ask(engine, rows, request_id=list(range(n)), **options)
        np.testing.assert_array_equal(made.scores, scores)
        assert made.version == "1" and made.request_ids.tolist() == list(range(n))
    engine.drain_served()
    log = engine.served_log.read("buy")
    served = np.stack([log[name].to_numpy() for name in COLUMNS], axis=1)
    np.testing.assert_array_equal(served, np.concatenate([features] * 3))


def test_unknown_entities_predict_with_nan_and_are_told(engine: Engine) -> None:
    made = engine.predict("buy", {"user_id": 999_999, "item_id": 1}, {"basket_value": 5.0}, now=NOW_US)
    assert made.status is not None and made.status.tolist() == [2]
    row = engine.served_log.read("buy") if engine.drain_served() is None else None
    assert np.isnan(row["daily_transactions"][0].as_py()) and row["basket_value"][0].as_py() == 5.0


def test_vectors_tables_and_coroutines_give_the_same_scores(engine: Engine) -> None:
    rows = rows_of(150, seed=5)
    features, scores = joined_scores(engine, rows)
    table = rows.drop(columns="event_timestamp")
    many = engine.predict_many("buy", table, now=NOW_US)
    np.testing.assert_array_equal(many.scores, scores)
    assert len(set(many.request_ids.tolist())) == 150
    made = asyncio.run(
        engine.predict_async("buy", rows[["user_id", "item_id"]], rows[["basket_value"]], now=NOW_US)
    )
    np.testing.assert_array_equal(made.scores, scores)
    direct = engine.predict_vectors("bare", features)
    want = engine.live.get("bare").bundle.ensemble().predict(features)[:, 0]
    np.testing.assert_array_equal(direct.scores, want)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (("nobody", {"user_id": 1}), NotFoundError, "expected one of"),
        (("buy", {"user_id": 1}), InvalidArgumentError, "entities.item_id is missing"),
        (("buy", {"user_id": 1, "item_id": 2}), InvalidArgumentError, "inputs.basket_value is missing"),
        (("buy", {"user_id": "x", "item_id": 2}, {"basket_value": 1.0}), InvalidArgumentError, "user_id"),
        (("buy", {"user_id": 1.5, "item_id": 2}, {"basket_value": 1.0}), InvalidArgumentError, "int64"),
        (("bare", {"user_id": 1}), FailedPreconditionError, "predict_vectors"),
    ],
)
def test_a_bad_call_names_what_is_wrong(
    shared: Engine, call: tuple[Any, ...], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        shared.predict(*call)


def test_labels_join_are_durable_and_are_counted_after_a_restart(home: Path) -> None:
    config = config_of(home)
    with Engine(config) as engine:
        rows = rows_of(40, seed=8)
        made = ask(engine, rows)
        labels = [0, 1] * 20
        counts = engine.label(made.request_ids, labels, [NOW_US] * 40)
        assert counts["matched"] == 40 and counts["orphan"] == 0
        before = engine.stats()["models"]["buy"]["performance"]
        assert before["labelled"] == 40
    with Engine(config) as engine:
        assert engine.call("label", [[int(made.request_ids[0])], [0], [NOW_US]])["duplicate"] == 1
        rows = rows_of(1)
        ask(engine, rows)  # the newest pane of this process, so that stats looks at that window
        after = engine.stats()["models"]["buy"]["performance"]
        assert after["labelled"] == 40 and after["auc"] == before["auc"]


@pytest.mark.parametrize(
    ("ids", "labels", "times", "words"),
    [
        ([1], [0.5], None, "labels\\[0\\] is 0.5"),
        ([1], [2], None, "expected 0 or 1"),
        ([-1], [1], None, "request_ids\\[0\\] is -1"),
        ([1 << 64], [1], None, "uint64"),
        ([1, 2], [1], None, "1 values; expected 2"),
        ([1], [1], [NOW_US, NOW_US], "times has 2"),
        (5, [1], None, "request_ids is 5"),
        ([1], [1], ["noon"], "times\\[0\\]"),
        ([1], [1], [-1 << 70], "times\\[0\\]"),
    ],
)
def test_bad_labels_leave_nothing_behind(
    shared: Engine, ids: Any, labels: Any, times: Any, words: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        shared.label(ids, labels, times)
    assert list(shared.label_log.read()) == []


def test_promotion_and_rollback_swap_versions(home: Path) -> None:
    with Engine(config_of(home)) as engine:
        engine.registry.add(home / "bundles" / "buy" / "2")
        rows = rows_of(3)
        first = ask(engine, rows)
        assert engine.promote("buy") == {"model": "buy", "version": "2"}
        second = ask(engine, rows)
        assert (first.version, second.version) == ("1", "2")
        assert not np.array_equal(first.scores, second.scores)
        assert engine.rollback("buy")["version"] == "1"
        np.testing.assert_array_equal(ask(engine, rows).scores, first.scores)
        assert engine.rollback("buy")["version"] == "2"
        assert engine.models()["buy"]["aliases"]["champion"] == "2"
        with pytest.raises(NotFoundError):
            engine.promote("buy", "9")
        assert ask(engine, rows).version == "2"
    config, _ = check_text(f"feature_store: {{repo_path: {home}/repo}}\ndata_dir: {home}/data")
    assert config is not None
    with Engine(config) as engine:  # champions of the registry, without a word about models
        assert engine.health()["models"] == {"buy": "2", "bare": "1"}


def test_a_path_deploys_its_bundle_once_and_later_promotions_hold(home: Path) -> None:
    with Engine(config_of(home)) as engine:
        engine.registry.add(home / "bundles" / "buy" / "2")
        engine.promote("buy", "2")
    with Engine(config_of(home)) as engine:
        assert engine.health()["models"]["buy"] == "2"
        engine.rollback("buy")
    with Engine(config_of(home, **{"buy/1": "buy/2"})) as engine:  # known already: the rollback holds
        assert engine.health()["models"]["buy"] == "1"


def test_a_new_path_is_deployed(home: Path) -> None:
    with Engine(config_of(home)) as engine:
        assert engine.health()["models"]["buy"] == "1"
    with Engine(config_of(home, **{"buy/1": "buy/2"})) as engine:
        assert engine.health()["models"]["buy"] == "2"
        assert engine.rollback("buy")["version"] == "1"


def test_a_bundle_of_other_definitions_is_refused(home: Path) -> None:
    path = home / "repo" / "features.py"
    path.write_text(path.read_text().replace('window="1d"', 'window="2d"'))
    with pytest.raises(BundleError, match="other definitions of the service 'purchase'"):
        Engine(config_of(home))
    # The lock was let go, and the vectors' model needs no store.
    config, _ = check_text(f"models: {{bare: {{path: {home}/bundles/bare/1}}}}\ndata_dir: {home}/data")
    assert config is not None
    with Engine(config) as engine:
        assert engine.predict_vectors("bare", np.zeros((1, 5))).version == "1"


def test_two_engines_on_one_data_dir(home: Path, engine: Engine) -> None:
    with pytest.raises(FailedPreconditionError, match="in use by process"):
        Engine(config_of(home))
    assert ask(engine, rows_of(1)).version == "1"


def test_a_source_that_changed_is_served_after_materialize(home: Path, engine: Engine) -> None:
    rows = rows_of(20, seed=3)
    before = ask(engine, rows)
    source = home / "repo" / "data" / "transactions.parquet"
    table = pq.read_table(source).to_pandas()
    extra = table.iloc[:500].assign(
        event_timestamp=NOW - pd.Timedelta(hours=2),
        created_timestamp=NOW - pd.Timedelta(hours=2),
        user_id=np.resize(rows["user_id"].to_numpy(), 500),
        amount=1000.0,
    )
    pd.concat([table, extra]).to_parquet(source, index=False)
    assert engine.materialize(NOW_US)["rows"]["user_features"] > 0
    after = ask(engine, rows)
    np.testing.assert_array_equal(after.scores, joined_scores(engine, rows)[1])
    assert not np.array_equal(before.scores, after.scores)
    assert engine.materialize(NOW_US)["rows"] == {"user_features": 0, "item_features": 0}
    np.testing.assert_array_equal(ask(engine, rows).scores, after.scores)


def test_materialize_refreshes_the_rows_that_are_cached(engine: Engine) -> None:
    rows = rows_of(50, seed=4)
    ask(engine, rows)
    later = NOW_US + 26 * 3_600_000_000  # every window has moved on
    engine.materialize(later)
    before = engine.stats()
    made = ask(engine, rows, now=later)
    after = engine.stats()
    assert after["models"]["buy"]["missed_rows"] == before["models"]["buy"]["missed_rows"]
    at = rows.assign(event_timestamp=pd.Timestamp(later, unit="us", tz="UTC"))
    np.testing.assert_array_equal(made.scores, joined_scores(engine, at)[1])


def test_apply_ends_the_trial_of_a_version_whose_features_are_no_longer_those_of_its_training(
    home: Path, engine: Engine
) -> None:
    for bundle in ("buy/2", "bare/2"):
        engine.registry.add(home / "bundles" / bundle)
    engine.shadow("buy", share=1)
    engine.canary("bare", share=1)
    vectors = np.zeros((1, len(COLUMNS)), np.float32)
    assert engine.predict_vectors("bare", vectors).version == "2"
    with pytest.raises(FailedPreconditionError, match="a shadow needs those of the live version"):
        engine.shadow("bare", share=1)
    source = home / "repo" / "data" / "prices.parquet"
    table = pq.read_table(source).to_pandas()
    table.assign(price=table["price"] * 2 + 1).to_parquet(source, index=False)
    assert engine.apply()["retired"] == ["buy"]
    assert engine.predict_vectors("bare", vectors).version == "1"
    assert "defined otherwise now" in engine.models()["bare"]["trial"]["fault"]
    assert {f"{m.bundle.name}/{m.bundle.version}" for m in engine.live.all()} == {"bare/1"}


def test_a_shadow_scores_rows_of_features_with_their_event_times(home: Path, engine: Engine) -> None:
    engine.registry.add(home / "bundles" / "buy" / "2")
    engine.shadow("buy", share=1)
    rows = rows_of(64, seed=9)
    features, scores = joined_scores(engine, rows)
    np.testing.assert_array_equal(ask(engine, rows).scores, scores)
    limit = time.monotonic() + 60
    while engine.stats()["models"]["buy"]["trial"]["rows"]["ok"] < 64:
        assert time.monotonic() < limit
    report = engine.drift("buy")["buy"]
    assert report["trial"]["freshness"] == report["freshness"]
    assert report["trial"]["drift"]["n"] == 64
    log = engine.served_log.read("buy").to_pandas()
    unseen = log[log["version"] == "2"]
    np.testing.assert_array_equal(unseen[COLUMNS].to_numpy(np.float32), features)
    np.testing.assert_array_equal(unseen["status"] & 0x7F, log[log["version"] == "1"]["status"])


def test_apply_stops_a_model_whose_features_are_no_longer_those_of_its_training(
    home: Path, engine: Engine
) -> None:
    assert engine.apply()["retired"] == []
    source = home / "repo" / "data" / "prices.parquet"
    table = pq.read_table(source).to_pandas()
    table.assign(price=table["price"] * 2 + 1).to_parquet(source, index=False)
    assert engine.apply()["retired"] == ["buy"]  # price_percentile was fitted anew
    with pytest.raises(NotFoundError):
        ask(engine, rows_of(1))
    assert engine.predict_vectors("bare", np.zeros((1, 5))).version == "1"


def test_a_store_that_fails_is_unavailable_and_comes_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise StoreError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.store, "load_rows", broken)
        with pytest.raises(UnavailableError, match="the disk is gone"):
            ask(engine, rows_of(5))
    assert ask(engine, rows_of(5)).version == "1"


def test_every_row_answered_is_counted(engine: Engine) -> None:
    total = 0
    for n in (1, 7, 64, 130):
        ask(engine, rows_of(n, seed=n))
        total += n
    report = engine.drift()["buy"]
    assert report["drift"]["n"] == total
    assert {view["view"] for view in report["freshness"]["views"]} == {"user_features", "item_features"}
    stats = engine.stats()
    for what in ("requests", "rows"):
        counts = stats["models"]["buy"][what]
        assert counts["submitted"] == sum(v for k, v in counts.items() if k != "submitted")
    assert stats["models"]["buy"]["rows"]["ok"] == total == stats["served_log"]["rows"]
    assert stats["models"]["buy"]["served_dropped"] == 0 and stats["monitor_errors"] == 0
    batches = stats["models"]["buy"]["batches"]  # text keys: many MessagePack readers take no others in a map
    assert sum(int(rows) * runs for rows, runs in batches.items()) == total
    assert set(stats["caches"]) == {"user_features", "item_features"}


def test_features_over_the_wire_are_columns_and_reasons(shared: Engine) -> None:
    got = shared.call(
        "features", ["purchase", {"user_id": [1, 9999], "item_id": [1, 2], "basket_value": [1, 2]}]
    )
    assert got["columns"]["user_id"] == [1, 9999]
    assert got["status"]["daily_transactions"][1] == 2
    only = shared.call("features", [["item_features:price"], {"item_id": 3}, NOW_US])
    assert list(only["columns"]) == ["item_id", "price"] and only["status"] == {"price": [0]}


@pytest.mark.parametrize(
    ("method", "params", "error"),
    [
        ("nothing", [], NotFoundError),
        ("label", [[1]], InvalidArgumentError),
        ("promote", [], InvalidArgumentError),
        ("drift", ["nobody"], NotFoundError),
        ("features", ["nothing", {"user_id": 1}], NotFoundError),
        ("rollback", ["buy"], Exception),
    ],
)
def test_a_bad_method_call_is_an_error_of_ours(
    shared: Engine, method: str, params: list[Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        shared.call(method, params)
    assert shared.health()["ready"]


def test_a_closed_engine_refuses_and_closes_twice(home: Path) -> None:
    engine = Engine(config_of(home))
    engine.close()
    engine.close()
    with pytest.raises(UnavailableError):
        ask(engine, rows_of(1))


def test_a_program_that_ends_without_closing_ends_in_order(home: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from penstock import Engine\n"
        "engine = Engine.from_config(sys.argv[1])\n"
        "print(engine.predict_vectors('bare', np.zeros((1, 5))).version, flush=True)\n"
        "raise RuntimeError('the program fails')\n"
    )
    path = home / "inference-config.yaml"
    path.write_text(f"models: {{bare: {{path: {home}/bundles/bare/1}}}}\ndata_dir: {home}/data\n")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "1\n")
    assert done.stderr.splitlines()[-1] == "RuntimeError: the program fails"


def test_a_config_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Engine.from_config(tmp_path / "none.yaml")


def test_the_trained_bundle_knows_its_features(trained: Path) -> None:
    from penstock.models.bundle import load_bundle

    bundle: ModelBundle = load_bundle(trained / "bundles" / "buy" / "2")
    assert [name for name, _ in bundle.inputs] == COLUMNS and bundle.service == "purchase"


# What the caches remember


def with_cache(home: Path, settings: str) -> Any:
    return config_of(home, **{"data_dir:": f"caches: {{features: {{{settings}}}}}\ndata_dir:"})


@pytest.mark.parametrize(("ttl", "loads"), [("1us", 3), ("1h", 1)])
def test_a_key_without_data_is_loaded_once_a_negative_ttl(home: Path, ttl: str, loads: int) -> None:
    unknown = pd.DataFrame({"user_id": [10_001], "item_id": [1], "basket_value": [1.0]})
    with Engine(with_cache(home, f"negative_ttl: {ttl}, refresh_ahead: 0")) as engine:
        for _ in range(3):
            assert ask(engine, unknown).status.tolist() == [2]
        assert engine.live.get("buy").served.stats()["missed_rows"] == loads + 1  # the item, once
        assert engine.stats()["caches"]["user_features"]["negative_puts"] == loads


def test_rows_that_are_read_live_on_past_their_ttl(home: Path) -> None:
    with Engine(with_cache(home, "ttl: 300ms, refresh_ahead: 0.5")) as engine:
        rows = rows_of(20)
        expected = ask(engine, rows).scores
        deadline = time.monotonic() + 60
        while engine.stats()["refresh"]["loaded"] < 20:
            np.testing.assert_array_equal(ask(engine, rows).scores, expected)
            assert time.monotonic() < deadline
        assert engine.stats()["refresh"]["errors"] == 0
