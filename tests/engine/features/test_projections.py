"""Column renames of sources, views without entities, projections under other names, and declared dtypes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lightgbm import LGBMClassifier

import penstock as d
from penstock.config import check_text
from penstock.errors import (
    DefinitionError,
    FeatureNameCollisionError,
    InvalidArgumentError,
    NotFoundError,
)
from penstock.features.describe import describe_service, describe_view
from penstock.features.expressions import col
from penstock.features.lineage import around, lineage
from penstock.features.store import FeatureStore
from penstock.models.bundle import save_bundle
from penstock.serving.engine import Engine

T = datetime(2024, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
DEFINITIONS = """
from datetime import timedelta
from penstock import Entity, FeatureService, FeatureView, ParquetSource, col, count, now

place = Entity("place", join_keys=["location_id"])
weather = ParquetSource("weather.parquet", timestamp="at", field_mapping={"when": "at", "loc": "location_id",
                                                                         "x": "temperature"})
rates = ParquetSource("rates.parquet", timestamp="at")
location_stats = FeatureView("location_stats", entities=[place], source=weather, ttl=timedelta(days=2),
    features={"temperature": col("temperature"), "seen": count(window="1d"), "name": col("name"),
              "age": (now() - col("at")).hours()})
market = FeatureView("market", entities=[], source=rates, schema={"rate": "float64"})
origin_stats = location_stats.with_name("origin_stats").with_join_key_map({"location_id": "origin_id"})
destination = location_stats.with_name("destination_stats").with_join_key_map(
    {"location_id": "destination_id"})
trip = FeatureService("trip", features=[origin_stats[["temperature"]], "destination_stats:seen", market])
"""
REFS = ["origin_stats:temperature", "destination_stats:temperature", "location_stats:temperature",
        "origin_stats:seen", "destination_stats:age", "destination_stats:name", "market:rate"]  # fmt: skip


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    path = tmp_path / "repo"
    path.mkdir()
    (path / "feature_store.yaml").write_text("project: test\n")
    (path / "features.py").write_text(DEFINITIONS)
    pq.write_table(
        pa.table(
            {
                "when": [T - HOUR, T - 2 * HOUR, T],
                "loc": [1, 1, 2],
                "x": [11.0, 10.0, 22.0],
                "name": ["a", "b", "c"],
                "temperature": ["a column", "that the rename", "replaces"],
            }
        ),
        path / "weather.parquet",
    )
    pq.write_table(pa.table({"at": [T - HOUR, T], "rate": [0.5, 0.25]}), path / "rates.parquet")
    return path


def entities(times: list[datetime]) -> pa.Table:
    n = len(times)
    ids = {"origin_id": [1, 2, 9], "destination_id": [2, 1, 1], "location_id": [2, 2, None]}
    return pa.table({"event_timestamp": times, **{k: pa.array(v[:n], pa.int64()) for k, v in ids.items()}})


@pytest.mark.parametrize("full", [False, True])
def test_projections_renames_and_views_without_entities(repo: Path, full: bool) -> None:
    refs = REFS if full else ["origin_stats:temperature", "destination_stats:name", "market:rate"]
    with FeatureStore(repo) as store:
        table = entities([T, T - HOUR / 2, T - 3 * HOUR])
        got = store.get_historical_features(table, refs, full_feature_names=full, with_status=True).to_arrow()
        name = "origin_stats__temperature" if full else "temperature"
        assert got[name].to_pylist() == [11.0, None, None]
        assert got[name + "__status"].to_pylist() == ["PRESENT", "FUTURE", "NOT_FOUND"]
        rate = "market__rate" if full else "rate"
        assert got[rate].to_pylist() == [0.25, 0.5, None]
        if full:
            assert got["destination_stats__temperature"].to_pylist() == [22.0, 11.0, None]
            assert got["location_stats__temperature"].to_pylist() == [22.0, None, None]
            assert got["origin_stats__seen"].to_pylist() == [2, None, None]
            assert got["destination_stats__age"].to_pylist() == [0.0, 0.5, None]
            assert got["destination_stats__name"].to_pylist() == ["c", "a", None]


def test_online_they_give_what_the_historical_join_gives(repo: Path) -> None:
    with FeatureStore(repo) as store:
        asked = entities([T, T, T])
        offline = store.get_historical_features(asked, REFS, True, with_status=True).to_arrow()
        online_rows = asked.drop_columns("event_timestamp")
        for _ in range(2):
            online = store.get_online_features(REFS, online_rows, now=T, full_feature_names=True)
            assert online.to_arrow(with_status=True).equals(
                offline.select(online.to_arrow(with_status=True).column_names)
            )
            assert store.materialize(T - HOUR, T).rows == {"location_stats": 2, "market": 1}


def test_a_view_without_entities_needs_no_key_online(repo: Path) -> None:
    with FeatureStore(repo) as store:
        for _ in range(2):
            assert store.get_online_features(["market:rate"], [{}], now=T).to_dict() == {"rate": [0.25]}
            two = store.get_online_features(["market:rate"], [{}, {}], now=T - timedelta(microseconds=1))
            assert two.to_dict() == {"rate": [0.5, 0.5]} and len(two) == 2
            store.materialize(T - HOUR, T)


def test_a_service_lists_projections_as_objects(repo: Path) -> None:
    with FeatureStore(repo) as store:
        got = store.get_historical_features(entities([T]), "trip").to_arrow()
        assert got.column_names[4:] == ["temperature", "seen", "rate"]
        assert [got[c].to_pylist() for c in ("temperature", "seen", "rate")] == [[11.0], [1], [0.25]]
        view = store.views["location_stats"]
        lists = [[view[["temperature"]].with_join_key_map({"location_id": key})] for key in
                 ("origin_id", "destination_id")]  # fmt: skip
        by_object = [store.get_historical_features(entities([T]), refs).to_arrow() for refs in lists]
        assert [table["temperature"].to_pylist() for table in by_object] == [[11.0], [22.0]]
        assert "trip" in store.apply().services
        assert not store.plan() and not store.plan().breaks
    (repo / "features.py").write_text(DEFINITIONS.replace('"destination_id"}', '"other_id"}'))
    with FeatureStore(repo) as store:  # a projection that the service calls by its name has changed
        assert store.plan().services == {"trip": "changed"}


def test_lineage_names_the_views_behind_projections(repo: Path) -> None:
    with FeatureStore(repo) as store:
        service = store.services["trip"]
        assert service.base_refs == ["location_stats:temperature", "location_stats:seen", "market:rate"]
        graph = lineage(store.views, store.services)
        assert {node.name for node in graph.nodes if node.kind == "view"} == {"location_stats", "market"}
        assert not [node for node in graph.nodes if node.note == "not defined"]
        near = around(graph, "location_stats:seen", store.services)
        assert "trip" in {node.name for node in near.nodes}
        assert describe_view(store.views["location_stats"], store.services, {})["services"] == ["trip"]
        assert describe_service(service)["aliases"]["origin_stats"] == {
            "view": "location_stats", "join_keys": {"location_id": "origin_id"}}  # fmt: skip


def test_a_service_may_have_full_names(repo: Path) -> None:
    more = 'both = FeatureService("both", ["origin_stats:seen", "destination_stats:seen"]'
    (repo / "features.py").write_text(f"{DEFINITIONS}{more})")
    with FeatureStore(repo) as store, pytest.raises(FeatureNameCollisionError):
        store.apply()
    (repo / "features.py").write_text(f"{DEFINITIONS}{more}, full_feature_names=True)")
    with FeatureStore(repo) as store:
        store.apply()
        got = store.get_historical_features(entities([T]), "both").to_arrow()
        assert got.column_names[4:] == ["origin_stats__seen", "destination_stats__seen"]
    with pytest.raises(DefinitionError, match="full_feature_names is 1; expected True or False"):
        d.FeatureService("s", ["a:b"], full_feature_names=1)  # type: ignore[arg-type]


def test_the_fingerprint_counts_what_a_projection_reads(repo: Path) -> None:
    with FeatureStore(repo) as store:
        view = store.views["location_stats"]
        found = [
            store.service_plan([view[["seen"]].with_name(name).with_join_key_map(keys)]).fingerprint
            for name, keys in (("a", {}), ("b", {}), ("a", {"location_id": "x"}), ("a", {"location_id": "y"}))
        ]
        assert len(set(found)) == 4
        again = view[["seen"]].with_name("a").with_join_key_map({"location_id": "x"})
        assert store.service_plan([again]).fingerprint == found[2]


def test_wrong_projections_are_refused_by_name(repo: Path) -> None:
    with FeatureStore(repo) as store:
        view, service = store.views["location_stats"], store.services["trip"]
        assert service.features == ("origin_stats:temperature", "destination_stats:seen", "market:rate")
        with pytest.raises(DefinitionError, match="'nope' is no join key; expected one of location_id"):
            view.with_join_key_map({"nope": "x"})
        with pytest.raises(DefinitionError, match="has no feature 'nope'"):
            view[["nope"]]
        with pytest.raises(DefinitionError, match="two different projections are named 'a'"):
            store.service_plan(
                [view.with_name("a"), view.with_name("a").with_join_key_map({"location_id": "x"})]
            )
        with pytest.raises(NotFoundError, match="did you mean 'origin_stats'"):
            store.service_plan(["orign_stats:seen"])
        with pytest.raises(FeatureNameCollisionError, match="use full_feature_names=True"):
            store.service_plan(["origin_stats:seen", "destination_stats:seen"])
        other = d.FeatureView("location_stats", view.entities, view.source, {"x": col("x")})
        with pytest.raises(InvalidArgumentError, match="not the repository's"):
            store.service_plan([other.with_name("a")])
        with pytest.raises(InvalidArgumentError, match="features is 3"):
            store.service_plan(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda r: d.FeatureService("s", r), lambda r: r])
def test_a_version_of_a_view_is_refused(repo: Path, make: Any) -> None:
    with FeatureStore(repo) as store, pytest.raises(InvalidArgumentError, match="expected 'market:rate'"):
        store.service_plan(make(["market@v2:rate"]))


@pytest.mark.parametrize(
    "line, problem",
    [
        ("market2 = location_stats.with_name('market')", "projection 'market' has the name of a view"),
        ("from penstock import *; x = FeatureView('o', [place], rates, {'a': col('rate')}).with_name('b')",
         "projection 'b' is of view 'o', which no file names"),
    ],
)  # fmt: skip
def test_wrong_projections_of_a_repository(repo: Path, line: str, problem: str) -> None:
    (repo / "features.py").write_text(DEFINITIONS + line)
    with pytest.raises(DefinitionError, match=problem):
        FeatureStore(repo)


@pytest.mark.parametrize("mapping", [{"a": ""}, {"a": 1}, ["a"], {"a": "x", "b": "x"}])
def test_a_wrong_field_mapping_is_refused(mapping: Any) -> None:
    with pytest.raises(DefinitionError, match="field_mapping"):
        d.ParquetSource("x", timestamp="t", field_mapping=mapping)


def test_a_declared_schema_is_checked_against_the_source(repo: Path) -> None:
    (repo / "features.py").write_text(DEFINITIONS.replace('"rate": "float64"', '"rate": "int64"'))
    with (
        FeatureStore(repo) as store,
        pytest.raises(DefinitionError, match="'rate' is float64; its schema expects int64"),
    ):
        store.apply()
    (repo / "features.py").write_text(DEFINITIONS.replace('"rate": "float64"', '"rate": "decimal"'))
    with pytest.raises(DefinitionError, match="schema has 'rate': 'decimal'"):
        FeatureStore(repo)


def test_a_served_model_reads_projections_and_views_without_entities(repo: Path, tmp_path: Path) -> None:
    with FeatureStore(repo, data_dir=tmp_path / "data") as store:
        asked = {"origin_id": [1, 2, 9, 1], "destination_id": [2, 1, 1, 1]}
        rows = store.get_online_features("trip", asked, now=T).to_numpy()
        rng = np.random.default_rng(0)
        training = pd.DataFrame(
            rng.normal(5, 9, (400, 3)), columns=["temperature", "seen", "rate"], dtype=np.float32
        )
        training["y"] = training["temperature"] + training["seen"] * 7 + training["rate"] * 60 > 9
        model = LGBMClassifier(n_estimators=20, min_child_samples=2, verbose=-1)
        model.fit(training.drop(columns="y"), training["y"])
        plan = store.service_plan("trip")
        save_bundle(model, training, name="trip", directory=tmp_path / "bundles", label="y", plan=plan)
    text = f"""
serving: {{allow_replay: true, max_latency_ms: 20000}}
feature_store: {{repo_path: {repo}}}
models: {{trip: {{path: {tmp_path}/bundles/trip/1}}}}
data_dir: {tmp_path}/data
"""
    config, faults = check_text(text)
    assert config is not None, faults
    expected = model.predict_proba(pd.DataFrame(rows, columns=plan.output_names))[:, 1]
    assert len(set(expected)) > 1
    with Engine(config) as engine:
        for _ in range(2):  # the first finds nothing in the caches
            got = engine.predict("trip", asked, now=int(T.timestamp() * 1e6))
            np.testing.assert_allclose(got.scores, expected, rtol=1e-6)
