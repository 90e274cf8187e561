"""Tree ensembles of 200 x 31 and 1 000 x 255 leaves over 32 features, batches of 1 to 64, one thread.

Rows are distinct and in rotation: repeating one would flatter every contestant, since the branch predictor
learns its paths. Each contestant's scores are compared with LightGBM's before it is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Absent, Case, build_native, import_peer, interleave, machine, rows_of, summary, write
from forest import FEATURES, LEAVES, ROWS, TREES, train

from penstock import _core
from penstock.models.trees import from_lightgbm

BATCHES = (1, 8, 16, 32, 64)
LEVELS = ("portable", "AVX2", "AVX-512")
Score = Callable[[np.ndarray], np.ndarray]
Samples = dict[tuple[str, str], list[float]]


@dataclass(frozen=True)
class Model:
    """A forest, and how much of it a round does: a call of the larger takes milliseconds."""

    name: str
    trees: int
    leaves: int
    rows_per_round: int  # at batches above 1
    calls_at_batch_1: int


MODELS = (
    Model("200 x 31", TREES, LEAVES, ROWS, 1024),
    Model("1 000 x 255", 1000, 255, 1024, 128),
)
# (model, case, batch): the least ratio of the best peer's time to ours.
TARGETS = {
    ("200 x 31", "AVX-512", 64): 25.0,
    ("200 x 31", "AVX2", 64): 10.0,
    ("200 x 31", "portable", 64): 3.0,
    ("200 x 31", "AVX-512", 1): 3.0,
    ("1 000 x 255", "AVX-512", 64): 4.0,
}
# Compiles a saved LightGBM model; a process of its own, which can be given up on.
COMPILE = """
import sys, tl2cgen, treelite
model = treelite.frontend.load_lightgbm_model(sys.argv[1])
params = {"parallel_comp": int(sys.argv[3])}
tl2cgen.export_lib(model, toolchain="gcc", libpath=sys.argv[2], params=params)
"""


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


def compiled(booster: Any, model: Model, folder: str, limit: float) -> Score:
    """The model as machine code by tl2cgen and gcc, or Absent if that takes more than `limit` seconds."""
    tl2cgen = import_peer("tl2cgen")
    import_peer("treelite")
    source, library = Path(folder) / "model.txt", Path(folder) / "trees.so"
    booster.save_model(source)
    command = [sys.executable, "-c", COMPILE, str(source), str(library), str(max(4, model.trees // 32))]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        failed = process.wait(limit)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise Absent(f"tl2cgen for {model.name}: not compiled after {limit:.0f} s") from error
    if failed:
        raise Absent(f"tl2cgen for {model.name}: the compilation failed")
    predictor = tl2cgen.Predictor(str(library), nthread=1)
    return lambda rows: predictor.predict(tl2cgen.DMatrix(rows, dtype="float32")).reshape(-1)


def check(who: str, scores: np.ndarray, expected: np.ndarray) -> None:
    worst = float(np.abs(scores - expected).max())
    if scores.shape != expected.shape or not worst < 1e-5:
        raise SystemExit(f"{who}: scores differ from LightGBM's by {worst}")


def case(who: str, model: Model, batch: int, score: Score, rows: np.ndarray) -> Case:
    calls = model.calls_at_batch_1 if batch == 1 else model.rows_per_round // batch
    parts = [np.ascontiguousarray(rows[at : at + batch]) for at in range(0, calls * batch, batch)]

    def run() -> None:
        for part in parts:
            score(part)

    return Case(f"{model.name}: {who}", f"batch {batch}", run, len(parts))


class Native:
    """The C++ call with a reused scratch: one program, run once for each batch and instruction set."""

    def __init__(
        self, model: Model, trees: bytes, rows: np.ndarray, expected: np.ndarray, folder: str
    ) -> None:
        self.program = build_native(Path(__file__).with_name("tree_bench.cc"), ["model", "base"])
        self.model, self.expected = model, expected
        self.trees, self.rows, self.scores = (
            str(Path(folder) / f"native-{n}") for n in ("trees", "rows", "out")
        )
        Path(self.trees).write_bytes(trees)
        Path(self.rows).write_bytes(rows.tobytes())

    def round(self, samples: Samples) -> None:
        for level, name in enumerate(LEVELS):
            for batch in BATCHES:
                arguments = [self.trees, self.rows, str(ROWS), str(batch), "2", self.scores, str(level)]
                done = subprocess.run([str(self.program), *arguments], capture_output=True, check=False)
                if done.returncode != 0:
                    continue  # the processor lacks the level
                check(f"Penstock, {name}", np.fromfile(self.scores), self.expected)
                _, us = json.loads(done.stdout)["us_per_batch"]  # the first warms up
                key = (f"{self.model.name}: Penstock in C++, {name}", f"batch {batch}")
                samples.setdefault(key, []).append(us)


def ratios(model: Model, samples: Mapping[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """By instruction set and batch, the best peer's median over ours; the spread is over rounds."""
    ours = f"{model.name}: Penstock"
    rows = []
    for level in LEVELS:
        figures = {}
        for batch in BATCHES:
            column = f"batch {batch}"
            mine = samples.get((f"{ours} in C++, {level}", column))
            peers = [
                values
                for (who, at), values in samples.items()
                if at == column and who.startswith(f"{model.name}:") and not who.startswith(ours)
            ]
            if not mine or not peers:
                continue
            best = min(peers, key=statistics.median)
            figures[column] = summary([theirs / us for theirs, us in zip(best, mine, strict=True)])
            figures[column]["median"] = statistics.median(best) / statistics.median(mine)
            target = TARGETS.get((model.name, level, batch))
            if target is not None:
                verdict = "pass" if figures[column]["median"] >= target else "MISS"
                print(
                    f"{verdict}: {model.name}, {level}, {column}: {statistics.median(mine):.2f} us, "
                    f"{figures[column]['median']:.1f} x the best peer (target {target:.0f} x)"
                )
        if figures:
            rows.append(
                {"case": f"{model.name}: best peer / Penstock in C++, {level} (ratio)", "figures": figures}
            )
    return rows


def measure(model: Model, rounds: int, limit: float, absent: list[str]) -> list[dict[str, Any]]:
    booster, _, rows = train(model.trees, model.leaves)
    expected = np.asarray(booster.predict(rows, num_threads=1))
    trees = from_lightgbm(booster)
    start = time.perf_counter()
    ensemble = _core.TreeEnsemble(trees)
    print(f"{model.name}: {len(trees) / 1e6:.1f} MB loaded in {1e3 * (time.perf_counter() - start):.0f} ms")
    contestants: dict[str, dict[int, Score]] = {}
    contestants["Penstock from Python"] = dict.fromkeys(BATCHES, lambda part: ensemble.predict(part)[:, 0])
    predict: Score = lambda part: np.asarray(booster.predict(part, num_threads=1))  # noqa: E731
    contestants["LightGBM (one row: C API, prepared)"] = dict.fromkeys(BATCHES, predict)
    contestants["LightGBM (one row: C API, prepared)"][1] = lightgbm_single(booster)
    with tempfile.TemporaryDirectory() as folder:
        for who, make in (
            ("onnxruntime", lambda: onnx_runtime(booster)),
            ("tl2cgen", lambda: compiled(booster, model, folder, limit)),
        ):
            try:
                contestants[who] = dict.fromkeys(BATCHES, make())
            except Absent as error:
                absent.append(str(error))
        cases = []
        for who, by_batch in contestants.items():
            for batch, score in by_batch.items():
                made = case(who, model, batch, score, rows)
                seen = min(ROWS, batch * made.operations)
                parts = [np.ascontiguousarray(rows[at : at + batch]) for at in range(0, seen, batch)]
                check(who, np.concatenate([score(part).copy() for part in parts]), expected[:seen])
                cases.append(made)
        samples: Samples = {}
        try:
            native = Native(model, trees, rows, expected, folder)
        except Absent as error:
            absent.append(str(error))
            native = None
        # A round of the C++ program among those of the rest: a slow minute falls on all.
        for _ in range(rounds):
            if native is not None:
                native.round(samples)
            for key, values in interleave(cases, rounds=1).items():
                samples.setdefault(key, []).extend(values)
    return rows_of(samples) + ratios(model, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--compile-limit", type=float, default=300.0, help="seconds that tl2cgen may take for one model"
    )
    options = parser.parse_args()
    facts = machine()
    absent: list[str] = []
    table = []
    for model in MODELS:
        table += measure(model, options.rounds, options.compile_limit, absent)
    settings = {
        "models": {model.name: {"trees": model.trees, "leaves": model.leaves} for model in MODELS},
        "features": FEATURES,
        "distinct_rows": {model.name: model.rows_per_round for model in MODELS},
        "distinct_rows_at_batch_1": {model.name: model.calls_at_batch_1 for model in MODELS},
        "distinct_rows_in_cpp": ROWS,
        "threads": 1,
        "rounds": options.rounds,
        "unit": "us per batch",
    }
    packages = ["numpy", "lightgbm", "onnxruntime", "onnxmltools", "treelite", "tl2cgen"]
    write("model", table, facts=facts, settings=settings, packages=packages, absent=absent)
    for text in absent:
        print(f"left out: {text}")


if __name__ == "__main__":
    main()
