"""What `apply` changes and breaks, bundles included, and `penstock features list|describe|lineage`."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lightgbm import LGBMClassifier
from push_repo import SCHEMA, make_push_repo
from store_repo import DEFINITIONS, HOUR, make_repo, some_rows, write_events
from typer.testing import CliRunner

from penstock import Engine, cli
from penstock.config import load_config
from penstock.data_lock import DataDirLock
from penstock.errors import BundleError, FailedPreconditionError, InvalidArgumentError
from penstock.features.aggregates import count, mean
from penstock.features.changes import Break, BundleFacts
from penstock.features.definitions import Entity, FeatureView
from penstock.features.describe import feature_text, length
from penstock.features.expressions import col, now, where
from penstock.features.source_definitions import ParquetSource
from penstock.features.store import FeatureStore
from penstock.models.bundle import save_bundle

CITY = DEFINITIONS + 'cities = FeatureService("cities", features=["users:spend", "users:rank"])\n'


@pytest.fixture
def run() -> Any:
    return lambda *args: CliRunner().invoke(cli.app, [str(arg) for arg in args])


def train(store: FeatureStore, service: str, name: str, directory: Path) -> Path:
    rng = np.random.default_rng(1)
    table = pa.table(
        {
            "user_id": pa.array(rng.integers(0, 20, 200), pa.int64()),
            "shop": pa.array(["ab"[i] for i in rng.integers(0, 2, 200)]),
            "value": rng.normal(size=200),
            "clicks": pa.array(rng.integers(0, 9, 200), pa.int64()),
            "event_timestamp": pa.array(rng.integers(HOUR, 9 * HOUR, 200), pa.timestamp("us", "UTC")),
        }
    )
    plan = store.service_plan(service)
    joined = store.get_historical_features(table, service).to_arrow()
    frame = pd.DataFrame(index=range(200))
    for column in plan.output_names:
        frame[column] = joined[column].to_numpy().astype(np.float64)
    frame["label"] = rng.integers(0, 2, 200)
    x = frame[list(plan.output_names)].astype(np.float32)
    model = LGBMClassifier(n_estimators=2, random_state=1, verbose=-1).fit(x, frame["label"])
    return save_bundle(model, frame, name=name, directory=directory, label="label", plan=plan).path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An applied repository with a bundle in its data folder and one that a configuration names."""
    home = tmp_path_factory.mktemp("made")
    repo = make_repo(home / "repo", some_rows())
    (repo / "features.py").write_text(CITY)
    with FeatureStore(repo, data_dir=home / "data") as store:
        store.apply()
        train(store, "model", "buy", home / "data" / "models")
        train(store, "cities", "where", home / "elsewhere")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that in the working directory."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    Path("inference-config.yaml").write_text(
        "data_dir: data\nfeature_store: {repo_path: repo}\nmodels: {where: {path: elsewhere/where/1}}\n"
    )
    return tmp_path / "home"


def edit(old: str, new: str) -> None:
    text = Path("repo/features.py").read_text()
    assert old in text
    Path("repo/features.py").write_text(text.replace(old, new))


def plan(run: Any) -> tuple[int, Any]:
    done = run("apply", "--plan", "--json")
    return done.exit_code, json.loads(done.output)


def broken(found: Any) -> list[tuple[str, str]]:
    return [(b["kind"], b["name"]) for b in found["breaks"]]


NOTHING: dict[str, Any] = {
    "views": {}, "services": {}, "view_parts": {}, "service_features": {}, "sources": {}, "breaks": [],
}  # fmt: skip


def test_a_plan_without_changes_breaks_nothing(run: Any, home: Path) -> None:
    assert plan(run) == (0, NOTHING)
    assert run("apply", "--plan").output == "nothing has changed\n"


def test_a_changed_feature_breaks_the_bundles_that_read_it(run: Any, home: Path) -> None:
    edit('count(window="1h")', 'count(window="2h")')
    code, found = plan(run)
    assert (code, found["views"], found["view_parts"]) == (
        1,
        {"users": "changed"},
        {"users": {"feature n": "changed"}},
    )
    assert broken(found) == [("bundle", "buy/1"), ("bundle", "where/1")]  # a plan covers all of a view
    assert "was trained on service 'model' with fingerprint" in found["breaks"][0]["reason"]
    shown = run("apply", "--plan")
    assert shown.exit_code == 1
    assert shown.output.splitlines()[:2] == [" changed  view users", f"{'':>10}  changed feature n"]
    assert "  breaks  bundle buy/1: was trained on service 'model'" in shown.output
    applied = run("apply", "--json")
    assert applied.exit_code == 0
    assert json.loads(applied.output) == found  # apply says the same, and does it
    assert plan(run)[1] == {**NOTHING, "breaks": found["breaks"]}


def test_a_plan_only_looks_even_while_a_server_holds_the_folder(run: Any, home: Path) -> None:
    edit('count(window="1h")', 'count(window="2h")')
    write_events(home / "repo", [*some_rows(), (HOUR, 1, "a", 1.0, "Aarhus")])  # a text without a code
    before = sorted((p.name, p.read_bytes()) for p in (home / "data" / "registry").iterdir())
    lock = DataDirLock(home / "data")
    try:
        code, found = plan(run)
        assert (code, found["views"]) == (1, {"users": "changed"})
        assert sorted((p.name, p.read_bytes()) for p in (home / "data" / "registry").iterdir()) == before
        assert run("features", "lineage").exit_code == 0
        assert run("apply").exit_code == 1
    finally:
        lock.release()


def test_ttl_source_and_keys_are_named(run: Any, home: Path) -> None:
    edit("ttl=timedelta(hours=3)", "ttl=timedelta(hours=4)")
    assert plan(run)[1]["view_parts"] == {"users": {"ttl": "changed"}}
    edit('timestamp="at"', 'timestamp="at", event_id="x"')
    assert plan(run)[1]["view_parts"]["pairs"] == {"source": "changed"}
    edit('"city": col("city"),', "")
    assert plan(run)[1]["view_parts"]["users"] == {
        "feature city": "removed",
        "source": "changed",
        "ttl": "changed",
    }


def test_a_service_that_loses_a_feature(run: Any, home: Path) -> None:
    edit('["users:n", "pairs:top", "cart:value", "users:age"]', '["users:n", "cart:value", "pairs:top"]')
    code, found = plan(run)
    assert (code, found["services"]) == (1, {"model": "changed"})
    assert found["service_features"] == {
        "model": {"users:age": "removed", "cart:value": "moved", "pairs:top": "moved"}
    }
    assert {"kind": "service", "name": "model", "reason": "loses the feature 'users:age'"} in found["breaks"]
    assert broken(found) == [("service", "model"), ("bundle", "buy/1")]


def test_a_feature_that_a_service_still_lists(run: Any, home: Path) -> None:
    edit('"rank": percentile_rank(col("x")),', "")
    code, found = plan(run)
    assert code == 1
    assert broken(found) == [("service", "cities"), ("bundle", "buy/1"), ("bundle", "where/1")]
    assert found["breaks"][0]["reason"] == "lists 'users:rank', which no view has"
    assert "no such feature 'rank'" in found["breaks"][2]["reason"]
    refused = run("apply")
    assert (refused.exit_code, "no such feature 'rank'" in refused.output) == (1, True)
    assert plan(run)[1] == found  # nothing was recorded


def test_a_service_that_is_gone(run: Any, home: Path) -> None:
    edit('cities = FeatureService("cities"', 'cities = FeatureService("towns"')
    found = plan(run)[1]
    assert found["services"] == {"cities": "removed", "towns": "added"}
    assert found["breaks"] == [
        {"kind": "bundle", "name": "where/1", "reason": "its service 'cities' is not defined"}
    ]


def test_new_rows_change_a_fitted_distribution_and_break_what_reads_it(run: Any, home: Path) -> None:
    write_events(home / "repo", [*some_rows(), (HOUR, 1, "a", 1.0, "Aarhus")])
    found = plan(run)[1]
    assert found["views"] == {}
    assert ("bundle", "where/1") in broken(found)


def test_a_source_that_cannot_be_read(run: Any, home: Path) -> None:
    (home / "repo" / "events.parquet").unlink()
    code, found = plan(run)
    assert (code, broken(found)) == (
        1, [("source", "events.parquet"), ("bundle", "buy/1"), ("bundle", "where/1")]
    )  # fmt: skip
    assert "expected an existing file" in found["breaks"][0]["reason"]


def test_a_bundle_that_cannot_be_read_is_left_out(run: Any, home: Path) -> None:
    edit('count(window="1h")', 'count(window="2h")')
    (home / "data" / "models" / "buy" / "1" / "model.yaml").write_text("no: bundle")
    assert broken(plan(run)[1]) == [("bundle", "where/1")]


def test_an_engine_refuses_a_bundle_of_other_definitions(home: Path) -> None:
    config = load_config(Path("inference-config.yaml"))
    Engine(config).close()  # it fits
    edit('count(window="1h")', 'count(window="2h")')
    with pytest.raises(BundleError, match=r"'where' version 1 was trained on other definitions"):
        Engine(config)
    edit('count(window="2h")', 'count(window="1h")')
    Engine(config).close()


def test_a_source_that_drifts_or_vanishes_while_an_engine_serves(home: Path) -> None:
    text = Path("inference-config.yaml").read_text() + "serving: {allow_replay: true}\n"
    Path("inference-config.yaml").write_text(text)
    config = load_config(Path("inference-config.yaml"))
    events = home / "repo" / "events.parquet"
    good = pq.read_table(events)
    with Engine(config) as engine:

        def scores() -> Any:
            return engine.predict("where", {"user_id": [1, 2, 3]}, now=5 * HOUR).scores.tolist()

        before = scores()
        retyped = good.set_column(good.column_names.index("x"), "x", good["x"].cast(pa.float32()))
        faults: list[tuple[Any, Any]] = [
            (lambda: pq.write_table(retyped, events), "column 'x' is float32; expected float64"),
            (lambda: pq.write_table(good.drop_columns(["x"]), events), "has no column 'x'"),
            (lambda: events.write_bytes(b"PAR1"), "cannot be read as Parquet"),
            (events.unlink, "expected an existing file"),
        ]
        for break_it, message in faults:
            break_it()
            with pytest.raises((FailedPreconditionError, InvalidArgumentError), match=message):
                engine.materialize(6 * HOUR)
            assert scores() == before
        pq.write_table(good, events)
        engine.materialize(6 * HOUR)
        assert scores() == before


def test_list(run: Any, home: Path) -> None:
    rows = json.loads(run("features", "list", "--json").output)
    assert [row["feature"] for row in rows[:3]] == ["users:n", "users:spend", "users:tick"]
    by_name = {row["feature"]: row for row in rows}
    assert by_name["users:age"]["dtype"] == "float64"
    assert by_name["users:age"]["stage"] == "request time"
    assert by_name["users:city"] | {"fingerprint": ""} == {
        "feature": "users:city", "name": "city", "dtype": "string", "stage": "stored",
        "definition": "col('city')",
        "fingerprint": "", "keys": ["user_id"], "source": "events.parquet", "ttl": "3h",
    }  # fmt: skip
    shown = run("features", "list").output.splitlines()
    assert shown[0].split() == ["feature", "dtype", "keys", "source", "definition"]
    assert len(shown) == len(rows) + 1
    edit('"n": count', '"new": count(window="1h"), "n": count')
    assert "users:new" in run("features", "list").output
    by_name = {row["feature"]: row for row in json.loads(run("features", "list", "--json").output)}
    assert by_name["users:new"]["dtype"] is None  # not applied yet


def test_describe(run: Any, home: Path) -> None:
    view = json.loads(run("features", "describe", "users", "--json").output)
    assert (view["kind"], view["entities"], view["ttl"]) == ("view", {"user": ["user_id"]}, "3h")
    assert view["services"] == ["model", "cities"]
    service = json.loads(run("features", "describe", "model", "--json").output)
    assert service["request"] == {"name": "cart", "inputs": {"value": "float64", "clicks": "int64"}}
    source = json.loads(run("features", "describe", "events.parquet", "--json").output)
    assert (source["type"], source["declared"], sorted(source["views"])) == (
        "ParquetSource",
        None,
        ["pairs", "users"],
    )
    assert source["recorded"] == {
        "at": "timestamp", "user_id": "int64", "shop": "string", "x": "float64", "city": "string"
    }  # fmt: skip
    feature = json.loads(run("features", "describe", "users:tick", "--json").output)
    assert (feature["definition"], feature["services"]) == ("mean(col('x'), window='2h', every='30m')", [])
    text = run("features", "describe", "users:tick").output
    assert "definition: mean(col('x'), window='2h', every='30m')" in text
    assert "inputs: value float64, clicks int64" in run("features", "describe", "model").output
    assert "  n: int64, stored: count(window='1h')" in run("features", "describe", "users").output
    cart = run("features", "describe", "cart", "--json")
    assert json.loads(cart.output) == {
        "kind": "request source",
        "name": "cart",
        "inputs": {"value": "float64", "clicks": "int64"},
        "services": ["model"],
    }
    wrong = run("features", "describe", "nobody")
    assert "events.parquet, cart" in wrong.output  # sources are named too
    assert (wrong.exit_code, "'nobody' is no view, service, source or feature" in wrong.output) == (1, True)
    assert run("features", "describe").exit_code == 2


def test_lineage(run: Any, home: Path) -> None:
    graph = json.loads(run("features", "lineage", "--json").output)
    edges = {tuple(edge) for edge in graph["edges"]}
    assert edges == {
        ("source:events.parquet", "view:users"), ("source:events.parquet", "view:pairs"),
        ("view:users", "service:model"), ("view:pairs", "service:model"), ("source:cart", "service:model"),
        ("view:users", "service:cities"), ("service:model", "bundle:buy/1"),
        ("service:cities", "bundle:where/1"),
    }  # fmt: skip
    notes = {node["key"]: node["note"] for node in graph["nodes"]}
    assert (notes["bundle:buy/1"], notes["source:events.parquet"]) == ("fits", "ParquetSource")
    assert run("features", "lineage", "pairs").output.splitlines() == [
        "source events.parquet  (ParquetSource)",
        "  view pairs",
        "    service model",
        "      bundle buy/1  (fits)",
    ]  # fmt: skip
    one = json.loads(run("features", "lineage", "users:rank", "--json").output)
    assert {node["key"] for node in one["nodes"]} == {
        "source:events.parquet", "view:users", "service:cities", "bundle:where/1"
    }  # fmt: skip
    up = json.loads(run("features", "lineage", "where/1", "--json").output)
    assert {node["key"] for node in up["nodes"]} == {node["key"] for node in one["nodes"]}
    edit('"rank": percentile_rank(col("x"))', '"rank": percentile_rank(-col("x"))')
    assert "does not fit: its fingerprint differs" in run("features", "lineage", "where/1").output
    wrong = run("features", "lineage", "nobody")
    assert (wrong.exit_code, "'nobody' is no source, view" in wrong.output) == (1, True)


def test_a_pushed_source_has_the_schema_that_it_declares(run: Any, tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "repo")
    with FeatureStore(repo) as store:
        assert store.plan().sources == {}
        store.apply()
        assert not store.plan()
        store.push("events", {"at": HOUR, "user_id": 1, "shop": "a", "x": 1.0, "city": "Oslo"})
        assert not store.plan()
    described = json.loads(run("features", "describe", "events", "--repo", repo, "--json").output)
    assert (described["type"], described["recorded"]) == ("PushSource", SCHEMA)
    wider = (repo / "features.py").read_text().replace("'city': 'string'", "'city': 'string', 'new': 'int64'")
    (repo / "features.py").write_text(wider)
    with FeatureStore(repo) as store:
        planned = store.plan()
        assert planned.sources == {"PushSource events": {"new": "added int64"}}
        assert planned.view_parts["users"] == {"source": "changed"}
        assert store.apply() == planned
        assert not store.plan()
    graph = json.loads(run("features", "lineage", "events", "--repo", repo, "--json").output)
    assert [n["key"] for n in graph["nodes"]] == [
        "source:events",
        "view:pairs",
        "view:users",
        "service:model",
    ]


def test_without_definitions_or_an_apply(run: Any, tmp_path: Path) -> None:
    (tmp_path / "feature_store.yaml").write_text("project: p\n")
    for command, text in (("list", "there are no features\n"), ("lineage", "there is nothing\n")):
        done = run("features", command, "--repo", tmp_path)
        assert (done.exit_code, done.output) == (0, text)
    assert not (tmp_path / ".penstock").exists()  # looking makes no registry
    assert run("features", "list", "--repo", tmp_path / "none").exit_code == 1


EDITS = [
    ('count(window="1h")', 'count(window="2h")', {"users"}, set()),
    ('sum(col("x"), window="90m")', 'sum(col("x") * 2, window="90m")', {"users"}, set()),
    ("hours=3", "hours=5", {"users"}, set()),
    ('"top": max(col("x"), window="1h")', '"top": max(col("x"), window="3h")', {"pairs"}, set()),
    ('["users:spend", "users:rank"]', '["users:rank", "users:spend"]', set(), {"cities"}),
    ('"clicks": "int64"', '"clicks": "float64"', set(), {"model"}),
    ('user = Entity("user"', 'user = Entity("client"', {"users", "pairs"}, set()),
]


def test_any_edits_are_planned_as_they_are_applied_and_can_be_taken_back(made: Path, tmp_path: Path) -> None:
    """A plan names what an edit touches and the bundles whose fingerprint has changed, and equals what apply
    then says; taking the edits back mends all.
    """
    rng = random.Random(7)
    shutil.copytree(made / "repo", tmp_path / "repo", ignore=shutil.ignore_patterns(".penstock"))
    with FeatureStore(made / "repo", data_dir=made / "data") as store:
        bundles = [
            BundleFacts(name, "1", name, store.service_plan(name).fingerprint) for name in ("model", "cities")
        ]
    shutil.copytree(made / "data", tmp_path / "data")
    for size in [0, *itertools.repeat(None, 6)]:
        chosen = rng.sample(EDITS, rng.randint(1, 4) if size is None else size)
        text = CITY
        for old, new, _, _ in chosen:
            text = text.replace(old, new)
        (tmp_path / "repo" / "features.py").write_text(text)
        with FeatureStore(tmp_path / "repo", data_dir=tmp_path / "data") as store:
            planned = store.plan(bundles)
            assert set(planned.views) == set().union(*(edit[2] for edit in chosen))
            assert set(planned.services) == set().union(*(edit[3] for edit in chosen))
            differ = {b.label for b in bundles if store.service_plan(b.name).fingerprint != b.fingerprint}
            assert {b.name for b in planned.breaks} == differ
            assert store.apply(bundles) == planned
            assert not store.plan()
        (tmp_path / "repo" / "features.py").write_text(CITY)
        with FeatureStore(tmp_path / "repo", data_dir=tmp_path / "data") as store:
            back = store.apply(bundles)
            assert (set(back.views), back.breaks) == (set(planned.views), ())


def test_a_break_is_told_of_bare_facts(made: Path) -> None:
    with FeatureStore(made / "repo", data_dir=made / "data") as store:
        facts = [BundleFacts("a", "1", "none", None), BundleFacts("b", "2", None, None)]
        assert store.plan(facts).breaks == (Break("bundle", "a/1", "its service 'none' is not defined"),)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (col("a") + 1, "(col('a') + 1)"),
        ((now() - col("t")).days(), "(now() - col('t')).days()"),
        (where(col("a") > 2, col("b"), 0.5), "where((2 < col('a')), col('b'), 0.5)"),
        (col("a").isin([1, 2]), "isin(col('a'), (1, 2))"),
        (count(window="60m"), "count(window='1h')"),
        (mean(-col("a"), window="90s", every="1m"), "mean(neg(col('a')), window='90s', every='1m')"),
    ],
)
def test_definitions_as_texts(value: Any, text: str) -> None:
    view = FeatureView("v", [Entity("e", ["k"])], ParquetSource("p", "t"), {"f": value})
    assert feature_text(view.features["f"]) == text


def test_lengths_as_texts() -> None:
    assert [length(us) for us in (None, 1, 1_000_000, 90_000_000, 86_400_000_000, 0)] == [
        None, "1us", "1s", "90s", "1d", "0us"
    ]  # fmt: skip
