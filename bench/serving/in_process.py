"""Serving without a socket: `Engine.predict_vectors`, and `Engine.predict` of one cached entity beside the
tree kernel alone.

The forest of the benchmarks gets its 32 inputs once as vectors and once as stored features of 4096 entities,
all in the feature cache. Every answer is compared with LightGBM's. Run by itself it writes
results/serving-in-process.json; the serving benchmark takes its figures from `measure`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Absent, build_native, machine, rows_of, write
from forest import FEATURES, LEAVES, ROWS, TREES, train

from penstock import Engine, FeatureStore
from penstock.models.bundle import save_bundle

Samples = dict[tuple[str, str], list[float]]
NAMES = [f"f{i}" for i in range(FEATURES)]
NOW_US = 1_772_323_200_000_000
_LEVELS = 3  # of instruction sets that the kernel knows
_DEFINITIONS = """
from penstock import Entity, FeatureService, FeatureView, ParquetSource, col
user = Entity("user", join_keys=["user_id"])
rows = FeatureView("rows", entities=[user], source=ParquetSource("rows.parquet", timestamp="at"), features={
    name: col(name) for name in [f"f{i}" for i in range(32)]})
forest = FeatureService("forest", features=[f"rows:f{i}" for i in range(32)])
"""


def save_vectors(booster: Any, columns: np.ndarray, folder: Path, name: str = "forest") -> Path:
    """The bundle of the model on bare vectors."""
    import pandas

    frame = pandas.DataFrame(columns, columns=[*NAMES, "label"])
    return Path(save_bundle(booster, frame, name=name, directory=folder, label="label").path)


def save_entities(booster: Any, columns: np.ndarray, rows: np.ndarray, home: Path) -> Path:
    """A feature repository that stores `rows` by user_id, and the configuration of a model on it."""
    repo = home / "repo"
    repo.mkdir(parents=True)
    (repo / "feature_store.yaml").write_text("project: bench\n")
    (repo / "features.py").write_text(_DEFINITIONS)
    stored = {name: pa.array(rows[:, i]) for i, name in enumerate(NAMES)}
    at = pa.array(np.full(len(rows), NOW_US - 1_000_000), pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({"user_id": np.arange(len(rows)), "at": at, **stored}), repo / "rows.parquet")
    with FeatureStore(repo, data_dir=home / "data") as store:
        plan = store.service_plan("forest")
        names = list(plan.output_names)
        frame = pa.table(
            {**{name: columns[:, i] for i, name in enumerate(names)}, "label": columns[:, FEATURES]}
        )
        bundle = save_bundle(
            booster, frame, name="stored", directory=home / "models", label="label", plan=plan
        )
    document = {
        "serving": {"allow_replay": True},
        "feature_store": {"repo_path": str(repo)},
        "models": {"stored": {"path": str(bundle.path)}},
        "data_dir": str(home / "data"),
    }
    config = home / "inference-config.yaml"
    config.write_text(yaml.safe_dump(document))
    return config


def kernel_us(trees: bytes, rows: np.ndarray) -> float:
    """The tree kernel alone for one row, microseconds: the C++ call with the best instruction set here, the
    fastest of 30 passes.

    Raises:
        Absent: there is no compiler.
    """
    program = build_native(Path(__file__).parents[1] / "model" / "tree_bench.cc", ["model", "base"])
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / part for part in ("trees", "rows", "scores")]
        paths[0].write_bytes(trees)
        paths[1].write_bytes(rows.tobytes())
        best = float("inf")
        for level in range(_LEVELS):
            arguments = [str(paths[0]), str(paths[1]), str(len(rows)), "1", "30", str(paths[2]), str(level)]
            done = subprocess.run([str(program), *arguments], capture_output=True, check=False)
            if done.returncode == 0:  # else the processor lacks the level
                best = min(best, *json.loads(done.stdout)["us_per_batch"])
    return best


def _check(who: str, scores: list[Any], expected: np.ndarray) -> None:
    worst = float(np.abs(np.concatenate(scores) - expected).max())
    if not worst < 1e-5:
        raise SystemExit(f"{who}: scores differ from LightGBM's by {worst}")


def measure(rounds: int) -> tuple[Samples, dict[str, float]]:
    """Microseconds per request by (case, column) and round; and what `predict` adds to the kernel."""
    booster, columns, rows = train()
    expected = np.asarray(booster.predict(rows, num_threads=1))
    samples: Samples = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = save_vectors(booster, columns, folder / "models")
        config = folder / "vectors.yaml"
        document = {"data_dir": str(folder / "data"), "models": {"forest": {"path": str(bundle)}}}
        config.write_text(yaml.safe_dump(document))
        stored = save_entities(booster, columns, rows, folder / "stored")
        parts = {n: [np.ascontiguousarray(rows[at : at + n]) for at in range(0, ROWS, n)] for n in (1, 64)}
        keys = [{"user_id": int(key)} for key in range(ROWS)]
        kernel: list[float] = []
        with Engine.from_config(config) as engine, Engine.from_config(stored) as entities:
            for round_number in range(rounds + 1):
                taken: dict[tuple[str, str], list[float]] = {}
                for n, calls in parts.items():
                    scores, times = [], []
                    for part in calls:
                        start = time.perf_counter_ns()
                        made = engine.predict_vectors("forest", part)
                        times.append((time.perf_counter_ns() - start) / 1e3)
                        scores.append(made.scores)
                    _check("Engine.predict_vectors", scores, expected)
                    taken["predict_vectors", "1 row" if n == 1 else "64 rows"] = times
                scores, times = [], []
                for key in keys:
                    start = time.perf_counter_ns()
                    made = entities.predict("stored", key, now=NOW_US)
                    times.append((time.perf_counter_ns() - start) / 1e3)
                    scores.append(made.scores)
                _check("Engine.predict", scores, expected)
                taken["predict, cached entity", "1 row"] = times
                if round_number == 0:  # fills the cache
                    continue
                for (case, column), times in taken.items():
                    for percent in (50, 99):
                        samples.setdefault((case, f"{column}, p{percent}"), []).append(
                            float(np.percentile(times, percent))
                        )
        try:
            trees = (bundle / "trees.bin").read_bytes()
            kernel = [kernel_us(trees, rows)]
        except Absent:
            pass
    predict = statistics.median(samples["predict, cached entity", "1 row, p50"])
    facts = {"predict_p50_us": predict}
    if kernel:
        facts |= {"kernel_us": kernel[0], "added_us": predict - kernel[0]}
    return samples, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    facts = machine()
    samples, line = measure(options.rounds)
    settings = {
        "trees": TREES,
        "leaves": LEAVES,
        "features": FEATURES,
        "distinct_rows": ROWS,
        "rounds": options.rounds,
        "unit": "us per request",
        **line,
    }
    packages = ["numpy", "lightgbm", "penstock"]
    write("serving-in-process", rows_of(samples), facts=facts, settings=settings, packages=packages)


if __name__ == "__main__":
    main()
