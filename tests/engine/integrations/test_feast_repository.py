"""A Feast repository as the real Feast 0.67 applied and materialised it, read without Feast."""

from __future__ import annotations

import math
import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feast_repo import FEATURES, HOUR, US, T, entity_table, write_feast_repo

from penstock.clock import ManualClock
from penstock.errors import (
    ConfigError,
    DefinitionError,
    FeatureNameCollisionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from penstock.features.store import FeatureStore
from penstock.integrations.feast import FeastOnlineResult, FeastRepository
from penstock.integrations.feast_online import RedisLayout, RowWrite, SqliteLayout, ViewRead
from penstock.integrations.feast_registry import read_definitions
from penstock.integrations.feast_wire import (
    Message,
    encode_varint,
    entity_key,
    redis_field,
    redis_time_field,
)

GOLDEN = Path(__file__).parent / "golden"
ROWS = [{"driver_id": d, "customer_id": c} for d, c in
        ((1, "ä"), (2, "ä"), (3, "b"), (4, "ä"), (5, "b"), (-6, "?"), (99, "ä"), (None, "ä"))]  # fmt: skip
PRESENT, NULL, NOT_FOUND, EXPIRED = range(4)


def read_feast(repo: FeastRepository, features: Any, rows: Any, **more: Any) -> FeastOnlineResult:
    found = repo.get_online_features(features, rows, origin="feast", **more)
    assert isinstance(found, FeastOnlineResult)
    return found


# Definitions


def test_the_registry_becomes_definitions(feast_repo: Path) -> None:
    with FeastRepository.open(feast_repo) as repo:
        views = repo.store.views
        assert set(views) == {"driver_stats", "market", "trips_between"}
        stats = views["driver_stats"]
        assert stats.join_keys == ["driver_id"] and stats.ttl == timedelta(days=1)
        assert list(stats.features) == ["conv_rate", "trips", "city", "active", "hired"]
        assert stats.source.describe() == [
            "ParquetSource", "data/stats.parquet", "at", "created",
            [("conv", "conv_rate"), ("when", "at")]]  # fmt: skip
        assert views["trips_between"].join_keys == ["driver_id", "customer_id"]
        assert views["trips_between"].ttl is None and views["market"].join_keys == []
        assert set(repo.store.services) == {"drivers", "swap"}
        assert repo.store.services["swap"].features == ("first:trips", "second:trips")
        assert dict(repo.refused) == {
            "driver_stats:scores": "is of type Array(Float32), which no stored feature can have"
        }
        assert repo.store.project == "rides"


def test_what_cannot_be_run_is_refused_by_name(tmp_path: Path) -> None:
    repo_path = write_feast_repo(tmp_path / "repo")
    shutil.copy(GOLDEN / "feast_other_sources.db", repo_path / "data" / "registry.db")
    with FeastRepository.open(repo_path) as repo:
        assert dict(repo.refused) == {
            "maps": "has no feature of a type that a stored feature can have",
            "maps:x": "is of type Map, which no stored feature can have",
            "of_bigquery": "has a BigQuery source 'warehouse'; expected a Parquet file",
            "of_bucket": "has the source 's3://bucket/t.parquet'; expected a path on this machine",
            "of_delta": "has the source 't' in Delta format; expected Parquet",
            "s": "reads view 'of_bigquery' as 'other', which has a BigQuery source 'warehouse'; "
            "expected a Parquet file",
            "untimed": "has the source 't.parquet' without a timestamp_field; run `feast apply`",
        }
        assert set(repo.store.views) == {"streamed"}
        for features, message in (
            (["of_bigquery:x"], "'of_bigquery:x': view 'of_bigquery' has a BigQuery source"),
            (["maps:x"], "has no feature of a type"),
            ("s", "service 's' reads view 'of_bigquery'"),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                repo.get_historical_features(pa.table({"user_id": [1], "event_timestamp": [T]}), features)
        with pytest.raises(NotFoundError, match="view 'nope' is unknown; the views are"):
            repo.get_historical_features(pa.table({"user_id": [1], "event_timestamp": [T]}), ["nope:x"])
        with pytest.raises(InvalidArgumentError, match="has not recorded the types of its join keys"):
            read_feast(repo, ["of_bucket:x"], {"user_id": [1]}, now=T)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no project"),
        ("project: p\nentity_key_serialization_version: 2", "entity_key_serialization_version is 2"),
        ("project: [", "cannot be read"),
        ("project: p\nregistry: gs://b/r.db", "the registry is gs; expected a file"),
        ("project: p\nregistry: {registry_type: sql, path: 'x'}", "the registry is sql"),
        ("project: p\nregistry: none.db", "none.db; expected a file that `feast apply` wrote"),
    ],
)
def test_a_wrong_configuration_is_named(feast_repo: Path, text: str, message: str) -> None:
    (feast_repo / "feature_store.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        FeastRepository.open(feast_repo, definitions="registry")


def test_a_registry_that_is_none_is_refused(feast_repo: Path) -> None:
    (feast_repo / "data" / "registry.db").write_bytes(b"\x0a\xff\x01")
    with pytest.raises(DefinitionError, match=r"registry\.db is no Feast registry: a field is cut short"):
        FeastRepository.open(feast_repo)
    with pytest.raises(ConfigError, match="definitions is 'x'"):
        FeastRepository.open(feast_repo, definitions="x")


def test_a_registry_of_another_project_is_refused(feast_repo: Path) -> None:
    settings = feast_repo / "feature_store.yaml"
    settings.write_text(settings.read_text().replace("project: rides", "project: ride"))
    with pytest.raises(DefinitionError, match="project is 'ride'; the registry has views of rides alone"):
        FeastRepository.open(feast_repo)


def test_environment_variables_in_the_configuration(
    feast_repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIDES_PROJECT", "rides")
    text = (feast_repo / "feature_store.yaml").read_text()
    (feast_repo / "feature_store.yaml").write_text(
        text.replace("project: rides", "project: ${RIDES_PROJECT}")
    )
    with FeastRepository.open(feast_repo) as repo:
        assert repo.store.project == "rides" and repo.store.views


def test_a_penstock_repository_takes_over_the_definitions(feast_repo: Path, tmp_path: Path) -> None:
    home = tmp_path / "penstock"
    home.mkdir()
    (home / "feature_store.yaml").write_text("project: own\n")
    (home / "features.py").write_text(
        "from pathlib import Path\n"
        "from penstock import FeatureService\n"
        "from penstock.integrations.feast import import_definitions\n"
        "globals().update(import_definitions(Path(__file__).parent.parent / 'repo'))\n"
        "mine = FeatureService('mine', ['driver_stats:trips', 'market:rate'])\n"
    )
    with FeatureStore(home) as store:
        assert set(store.apply().services) == {"drivers", "mine", "swap"}
        assert store.service_plan("swap").output_names == ("first__trips", "second__trips")
        got = store.get_online_features("mine", {"driver_id": [1, 3]}, now=T)
        assert got.to_dict() == {"driver_id": [1, 3], "trips": [2**53 + 1, None], "rate": [0.5, 0.5]}


def test_versioned_names_of_the_online_store(redis_repo: Path) -> None:
    registry = redis_repo / "data" / "registry.db"
    text = (redis_repo / "feature_store.yaml").read_text()
    on = "registry: {path: data/registry.db, enable_online_feature_view_versioning: true}"
    (redis_repo / "feature_store.yaml").write_text(text.replace("registry: data/registry.db", on))
    with FeastRepository.open(redis_repo) as repo:
        assert {view.online_name for view in repo.definitions.views.values()} == set(repo.definitions.views)
    view = next(m for m in Message(registry.read_bytes()).messages(6) if m.message(1).text(1) == "market")
    data = view.data(1)
    field = b"\x0a" + encode_varint(len(data)) + data
    item = field + b"\x12\x02\x20\x03"  # meta: current_version_number 3
    registry.write_bytes(b"\x32" + encode_varint(len(item)) + item)
    with FeastRepository.open(redis_repo) as repo:
        assert repo.definitions.views["market"].online_name == "market_v3"
        assert read_feast(repo, ["market:rate"], [{}], now=T).statuses() == {"rate": [NOT_FOUND]}
        assert repo.write_online(T) == {"market": 1}
        assert read_feast(repo, ["market:rate"], [{}], now=T).to_dict() == {"rate": [0.5]}


# Historical


@pytest.mark.parametrize("full", [False, True])
def test_the_historical_join_keeps_every_row(feast_repo: Path, full: bool) -> None:
    with FeastRepository.open(feast_repo) as repo:
        entities = entity_table()
        got = repo.get_historical_features(entities, FEATURES, full, with_status=True).to_arrow()
        names = [f.replace(":", "__") if full else f.split(":")[1] for f in FEATURES]
        assert [c for c in got.column_names if not c.endswith("__status")] == entities.column_names + names
        assert got.select(entities.column_names).equals(entities)
        column = dict(zip((f.split(":")[1] for f in FEATURES), names))
        assert got[column["trips"]].to_pylist() == [
            2**53 + 1, 2**53 + 1, None, None, -5, None, 0, None, None, 1, None, None]  # fmt: skip
        assert got[column["trips"] + "__status"].to_pylist() == [
            "PRESENT", "PRESENT", "NULL", "EXPIRED", "PRESENT", "FUTURE", "PRESENT", "NOT_FOUND", "FUTURE",
            "PRESENT", "NOT_FOUND", "NOT_FOUND"]  # fmt: skip
        assert got[column["distance"]].to_pylist() == [
            1.5, 2.5, None, None, None, None, None, None, None, None, None, pytest.approx(0.1)]  # fmt: skip
        assert got[column["rate"]].to_pylist() == [0.5] * 8 + [None, 0.25, 0.5, 0.5]
        frame = repo.get_historical_features(entities.to_pandas(), FEATURES, full).to_df()
        assert frame.index.tolist() == list(range(entities.num_rows))


def test_snapshots_sql_and_ages(feast_repo: Path) -> None:
    with FeastRepository.open(feast_repo) as repo:
        got = repo.get_historical_features(None, ["driver_stats:city"], end_date=T, with_age=True).to_arrow()
        assert got["driver_id"].to_pylist() == [-6, 1, 2, 4]  # 3 is expired, 5 in the future
        assert got["city__age"].to_pylist() == [3 * 3600 * 10**6, 3600 * 10**6, None, 24 * 3600 * 10**6]
        query = "SELECT 1 AS driver_id, TIMESTAMPTZ '2024-03-01 12:00:00+00' AS event_timestamp"
        found = repo.get_historical_features(query, ["driver_stats:city"]).to_arrow()
        assert found["city"].to_pylist() == ["Zürich"]
        for entity_df in (None, query):
            with pytest.raises(InvalidArgumentError, match="on-demand features need a table"):
                repo.get_historical_features(entity_df, ["twice:doubled"])


def test_a_created_cutoff_hides_what_was_not_known(feast_repo: Path) -> None:
    with FeastRepository.open(feast_repo) as repo:
        asked = pa.table({"driver_id": [2, 4], "event_timestamp": [T - US, T - US]})
        for cut, expected in ((False, ["NULL", "PRESENT"]), (True, ["FUTURE", "FUTURE"])):
            got = repo.get_historical_features(
                asked, ["driver_stats:city"], filter_by_created_timestamp=cut, with_status=True
            ).to_arrow()
            assert got["city__status"].to_pylist() == expected


def test_services_and_aliases(feast_repo: Path) -> None:
    with FeastRepository.open(feast_repo) as repo:
        asked = pa.table({"first_id": [1, 4], "second_id": [4, 1], "event_timestamp": [T, T]})
        got = repo.get_historical_features(asked, "swap", True).to_arrow()
        assert got["first__trips"].to_pylist() == [2**53 + 1, -5]
        assert got["second__trips"].to_pylist() == [-5, 2**53 + 1]
        with pytest.raises(FeatureNameCollisionError):
            repo.get_historical_features(asked, "swap").to_arrow()
        with pytest.raises(
            NotFoundError, match="service 'nope' is unknown; the services are bonus, drivers, swap"
        ):
            repo.get_historical_features(asked, "nope")
        online = repo.get_online_features(
            "swap", {"first_id": 1, "second_id": 4}, now=T, full_feature_names=True
        )
        assert online.to_dict()["second__trips"] == [-5]
        plan = repo.store.service_plan("drivers")
        assert plan.output_names == ("trips", "city", "rate")


def test_a10_on_demand_views_run_over_the_join(feast_repo: Path) -> None:
    with FeastRepository.open(feast_repo) as repo:
        entities = entity_table().append_column("bonus", pa.array(np.arange(12.0)))
        got = repo.get_historical_features(entities, ["adjusted:with_bonus", "twice:doubled"]).to_arrow()
        assert got.column_names == [*entities.column_names, "with_bonus", "doubled"]  # no inputs beside them
        expected = [0.75, 1.75, None, None, None, None, 6.0, None, None, 9.5, None, None]
        assert [None if v is None or math.isnan(v) else v for v in got["with_bonus"].to_pylist()] == expected
        assert got["doubled"].to_pylist() == [1.0] * 8 + [None, 0.5, 1.0, 1.0]
        full = repo.get_historical_features(entities, "bonus", True).to_arrow()
        assert full.column_names == [*entities.column_names, "driver_stats__trips", "adjusted__with_bonus"]
        clash = entities.append_column("doubled", pa.array([0] * 12))
        with pytest.raises(FeatureNameCollisionError, match="'twice:doubled' would be named 'doubled'"):
            repo.get_historical_features(clash, ["twice:doubled"]).to_arrow()


def test_a03_missing_request_data_is_named(feast_repo: Path) -> None:
    with FeastRepository.open(feast_repo) as repo:
        with pytest.raises(
            InvalidArgumentError, match="no request input 'bonus', which on-demand view 'adjusted'"
        ):
            repo.get_historical_features(entity_table(), "bonus").to_arrow()
        with pytest.raises(NotFoundError, match="'twice:nope': no such feature; expected one of doubled"):
            repo.get_historical_features(entity_table(), ["twice:nope"])
        with pytest.raises(InvalidArgumentError, match="runs in historical joins only"):
            repo.get_online_features("bonus", {"driver_id": 1})


@pytest.mark.parametrize("features", [["market@v2:rate"], ["rate"], [], 3, [3]])
def test_wrong_feature_lists_are_refused(feast_repo: Path, features: Any) -> None:
    with FeastRepository.open(feast_repo) as repo, pytest.raises(InvalidArgumentError, match="feature"):
        repo.get_historical_features(entity_table(), features)


# Online


def test_our_store_gives_what_the_historical_join_gives(feast_repo: Path) -> None:
    with FeastRepository.open(feast_repo, clock=ManualClock(int(T.timestamp() * 1e6))) as repo:
        for _ in range(2):
            online = repo.get_online_features(FEATURES, ROWS, full_feature_names=True).to_arrow(
                with_status=True
            )
            asked = online.select(["driver_id", "customer_id"]).append_column(
                "event_timestamp", pa.array([T] * len(ROWS), pa.timestamp("us", "UTC"))
            )
            offline = repo.get_historical_features(asked, FEATURES, True, with_status=True).to_arrow()
            for name in online.column_names[2:]:
                expected = ["NOT_FOUND" if v == "FUTURE" else v for v in offline[name].to_pylist()]
                got = online[name].to_pylist()
                assert repr(got) == repr(expected), name
            assert repo.materialize(T - 99 * HOUR, T).rows["driver_stats"] == 6
        assert repo.materialize_incremental(T + HOUR).rows["driver_stats"] > 0


def test_rows_that_feast_materialised_into_redis_are_read(redis_repo: Path) -> None:
    with FeastRepository.open(redis_repo) as repo:
        got = read_feast(repo, [*FEATURES, "driver_stats:scores"], ROWS, now=T)
        columns = got.to_dict()
        assert columns["trips"] == [2**53, None, None, -5, None, 0, None, None]  # Feast's materialise rounds
        assert columns["city"] == ["Zürich", None, None, "", None, "x" * 300, None, None]
        assert columns["active"] == [False, None, None, False, None, True, None, None]
        assert columns["scores"][0] == [] and columns["scores"][5] == [3.0] * 9
        assert columns["hired"][5] == datetime(1969, 12, 31, tzinfo=UTC)
        assert columns["hired"][1] is None  # NaT
        assert (
            columns["conv_rate"][:3] == [0.75, None, None] and math.copysign(1, columns["conv_rate"][5]) == -1
        )
        assert columns["distance"] == [1.5, None, None, None, None, None, None, None]
        assert columns["rate"] == [0.5] * 8
        # Driver 5's only row is in the future, 99 was never written: Feast calls both and a null PRESENT.
        assert got.statuses()["trips"] == [
            PRESENT, NULL, EXPIRED, PRESENT, NOT_FOUND, PRESENT, NOT_FOUND, NOT_FOUND]  # fmt: skip
        assert got.statuses()["distance"] == [PRESENT, NULL] + [NOT_FOUND] * 6
        assert got.statuses()["rate"] == [PRESENT] * 8
        at = [int((T - d).timestamp() * 1e6) for d in (HOUR, HOUR / 2, 25 * HOUR)]
        assert got.event_time[:3, got.views.index("driver_stats")].tolist() == at
        assert len(got) == 8 and got.to_df().shape == (8, 10)
        with_status = got.to_arrow(with_status=True)
        assert with_status["trips__status"].to_pylist()[2] == "EXPIRED"
        assert with_status.column_names[:4] == ["driver_id", "customer_id", "conv_rate", "conv_rate__status"]


def test_a_row_holds_to_the_last_microsecond_of_its_ttl(redis_repo: Path) -> None:
    with FeastRepository.open(redis_repo) as repo:
        edge = T - HOUR + timedelta(days=1)
        for now, status in (
            (T - HOUR - US, NOT_FOUND),
            (T - HOUR, PRESENT),
            (edge, PRESENT),
            (edge + US, EXPIRED),
        ):
            got = read_feast(repo, ["driver_stats:trips"], {"driver_id": 1}, now=now)
            assert got.statuses() == {"trips": [status]}
            assert got.to_dict()["trips"] == [2**53 if status == PRESENT else None]


def test_aliases_read_from_feasts_store(redis_repo: Path) -> None:
    with FeastRepository.open(redis_repo) as repo:
        got = read_feast(
            repo, "swap", {"first_id": [1, 4], "second_id": [4, -6]}, now=T, full_feature_names=True
        )
        assert got.to_dict() == {"first_id": [1, 4], "second_id": [4, -6], "first__trips": [2**53, -5],
                                 "second__trips": [-5, 0]}  # fmt: skip
        with pytest.raises(FeatureNameCollisionError, match="use full_feature_names"):
            read_feast(repo, "swap", {"first_id": 1, "second_id": 4}, now=T)


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"customer_id": ["a"]}, "no join key 'driver_id'"),
        ({"driver_id": ["a"]}, "driver_id"),
        ({"driver_id": [1], "other": [1]}, "column 'other' is no join key; expected driver_id"),
    ],
)
def test_wrong_entity_rows_are_refused(redis_repo: Path, rows: Any, message: str) -> None:
    with FeastRepository.open(redis_repo) as repo, pytest.raises(InvalidArgumentError, match=message):
        read_feast(repo, ["driver_stats:trips"], rows, now=T)


def test_an_unknown_origin_or_feature_is_refused(redis_repo: Path) -> None:
    with FeastRepository.open(redis_repo) as repo:
        with pytest.raises(InvalidArgumentError, match="origin is 'redis'; expected 'store' or 'feast'"):
            repo.get_online_features(["market:rate"], [{}], origin="redis")
        with pytest.raises(
            NotFoundError, match="'market:nope' is no feature of a view in Feast's online store"
        ):
            read_feast(repo, ["market:nope"], [{}])


@pytest.mark.parametrize("origin", ["feast_repo", "redis_repo"])
def test_rows_are_written_where_feast_looks_for_them(request: pytest.FixtureRequest, origin: str) -> None:
    """Both layouts; B12 and B13: a correction of the same time arrives, an older row does not."""
    with FeastRepository.open(request.getfixturevalue(origin)) as repo:
        if origin == "feast_repo":  # into an empty store, an older state first
            assert repo.write_online(T - 1.5 * HOUR) == {"driver_stats": 4, "trips_between": 0, "market": 1}
            assert repo.write_online(T) == {"driver_stats": 4, "trips_between": 4, "market": 1}
            assert repo.write_online(T - 1.5 * HOUR, views=["driver_stats"]) == {"driver_stats": 3}
        else:
            # Feast has materialised rows up to T + 2 h; only driver 5's lies after T.
            assert repo.write_online(T) == {"driver_stats": 4, "trips_between": 4, "market": 1}
        got = read_feast(repo, FEATURES, ROWS, now=T)
        ours = repo.get_online_features(FEATURES, ROWS, now=T)
        for name in got.names:
            expected, found = (result.to_arrow()[name].to_pylist() for result in (ours, got))
            assert repr(found) == repr(expected), name
            assert got.statuses()[name] == ours.statuses()[name]
        assert got.to_dict()["trips"][0] == 2**53 + 1  # ours corrects what Feast's materialise has rounded
        with pytest.raises(NotFoundError):
            repo.write_online(T, views=["nope"])


def test_a_store_that_fails_is_unavailable(redis_repo: Path, redis_port: int) -> None:
    import redis

    client = redis.Redis(port=redis_port)
    key = entity_key(["driver_id"], [4], [1]) + b"rides"
    with FeastRepository.open(redis_repo) as repo:
        for field, value, message in (
            (redis_field("driver_stats", "trips"), b"\xff", "no Int64 at 'driver_stats:trips'"),
            (
                redis_field("driver_stats", "trips"),
                b"\x12\x01a",
                "no Int64 at 'driver_stats:trips', but a value of type String",
            ),
            (redis_time_field("driver_stats"), b"\xff", "no time at '_ts:driver_stats'"),
        ):
            client.hset(key, field, value)
            with pytest.raises(UnavailableError, match=message):
                read_feast(repo, ["driver_stats:trips"], {"driver_id": 1}, now=T)
        client.set(key, "no hash")
        with pytest.raises(UnavailableError, match="Redis store failed"):
            read_feast(repo, ["driver_stats:trips"], {"driver_id": 1}, now=T)
    client.close()
    text = (redis_repo / "feature_store.yaml").read_text()
    (redis_repo / "feature_store.yaml").write_text(text.replace(str(redis_port), "1"))
    with (
        FeastRepository.open(redis_repo) as repo,
        pytest.raises(UnavailableError, match="Redis store failed"),
    ):
        read_feast(repo, ["driver_stats:trips"], {"driver_id": 1}, now=T)


@pytest.mark.parametrize(
    "store, message",
    [
        ("{type: dynamodb}", "online_store.type is 'dynamodb'; expected 'redis' or 'sqlite'"),
        ("{type: redis, redis_type: redis_cluster}", "redis_type is 'redis_cluster'"),
        ("{type: redis, connection_string: 'a:1,b:2'}", "expected one 'host:port'"),
        ("{type: redis, connection_string: 'a:1,nope=2'}", "has 'nope'; expected one of db"),
    ],
)
def test_a_wrong_online_store_is_named(feast_repo: Path, store: str, message: str) -> None:
    text = (feast_repo / "feature_store.yaml").read_text()
    (feast_repo / "feature_store.yaml").write_text(
        text.replace("{type: sqlite, path: data/online.db}", store)
    )
    with FeastRepository.open(feast_repo) as repo, pytest.raises(ConfigError, match=message):
        read_feast(repo, ["market:rate"], [{}], now=T)


def test_a_broken_sqlite_file_is_unavailable(feast_repo: Path) -> None:
    (feast_repo / "data" / "online.db").write_bytes(b"no database" * 99)
    with FeastRepository.open(feast_repo) as repo:
        with pytest.raises(UnavailableError, match="cannot be read"):
            read_feast(repo, ["market:rate"], [{}], now=T)
        with pytest.raises(UnavailableError, match="cannot be written"):
            repo.write_online(T)


@pytest.mark.parametrize("kind", ["redis", "sqlite"])
def test_layouts_keep_the_newest_row(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    """B13, and within one batch; B12: of one time the later write stays."""
    layout: RedisLayout | SqliteLayout
    if kind == "redis":
        port = request.getfixturevalue("redis_port")
        layout = RedisLayout("p", f"127.0.0.1:{port},db=1", key_ttl_seconds=1000)
    else:
        layout = SqliteLayout("p", tmp_path / "o.db")
    key = entity_key(["k"], [2], [f"{kind}"])
    second = 1_000_000
    times = ((20, b"a"), (30, b"b"), (10, b"c"))
    batch = [RowWrite(key, at * second, {"f": value}) for at, value in times]
    assert layout.write("v", batch) == 2
    read = [ViewRead("v", ["f", "g"], [key, None, key + b"x"])]
    for rows, written, value in (([], 0, b"b"), ([(29, b"d")], 0, b"b"), ([(30, b"e")], 1, b"e")):
        assert layout.write("v", [RowWrite(key, at * second, {"f": data}) for at, data in rows]) == written
        [[found, none, missing]] = layout.read(read)
        assert found is not None and (found.event_us, dict(found.values)) == (30 * second, {"f": value})
        assert none is None and missing is None
    if isinstance(layout, SqliteLayout):
        with closing(sqlite3.connect(tmp_path / "o.db")) as db:
            [(stored,)] = db.execute('SELECT event_ts FROM "p_v"').fetchall()
            assert datetime.fromtimestamp(stored) == datetime(1970, 1, 1, 0, 0, 30)  # UTC as if it were local
    layout.close()


# Bad bytes


def test_a_corrupt_registry_is_refused_or_read_but_never_crashes(tmp_path: Path) -> None:
    """Bytes changed, cut, doubled, inserted at random: definitions, or an error that names the registry."""
    rng = np.random.default_rng(17)
    whole = [(GOLDEN / name).read_bytes() for name in ("feast_registry.db", "feast_other_sources.db")]
    repo_path = write_feast_repo(tmp_path / "repo")
    read = refused = 0
    for i in range(600):
        data = bytearray(whole[i % 2])
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, len(data)))
            kind = max(0, rng.integers(-6, 4))
            if kind == 0:
                data[at] = int(rng.integers(256))
            elif kind == 1:
                del data[at : at + int(rng.integers(1, 30))]
            elif kind == 2:
                data[at:at] = data[at : at + int(rng.integers(1, 30))]
            else:
                data[at:at] = rng.bytes(int(rng.integers(1, 9)))
            if not data:
                break
        (repo_path / "data" / "registry.db").write_bytes(data)
        try:
            read_definitions(repo_path, tmp_path / "data")
            read += 1
        except DefinitionError:
            refused += 1
    assert read > 20 and refused > 100
