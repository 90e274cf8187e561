"""The loop thread lets go of the GIL for a model that runs under it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest

from penstock import _core

F = 4


@pytest.fixture
def core() -> Iterator[Any]:
    core = _core.ServingCore()
    yield core
    core.close()


@pytest.mark.parametrize("call", ["received", "wake", "expire"])
def test_a_busy_loop_gives_way_to_a_model_in_python(core: Any, call: str) -> None:
    """The loop thread holds the GIL all the time: the model's thread runs while a native call works."""
    rows, scores = np.zeros((64, F), np.float32), np.zeros((64, 1), np.float64)
    ran: list[int] = []
    served = core.load("m", "1", _core.PythonModel(ran.append, rows, scores), max_latency_ms=60_000)
    core.publish(served)
    connection = core.connection(1 << 20, 16, 16, 1 << 20)
    request = msgpack.packb([0, 1, "predict_vectors", ["m", b"\0" * 4 * F, 1]])
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # nobody takes the GIL
    try:
        ran.clear()  # of the warm-up
        connection.get_buffer()[: len(request)] = request
        connection.received(len(request))
        calls = {"received": lambda: connection.received(0), "wake": core.wake, "expire": core.expire}
        until = time.monotonic() + 20
        while not ran and time.monotonic() < until:
            calls[call]()
    finally:
        sys.setswitchinterval(interval)
    assert ran == [1]
    connection.drop()
