"""The native session of an ONNX model: onnxruntime's own scores, no GIL, and every wrong thing refused."""

from __future__ import annotations

import ctypes.util
import re
import sys
import time
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from foreign_models import FEATURES, onnx_direct, onnx_graph, rows_of

from penstock import _core
from penstock.errors import FailedPreconditionError, InvalidArgumentError
from penstock.models import onnx_backend

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")

PLAIN = {
    "input": "x", "output": "p", "n_features": 3, "width": 1, "flat": False, "wide": False,
}  # fmt: skip


def session(model: Any = None, **options: Any) -> _core.OnnxSession:
    data = (onnx_graph() if model is None else model).SerializeToString()
    return _core.OnnxSession(data, **{"library": onnx_backend._library("it"), **PLAIN, **options})


@pytest.mark.parametrize(("outputs", "flat"), [(1, False), (1, True), (2, False), (5, False)])
@pytest.mark.parametrize("double", [False, True])
def test_scores_are_those_of_onnxruntime_for_each_batch_size(outputs: int, flat: bool, double: bool) -> None:
    model = onnx_graph(outputs=outputs, double=double, flat=flat)
    name = "d" if double else "s" if flat else "p"
    made = session(model, output=name, width=outputs, flat=flat, wide=double)
    for n in [*range(1, 65), 3, 64, 1]:  # what one run leaves behind does not show in the next
        rows = rows_of(n, seed=n)
        want = onnx_direct(model, rows).reshape(n, outputs).astype(np.float64)
        assert made.run(rows).tobytes() == want.tobytes()


def test_one_column_is_served_and_probabilities_are_checked() -> None:
    model, rows = onnx_graph(outputs=3, op="Identity"), rows_of(20)
    raw = onnx_direct(model, rows)
    assert (session(model, width=3, column=1).run(rows)[:, 0] == raw[:, 1]).all()
    checked = session(model, width=3, probability=True).run(rows)
    outside = (raw < -1e-5) | (raw > 1 + 1e-5)
    assert 0 < outside.sum() < raw.size
    assert (np.isnan(checked) == outside).all()


def test_a_run_needs_no_gil() -> None:
    """The thread that asked keeps the GIL: the executor scores and answers beside it."""
    core = _core.ServingCore()
    try:
        served = core.load("m", "1", session(), max_latency_ms=60_000)
        core.publish(served)
        connection = core.connection(1 << 20, 16, 16, 1 << 20)
        request = msgpack.packb([0, 1, "predict_vectors", ["m", rows_of(1).tobytes(), 1]])
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1000.0)  # nobody takes the GIL
        try:
            connection.get_buffer()[: len(request)] = request
            connection.received(len(request))
            until = time.monotonic() + 20
            while not served.idle() and time.monotonic() < until:
                pass
            assert served.idle()
        finally:
            sys.setswitchinterval(interval)
        connection.drop()
    finally:
        core.close()


def test_an_interrupted_session_runs_no_more() -> None:
    made = session()
    made.run(rows_of(2))
    made.interrupt()
    code, message = made.run(rows_of(2))
    assert code == "INTERNAL"
    assert "terminate" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "y"}, r"inputs \['x'\] and outputs \['p'\]; expected \['y'\] and 'p'"),
        ({"output": "z"}, r"outputs \['p'\]; expected \['x'\] and 'z'"),
        ({"width": 0}, "width is 0"),
        ({"column": 1}, "column is 1; expected one of 1"),
        ({"n_features": 0}, "n_features is 0"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session(**options)


@pytest.mark.parametrize("options", [{"width": 2}, {"n_features": 4}, {"flat": True}, {"wide": True}])
def test_a_shape_that_the_model_does_not_have_fails_the_run(options: dict[str, Any]) -> None:
    made = session(**options)
    code, message = made.run(np.zeros((5, options.get("n_features", len(FEATURES))), np.float32))
    assert code == "INTERNAL"
    assert message.startswith("the model failed: ")
    assert "\n" not in message


def test_bytes_and_libraries_that_are_none_are_refused(tmp_path: Path) -> None:
    library = onnx_backend._library("it")
    for data in (b"", b"no model"):
        with pytest.raises(ValueError, match=r"."):
            _core.OnnxSession(data, library=library, **PLAIN)
    nowhere = str(tmp_path / "libonnxruntime.so")
    with pytest.raises(RuntimeError, match=re.escape(nowhere)):
        session(library=nowhere)
    other = ctypes.util.find_library("m")
    assert other is not None
    with pytest.raises(RuntimeError, match="has no OrtGetApiBase"):
        session(library=other)


def test_errors_name_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = onnx_backend.inspect(onnx_graph().SerializeToString(), 3, rows_of(4), "probability", None)
    with pytest.raises(InvalidArgumentError, match=r"model 'm' is refused: .*"):
        onnx_backend.open_session(b"no model", entry, 3, True, what="model 'm'")
    monkeypatch.setattr(onnx_backend, "_library", lambda what: str(tmp_path / "nowhere.so"))
    with pytest.raises(FailedPreconditionError, match=r"model 'm' needs onnxruntime: .*nowhere\.so"):
        onnx_backend.open_session(onnx_graph().SerializeToString(), entry, 3, True, what="model 'm'")
