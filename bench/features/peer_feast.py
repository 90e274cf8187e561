"""Feast in process on the benchmark's Parquet files: on SQLite, or on a Redis server that runs already.

Views: `stats` (10 features, many events of a user), `wide0` to `wide4` (10 features each), `fifty` (50
features, an entity of its own), and the on-demand view `ops` of 20 operations in pandas over `stats`.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from data import FEATURES
from feast import Entity, FeatureStore, FeatureView, Field, FileSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float32, Float64
from peer_loop import percentiles, seconds, serve

CONFIG = """project: bench
registry: {folder}/registry.db
provider: local
offline_store: {{type: file}}
online_store: {online}
entity_key_serialization_version: 3
"""


class Feast:
    """A store of its own folder."""

    def __init__(self, data: Path, folder: Path, redis: str | None) -> None:
        self.data = data
        folder.mkdir(parents=True, exist_ok=True)
        online = (
            f"{{type: redis, connection_string: '{redis}'}}"
            if redis
            else f"{{type: sqlite, path: {folder}/online.db}}"
        )
        (folder / "feature_store.yaml").write_text(CONFIG.format(folder=folder, online=online))
        self.store = FeatureStore(repo_path=str(folder))
        self.redis = redis
        self.store.apply(self._definitions())
        self.stats = [f"stats:{name}" for name in FEATURES]
        self.wide = [f"wide{v}:v{v}_{i}" for v in range(5) for i in range(10)]

    def _definitions(self) -> list[Any]:
        user = Entity(name="user", join_keys=["user_id"])
        item = Entity(name="item", join_keys=["item_id"])

        def view(name: str, file: str, entity: Any, features: list[str]) -> Any:
            source = FileSource(name=name, path=str(self.data / file), timestamp_field="event_timestamp")
            schema = [Field(name=feature, dtype=Float32) for feature in features]
            return FeatureView(
                name=name, entities=[entity], source=source, schema=schema, ttl=timedelta(days=3650)
            )

        stats = view("stats", "online/events.parquet", user, list(FEATURES))
        wide = [
            view(f"wide{v}", f"wide{v}.parquet", user, [f"v{v}_{i}" for i in range(10)]) for v in range(5)
        ]
        fifty = view("fifty", "fifty_items.parquet", item, [f"x{i}" for i in range(50)])

        @on_demand_feature_view(sources=[stats], schema=[Field(name="score", dtype=Float64)], mode="pandas")
        def ops(inputs: pd.DataFrame) -> pd.DataFrame:
            a, b = inputs["f0"].astype("float64"), inputs["f1"].astype("float64")
            x = a
            for i in range(10):
                x = x * b + (i + 1)
            return pd.DataFrame({"score": x})

        return [user, item, stats, *wide, fifty, ops]

    def materialize(self, views: list[str], start_us: int, end_us: int) -> float:
        """Seconds to write the newest row of each key."""
        start, end = (datetime.fromtimestamp(us / 1e6, UTC) for us in (start_us, end_us))
        return seconds(lambda: self.store.materialize(start, end, feature_views=views))[0]

    def _features(self, what: str) -> list[str]:
        two = self.stats[:2]
        return {"stats": self.stats, "wide": self.wide, "two": two, "ops": [*two, "ops:score"]}[what]

    def read(self, what: str, keys: list[list[int]]) -> dict[str, float]:
        """p50 and p99 in microseconds of a call for each list of keys."""
        features = self._features(what)
        rows = [[{"user_id": key} for key in one] for one in keys]
        return percentiles(lambda one: self.store.get_online_features(features, one).to_dict(), rows)

    def answer(self, what: str, keys: list[int], path: str) -> None:
        """Write the values, float64[keys, features], NaN where there is none."""
        features = self._features(what)
        names = [feature.split(":")[1] for feature in features]
        parts = []
        for at in range(0, len(keys), 256):
            rows = [{"user_id": key} for key in keys[at : at + 256]]
            found = self.store.get_online_features(features, rows).to_dict()
            parts.append(np.array([found[name] for name in names], dtype=np.float64).T)
        np.save(path, np.concatenate(parts))

    def memory(self, keys: int) -> float:
        """Redis' own MEMORY USAGE of an entity of 50 features, mean of `keys`, bytes."""
        import redis

        host, port = str(self.redis).split(":")
        client = redis.Redis(host=host, port=int(port))
        names = [name for name in client.scan_iter(count=1000) if b"item_id" in name]
        sizes = [client.memory_usage(name, samples=0) for name in names[:keys]]
        if len(sizes) < keys:
            raise ValueError(f"Redis has {len(sizes)} keys of items; expected {keys}")
        return float(np.mean(sizes))

    def join(self, answer: str | None = None) -> float:
        """Seconds of a historical join by Feast's default engine."""
        asked = pd.read_parquet(self.data / "join" / "entities.parquet")
        taken, found = seconds(lambda: self.store.get_historical_features(asked, self.stats).to_df())
        if answer is not None:
            np.save(answer, found[list(FEATURES)].to_numpy(np.float32))
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--redis", help="HOST:PORT; SQLite if left out")
    options = parser.parse_args()
    feast = Feast(options.data, options.folder, options.redis)
    serve(
        {
            "materialize": feast.materialize,
            "read": feast.read,
            "answer": feast.answer,
            "memory": feast.memory,
            "join": feast.join,
        }
    )


if __name__ == "__main__":
    main()
