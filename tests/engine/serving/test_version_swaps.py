"""Versions that take each other's place under load: no request fails, each is answered by one version."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_models import code_folder, frame, onnx_graph, rows_of, save_onnx, save_python

from penstock import Engine
from penstock.config import check_text
from penstock.models import EntryPoint, save_bundle

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")

VERSIONS = ("1", "2", "3")
PAUSE = 5e-4  # s between a thread's requests: without it, cheap models leave the swapping thread no GIL


def save_trees(folder: Path) -> None:
    import lightgbm

    table = frame()
    for trees in (1, 2, 3):
        fitted = lightgbm.LGBMClassifier(n_estimators=trees, verbose=-1, n_jobs=1)
        save_bundle(fitted.fit(table, table["a"] > 0), table, name="m", directory=folder / "bundles")


def save_nets(folder: Path) -> None:
    for scale in (1, 2, 3):
        model = onnx_graph()
        weights = model.graph.initializer[0]
        scaled = np.frombuffer(weights.raw_data, np.float32) * scale
        weights.raw_data = scaled.astype(np.float32).tobytes()
        save_onnx(folder, model, name="m")


def save_entry_points(folder: Path) -> None:
    for scale in (1.0, 0.5, 0.25):
        save_python(folder, name="m", scale=scale)


Save = Callable[[Path], None]


@pytest.fixture(
    scope="module", params=[save_trees, save_nets, save_entry_points], ids=["trees", "onnx", "python"]
)
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1, 2 and 3 of `m`."""
    folder = tmp_path_factory.mktemp("saved")
    request.param(folder)
    return Path(folder / "bundles" / "m")


@pytest.fixture
def engine(saved: Path, tmp_path: Path) -> Iterator[Engine]:
    """Serves version 1 of `m`; 2 and 3 are in the registry."""
    config, faults = check_text(
        f"serving: {{max_latency_ms: 60000}}\nmodels: {{m: {{path: {saved}/1}}}}\n"
        "caches: {edge: {mode: off}}\n"
        f"monitoring: {{ring_rows: 1024, label_capacity: 4096, log_bytes: 1MiB}}\ndata_dir: {tmp_path}/data"
    )
    assert config is not None, faults
    with Engine(config) as engine:
        for version in ("2", "3"):
            engine.registry.add(saved / version)
        yield engine


class Load:
    """Threads that ask until told to stop, and check every answer against the version that it names."""

    def __init__(
        self, ask: Callable[[np.ndarray], Any], want: dict[str, np.ndarray], rows: np.ndarray
    ) -> None:
        self._ask, self._want, self._rows = ask, want, rows
        self._done = threading.Event()
        self.ends: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(4)]

    def _run(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not self._done.wait(PAUSE):
            at, n = int(rng.integers(0, 100)), int(rng.choice([1, 2, 70]))
            try:
                got = self._ask(self._rows[at : at + n])
                right = np.allclose(got.scores, self._want[got.version][at : at + n], rtol=1e-5)
                end = f"version {got.version}" if right else f"wrong scores of {got.version}"
            except Exception as error:
                end = f"{type(error).__name__}: {error}"
            with self._lock:
                self.ends[end] += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def wanted(engine: Engine, rows: np.ndarray) -> dict[str, np.ndarray]:
    from penstock.models import score

    return {version: score(engine.registry.get("m", version), rows) for version in VERSIONS}


@pytest.mark.parametrize(
    "swaps", [50, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_versions_swap_under_load_without_a_failed_request(engine, swaps):
    rows = rows_of(200)
    want = wanted(engine, rows)
    assert len({want[version].tobytes() for version in VERSIONS}) == 3
    swapped = Counter[str]()
    with Load(lambda part: engine.predict_vectors("m", part), want, rows) as load:
        for i in range(swaps):
            if i == swaps // 5:  # what grows without a bound grows after this too
                gc.collect()
                before = resident_bytes()
            done = engine.rollback("m") if i % 3 == 2 else engine.promote("m", VERSIONS[(i + 1) % 2])
            swapped[done["version"]] += 1
    gc.collect()
    grown = resident_bytes() - before
    assert set(load.ends) <= {"version 1", "version 2"}, load.ends
    assert set(swapped) == {"1", "2"}
    assert grown < 64 << 20
    assert len(engine.live.all()) == 2


@pytest.mark.parametrize(
    "rounds", [1, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_versions_that_are_loaded_and_stopped_under_load_fail_no_request(engine, rounds):
    """Three versions in turn: each promotion loads one and stops another, which may have requests."""
    rows = rows_of(200)
    want = wanted(engine, rows)
    with Load(lambda part: engine.predict_vectors("m", part), want, rows) as load:
        for _ in range(rounds):
            for version in ("2", "3", "1"):
                engine.promote("m", version)
    assert set(load.ends) <= {f"version {version}" for version in VERSIONS}, load.ends
    np.testing.assert_allclose(engine.predict_vectors("m", rows).scores, want["1"], rtol=1e-6)


def test_stopped_version_answers_what_it_has_first(tmp_path):
    """Two quick swaps away from a version whose model takes long: its requests are answered, not cut off."""
    source = """
        import time
        def make(folder):
            def model(rows):
                if rows[0, 0] == 7:
                    time.sleep(0.3)
                return [0.5] * len(rows)
            return model
    """
    code = code_folder(tmp_path / "code", source)
    for _ in VERSIONS:
        save_bundle(EntryPoint("scorer:make", code), frame(), name="m", directory=tmp_path / "bundles")
    config, _ = check_text(
        f"serving: {{max_latency_ms: 60000}}\nmodels: {{m: {{path: {tmp_path}/bundles/m/1}}}}\n"
        f"data_dir: {tmp_path}/d"
    )
    with Engine(config) as engine:
        loaded = []
        for version in ("2", "3"):
            engine.registry.add(tmp_path / "bundles" / "m" / version)
            loaded.append(engine.live.load(engine.registry.get("m", version)))
        first, slow, answers = engine.live.get("m"), rows_of(1), []
        slow[0, 0] = 7
        asking = threading.Thread(target=lambda: answers.append(engine.predict_vectors("m", slow)))
        asking.start()
        while first.served.idle():
            pass
        for model in loaded:
            engine.live.publish(model)
        asking.join()
        assert [answer.version for answer in answers] == ["1"]
        assert engine.predict_vectors("m", rows_of(1)).version == "3"
