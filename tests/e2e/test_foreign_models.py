"""`penstock serve` with an ONNX model and a Python entry point: scores, kill -9 of the child, swaps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from foreign_models import expected, onnx_direct, onnx_graph, rows_of, save_onnx, save_python

from penstock.errors import UnavailableError
from penstock.serving.client import Client

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net 1; py 1 and 2, whose scores are half those of 1."""
    folder = tmp_path_factory.mktemp("foreign")
    save_onnx(folder)
    save_python(folder)
    save_python(folder, scale=0.5)
    return folder / "bundles"


def write_config(folder: Path, bundles: Path, **py: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "inference-config.yaml"
    models = {
        "net": {"path": str(bundles / "net" / "1")},
        "py": {"path": str(bundles / "py" / "1"), "process": {"restart_backoff": "5ms", **py}},
    }
    path.write_text(
        yaml.safe_dump(
            {
                "serving": {"max_latency_ms": 60_000},
                "server": {"goaway_grace": 0.02},
                "caches": {"edge": {"mode": "off"}},  # each request reaches the model
                "models": models,
                "data_dir": str(folder / "data"),
            }
        )
    )
    return path


def children(pid: int) -> list[int]:
    """Processes that the server started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def until(condition: Any) -> Any:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def assert_conserved(client: Client, name: str) -> dict[str, int]:
    counts = client.stats()["models"][name]["requests"]
    assert counts["submitted"] == sum(counts.values()) - counts["submitted"]
    return dict(counts)


def test_both_are_served_and_end_with_the_server(serve, bundles, tmp_path):
    server = serve(write_config(tmp_path, bundles))
    rows = rows_of(130)
    with server.client() as client:
        net = client.predict_vectors("net", rows).scores
        np.testing.assert_allclose(net, onnx_direct(onnx_graph(), rows)[:, 0], rtol=1e-6)
        np.testing.assert_allclose(client.predict_vectors("py", rows).scores, expected(rows), rtol=1e-6)
        models = client.models()
        assert models["net"]["backend"]["format"] == "onnx"
        assert models["py"]["backend"] == {
            "format": "python", "entry_point": "scorer:make", "isolation": "process",
        }  # fmt: skip
        assert client.stats()["models_memory"]["versions"].keys() == {"net/1", "py/1"}
    (child,) = children(server.process.pid)
    assert "process" in (log := server.log.read_text())
    assert f"{child}: made" in log
    assert server.stop() == 0
    assert gone(child)


def test_the_child_does_not_outlive_a_server_that_is_killed(serve, bundles, tmp_path):
    server = serve(write_config(tmp_path, bundles))
    (child,) = children(server.process.pid)
    server.kill()
    until(lambda: gone(child))


def test_kill_9_of_the_child_ends_each_request_once(serve, bundles, tmp_path):
    server = serve(write_config(tmp_path, bundles))
    rows, ends, lock, done = rows_of(64), Counter[str](), threading.Lock(), threading.Event()
    want = expected(rows)

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with server.client() as client:
            while not done.is_set():
                at, n = int(rng.integers(0, 60)), int(rng.integers(1, 5))
                try:
                    got = client.predict_vectors("py", rows[at : at + n])
                    end = "ok" if np.allclose(got.scores, want[at : at + n], rtol=1e-5) else "wrong"
                except UnavailableError:
                    end = "unavailable"
                except Exception as error:
                    end = f"{type(error).__name__}: {error}"
                with lock:
                    ends[end] += 1

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    with server.client() as watch:
        for _ in range(5):
            before = watch.stats()["models"]["py"]["requests"]["ok"]
            until(lambda before=before: watch.stats()["models"]["py"]["requests"]["ok"] > before + 10)
            (child,) = until(lambda: children(server.process.pid))
            os.kill(child, signal.SIGKILL)
            until(lambda child=child: gone(child))
        done.set()
        for thread in threads:
            thread.join()
        assert set(ends) <= {"ok", "unavailable"}, ends
        assert ends["ok"] > 50
        assert assert_conserved(watch, "py")["in_flight"] == 0
        np.testing.assert_allclose(watch.predict_vectors("net", rows).scores, want, rtol=1e-5)
    assert server.stop() == 0


@pytest.mark.parametrize(
    "swaps", [50, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_versions_swap_through_the_socket_without_a_failed_request(serve, bundles, tmp_path, penstock, swaps):
    config = write_config(tmp_path, bundles)
    for bundle in ("py/1", "py/2"):
        done_ = penstock("models", "add", bundles / bundle, "--config", config)
        assert done_.returncode == 0, done_.stderr
    server = serve(config)
    rows, ends, lock, done = rows_of(64), Counter[str](), threading.Lock(), threading.Event()
    want = {"1": expected(rows), "2": expected(rows, 0.5)}

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with server.client() as client:
            while not done.is_set():
                at, n = int(rng.integers(0, 60)), int(rng.integers(1, 5))
                try:
                    got = client.predict_vectors("py", rows[at : at + n])
                    right = np.allclose(got.scores, want[got.version][at : at + n], rtol=1e-5)
                    end = f"version {got.version}" if right else "wrong"
                except Exception as error:
                    end = f"{type(error).__name__}: {error}"
                with lock:
                    ends[end] += 1

    def resident() -> int:
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    with server.client() as admin:
        for i in range(swaps):
            if i == swaps // 5:
                before = resident()
            assert admin.promote("py", "12"[(i + 1) % 2])["version"] == "12"[(i + 1) % 2]
        done.set()
        for thread in threads:
            thread.join()
        grown = resident() - before
    assert set(ends) == {"version 1", "version 2"}, ends
    assert grown < 64 << 20
    assert server.stop() == 0
