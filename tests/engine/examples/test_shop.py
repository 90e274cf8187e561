"""The shop example: the specification's call, verbatim, against plain loops."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from feast_twin import write_shop

from penstock.features.expressions import timestamp_us

_DAY = 86_400_000_000


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("shop") / "feature_repo")


def _us(column: Any) -> list[int]:
    return list(column.cast("int64").to_pylist())


def test_the_call_of_the_specification(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop.parent)
    visits = pq.read_table(shop / "data" / "visits.parquet")
    entity_df = visits.to_pandas()

    from penstock import FeatureStore

    store = FeatureStore(repo_path="feature_repo/")
    training_df = store.get_historical_features(
        entity_df=entity_df,
        features=[
            "user_features:daily_transactions",
            "user_features:account_age_days",
            "item_features:price_percentile",
        ],
    ).to_df()

    store.close()
    names = ["daily_transactions", "account_age_days", "price_percentile"]
    assert list(training_df.columns) == [*entity_df.columns, *names]
    assert training_df.index.tolist() == list(range(len(entity_df)))
    assert training_df[entity_df.columns].equals(entity_df)

    bought = pq.read_table(shop / "data" / "transactions.parquet")
    by_user: dict[int, list[tuple[int, int]]] = defaultdict(list)
    signup = dict(zip(bought["user_id"].to_pylist(), _us(bought["signup_time"])))
    for user, at in zip(bought["user_id"].to_pylist(), _us(bought["event_timestamp"])):
        by_user[user].append((at, signup[user]))
    prices = pq.read_table(shop / "data" / "prices.parquet")
    until = timestamp_us(yaml.safe_load((shop / "feature_store.yaml").read_text())["fit_until"])
    fitted = np.array(_us(prices["event_timestamp"])) < until
    listed = np.sort(prices["price"].to_numpy()[fitted])
    by_item: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for item, at, price in zip(
        prices["item_id"].to_pylist(), _us(prices["event_timestamp"]), prices["price"].to_pylist()
    ):
        by_item[item].append((at, price))
    seen = 0
    for row in range(visits.num_rows):
        user, item = (visits[name][row].as_py() for name in ("user_id", "item_id"))
        now = visits["event_timestamp"].cast("int64")[row].as_py()
        past = [at for at, _ in by_user[user] if at <= now]
        daily, age, rank = (training_df[name][row] for name in names)
        if not past or max(past) < now - 90 * _DAY:
            assert daily is pd.NA and np.isnan(age)
        else:
            seen += 1
            assert daily == sum(at > now - _DAY for at in past)
            assert age == (now - signup[user]) / _DAY
        known = [price for at, price in sorted(by_item[item]) if at <= now]
        if known:
            below, equal = (listed < known[-1]).sum(), (listed == known[-1]).sum()
            assert rank == (below + 0.5 * equal) / len(listed)
        else:
            assert np.isnan(rank)
    assert seen > 1000
