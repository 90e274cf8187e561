"""What a real server tells of itself under load: drift of every row, the exposition, spans."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from penstock.serving.async_client import AsyncClient


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


def samples(address: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def _one(address: str, row: np.ndarray) -> Any:
    async with AsyncClient(address) as client:
        return await client.predict_vectors(
            "bare", row, timings=True, traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        )


def test_a_server_is_scraped_while_it_serves(shop: Any, serve: Any, tmp_path: Path) -> None:
    monitoring = {"prometheus": {"listen": "127.0.0.1:0"}, "tracing": {"exporter": "console"}}
    served = serve(shop.config(tmp_path, monitoring=monitoring))
    entities, inputs = shop.entities(slice(0, 8)), shop.inputs(slice(0, 8))
    with served.client() as client:
        address = client.stats()["prometheus"]["address"]
        first = samples(address)
        stop = threading.Event()

        def keep_asking() -> None:
            with served.client() as other:
                while not stop.is_set():
                    other.predict_vectors("bare", shop.vectors[:64])

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            for _ in range(5):
                made = client.predict("buy", entities, inputs, timings=True)
                samples(address)
        finally:
            stop.set()
            asking.join()
        assert list(made.timings) == ["receive", "gather", "queue", "run", "total"]
        assert made.timings["gather"] > 0
        parts = sum(made.timings[stage] for stage in ("receive", "gather", "queue", "run"))
        assert parts <= made.timings["total"]
        traced = asyncio.run(_one(served.address, shop.vectors[:2]))
        assert traced.timings["gather"] == 0
        last = samples(address)
        stats = client.stats()
    assert set(first) <= set(last)
    rising = [key for key in first if key[0].endswith(("_total", "_bucket", "_count"))]
    assert rising and all(last[key] >= first[key] for key in rising)
    buy = frozenset({"model": "buy", "version": "1"}.items())
    assert last["penstock_requests_total", buy | {("outcome", "ok")}] == 5
    assert last["penstock_stage_duration_seconds_count", buy | {("stage", "gather")}] == 5
    assert last["penstock_connections", frozenset()] == 1
    assert last["penstock_connections_accepted_total", frozenset()] >= 3
    view = frozenset({"cache": "features", "view": "user_features"}.items())
    cache = stats["caches"]["user_features"]
    assert last["penstock_cache_hits_total", view] == cache["hits"] > 0
    assert last["penstock_cache_misses_total", view] == cache["misses"] > 0
    assert served.stop() == 0
