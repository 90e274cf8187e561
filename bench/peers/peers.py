"""The peers that `make bench-serving` stands Penstock beside, each in a virtual environment of its own.

The environments are made once, under build/peers, from package names; the versions that came are written to
the results. A peer that cannot be installed, or does not start, is named with the reason and left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import ROOT, Absent

from penstock.loadgen import Requests, http_request, requests_of, vector_requests

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = ROOT / "build" / "peers"
INSTALL_SECONDS = 600


@dataclass(frozen=True)
class Peer:
    """A server to stand beside.

    Attributes:
        environment: the virtual environment's name; None: this one.
        packages: what it holds.
        script, options: beside --model and --port.
        encode: rows and expected scores to requests of one row.
        pipelined: one connection may carry many requests.
    """

    name: str
    environment: str | None
    packages: tuple[str, ...]
    script: str
    encode: Callable[[np.ndarray, np.ndarray], Requests]
    options: tuple[str, ...] = ()
    pipelined: bool = False
    libpython: bool = field(default=False)  # it links the system's libpython: point it at the right one

    def command(self, model: Path, port: int) -> list[str]:
        """Raises Absent if it cannot be installed."""
        python = sys.executable if self.environment is None else str(install(self.environment, self.packages))
        script = str(HERE / self.script)
        return [python, script, "--model", str(model), "--port", str(port), *self.options]

    def variables(self) -> dict[str, str]:
        """The process's environment."""
        found = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if self.libpython:
            found["LD_LIBRARY_PATH"] = os.pathsep.join(
                part for part in (str(Path(sys.base_prefix) / "lib"), found.get("LD_LIBRARY_PATH")) if part
            )
        return found

    def versions(self) -> dict[str, str]:
        if self.environment is None:
            return {}
        return dict(json.loads((ENVIRONMENTS / self.environment / "versions.json").read_text()))


def install(name: str, packages: tuple[str, ...]) -> Path:
    """The interpreter of the environment `name`, made if it is not there. Absent if pip cannot fill it.

    A package may ask for extras, "name[extra]".
    """
    names = [package.split("[")[0] for package in packages]
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    stamp = folder / "versions.json"
    if stamp.exists() and set(names) <= json.loads(stamp.read_text()).keys():
        return python
    print(f"{name}: installing {', '.join(packages)}", flush=True)
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            [*pip, "install", *packages], capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Absent(f"{name} was not installed within {INSTALL_SECONDS} s") from None
    if done.returncode != 0:
        raise Absent(f"{name} cannot be installed: {(done.stderr.strip() or 'pip failed').splitlines()[-1]}")
    script = (
        "import importlib.metadata, json, sys;"
        "print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))"
    )
    found = subprocess.run(
        [str(python), "-c", script, *names], capture_output=True, text=True, check=True
    ).stdout
    stamp.write_text(found)
    return python


def raw_requests(rows: np.ndarray, expected: np.ndarray) -> Requests:
    """HTTP with a row of float32 as the body, and back."""
    headers = {"Content-Type": "application/octet-stream"}
    frames = [http_request("/predict", row.astype("<f4").tobytes(), headers=headers) for row in rows]
    return requests_of(frames, protocol="http", body_format="f32", expected=expected.reshape(-1, 1))


def triton_requests(rows: np.ndarray, expected: np.ndarray) -> Requests:
    """HTTP with the JSON of the inference protocol, version 2."""
    frames = []
    for row in rows:
        data = [float(np.format_float_positional(value, unique=True)) for value in row.astype(np.float32)]
        x = {"name": "x", "shape": [1, len(data)], "datatype": "FP32", "data": data}
        body = json.dumps({"inputs": [x]}, separators=(",", ":")).encode()
        frames.append(
            http_request("/v2/models/forest/infer", body, headers={"Content-Type": "application/json"})
        )
    return requests_of(
        frames, protocol="http", body_format="json", json_key="data", expected=expected.reshape(-1, 1)
    )


def rpc_requests(rows: np.ndarray, expected: np.ndarray) -> Requests:
    return vector_requests("forest", rows, expected=expected)


_MOSEC = ("mosec", "onnxruntime", "numpy")
_FASTAPI = ("fastapi", "uvicorn", "uvloop", "httptools", "onnxruntime", "numpy")
_TRITON = ("nvidia-pytriton", "onnxruntime", "numpy")
_FLOOR = ("uvloop", "msgpack", "onnxruntime", "numpy")

PEERS = (
    Peer("mosec", "mosec", _MOSEC, "serve_mosec.py", raw_requests, ("--address", "127.0.0.1")),
    Peer(
        "mosec, no batching",
        "mosec",
        _MOSEC,
        "serve_mosec.py",
        raw_requests,
        ("--address", "127.0.0.1", "--batch", "1"),
    ),
    Peer("FastAPI", "fastapi", _FASTAPI, "serve_fastapi.py", raw_requests),
    Peer("FastAPI, 2 workers", "fastapi", _FASTAPI, "serve_fastapi.py", raw_requests, ("--workers", "2")),
    Peer("Triton (PyTriton)", "triton", _TRITON, "serve_triton.py", triton_requests, libpython=True),
    Peer("uvloop + onnxruntime, bare", "floor", _FLOOR, "serve_floor.py", rpc_requests, pipelined=True),
)
