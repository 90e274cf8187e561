"""ONNX models and entry points behind the engine: scores, limits, memory, children that die and hang."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_models import (
    EXIT,
    HANG,
    NAN,
    RAISE,
    WIDE,
    code_folder,
    expected,
    frame,
    onnx_direct,
    onnx_graph,
    rows_of,
    save_onnx,
    save_python,
)

from penstock import Engine
from penstock.config import check_text
from penstock.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    PenstockError,
    UnavailableError,
)
from penstock.models import EntryPoint, save_bundle

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")

SLOW_MS = 60_000  # a loaded machine is no failure here


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """py 1 and 2 (half the scores of 1), net 1."""
    folder = tmp_path_factory.mktemp("models")
    save_python(folder)
    save_python(folder, scale=0.5)
    save_onnx(folder)
    return folder / "bundles"


Open = Callable[..., Engine]


@pytest.fixture
def opened(bundles: Path, tmp_path: Path) -> Iterator[Open]:
    made: list[Engine] = []

    def start(
        models: dict[str, str], *, latency_ms: float = SLOW_MS, caches: str = "caches: {edge: {mode: off}}"
    ) -> Engine:
        lines = [f"  {name}: {{path: {bundles}/{name}/1, {options}}}" for name, options in models.items()]
        text = "\n".join(
            [
                f"serving: {{max_latency_ms: {latency_ms}}}",
                "models:",
                *lines,
                caches,
                f"data_dir: {tmp_path}/data",
            ]
        )
        config, faults = check_text(text)
        assert config is not None, faults
        made.append(Engine(config))
        return made[-1]

    yield start
    for engine in made:
        engine.close()


def until(condition: Callable[[], Any]) -> Any:
    """What `condition` gives once it is true; fails after a minute."""
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


def served_again(engine: Engine, name: str = "py") -> np.ndarray:
    """Scores of one row, once the model runs (again)."""

    def ask() -> Any:
        with contextlib.suppress(UnavailableError):
            return [engine.predict_vectors(name, rows_of(1)).scores]
        return None

    return until(ask)[0]


def process_of(engine: Engine, name: str = "py") -> int:
    child = engine.live.get(name).backend.process
    assert child is not None
    return until(lambda: child.pid)


def assert_conserved(engine: Engine, name: str) -> dict[str, Any]:
    stats = engine.stats()["models"][name]
    for counts in (stats["requests"], stats["rows"]):
        assert counts["submitted"] == sum(counts.values()) - counts["submitted"]
        assert counts["in_flight"] == 0
    return stats["requests"]


# Scores


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_entry_point_is_served(opened, isolation, caplog):
    engine = opened({"py": f"isolation: {isolation}"})
    rows = rows_of(150)
    got = engine.predict_vectors("py", rows)
    np.testing.assert_allclose(got.scores, expected(rows), rtol=1e-6)
    stats = engine.stats()["models"]["py"]
    assert stats["inline_runs"] == 0
    assert max(map(int, stats["batches"])) <= 64
    described = engine.models()["py"]["backend"]
    assert described == {"format": "python", "entry_point": "scorer:make", "isolation": isolation}
    assert ("isolation: thread" in caplog.text) == (isolation == "thread")


def test_onnx_is_served_as_onnxruntime_scores(opened):
    engine = opened({"net": ""})
    rows, model = rows_of(300), onnx_graph()
    want = onnx_direct(model, rows)[:, 0].astype(np.float64)
    np.testing.assert_allclose(engine.predict_vectors("net", rows).scores, want, rtol=1e-6)
    for i in range(50):
        alone = onnx_direct(model, rows[i : i + 1])[0, 0]
        assert engine.predict_vectors("net", rows[i : i + 1]).scores[0] == alone
    stats = engine.stats()["models"]["net"]
    assert stats["inline_runs"] == 0
    assert engine.models()["net"]["backend"] == {"format": "onnx"}


@pytest.mark.parametrize("name", ["py", "net"])
def test_concurrent_callers_get_their_own_rows_and_no_run_sees_more_than_64(opened, name):
    engine = opened({name: ""})
    rows = rows_of(600)
    want = expected(rows)
    wrong: list[Any] = []

    def ask(first: int) -> None:
        rng = np.random.default_rng(first)
        for _ in range(40):
            at, n = rng.integers(0, 500), rng.integers(1, 90)
            scores = engine.predict_vectors(name, rows[at : at + n]).scores
            if not np.allclose(scores, want[at : at + n], rtol=1e-5):
                wrong.append((at, n))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    stats = engine.stats()["models"][name]
    sizes = {int(size): runs for size, runs in stats["batches"].items()}
    assert max(sizes) <= 64
    assert sum(size * runs for size, runs in sizes.items()) == stats["rows"]["ok"]
    assert stats["requests"]["ok"] == 8 * 40


def test_threads_of_onnxruntime_are_a_setting(opened):
    engine = opened({"net": "threads: 2"})
    np.testing.assert_allclose(
        engine.predict_vectors("net", rows_of(64)).scores, expected(rows_of(64)), rtol=1e-5
    )


def test_batch_limit_holds_in_the_model_itself(bundles, tmp_path):
    """The model writes down the largest batch that it saw."""
    source = """
        def make(folder):
            from pathlib import Path
            most = [0]
            def model(rows):
                if len(rows) > most[0]:
                    most[0] = len(rows)
                return [float(most[0])] * len(rows)
            return model
    """
    code = code_folder(tmp_path / "code", source)
    made = save_bundle(
        EntryPoint("scorer:make", code), frame(), name="most", directory=tmp_path, kind="value"
    )
    config, _ = check_text(
        f"serving: {{max_latency_ms: {SLOW_MS}}}\nmodels: {{most: {{path: {made.path}}}}}\n"
        f"data_dir: {tmp_path}/d"
    )
    with Engine(config) as engine:
        assert engine.predict_vectors("most", rows_of(1000)).scores.max() == 64


# Models that fail


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_model_that_raises_fails_the_request_alone(opened, isolation):
    engine = opened({"py": f"isolation: {isolation}"})
    bad = rows_of(3)
    bad[1, 0] = RAISE
    with pytest.raises(InternalError, match="the model raised ValueError: this row cannot be scored"):
        engine.predict_vectors("py", bad)
    np.testing.assert_allclose(
        engine.predict_vectors("py", rows_of(3)).scores, expected(rows_of(3)), rtol=1e-6
    )
    bad[1, 0] = WIDE
    with pytest.raises(InternalError, match=r"scores \[3, 2\] for 3 rows; expected \[3\]"):
        engine.predict_vectors("py", bad)
    assert assert_conserved(engine, "py") == {
        "submitted": 3, "in_flight": 0, "ok": 1, "rejected": 0, "expired": 0, "cancelled": 0, "failed": 2,
    }  # fmt: skip


def test_row_without_a_score_fails_its_request_and_no_other_of_the_batch(opened):
    engine = opened({"py": ""})
    rows, ends = rows_of(40), Counter()
    rows[::4, 0] = NAN
    lock = threading.Lock()

    def ask(i: int) -> None:
        try:
            score = engine.predict_vectors("py", rows[i : i + 1]).scores[0]
            end = "right" if abs(score - expected(rows[i : i + 1])[0]) < 1e-6 else "wrong"
        except InternalError as error:
            end = "none" if "no score that is finite" in str(error) and i % 4 == 0 else "wrong"
        with lock:
            ends[end] += 1

    engine.live.get("py").served._hold(True)  # so that they share batches
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    until(lambda: engine.stats()["models"]["py"]["requests"]["in_flight"] == 40)
    engine.live.get("py").served._hold(False)
    for thread in threads:
        thread.join()
    assert ends == {"right": 30, "none": 10}
    assert max(map(int, engine.stats()["models"]["py"]["batches"])) > 1
    assert engine.monitor_errors == 0


def test_onnx_row_without_a_score_is_an_error_of_its_request(opened):
    engine = opened({"net": ""})
    rows = rows_of(2)
    rows[0] = np.nan
    with pytest.raises(InternalError, match="no score that is finite"):
        engine.predict_vectors("net", rows)
    assert np.isfinite(engine.predict_vectors("net", rows[1:]).scores).all()


def test_hung_child_is_killed_and_replaced(opened):
    engine = opened({"py": "process: {run_timeout: 300ms, restart_backoff: 10ms}"}, latency_ms=100)
    before = process_of(engine)
    hung = rows_of(1)
    hung[0, 0] = HANG
    with pytest.raises((DeadlineExceededError, UnavailableError)):
        engine.predict_vectors("py", hung)
    until(lambda: not Path(f"/proc/{before}").exists())
    assert until(lambda: process_of(engine)) != before
    assert until(lambda: _ok_once(engine)) == 1
    assert engine.live.get("py").backend.process.restarts >= 1
    assert_conserved(engine, "py")


def _ok_once(engine: Engine) -> int:
    with contextlib.suppress(PenstockError):
        engine.predict_vectors("py", rows_of(1))
        return 1
    return 0


def test_callers_are_told_when_a_child_that_exited_will_be_back(opened):
    engine = opened({"py": "process: {restart_backoff: 30s, restart_backoff_max: 60s}"})
    row = rows_of(1)
    row[0, 0] = EXIT
    with pytest.raises(UnavailableError, match="its process died") as failed:
        engine.predict_vectors("py", row)
    assert failed.value.retryable
    assert failed.value.retry_after_ms >= 25_000
    with pytest.raises(UnavailableError, match="cannot run now: its process") as failed:
        engine.predict_vectors("py", rows_of(1))
    assert failed.value.retry_after_ms >= 1
    engine.close()  # does not wait for the pause to end


def test_other_models_do_not_notice_a_child_that_hangs_or_dies(opened):
    engine = opened({"py": "process: {run_timeout: 10s}", "net": ""}, latency_ms=2000)
    hung = rows_of(1)
    hung[0, 0] = HANG
    asking = threading.Thread(target=_swallow, args=(engine, hung))
    asking.start()
    until(lambda: engine.stats()["models"]["py"]["requests"]["in_flight"] == 1)
    for _ in range(20):
        engine.predict_vectors("net", rows_of(4))
    os.kill(process_of(engine), signal.SIGKILL)
    asking.join()
    assert engine.stats()["models"]["net"]["requests"]["ok"] == 20


def _swallow(engine: Engine, rows: np.ndarray) -> None:
    with contextlib.suppress(PenstockError):
        engine.predict_vectors("py", rows)


def test_output_of_the_child_is_logged(bundles, tmp_path, caplog):
    source = """
        import sys
        def make(folder):
            print("hello from the factory", flush=True)
            print("x" * 10_000, file=sys.stderr, flush=True)
            return lambda rows: [0.5] * len(rows)
    """
    code = code_folder(tmp_path / "code", source)
    made = save_bundle(EntryPoint("scorer:make", code), frame(), name="loud", directory=tmp_path)
    config, _ = check_text(f"models: {{loud: {{path: {made.path}}}}}\ndata_dir: {tmp_path}/d")
    with caplog.at_level(logging.INFO, "penstock.models"), Engine(config) as engine:
        pid = process_of(engine, "loud")
    assert f"model 'loud/1' process {pid}: hello from the factory" in caplog.messages
    assert max(map(len, caplog.messages)) < 4200
    assert sum(message.count("x") for message in caplog.messages) >= 10_000


def test_close_ends_a_hung_child_at_once(opened):
    engine = opened({"py": "process: {run_timeout: 1h}"}, latency_ms=50)
    pid = process_of(engine)
    hung = rows_of(1)
    hung[0, 0] = HANG
    with pytest.raises(DeadlineExceededError):
        engine.predict_vectors("py", hung)
    engine.close()
    assert not Path(f"/proc/{pid}").exists()


# Kill -9


def kill_loop(engine: Engine, times: int, in_flight: int) -> Counter[str]:
    """Kill the child `times` times, each while `in_flight` requests are; the ends of all of them."""
    rows, ends, lock = rows_of(in_flight), Counter[str](), threading.Lock()
    want = expected(rows)

    def ask(i: int) -> None:
        try:
            score = engine.predict_vectors("py", rows[i : i + 1]).scores[0]
            end = "ok" if abs(score - want[i]) < 1e-6 else "wrong"
        except UnavailableError as error:
            end = "unavailable" if error.retry_after_ms is not None else "no hint"
        except PenstockError as error:
            end = error.code
        with lock:
            ends[end] += 1

    served = engine.live.get("py").served
    for _ in range(times):
        served_again(engine)
        pid = process_of(engine)
        served._hold(True)
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(in_flight)]
        for thread in threads:
            thread.start()
        until(lambda: engine.stats()["models"]["py"]["requests"]["in_flight"] == in_flight)
        served._hold(False)
        os.kill(pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
    return ends


def descriptors() -> int:
    """Open descriptors that are no files: sockets, pipes, eventfds, pidfds, memfds."""
    gc.collect()  # engines of other tests
    kinds = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            kinds.append(str(entry.readlink()))
    return sum(not kind.startswith("/") or kind.startswith("/memfd:") for kind in kinds)


@pytest.mark.parametrize(
    "times", [20, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_kill_9_of_the_child_with_100_requests_in_flight(opened, times):
    engine = opened({"py": "process: {restart_backoff: 1ms, restart_backoff_max: 2ms}"})
    served_again(engine)
    before, shared = descriptors(), len(list(Path("/dev/shm").iterdir()))
    ends = kill_loop(engine, times, 100)
    np.testing.assert_allclose(served_again(engine), expected(rows_of(1)), rtol=1e-6)
    assert sum(ends.values()) == 100 * times
    assert set(ends) <= {"ok", "unavailable"}
    assert ends["unavailable"] > 0
    counts = assert_conserved(engine, "py")
    assert counts["failed"] >= ends["unavailable"]
    assert descriptors() == before
    assert len(list(Path("/dev/shm").iterdir())) <= shared
    pid = process_of(engine)
    engine.close()
    assert not Path(f"/proc/{pid}").exists()


def test_engines_that_come_and_go_leave_nothing(opened, bundles, tmp_path):
    config, _ = check_text(
        f"models: {{py: {{path: {bundles}/py/1}}, net: {{path: {bundles}/net/1}}}}\ndata_dir: {tmp_path}/data"
    )
    counts = []
    for _ in range(4):
        with Engine(config) as engine:
            pid = process_of(engine)
            engine.predict_vectors("net", rows_of(2))
        assert not Path(f"/proc/{pid}").exists()
        counts.append((descriptors(), threading.active_count()))
    assert len(set(counts[1:])) == 1  # the first may load what stays


# Loading


def test_version_that_does_not_start_is_not_promoted(opened, bundles, tmp_path):
    engine = opened({"py": "process: {start_timeout: 20s}"})
    broken = engine.registry.add(bundles / "py" / "2")
    folder = engine.config.data_dir / "models" / "py" / broken.version
    # What the bundle's checksums cannot see: the environment has changed.
    source = (folder / "scorer.py").read_text()
    bundle = engine.registry.get("py", "2")
    (folder / "scorer.py").write_text("import nowhere_to_be_found\n" + source)
    with pytest.raises(FailedPreconditionError, match="No module named 'nowhere_to_be_found'"):
        engine.live.load(bundle)
    assert engine.health()["models"] == {"py": "1"}
    (folder / "scorer.py").write_text(source)
    engine.promote("py", "2")
    np.testing.assert_allclose(
        engine.predict_vectors("py", rows_of(3)).scores, expected(rows_of(3), 0.5), rtol=1e-6
    )
    engine.rollback("py")
    np.testing.assert_allclose(
        engine.predict_vectors("py", rows_of(3)).scores, expected(rows_of(3)), rtol=1e-6
    )


def test_two_versions_in_threads_use_their_own_modules(opened, bundles):
    engine = opened({"py": "isolation: thread"})
    engine.registry.add(bundles / "py" / "2")
    engine.promote("py", "2")
    np.testing.assert_allclose(
        engine.predict_vectors("py", rows_of(3)).scores, expected(rows_of(3), 0.5), rtol=1e-6
    )
    engine.rollback("py")
    np.testing.assert_allclose(
        engine.predict_vectors("py", rows_of(3)).scores, expected(rows_of(3)), rtol=1e-6
    )


# Memory


def test_version_that_does_not_fit_is_refused_and_nothing_changes(opened, bundles):
    engine = opened({"net": ""}, caches="caches: {models: {memory: 20MB}}")
    engine.registry.add(bundles / "net" / "1")
    memory = engine.stats()["models_memory"]
    assert memory["budget_bytes"] == 20_000_000
    assert 0 < memory["versions"]["net/1"] < 20_000_000
    with pytest.raises(
        FailedPreconditionError,
        match=r"'py' version 1 needs \d+ bytes of memory; of caches.models.memory \(20000000\) the live",
    ):
        engine.live.load(save_free(engine, bundles))
    assert engine.stats()["models_memory"] == memory
    assert set(engine.health()["models"]) == {"net"}


def save_free(engine: Engine, bundles: Path) -> Any:
    engine.registry.add(bundles / "py" / "1")
    return engine.registry.get("py")


def test_previous_versions_make_room_the_least_recently_live_first(opened, bundles, tmp_path):
    engine = opened({"net": ""}, caches="caches: {models: {memory: 1GB}}")
    live = engine.live
    for name in ("a", "b"):
        for version in ("1", "2"):
            made = save_onnx(tmp_path, name=name, version=version)
            engine.live.publish(engine.live.load(made))
    one = live.get("net").memory_bytes()
    assert set(live.previous) == {"a", "b"}
    room = 5 * one
    object.__setattr__(engine.config.caches.models, "memory", room)
    first = save_onnx(tmp_path, name="c")
    live.publish(live.load(first))  # a/1 goes, which was live before b/1 was
    assert (set(live.live), set(live.previous)) == ({"net", "a", "b", "c"}, {"b"})
    assert sum(live.memory()["versions"].values()) <= room
    second = save_onnx(tmp_path, name="d")
    live.publish(live.load(second))
    assert (set(live.live), set(live.previous)) == ({"net", "a", "b", "c", "d"}, set())
    with pytest.raises(FailedPreconditionError, match="model 'e' version 1 needs"):
        live.load(save_onnx(tmp_path, name="e"))
    for name in live.live:
        assert np.isfinite(engine.predict_vectors(name, rows_of(2)).scores).all()


def test_rollback_to_a_version_that_was_dropped_loads_it_again(opened, bundles):
    engine = opened({"py": ""})
    engine.registry.add(bundles / "py" / "2")
    engine.promote("py", "2")
    live = engine.live
    live.previous.pop("py").stop()
    engine.rollback("py")
    np.testing.assert_allclose(
        engine.predict_vectors("py", rows_of(3)).scores, expected(rows_of(3)), rtol=1e-6
    )


def test_process_counts_with_its_resident_memory(opened):
    engine = opened({"py": ""})
    live = engine.live.get("py")
    resident = live.backend.process.resident_bytes()
    assert resident > 5 << 20  # an interpreter with numpy
    assert live.memory_bytes() >= resident
