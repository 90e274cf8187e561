"""The shop example, and its twin in Feast's own definitions over the same precomputed columns."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from feast_twin_definitions import TWIN_DEFINITIONS

import penstock.examples.shop
from penstock.examples.shop import data
from penstock.features.store import FeatureStore

FEATURES = [
    "user_features:daily_transactions",
    "user_features:account_age_days",
    "item_features:price_percentile",
]


def write_shop(path: Path) -> Path:
    """A copy of the shop example with its data."""
    home = Path(penstock.examples.shop.__file__).parent / "repo"
    shutil.copytree(home, path, ignore=shutil.ignore_patterns("__pycache__"))
    data.build(path)
    return path


def write_twin(path: Path, shop: Path) -> Path:
    """A Feast repository over the columns that the shop has right after each of its events."""
    (path / "data").mkdir(parents=True)
    (path / "feature_store.yaml").write_text(
        "project: shop\nregistry: data/registry.db\nprovider: local\n"
        "online_store: {type: sqlite, path: data/online.db}\nentity_key_serialization_version: 3\n"
    )
    (path / "definitions.py").write_text(TWIN_DEFINITIONS)
    with FeatureStore(shop) as store:
        for events, key, refs, name in (
            ("transactions", "user_id", FEATURES[:2], "users"),
            ("prices", "item_id", FEATURES[2:], "items"),
        ):
            table = pq.read_table(shop / "data" / f"{events}.parquet", columns=["event_timestamp", key])
            columns = store.get_historical_features(table, refs).to_arrow()
            pq.write_table(columns, path / "data" / f"{name}.parquet")
    return path


def visits(shop: Path, at_once: int | None = None) -> pa.Table:
    """The shop's visits, numbered; one of them, if it is named, at three more items at once."""
    table = pq.read_table(shop / "data" / "visits.parquet")
    basket = table.slice(0, 0) if at_once is None else table.slice(at_once, 1)
    more = [basket.set_column(2, "item_id", pa.array([item] * len(basket), pa.int64()))
            for item in (1, 2, 3)]  # fmt: skip
    table = pa.concat_tables([table, *more])
    return table.append_column("row", pa.array(range(table.num_rows)))
