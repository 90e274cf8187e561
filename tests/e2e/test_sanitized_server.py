"""A whole server whose native core runs under ThreadSanitizer, loaded from every side."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgpack
import pytest
from native_builds import build

from penstock import Client

REQUESTS = 300  # of each peer: tens of times slower than without the sanitizer

# `penstock` with the core at argv[1] in place of the one that is installed.
LAUNCH = """
import importlib.util, sys
import penstock
spec = importlib.util.spec_from_file_location("penstock._core", sys.argv.pop(1))
penstock._core = sys.modules["penstock._core"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(penstock._core)
from penstock.cli import main
main()
"""


@pytest.fixture(scope="module")
def sanitized_core() -> Path:
    import pybind11

    if shutil.which("ninja") is None or shutil.which("setarch") is None:
        pytest.skip("ninja and setarch are needed")
    folder = build(
        "sanitize-thread",  # with the native test programs, over one build of the core
        "-DPENSTOCK_BINDING=ON",
        "-DPENSTOCK_SANITIZE=thread",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        target="_core",
    )
    (made,) = folder.glob("_core.*.so")
    return made


def runtime() -> str:
    """The sanitizer's library, which must be loaded before all else."""
    found = subprocess.run(
        ["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("g++ has no libtsan")
    return found


@pytest.mark.long
def test_a_served_shop_has_no_data_race(shop, sanitized_core, tmp_path):
    config = shop.registry(tmp_path)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime(),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        # What runs inside Python itself and the libraries is not instrumented, and not asked about.
        "TSAN_OPTIONS": f"ignore_noninstrumented_modules=1 log_path={tmp_path}/race exitcode=66",
    }
    command = ["setarch", "-R", sys.executable, "-c", LAUNCH, str(sanitized_core), "serve", str(config)]
    command += ["--json", "--listen", "tcp://127.0.0.1:0"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert server.stdout is not None
        (address,) = json.loads(server.stdout.readline())["addresses"]
        load(shop, address)
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=120)
    finally:
        server.kill()
        server.communicate()
    races = "".join(path.read_text() for path in tmp_path.glob("race*"))
    assert not races, races[:8000]
    assert server.returncode == 0, (tmp_path / "server.log").read_text()


def load(shop, address: str) -> None:
    """Predictions with features and vectors, cancels, peers that vanish, labels, promotions, statistics."""
    faults: list[str] = []
    now = int(shop.columns["now_us"].max())

    def guard(work) -> None:
        try:
            work()
        except Exception as error:
            faults.append(f"{work.__name__}: {type(error).__name__}: {error}")

    def ask() -> None:
        with Client(address) as client:
            for i in range(REQUESTS):
                rows = slice(i % 300, i % 300 + 1 + i % 40)
                options = {"now": now, "no_cache": i % 7 == 0}
                made = client.predict("buy", shop.entities(rows), shop.inputs(rows), **options)
                if i % 5 == 0:
                    client.label(made.request_ids, [i % 2] * len(made.request_ids))

    def ask_vectors() -> None:
        with Client(address) as client:
            for i in range(REQUESTS):
                made = client.predict_vectors("bare", shop.vectors[: 1 + i % 64])
                if len(made.scores) != 1 + i % 64:
                    raise AssertionError(len(made.scores))

    def vanish() -> None:
        import socket

        host, port = address.removeprefix("tcp://").rsplit(":", 1)
        body = ["bare", shop.vectors[:8].tobytes(), 8]
        for i in range(REQUESTS // 10):
            with socket.create_connection((host, int(port))) as peer:
                burst = [msgpack.packb([0, k, "predict_vectors", body]) for k in range(32)]
                cancels = [msgpack.packb([2, "cancel", [k]]) for k in range(0, 32, 3)]
                peer.sendall(b"".join(burst + cancels))
                if i % 2:
                    peer.recv(100)

    def change() -> None:
        with Client(address) as client:
            for i in range(10):
                client.promote("buy", str(i % 2 + 1))
                client.stats()
                client.drift()
            client.materialize(now)

    threads = [threading.Thread(target=guard, args=(w,)) for w in (ask, ask, ask_vectors, vanish, change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
