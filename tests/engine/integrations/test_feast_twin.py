"""The twin of the shop, in Feast's own definitions, opened by Penstock: against a join by pandas.

`test_feast_real.py` opens it with the real Feast as well.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from feast_twin import FEATURES, visits, write_shop, write_twin

from penstock.integrations.feast import FeastRepository

GOLDEN = Path(__file__).parent / "golden"
_TTL = pd.Timedelta(days=2)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("shop") / "shop")


@pytest.fixture(scope="module")
def twin(shop: Path) -> Path:
    made = write_twin(shop.parent / "twin", shop)
    shutil.copy(GOLDEN / "feast_twin.db", made / "data" / "registry.db")
    return made


def expected(twin: Path, entities: pd.DataFrame) -> pd.DataFrame:
    """Each feature as pandas joins it, in the order of the rows."""
    found = entities[["row"]].copy()
    for name, key, ttl in (("users", "user_id", _TTL), ("items", "item_id", None)):
        table = pd.read_parquet(twin / "data" / f"{name}.parquet").sort_values("event_timestamp")
        joined = pd.merge_asof(
            entities.sort_values("event_timestamp"), table, on="event_timestamp", by=key, tolerance=ttl
        ).set_index("row")
        for column in set(table.columns) - {"event_timestamp", key}:
            found[column] = joined[column].reindex(found["row"]).to_numpy()
    return found


def test_the_twin_joins_as_pandas_does(shop: Path, twin: Path, tmp_path: Path) -> None:
    entities = visits(shop, at_once=3).to_pandas()
    entities = entities.sample(frac=1.0, random_state=5).reset_index(drop=True)
    with FeastRepository.open(twin, data_dir=tmp_path) as repo:
        assert not repo.refused
        got = repo.get_historical_features(entities, FEATURES, with_status=True).to_df()
    assert got["row"].tolist() == entities["row"].tolist()
    oracle = expected(twin, entities)
    for feature in FEATURES:
        name = feature.split(":")[1]
        mine, theirs = got[name].astype("float64"), oracle[name].astype("float64")
        pd.testing.assert_series_equal(mine, theirs, check_exact=True)
    states = set(got["daily_transactions__status"])
    assert states == {"PRESENT", "EXPIRED", "FUTURE", "NOT_FOUND"}


def test_the_twin_online_equals_its_join_at_that_time(shop: Path, twin: Path, tmp_path: Path) -> None:
    now = pd.Timestamp("2026-02-20T10:00:00Z")
    asked = pd.DataFrame({"user_id": range(1, 501), "item_id": [1 + n % 210 for n in range(500)]})
    with FeastRepository.open(twin, data_dir=tmp_path) as repo:
        joined = repo.get_historical_features(asked.assign(event_timestamp=now), FEATURES).to_arrow()
        written = repo.write_online(now)
        for origin in ("store", "feast"):
            got = repo.get_online_features(FEATURES, asked, origin=origin, now=now).to_arrow()
            for feature in FEATURES:
                name = feature.split(":")[1]
                assert got[name].to_pylist() == joined[name].to_pylist(), (origin, name)
            repo.materialize(now - pd.Timedelta(days=30), now)
    assert written["item_features"] == 200 and 100 < written["user_features"] < 500
