"""What the engine says of itself: drift counts of every row, stages, objectives, spans, the exposition."""

from __future__ import annotations

import gzip
import itertools
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.parser import text_string_to_metric_families
from sklearn.ensemble import RandomForestClassifier

import penstock
from penstock import Engine
from penstock.config import AutoscalingConfig, EdgeCacheConfig, check_text
from penstock.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from penstock.integrations import otel
from penstock.integrations.prometheus import EngineCollector, PrometheusExporter
from penstock.models.bundle import save_bundle

F = 4
INPUTS = [f"x{j}" for j in range(F)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with version 1 of `bare`, on bare vectors."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(rng.normal(size=(500, F)).astype(np.float32), columns=INPUTS)
    frame["y"] = (frame["x0"] + frame["x1"] > 0).astype(int)
    forest = RandomForestClassifier(n_estimators=5, max_leaf_nodes=8, random_state=1)
    forest.fit(frame[INPUTS].to_numpy(), frame["y"])
    folder = tmp_path_factory.mktemp("bundles")
    save_bundle(forest, frame, name="bare", directory=folder, label="y", inputs=INPUTS)
    return folder


def config_of(bundles: Path, data_dir: Path, monitoring: str = "") -> Any:
    text = f"""
serving: {{max_latency_ms: 10s, allow_replay: true}}
models: {{bare: {{path: {bundles}/bare/1}}}}
monitoring: {{pane: 1d, window: 10d, {monitoring}}}
data_dir: {data_dir}
"""
    config, faults = check_text(text)
    assert config is not None, faults
    return config


@pytest.fixture
def engine(bundles: Path, tmp_path: Path) -> Iterator[Engine]:
    with Engine(config_of(bundles, tmp_path / "data")) as engine:
        yield engine


def test_drift_counts_every_row_answered_however_small_the_ring(bundles: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(2).normal(size=(64, F)).astype(np.float32)
    with Engine(config_of(bundles, tmp_path / "data", "ring_rows: 100")) as engine:

        def saturate() -> None:
            for _ in range(300):
                engine.predict_vectors("bare", rows)

        threads = [threading.Thread(target=saturate) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()["models"]["bare"]
        drift = engine.drift("bare")["bare"]["drift"]
        assert stats["rows"]["ok"] == 3 * 300 * 64
        assert stats["served_dropped"] > 0  # the log lost rows, drift none
        assert (drift["n"], drift["rows"]) == (stats["rows"]["ok"],) * 2
        log = engine.stats()["served_log"]
        assert log["rows"] + stats["served_dropped"] == stats["rows"]["ok"]
        # The counts themselves: 900 times those of one request.
        *_, inputs, scores = engine.live.get("bare").drift.panes.window(None, 1)
        native = engine.live.get("bare").bundle.reference.spec
        one = np.zeros(native.n_slots, np.uint64)
        from penstock_kernels.reference import count_rows

        one += count_rows(native, rows)
        np.testing.assert_array_equal(inputs, 900 * one)
        assert int(scores.sum()) == 900 * 64


def test_a_large_request_is_counted_whole_by_a_ring_smaller_than_it(bundles: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(3).normal(size=(4096, F)).astype(np.float32)
    with Engine(config_of(bundles, tmp_path / "data", "ring_rows: 1000")) as engine:
        for _ in range(3):
            engine.predict_vectors("bare", rows)
        assert engine.drift("bare")["bare"]["drift"]["n"] == 3 * 4096


def test_stages_are_told_in_whole_nanoseconds_and_add_up(engine: Engine) -> None:
    rows = np.zeros((5, F), np.float32)
    for n in range(1, 41):
        timings = engine.predict_vectors("bare", rows, timings=True).timings
        assert timings is not None
        assert list(timings) == ["receive", "gather", "queue", "run", "total"]
        assert all(type(ns) is int and ns >= 0 for ns in timings.values())
        stages = engine.stats()["models"]["bare"]["stages"]
        assert timings["gather"] == 0 and stages["gather"]["count"] == 0  # vectors need none
        assert timings["run"] > 0
        parts = sum(stages[stage]["sum_ns"] for stage in ("receive", "queue", "run", "encode"))
        assert parts == stages["total"]["sum_ns"]
        assert {stages[stage]["count"] for stage in ("receive", "queue", "run", "encode", "total")} == {n}
    assert engine.predict_vectors("bare", rows).timings is None


def test_cumulative_counts_rise_to_the_count(engine: Engine) -> None:
    for _ in range(20):
        engine.predict_vectors("bare", np.zeros((64, F), np.float32))
    found = engine.stats()["models"]["bare"]
    edges = [m * 10**d for d in range(6) for m in (1, 2, 5)] + [10**6]
    for latency in (*found["stages"].values(), found["latency"], found["run"]):
        assert [edge for edge, _ in latency["le_us"]] == edges
        counts = [n for _, n in latency["le_us"]]
        assert counts == sorted(counts) and counts[-1] <= latency["count"]
    total = found["stages"]["total"]
    assert total["le_us"][-1][1] == total["count"] == 20  # none took a second
    slower = next(edge for edge, n in total["le_us"] if n == 20)
    assert total["p999_ns"] <= 1000 * slower


def test_objectives_count_what_was_due(engine: Engine) -> None:
    served = engine.live.get("bare").served
    row = np.zeros((2, F), np.float32)
    slo = engine.stats()["models"]["bare"]["slo"]
    assert slo["due"] == 0 and slo["attainment"] is None and slo["attainment_10s"] is None
    for _ in range(3):
        engine.predict_vectors("bare", row)
    with pytest.raises(InvalidArgumentError):
        engine.predict_vectors("bare", row[:, :1])  # wrong in itself: nothing was due
    served._hold(True)
    try:
        with pytest.raises(DeadlineExceededError):
            engine.predict_vectors("bare", row, deadline_ms=30)
        while_held = engine.stats()["models"]["bare"]
    finally:
        served._hold(False)
    found = engine.stats()["models"]["bare"]
    assert (found["slo"]["met"], found["slo"]["due"], found["slo"]["attainment"]) == (3, 4, 0.75)
    assert found["requests"]["rejected"] == 1 and found["requests"]["expired"] == 1
    assert 0 < while_held["busy_ratio"] <= 1  # a run that does not end is busy
    assert found["goodput"]["rows_per_s_60s"] == 2 * found["goodput"]["requests_per_s_60s"]
    assert found["goodput"]["requests_per_s_60s"] > 0
    assert found["queue_delay_ratio"] > 0


# Prometheus


def scrape(address: str) -> dict[str, Any]:
    """The metric families of an exposition, by name."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Any], name: str, **labels: str) -> float:
    """The one sample of that name with those labels."""
    found = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def histograms_are_sound(families: dict[str, Any]) -> int:
    """Buckets rise up to +Inf, which is the count; returns how many series there are."""
    seen = 0
    for family in families.values():
        if family.type != "histogram":
            continue
        series: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
        counts, sums = {}, {}
        for sample in family.samples:
            key = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
            if sample.name.endswith("_bucket"):
                series.setdefault(key, []).append((float(sample.labels["le"]), sample.value))
            elif sample.name.endswith("_count"):
                counts[key] = sample.value
            else:
                assert sample.name == f"{family.name}_sum"
                sums[key] = sample.value
        for key, buckets in series.items():
            edges, values = zip(*buckets)
            assert edges == tuple(sorted(edges)) and edges[-1] == float("inf")
            assert list(values) == sorted(values) and values[-1] == counts[key]
            assert sums[key] >= 0
            seen += 1
    return seen


def test_the_exposition_parses_and_says_what_the_stats_say(bundles: Path, tmp_path: Path) -> None:
    config = config_of(bundles, tmp_path / "data", 'prometheus: {listen: "127.0.0.1:0"}')
    config = config.model_copy(
        update={
            "serving": config.serving.model_copy(
                update={"autoscaling": AutoscalingConfig(min_replicas=3, max_replicas=100)}
            )
        }
    )
    with Engine(config) as engine:
        address = engine.stats()["prometheus"]["address"]
        for n in (1, 3, 64, 70):
            engine.predict_vectors("bare", np.zeros((n, F), np.float32))
        with pytest.raises(InvalidArgumentError):
            engine.predict_vectors("bare", np.zeros((1, F + 1), np.float32))
        families = scrape(address)
        stats = engine.stats()["models"]["bare"]
        own = {"model": "bare", "version": "1"}
        assert value(families, "penstock_requests_total", **own, outcome="ok") == 4
        assert value(families, "penstock_requests_total", **own, outcome="rejected") == 1
        assert value(families, "penstock_rows_total", **own, outcome="ok") == 138
        assert value(families, "penstock_batch_rows_count", **own) == 5
        assert value(families, "penstock_batch_rows_sum", **own) == 138
        assert value(families, "penstock_batch_rows_bucket", **own, le="4.0") == 2
        assert value(families, "penstock_batch_rows_bucket", **own, le="64.0") == 5
        assert value(families, "penstock_slo_attainment", **own, window="60s") == 1.0
        assert value(families, "penstock_slo_due_total", **own) == 4
        assert value(families, "penstock_served_dropped_total", **own) == 0
        assert value(families, "penstock_queue_rows", **own) == 0
        assert value(families, "penstock_latency_limit_seconds", **own) == 10.0
        assert value(families, "penstock_autoscaling_min_replicas") == 3
        assert value(families, "penstock_autoscaling_max_replicas") == 100
        assert value(families, "penstock_autoscaling_target_gpu_utilization") == 0.7
        assert value(families, "penstock_build_info", version=penstock.__version__) == 1
        total = value(families, "penstock_request_duration_seconds_sum", **own)
        assert total == pytest.approx(stats["latency"]["sum_ns"] / 1e9)  # seconds
        run = value(families, "penstock_stage_duration_seconds_sum", **own, stage="run")
        assert run == pytest.approx(stats["stages"]["run"]["sum_ns"] / 1e9)
        assert histograms_are_sound(families) == 9  # total, six stages, batch time, batch rows
        for family in families.values():
            assert family.name.startswith("penstock_") and family.documentation.endswith(".")
            if family.type == "counter":
                assert all(sample.name.endswith("_total") for sample in family.samples)
            assert not any(unit in family.name for unit in ("_ms", "_us", "_ns"))
        before = {
            (sample.name, *sample.labels.items()): sample.value
            for family in families.values()
            if family.type in ("counter", "histogram")
            for sample in family.samples
        }
        engine.predict_vectors("bare", np.zeros((2, F), np.float32))
        again = scrape(address)
        after = {
            (sample.name, *sample.labels.items()): sample.value
            for family in again.values()
            for sample in family.samples
        }
        assert all(after[key] >= was for key, was in before.items())
        assert value(again, "penstock_requests_total", **own, outcome="ok") == 5
    with pytest.raises(OSError):
        scrape(address)


def test_the_exposition_has_the_edge_cache_of_a_model_that_uses_one(bundles: Path, tmp_path: Path) -> None:
    config = config_of(bundles, tmp_path / "data", 'prometheus: {listen: "127.0.0.1:0"}')
    edge = EdgeCacheConfig(mode="on", capacity=3000)
    config = config.model_copy(update={"caches": config.caches.model_copy(update={"edge": edge})})
    with Engine(config) as engine:
        for _ in range(3):
            engine.predict_vectors("bare", np.zeros((1, F), np.float32))
        families = scrape(engine.stats()["prometheus"]["address"])
        found = engine.stats()["models"]["bare"]["edge"]
    own = {"cache": "edge", "view": "bare"}
    assert value(families, "penstock_cache_capacity_rows", **own) == found["capacity"] >= 3000
    assert value(families, "penstock_cache_rows", **own) == found["size"] == 1
    assert value(families, "penstock_cache_hits_total", **own) == found["hits"] > 0


def test_a_scrape_that_fails_is_answered_and_the_next_one_works(caplog: pytest.LogCaptureFixture) -> None:
    faults = [ValueError("no stats today")]

    def stats() -> dict[str, Any]:
        if faults:
            raise faults.pop()
        log = {"rows": 0, "lost": 0, "errors": 0, "bytes": 0}
        return {"models": {}, "caches": {}, "served_log": log, "monitor_errors": 0}

    exporter = PrometheusExporter("127.0.0.1:0", EngineCollector(stats, lambda: None, None, "0"))
    try:
        with pytest.raises(urllib.error.HTTPError) as caught:
            scrape(exporter.address)
        assert caught.value.code == 500
        caught.value.close()
        assert "no stats today" in caplog.text
        assert value(scrape(exporter.address), "penstock_monitor_errors_total") == 0
        with pytest.raises(UnavailableError, match="prometheus"):
            PrometheusExporter(exporter.address, EngineCollector(stats, lambda: None, None, "0"))
    finally:
        exporter.close()


def test_scrapers_beyond_the_bound_are_hung_up_on() -> None:
    log = {"rows": 0, "lost": 0, "errors": 0, "bytes": 0}
    stats = {"models": {}, "caches": {}, "served_log": log, "monitor_errors": 0}
    exporter = PrometheusExporter("127.0.0.1:0", EngineCollector(lambda: stats, lambda: None, None, "0"))
    host, _, port = exporter.address.rpartition(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(8)]
    try:
        with socket.create_connection((host, int(port))) as one_more:
            assert one_more.recv(1) == b""
        for each in idle:
            each.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert each.recv(8) == b"HTTP/1.0"
    finally:
        for each in idle:
            each.close()
        exporter.close()


def test_nothing_is_imported_that_is_not_configured(bundles: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from penstock import Engine
from penstock.config import load_config
with Engine(load_config({str(tmp_path / "config.yaml")!r})) as engine:
    engine.stats()
assert not [name for name in sys.modules if name.split(".")[0] in ("prometheus_client", "opentelemetry")]
"""
    (tmp_path / "config.yaml").write_text(
        f"models: {{bare: {{path: {bundles}/bare/1}}}}\ndata_dir: {tmp_path}/data\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    ("monitoring", "fault"),
    [
        ("prometheus: {listen: nowhere}", "monitoring.prometheus.listen is 'nowhere': expected \"host"),
        ("prometheus: {listn: x}", 'unknown key monitoring.prometheus.listn; did you mean "listen"?'),
        ("tracing: {sample: 2}", "monitoring.tracing.sample is 2: "),
        ("tracing: {exporter: fax}", "monitoring.tracing.exporter is 'fax': "),
        ("tracing: {endpoint: ftp://x}", "monitoring.tracing.endpoint is 'ftp://x': expected an http"),
    ],
)
def test_a_bad_setting_is_named(monitoring: str, fault: str) -> None:
    config, faults = check_text(f"monitoring: {{{monitoring}}}")
    assert config is None and fault in str(faults[0])


# Spans

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_sampled_request_gets_spans_in_the_callers_trace(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(otel, "make_exporter", lambda kind, endpoint: exporter)
    row = np.zeros((3, F), np.float32)
    with Engine(config_of(bundles, tmp_path / "data", "tracing: {service: shop}")) as engine:
        before_ns = time.time_ns()
        engine.predict_vectors("bare", row, traceparent=f"00-{TRACE}-{SPAN}-01")
        after_ns = time.time_ns()
        engine.predict_vectors("bare", row, traceparent=f"00-{TRACE}-{SPAN}-00")  # not sampled
        engine.predict_vectors("bare", row)
        served = engine.live.get("bare").served
        served._hold(True)
        with pytest.raises(DeadlineExceededError):
            engine.predict_vectors("bare", row, deadline_ms=20, traceparent=f"00-{TRACE}-{SPAN}-01")
        served._hold(False)
        with pytest.raises(InvalidArgumentError, match=r"options\.traceparent is \"zap\""):
            engine.predict_vectors("bare", row, traceparent="zap")
    spans = exporter.get_finished_spans()
    roots = [span for span in spans if span.name == "predict"]
    assert len(roots) == 2
    assert all(span.context.trace_id == int(TRACE, 16) for span in spans)
    assert all(span.parent.span_id == int(SPAN, 16) and span.kind is SpanKind.SERVER for span in roots)
    good, late = roots
    assert dict(good.attributes) == {
        "penstock.model": "bare",
        "penstock.version": "1",
        "penstock.rows": 3,
        "penstock.code": "OK",
    }
    assert good.resource.attributes["service.name"] == "shop"
    slack = 5_000_000  # the two clocks are not read at once
    assert before_ns - slack <= good.start_time <= good.end_time <= after_ns + slack
    stages = [span for span in spans if span.parent.span_id == good.context.span_id]
    assert [span.name for span in stages] == ["receive", "queue", "run", "encode"]
    assert stages[0].start_time == good.start_time and stages[-1].end_time == good.end_time
    assert all(a.end_time == b.start_time for a, b in itertools.pairwise(stages))
    assert (late.status.status_code, late.status.description) == (StatusCode.ERROR, "DEADLINE_EXCEEDED")
    assert late.end_time - late.start_time >= 20_000_000


def test_what_the_queues_cannot_hold_is_dropped_and_counted(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(otel, "make_exporter", lambda kind, endpoint: exporter)
    monkeypatch.setattr("penstock.serving.engine._MONITOR_WAIT_S", 60.0)
    row = np.zeros((1, F), np.float32)
    with Engine(config_of(bundles, tmp_path / "data", "tracing: {capacity: 5}")) as engine:
        for _ in range(8):
            engine.predict_vectors("bare", row, traceparent=f"00-{TRACE}-{SPAN}-01")
        assert engine.stats()["models"]["bare"]["traces_dropped"] == 3
    assert len([span for span in exporter.get_finished_spans() if span.name == "predict"]) == 5

    gate = threading.Event()

    class Slow(InMemorySpanExporter):
        def export(self, spans: Any) -> Any:
            gate.wait(60)
            return super().export(spans)

    slow = Slow()
    maker = otel.SpanMaker(slow, capacity=4)
    record = (1, 2, 3, 1000, 1, 0, 1, 1, 1, 4, 1, "OK")
    for _ in range(3):
        maker.submit("m", "1", [record] * 2)
    assert maker.stats() == {"waiting": 4, "dropped": 2, "exported": 0, "failed": 0}
    gate.set()
    maker.close()
    assert maker.stats() == {"waiting": 0, "dropped": 2, "exported": 20, "failed": 0}


def test_an_exporter_that_breaks_ends_nothing() -> None:
    class Broken(InMemorySpanExporter):
        def export(self, spans: Any) -> Any:
            if len(spans) > 5:
                raise OSError("no collector")
            return SpanExportResult.FAILURE

    maker = otel.SpanMaker(Broken())
    record = (1, 2, 3, 1000, 1, 0, 1, 1, 1, 4, 1, "OK")
    maker.submit("m", "1", [record] * 2)
    maker.submit("m", "1", [record])
    maker.close()
    assert maker.stats()["failed"] == 15


def test_spans_reach_a_collector_over_http() -> None:
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        maker = otel.SpanMaker(otel.make_exporter("otlp", endpoint))
        maker.submit("m", "1", [(1, 2, 3, 1000, 1, 0, 1, 1, 1, 4, 1, "OK")])
        maker.close()
        collector.shutdown()
        thread.join()
    assert maker.stats()["exported"] == 5
    sent = ExportTraceServiceRequest.FromString(bodies[0])
    spans = sent.resource_spans[0].scope_spans[0].spans
    assert [span.name for span in spans] == ["receive", "queue", "run", "encode", "predict"]
    assert spans[-1].trace_id == (1 << 64 | 2).to_bytes(16, "big")
    assert spans[-1].parent_span_id == (3).to_bytes(8, "big")


def test_the_sample_is_a_share_of_the_traces() -> None:
    exporter = InMemorySpanExporter()
    maker = otel.SpanMaker(exporter, sample=0.25)
    rng = np.random.default_rng(5)
    ids = rng.integers(1, 2**64, (400, 2), np.uint64).tolist()
    maker.submit("m", "1", [(high, low, 3, 1000, 1, 0, 1, 1, 1, 4, 1, "OK") for high, low in ids])
    maker.close()
    roots = [span for span in exporter.get_finished_spans() if span.name == "predict"]
    assert 60 <= len(roots) <= 140
