"""The memory of historical joins: the bound, its settings, and the parts that keep it."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from open_files import deleted_files

import penstock as d
from penstock.errors import ConfigError
from penstock.features import source_batches, store_settings
from penstock.features.repo import load_repo
from penstock.features.source_batches import csv_types
from penstock.features.source_reading import whole_schema
from penstock.features.spill import Spill
from penstock.features.store_settings import JoinSettings, machine_memory

US = pa.timestamp("us", "UTC")


@pytest.mark.parametrize("seed", range(16))
def test_types_of_a_csv_file_read_by_blocks_are_those_of_the_whole(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(source_batches, "_CSV_BLOCK", 3000)
    rng = random.Random(seed)
    pools = [["1", "0", "-5", "007"], ["0", "1", "true"], ["true", "false"], ["1.5", "nan", "1e9"],
             ["2024-01-01"], ["2024-01-01 00:00:00"], ["2024-01-01T00:00:00Z"], ["12:30:00"],
             ["99999999999999999999"], ['""'], ["2024-01-01 00:00:00.123456789"], ['"3"'],
             ["text", '"a,b"'], ["", ""], ["é"], ["NA"]]  # fmt: skip
    lines = ["a,b,c,d"]
    columns = [
        [rng.choice(rng.choices(pools, k=rng.choice([1, 1, 2, 3]))) for _ in range(4)] for _ in range(4)
    ]
    for at in range(4):
        for _ in range(1_000):  # of one kind for long, so that blocks differ
            lines.append(",".join(rng.choice([*columns[c][at], ""]) for c in range(4)))
    file = tmp_path / "x.csv"
    file.write_text("\n".join(lines) + "\n" + "pad,pad,pad,pad\n" * (seed % 2))
    source = d.CSVSource("x.csv", "a", schema={"d": "string"} if seed % 3 == 0 else None)
    assert csv_types(source, file) == {f.name: f.type for f in whole_schema(source, file)}


def test_settings(tmp_path, monkeypatch):
    def loaded(text: str) -> JoinSettings:
        (tmp_path / "feature_store.yaml").write_text(f"project: p\n{text}")
        return load_repo(tmp_path).join

    assert loaded("") == JoinSettings()
    assert JoinSettings().memory_bytes == machine_memory() // 4 > 1 << 20
    made = loaded(f"join: {{memory_bytes: 2000000, spill_dir: {tmp_path}}}")
    assert made == JoinSettings(2_000_000, str(tmp_path))
    for text, message in (
        ("join: 5", "join is 5; expected a mapping"),
        ("join: {memory: 5}", 'unknown key join.memory; did you mean "memory_bytes"'),
        ("join: {memory_bytes: 5}", "join.memory_bytes is 5; expected at least 1048576"),
        ("join: {memory_bytes: 1.5}", "join.memory_bytes is 1.5; expected a whole number"),
        ("join: {spill_dir: 7}", "join.spill_dir is no text"),
        ("join: {spill_dir: here}", "join.spill_dir is 'here'; expected the absolute path of a folder"),
        ("join: {spill_dir: /no/such}", "join.spill_dir is '/no/such'; expected the absolute path"),
    ):
        with pytest.raises(ConfigError, match=f"feature_store.yaml:2: {re.escape(message)}"):
            loaded(text)
    limit = tmp_path / "limit"
    monkeypatch.setattr(store_settings, "_CGROUP_LIMITS", (str(limit), "/no/such"))
    for text, expected in (("123456789\n", 123456789), ("max\n", None)):
        limit.write_text(text)
        assert (machine_memory() == 123456789) == (expected is not None)


def test_parts_of_a_spill_come_in_order(tmp_path):
    rng = np.random.default_rng(3)
    schema = pa.schema([("i", pa.int64()), ("s", pa.large_string())])
    with Spill(schema, 64, 2000, str(tmp_path)) as spill:
        added = []
        for at in range(0, 3000, 100):
            parts = rng.integers(0, 40, 100).astype(np.uint16)
            numbers = np.arange(at, at + 100)
            texts = pa.array([None if i % 7 == 0 else f"t{i}" for i in numbers], pa.large_string())
            spill.add(pa.table([pa.array(numbers), texts], schema), parts)
            added += list(zip(parts.tolist(), numbers.tolist(), texts.to_pylist()))
        groups = list(spill.groups())
        assert spill.spilled_bytes > 20_000 and not any(tmp_path.iterdir())
    assert [first for first, _, _ in groups] == [0, *(last for _, last, _ in groups[:-1])]
    assert groups[-1][1] == 64 and len(groups) > 10
    for first, last, rows in groups:
        found = list(zip(rows["i"].to_pylist(), rows["s"].to_pylist()))
        mine = [(part, i, text) for part, i, text in added if first <= part < last]
        assert found == [(i, text) for _, i, text in mine] or last - first > 1
        assert sorted(found) == sorted((i, text) for _, i, text in mine)
        assert last - first == 1 or rows.nbytes < 2 * 2000
    assert deleted_files(tmp_path) == []


CHILD = """
import hashlib, resource, sys
from pathlib import Path
import numpy as np, pandas, pyarrow as pa, pyarrow.compute, pyarrow.parquet
import penstock as d
from penstock.features.expressions import col
from penstock.features.repo import Repo
from penstock.features.store import FeatureStore
from penstock.features.store_settings import JoinSettings
folder, most, n, data = Path(sys.argv[1]), int(sys.argv[2]), 50_000, sys.argv[3]
features = {**{f"x{j}": col(f"x{j}") for j in range(5)}, "mean": d.mean(col("x5"), window="1d")}
view = d.FeatureView("v", [d.Entity("u", ["u"])], d.ParquetSource("log.parquet", "t"), features)
settings = JoinSettings(most, str(folder))
store = FeatureStore(Repo(folder, "p", folder / data, None, {}, {"v": view}, join=settings))
rng = np.random.default_rng(1)
times = pa.array(rng.integers(0, 10**12, n)).cast(pa.timestamp("us", "UTC"))
asked = pa.table({"u": rng.integers(0, 50_000, n), "event_timestamp": times})
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
got = store.get_historical_features(asked, [f"v:{name}" for name in features], with_status=True).to_arrow()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024  # ru_maxrss begins with the parent's
cells = b"".join(np.asarray(c.combine_chunks().fill_null(0)).tobytes() for c in got.columns
                 if not pa.types.is_dictionary(c.type))
print(peak - before, hashlib.sha256(cells).hexdigest())
"""


def grown(folder: Path, most: int, data: str) -> tuple[int, str]:
    """Bytes by which a join's process grows, and a digest of what it gives."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(most), data],
        capture_output=True,
        text=True,
        check=True,
    )
    size, digest = done.stdout.split()
    return int(size), digest


def make_log(folder: Path, rows: int) -> None:
    writer = None
    for at in range(0, rows, 250_000):
        n = min(250_000, rows - at)
        rng = np.random.default_rng(at)
        times = pa.array(rng.integers(0, 10**12, n)).cast(US)
        columns = {f"x{j}": rng.normal(size=n) for j in range(6)}
        table = pa.table({"u": rng.integers(0, 50_000, n), "t": times, **columns})
        writer = writer or pq.ParquetWriter(folder / "log.parquet", table.schema)
        writer.write_table(table)
    writer.close()


@pytest.mark.parametrize(
    ("rows", "bound", "most"),
    [
        (2_500_000, 16_000_000, 110_000_000),
        pytest.param(10_000_000, 60_000_000, 240_000_000, marks=pytest.mark.long),
    ],
)
def test_memory_follows_the_bound_and_not_the_source(tmp_path, rows, bound, most):
    make_log(tmp_path, rows)
    bounded, digest = grown(tmp_path, bound, "bounded")
    whole, expected = grown(tmp_path, 1 << 40, "whole")
    assert digest == expected
    assert bounded < most < 8 * 8 * rows < whole  # eight columns of eight bytes
