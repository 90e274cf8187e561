"""Penstock's side of the feature benchmark: repositories over the data, and reads through the public API."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from data import FEATURES

from penstock import FeatureStore

_HEAD = """
import datetime
from penstock import *

user = Entity("user", join_keys=["user_id"])
"""
_STATS = """
stats = FeatureView("stats", [user], {source}, {{name: col(name) for name in {features!r}}})
stats_service = FeatureService("stats", [f"stats:{{name}}" for name in {features!r}])
"""
_WIDE = """
wide = [
    FeatureView(f"wide{v}", [user], ParquetSource(f"{data}/wide{v}.parquet", "event_timestamp"),
                {f"v{v}_{i}": col(f"v{v}_{i}") for i in range(10)})
    for v in range(5)
]
wide0, wide1, wide2, wide3, wide4 = wide
wide_service = FeatureService("wide", [f"wide{v}:v{v}_{i}" for v in range(5) for i in range(10)])
"""
_OPS = """
x = (now() - col("event_timestamp")).seconds()
for i in range(9):
    x = x * col("f1") + (i + 1)
events = ParquetSource(f"{data}/online/events.parquet", "event_timestamp")
ops = FeatureView("ops", [user], events, {"score": x})
ops_service = FeatureService("ops", ["ops:score"])
"""
_FIFTY = """
item = Entity("item", join_keys=["item_id"])
fifty = FeatureView("fifty", [item], ParquetSource(f"{data}/fifty_items.parquet", "event_timestamp"),
                    {f"x{i}": col(f"x{i}") for i in range(50)})
"""
_WINDOWS = """
bursts = FeatureView("bursts", [user], ParquetSource(f"{data}/windows.parquet", "event_timestamp"), {
    f"{kind.__name__}_{name}": kind(col(name), window="30d")
    for name in ("f0", "f1") for kind in (count, sum, mean, min, max)})
bursts_service = FeatureService("bursts", [f"bursts:{name}" for name in bursts.features])
"""
_PUSH = """
clicks = PushSource("clicks", {"user_id": "int64", "at": "timestamp", "x": "float64"}, timestamp="at")
pushed = FeatureView("pushed", [user], clicks, {"x": col("x")})
pushed_service = FeatureService("pushed", ["pushed:x"])
"""
PARTS = {"wide": _WIDE, "ops": _OPS, "fifty": _FIFTY, "windows": _WINDOWS, "push": _PUSH}


def repository(folder: Path, data: Path, *parts: str, source: str | None = None) -> Path:
    """A repository with some of the parts; `source` is the text of the source of `stats`."""
    folder.mkdir(parents=True)
    (folder / "feature_store.yaml").write_text("project: bench\n")
    text = _HEAD + f"data = {str(data)!r}\n"
    if source is not None:
        text += _STATS.format(source=source, features=FEATURES)
    (folder / "features.py").write_text(text + "".join(PARTS[part] for part in parts))
    return folder


def parquet_source(path: Path) -> str:
    return f"ParquetSource({str(path)!r}, 'event_timestamp')"


def in_memory(name: str, table: pa.Table) -> str:
    """The text of a source over a table of this process."""
    module = sys.modules.setdefault("bench_tables", types.ModuleType("bench_tables"))
    setattr(module, name, table)
    return f"TableSource({name!r}, __import__('bench_tables').{name}, 'event_timestamp')"


class Reads:
    """Online reads of a service into a reused array: by `online_reader` where there is one."""

    def __init__(self, store: FeatureStore, service: str, rows: int, now: int) -> None:
        self.store, self.service, self.now = store, service, now
        self.out = np.empty((rows, len(store.services[service].features)), np.float32)
        self.through = "get_online_features(...).to_numpy(out=)"
        self._read = self._by_result
        if hasattr(store, "online_reader"):
            self._reader = store.online_reader(service)
            self._read = self._by_reader
            self.through = "online_reader"

    def __call__(self, rows: dict[str, Any], now: int | None = None) -> np.ndarray:
        """The values of entity rows as `request` makes them: the same array again and again."""
        return self._read(rows, self.now if now is None else now)

    def _by_result(self, rows: dict[str, Any], now: int) -> np.ndarray:
        return self.store.get_online_features(self.service, rows, now=now).to_numpy(out=self.out)

    def _by_reader(self, rows: dict[str, Any], now: int) -> np.ndarray:
        self._reader.read(rows, out=self.out, now=now)
        return self.out


def request(keys: np.ndarray) -> dict[str, Any]:
    """Entity rows as a caller has them: a number for one row, a list for many."""
    return {"user_id": int(keys[0]) if len(keys) == 1 else keys.tolist()}


def percentiles(work: Callable[[Any], Any], arguments: Sequence[Any]) -> dict[str, float]:
    """p50 and p99 in microseconds of one call for each argument."""
    taken = []
    for argument in arguments:
        start = time.perf_counter_ns()
        work(argument)
        taken.append((time.perf_counter_ns() - start) / 1e3)
    return {"p50": float(np.percentile(taken, 50)), "p99": float(np.percentile(taken, 99))}


def join_answer(table: pa.Table) -> np.ndarray:
    """float32[rows, features] of a historical join, NaN where null."""
    return np.column_stack([table[name].to_numpy().astype(np.float32) for name in FEATURES])


def stored_bytes(data_dir: Path) -> int:
    """Bytes of the pages that hold the online store's rows; the store must be closed."""
    import lmdb

    with lmdb.open(str(data_dir / "online"), readonly=True, lock=False) as environment:
        found = environment.stat()
        pages = found["branch_pages"] + found["leaf_pages"] + found["overflow_pages"]
        return int(pages * found["psize"])
