"""Tree ensemble: 200 trees of 31 leaves over 32 features, batches of 1 and 64, distinct rows in rotation.

Each contestant's scores of all rows are compared with LightGBM's before it is timed. Repeating one row would
flatter every contestant: the branch predictor learns its paths.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Absent, Case, build_native, import_peer, interleave, machine, rows_of, write
from forest import FEATURES, LEAVES, ROWS, TREES, train

from penstock import _core
from penstock.models.trees import from_lightgbm

BATCHES = (1, 64)
LEVELS = ("portable", "AVX2", "AVX-512")
Score = Callable[[np.ndarray], np.ndarray]


def lightgbm_single(booster: Any) -> Score:
    """The C API call made for one row at a time, with its parameters parsed beforehand."""
    from lightgbm.basic import _LIB as library

    configuration = ctypes.c_void_p()
    if library.LGBM_BoosterPredictForMatSingleRowFastInit(
        booster._handle, 0, 0, -1, 0, FEATURES, b"num_threads=1", ctypes.byref(configuration)
    ):
        raise RuntimeError("LGBM_BoosterPredictForMatSingleRowFastInit failed")
    length, out = ctypes.c_int64(), np.empty(1)
    length_at, out_at = ctypes.byref(length), out.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
    call = library.LGBM_BoosterPredictForMatSingleRowFast

    def score(rows: np.ndarray) -> np.ndarray:
        if call(configuration, ctypes.c_void_p(rows.ctypes.data), length_at, out_at):
            raise RuntimeError("LGBM_BoosterPredictForMatSingleRowFast failed")
        return out

    return score


def onnx_runtime(booster: Any) -> Score:
    runtime = import_peer("onnxruntime")
    tools = import_peer("onnxmltools")
    from onnxmltools.convert.common.data_types import FloatTensorType

    model = tools.convert_lightgbm(
        booster, initial_types=[("x", FloatTensorType([None, FEATURES]))], zipmap=False, target_opset=15
    )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(["probabilities"], {"x": rows})[0][:, 1]


def compiled(booster: Any, folder: str) -> Score:
    tl2cgen, treelite = import_peer("tl2cgen"), import_peer("treelite")
    library = Path(folder) / "trees.so"
    model = treelite.frontend.from_lightgbm(booster)
    tl2cgen.export_lib(model, toolchain="gcc", libpath=str(library), params={"parallel_comp": 4})
    predictor = tl2cgen.Predictor(str(library), nthread=1)
    return lambda rows: predictor.predict(tl2cgen.DMatrix(rows, dtype="float32")).reshape(-1)


def check(who: str, scores: np.ndarray, expected: np.ndarray) -> None:
    worst = float(np.abs(scores - expected).max())
    if scores.shape != expected.shape or not worst < 1e-5:
        raise SystemExit(f"{who}: scores differ from LightGBM's by {worst}")


def case(who: str, batch: int, score: Score, rows: np.ndarray, calls: int) -> Case:
    parts = [np.ascontiguousarray(rows[at : at + batch]) for at in range(0, ROWS, batch)][:calls]

    def run() -> None:
        for part in parts:
            score(part)

    return Case(who, f"batch {batch}", run, len(parts))


def native(trees: bytes, rows: np.ndarray, expected: np.ndarray, rounds: int) -> list[dict[str, Any]]:
    """The C++ call with a reused scratch, by instruction set."""
    program = build_native(Path(__file__).with_name("tree_bench.cc"), ["model", "base"])
    with tempfile.TemporaryDirectory() as folder:
        trees_at, rows_at, scores_at = (str(Path(folder) / name) for name in ("trees", "rows", "scores"))
        Path(trees_at).write_bytes(trees)
        Path(rows_at).write_bytes(rows.tobytes())
        samples: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for level, name in enumerate(LEVELS):
                for batch in BATCHES:
                    arguments = [trees_at, rows_at, str(ROWS), str(batch), "2", scores_at, str(level)]
                    done = subprocess.run([str(program), *arguments], capture_output=True, check=False)
                    if done.returncode != 0:
                        continue  # the processor lacks the level
                    check(f"Penstock, {name}", np.fromfile(scores_at), expected)
                    _, us = json.loads(done.stdout)["us_per_batch"]  # the first warms up
                    key = (f"Penstock in C++, {name}", f"batch {batch}")
                    samples.setdefault(key, []).append(us)
    return rows_of(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    facts = machine()
    absent: list[str] = []
    booster, _, rows = train()
    expected = np.asarray(booster.predict(rows, num_threads=1))
    trees = from_lightgbm(booster)
    ensemble = _core.TreeEnsemble(trees)
    contestants: dict[str, dict[int, Score]] = {}
    contestants["Penstock from Python"] = dict.fromkeys(BATCHES, lambda part: ensemble.predict(part)[:, 0])
    predict: Score = lambda part: np.asarray(booster.predict(part, num_threads=1))  # noqa: E731
    contestants["LightGBM (one row: C API, prepared)"] = {1: lightgbm_single(booster), 64: predict}
    with tempfile.TemporaryDirectory() as folder:
        for who, make in (
            ("onnxruntime", lambda: onnx_runtime(booster)),
            ("tl2cgen", lambda: compiled(booster, folder)),
        ):
            try:
                contestants[who] = dict.fromkeys(BATCHES, make())
            except Absent as error:
                absent.append(str(error))
        cases = []
        for who, by_batch in contestants.items():
            for batch, score in by_batch.items():
                parts = [np.ascontiguousarray(rows[at : at + batch]) for at in range(0, ROWS, batch)]
                check(who, np.concatenate([score(part).copy() for part in parts]), expected)
                cases.append(case(who, batch, score, rows, 1024))
        samples = interleave(cases, rounds=options.rounds)
    try:
        table = native(trees, rows, expected, options.rounds)
    except Absent as error:
        absent.append(str(error))
        table = []
    settings = {
        "trees": TREES,
        "leaves": LEAVES,
        "features": FEATURES,
        "distinct_rows": ROWS,
        "distinct_rows_at_batch_1": 1024,
        "threads": 1,
        "rounds": options.rounds,
        "unit": "us per batch",
    }
    packages = ["numpy", "lightgbm", "onnxruntime", "onnxmltools", "treelite", "tl2cgen"]
    write("model", table + rows_of(samples), facts=facts, settings=settings, packages=packages, absent=absent)
    for text in absent:
        print(f"left out: {text}")


if __name__ == "__main__":
    main()
