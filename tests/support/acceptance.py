"""What the acceptance cases share: repositories made in place, stores over them, and the oracle.

`ONLINE_STORES` names the online stores that the online cases run on; `World.open` opens a store over one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import penstock as d
from penstock.features.definitions import ViewProjection
from penstock.features.expressions import col
from penstock.features.repo import Repo
from penstock.features.store import FeatureStore

T = datetime(2024, 3, 1, 12, tzinfo=UTC)
HOUR, DAY, US = timedelta(hours=1), timedelta(days=1), timedelta(microseconds=1)
UTC_US = pa.timestamp("us", "UTC")
USER = d.Entity("user", ["u"])
ONLINE_STORES = ["lmdb"]
STATUS = ("PRESENT", "NULL", "NOT_FOUND", "EXPIRED", "FUTURE")


class World:
    """A folder of tables and the stores that were opened over it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: list[FeatureStore] = []

    def table(self, name: str, data: Any) -> str:
        """Write a Parquet file and return its name; its time differs from that of the one before."""
        file = self.folder / f"{name}.parquet"
        before = file.stat().st_mtime_ns if file.exists() else 0
        pq.write_table(data if isinstance(data, pa.Table) else pa.table(data), file)
        now = max(file.stat().st_mtime_ns, before + 1000)
        os.utime(file, ns=(now, now))
        return file.name

    def view(
        self,
        name: str,
        data: Any,
        features: Sequence[str] | Mapping[str, Any],
        *,
        entities: Sequence[d.Entity] = (USER,),
        ttl: timedelta | None = None,
        timestamp: str = "t",
        created: str | None = None,
        **more: Any,
    ) -> d.FeatureView:
        """A view over a table that is written here."""
        source = d.ParquetSource(self.table(name, data), timestamp=timestamp, created=created, **more)
        made = dict(features) if isinstance(features, Mapping) else {f: col(f) for f in features}
        return d.FeatureView(name, entities=list(entities), source=source, features=made, ttl=ttl)

    def open(self, *definitions: Any, online: str = "lmdb") -> FeatureStore:
        """A store over definitions."""
        kinds: dict[type, dict[str, Any]] = {
            kind: {} for kind in (d.FeatureView, d.FeatureService, d.RequestSource, ViewProjection)
        }
        for definition in definitions:
            kinds[type(definition)][definition.name] = definition
        views, services, requests, projections = kinds.values()
        entities = {e.name: e for view in views.values() for e in view.entities}
        data_dir = self.folder / f"data-{len(self._opened)}"
        assert online in ONLINE_STORES
        repo = Repo(
            self.folder, "acceptance", data_dir, None, entities, views, services, requests, projections
        )
        self._opened.append(FeatureStore(repo))
        return self._opened[-1]

    def close(self) -> None:
        for store in self._opened:
            store.close()


def ask(users: Sequence[Any], times: Sequence[Any] | None = None, **more: Any) -> pa.Table:
    """Entity rows of users at T, or at the times given."""
    at = [T] * len(users) if times is None else list(times)
    return pa.table({"u": users, "event_timestamp": at, **more})


def as_of(
    rows: Iterable[Mapping[str, Any]],
    key: Mapping[str, Any],
    t: datetime | None,
    feature: str,
    *,
    ttl: timedelta | None = None,
    known_by: datetime | None = None,
) -> tuple[Any, str]:
    """The oracle: a feature's value and status for one entity row, by the words of the policy.

    Of the rows of the key (a null equals nothing) at or before t, and known by `known_by` where that is
    given, the one of the greatest time counts, then of the greatest `created` (null is least), then the last.
    It counts until its time plus ttl, that moment included.
    """
    if t is None or any(value is None for value in key.values()):
        return None, "NOT_FOUND"
    own = [row for row in rows if all(row[name] == value for name, value in key.items())]
    if not own:
        return None, "NOT_FOUND"
    seen = [row for row in own if row["t"] <= t]
    if known_by is not None:
        seen = [row for row in seen if row.get("c") is not None and row["c"] <= known_by]
    if not seen:
        return None, "FUTURE"
    least = datetime.min.replace(tzinfo=UTC)
    best = seen[0]
    for row in seen[1:]:
        if (row["t"], row.get("c") or least) >= (best["t"], best.get("c") or least):
            best = row
    if ttl is not None and best["t"] < t - ttl:
        return None, "EXPIRED"
    value = best[feature]
    return value, "NULL" if value is None else "PRESENT"


def equal(a: Any, b: Any) -> bool:
    """Equal values; NaN equals NaN."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return type(a) is type(b) and bool(a == b)


def online_status(status: str) -> str:
    """The status online of a cell with that status in a historical join: an event to come is no event yet."""
    return "NOT_FOUND" if status == "FUTURE" else status


def assert_online_is_offline(
    store: FeatureStore, refs: Sequence[str], entities: pa.Table, now: datetime
) -> pa.Table:
    """Compare values and statuses at `now`, and return the online table."""
    online = store.get_online_features(refs, entities, now=now, full_feature_names=True)
    served = online.to_arrow(with_status=True)
    times = pa.array([now] * entities.num_rows, UTC_US)
    joined = store.get_historical_features(
        entities.append_column("event_timestamp", times), refs, True, with_status=True
    ).to_arrow()
    for name in served.column_names:
        expected = joined[name].to_pylist()
        if name.endswith("__status"):
            expected = [online_status(status) for status in expected]
        got = served[name].to_pylist()
        assert all(map(equal, got, expected)) and len(got) == len(expected), (name, got, expected)
    return served
