"""In-process `predict` on the shop example: keys, cached rows, request-time expressions, trees, in one call.

Two views, five features, one computed at request time; 20 trees. All that is asked is in the feature cache: a
warm-up at the same request time loads it. Scores of a whole pass are compared with the historical join's.
Beside it stands `get_online_features` to float32, the same rows without the model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from lightgbm import LGBMClassifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import machine, rows_of, write

from penstock import Engine, FeatureStore
from penstock.config import check_text
from penstock.examples.shop import data as shop_data
from penstock.models.bundle import save_bundle

ROWS = 4096
NOW = pd.Timestamp("2026-03-15T12:00:00Z")
KEYS = ["user_id", "item_id"]


def entity_rows() -> pd.DataFrame:
    rng = np.random.default_rng(5)
    return pd.DataFrame(
        {
            "user_id": rng.integers(1, 451, ROWS),
            "item_id": rng.integers(1, 201, ROWS),
            "basket_value": rng.gamma(2.0, 20.0, ROWS),
            "event_timestamp": NOW,
        }
    )


def prepare(home: Path) -> tuple[Path, np.ndarray]:
    """Data, a trained bundle and its configuration; the model's own scores of every row."""
    repo = Path(shop_data.__file__).parent / "repo"
    (home / "repo").mkdir()
    for file in repo.iterdir():
        if file.is_file():
            (home / "repo" / file.name).write_bytes(file.read_bytes())
    shop_data.build(home / "repo")
    with FeatureStore(home / "repo", data_dir=home / "data") as store:
        frame = store.get_historical_features(entity_rows(), "purchase").to_df()
        plan = store.service_plan("purchase")
        names = list(plan.output_names)
        frame["bought"] = np.nan_to_num(frame["weekly_spend"].to_numpy()) + frame["basket_value"] > 60
        x = frame[names].astype(np.float32)
        model = LGBMClassifier(n_estimators=20, random_state=3, verbose=-1).fit(x, frame["bought"])
        bundle = save_bundle(model, frame, name="buy", directory=home / "models", label="bought", plan=plan)
        scores = bundle.ensemble().predict(np.ascontiguousarray(x))[:, 0]
    return Path(bundle.path), scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    facts = machine()
    samples: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        bundle, expected = prepare(home)
        config, faults = check_text(
            f"serving: {{allow_replay: true}}\nfeature_store: {{repo_path: {home}/repo}}\n"
            f"models: {{buy: {{path: {bundle}}}}}\ndata_dir: {home}/data\n"
        )
        if config is None:
            raise SystemExit(f"configuration: {faults}")
        now_us = int(NOW.value // 1000)
        table = entity_rows()
        parts = {}
        for size in (1, 64):
            parts[size] = [
                (
                    {key: table[key].to_numpy()[at : at + size].tolist() for key in KEYS},
                    {"basket_value": table["basket_value"].to_numpy()[at : at + size].tolist()},
                )
                for at in range(0, ROWS, size)
            ]
        with Engine(config) as engine:
            assert engine.store is not None
            for round_number in range(options.rounds + 1):
                for size, calls in parts.items():
                    for case in ("Penstock, Engine.predict", "Penstock, get_online_features"):
                        taken, scores = [], []
                        for entities, inputs in calls[: 1024 // size if "online" in case else None]:
                            start = time.perf_counter_ns()
                            if "online" in case:
                                engine.store.get_online_features(
                                    "purchase", {**entities, **inputs}, now=now_us
                                ).to_numpy()
                            else:
                                made = engine.predict("buy", entities, inputs, now=now_us)
                                scores.append(made.scores)
                            taken.append((time.perf_counter_ns() - start) / 1e3)
                        if scores and not np.array_equal(np.concatenate(scores), expected):
                            raise SystemExit("Engine.predict: scores differ from the historical join's")
                        if round_number == 0:  # fills the cache
                            continue
                        column = "1 row" if size == 1 else "64 rows"
                        for percent in (50, 99):
                            figure = float(np.percentile(taken, percent))
                            samples.setdefault((case, f"{column}, p{percent}"), []).append(figure)
            missed = engine.stats()["models"]["buy"]["missed_rows"]
    settings = {
        "rounds": options.rounds,
        "distinct_rows": ROWS,
        "views": 2,
        "features": 5,
        "trees": 20,
        "rows_missed_in_warm_up": missed,
        "unit": "us per request",
    }
    write(
        "predict",
        rows_of(samples),
        facts=facts,
        settings=settings,
        packages=["numpy", "lightgbm", "penstock"],
        absent=[],
    )


if __name__ == "__main__":
    main()
