"""What a real server tells of itself under load: drift of every row, the exposition, spans."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np


def test_a_saturated_server_counts_every_row_for_drift(shop: Any, serve: Any, tmp_path: Path) -> None:
    config = shop.config(
        tmp_path,
        serving={"max_latency_ms": 20_000, "max_queued_rows": 1 << 16},
        monitoring={"ring_rows": 2048, "log_bytes": "16MiB"},
    )
    served = serve(config)
    rows = np.ascontiguousarray(shop.vectors[:64])
    faults: list[BaseException] = []

    def saturate() -> None:
        try:
            peer = served.raw()
            for _ in range(20):  # bursts of 32 requests in flight
                peer.send(*([0, i, "predict_vectors", ["bare", rows.tobytes(), 64]] for i in range(32)))
                for _ in range(32):
                    _, _, error, _ = peer.read()
                    assert error is None, error
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=saturate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    with served.client() as client:
        stats = client.stats()["models"]["bare"]
        drift = client.drift("bare")["bare"]["drift"]
    assert stats["rows"]["ok"] == 3 * 20 * 32 * 64
    assert drift["n"] == drift["rows"] == stats["rows"]["ok"]
    assert drift["late"] == drift["expired"] == 0
