"""The engine's figures for Prometheus, on a port of its own (`monitoring.prometheus`, extra `prometheus`).

A scrape reads `Engine.stats` once and turns it into metrics: base units (seconds), counters that end in
`_total`, histograms with the edges 1, 2, 5, ... 1e6 microseconds. A value up to 1/16 below an edge may count
above it. Labels: model and version, and what the name says.

Scrapes run on threads of their own, one at a time, from at most a few connections; one that fails is answered
500 and changes nothing.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from penstock.errors import UnavailableError

_log = logging.getLogger("penstock.integrations")

_MOST_CONNECTIONS = 8
_TIMEOUT_S = 5.0  # for one read or write of a scraper
_OUTCOMES = ("ok", "rejected", "expired", "cancelled", "failed")
_BATCH_EDGES = (1, 2, 4, 8, 16, 32, 48, 64)
_CACHE_COUNTS = {
    "hits": "Reads that found a valid row.",
    "misses": "Reads that found none, expired ones included.",
    "expired": "Misses that found a row which was no longer valid.",
    "evictions": "Rows that left for others.",
}

Stats = Mapping[str, Any]


class EngineCollector(Collector):
    """Makes metrics of `stats()`, the reply of `Engine.stats`.

    Args:
        stats: called once a scrape, on the scrape's thread.
        server_stats: the socket server's counters, or None where there is no server (yet).
        autoscaling: the autoscaling block, exported as it stands, or None.
        version: of this package.
    """

    def __init__(
        self,
        stats: Callable[[], Stats],
        server_stats: Callable[[], Stats | None],
        autoscaling: Mapping[str, float] | None,
        version: str,
    ) -> None:
        self._stats, self._server_stats = stats, server_stats
        self._autoscaling, self._version = autoscaling, version
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """The metrics of one scrape."""
        with self._lock:
            stats, server = self._stats(), self._server_stats()
        yield InfoMetricFamily("penstock_build", "Version of Penstock.", value={"version": self._version})
        yield from _model_metrics(stats["models"])
        yield from _cache_metrics(stats["caches"], stats["models"])
        yield from _log_metrics(stats)
        if server is not None:
            yield from _server_metrics(server)
        if self._autoscaling is not None:
            for name, value in self._autoscaling.items():
                text = "Of the autoscaling block of the configuration, for an orchestrator."
                yield GaugeMetricFamily(f"penstock_autoscaling_{name}", text, value=value)


class PrometheusExporter:
    """Serves /metrics at `listen` ("host:port", port 0: any free one) until `close`.

    Raises UnavailableError where the address cannot be had.
    """

    def __init__(self, listen: str, collector: EngineCollector) -> None:
        host, _, port = listen.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        registry = CollectorRegistry(auto_describe=False)
        registry.register(collector)
        kind = _ServerV6 if ":" in host else _Server
        try:
            self._server = make_server(host, int(port), make_wsgi_app(registry), kind, _Handler)
        except OSError as error:
            raise UnavailableError(f"monitoring.prometheus.listen {listen}: {error}") from error
        self.address = f"{listen.rpartition(':')[0]}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="prometheus", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving; a scrape in progress ends by itself."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(WSGIRequestHandler):
    timeout = _TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)

    def get_stderr(self) -> Any:
        return _Stderr()


class _Stderr:
    """Where wsgiref writes the traceback of a scrape that failed."""

    def write(self, text: str) -> None:
        if text.strip():
            _log.warning("a scrape failed: %s", text.strip().splitlines()[-1])

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        pass


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: Any, **options: Any) -> None:
        self._room = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        super().__init__(*args, **options)

    def server_bind(self) -> None:
        """As the base's, without its look-up of the host's full name, which may wait for a name server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a scraper left", exc_info=True)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"penstock_{name}", text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"penstock_{name}", text, labels=labels)


def _histogram(name: str, text: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"penstock_{name}", text, labels=labels)


def _add_latency(family: HistogramMetricFamily, labels: list[str], latency: Stats) -> None:
    """Add a "latency" of the stats: nanoseconds, and cumulative counts by microseconds."""
    buckets = [(floatToGoString(edge_us / 1e6), float(n)) for edge_us, n in latency["le_us"]]
    family.add_metric(labels, [*buckets, ("+Inf", float(latency["count"]))], latency["sum_ns"] / 1e9)


def _model_metrics(models: Mapping[str, Stats]) -> Iterator[Metric]:
    own = ("model", "version")
    requests = _counter("requests", "Requests by how they ended.", *own, "outcome")
    rows = _counter("rows", "Rows of requests by how they ended.", *own, "outcome")
    in_flight = _gauge("requests_in_flight", "Requests that have no answer yet.", *own)
    duration = _histogram(
        "request_duration_seconds", "From the read callback of a request to its reply.", *own
    )
    stages = _histogram(
        "stage_duration_seconds",
        "Time of requests answered OK by stage; refuse: of those refused on arrival.",
        *own,
        "stage",
    )
    run = _histogram("batch_run_duration_seconds", "Time of a batch in the model.", *own)
    batch_rows = _histogram("batch_rows", "Rows of a batch.", *own)
    runs = _counter("batches", "Batches by the thread that ran them.", *own, "thread")
    queue = _gauge("queue_rows", "Rows that wait for a run.", *own)
    busy = _gauge("busy_ratio", "Share of the last 10 s in which the model ran.", *own)
    delay = _gauge(
        "queue_delay_ratio", "95th percentile of the last 10 s' queue delays over the latency limit.", *own
    )
    attainment = _gauge(
        "slo_attainment", "Share of the requests due that were answered OK in time.", *own, "window"
    )
    met = _counter("slo_met", "Requests answered OK within their deadline.", *own)
    due = _counter("slo_due", "Requests that were due: neither wrong in themselves nor cancelled.", *own)
    good = _gauge("goodput_requests_per_second", "Requests answered OK in time.", *own, "window")
    parked = _counter("parked", "Requests that waited for the feature store.", *own)
    missed = _counter("missed_rows", "Feature rows that the caches lacked.", *own)
    lost = _counter("served_dropped", "Served rows that the log and the label join missed.", *own)
    traces = _counter("traces_dropped", "Sampled requests whose spans were dropped.", *own)
    limit = _gauge("latency_limit_seconds", "The limit of each request, max_latency_ms.", *own)
    for name, found in models.items():
        key = [name, str(found["version"])]
        for outcome in _OUTCOMES:
            requests.add_metric([*key, outcome], found["requests"][outcome])
            rows.add_metric([*key, outcome], found["rows"][outcome])
        in_flight.add_metric(key, found["requests"]["in_flight"])
        _add_latency(duration, key, found["latency"])
        for stage, latency in found["stages"].items():
            if stage != "total":
                _add_latency(stages, [*key, stage], latency)
        _add_latency(run, key, found["run"])
        sizes = {int(size): n for size, n in found["batches"].items()}
        counts = [sum(n for size, n in sizes.items() if size <= edge) for edge in _BATCH_EDGES]
        batch_rows.add_metric(
            key,
            [*zip(map(floatToGoString, _BATCH_EDGES), counts), ("+Inf", sum(sizes.values()))],
            sum(size * n for size, n in sizes.items()),
        )
        for thread in ("inline", "executor"):
            runs.add_metric([*key, thread], found[f"{thread}_runs"])
        queue.add_metric(key, found["queued_rows"])
        busy.add_metric(key, found["busy_ratio"])
        delay.add_metric(key, found["queue_delay_ratio"])
        for window in ("10s", "60s"):
            share = found["slo"][f"attainment_{window}"]
            if share is not None:
                attainment.add_metric([*key, window], share)
            good.add_metric([*key, window], found["goodput"][f"requests_per_s_{window}"])
        met.add_metric(key, found["slo"]["met"])
        due.add_metric(key, found["slo"]["due"])
        parked.add_metric(key, found["parked"])
        missed.add_metric(key, found["missed_rows"])
        lost.add_metric(key, found["served_dropped"])
        traces.add_metric(key, found["traces_dropped"])
        limit.add_metric(key, found["limit_ms"] / 1e3)
    yield from (requests, rows, in_flight, duration, stages, run, batch_rows, runs, queue, busy, delay)
    yield from (attainment, met, due, good, parked, missed, lost, traces, limit)


def _cache_metrics(caches: Mapping[str, Stats], models: Mapping[str, Stats]) -> Iterator[Metric]:
    """Of the feature caches by view, and of the edge caches by model."""
    own = ("cache", "view")
    found_in = {("features", view): found for view, found in caches.items()}
    found_in |= {("edge", name): model["edge"] for name, model in models.items() if model["edge"]["enabled"]}
    for what, text in _CACHE_COUNTS.items():
        counter = _counter(f"cache_{what}", text, *own)
        for labels, found in found_in.items():
            if what in found:
                counter.add_metric(labels, found[what])
        yield counter
    for name, what, text in (
        ("cache_rows", "size", "Rows that a cache holds."),
        ("cache_capacity_rows", "capacity", "Rows that a cache can hold."),
        ("cache_bytes", "bytes", "Memory of a cache."),
    ):
        gauge = _gauge(name, text, *own)
        for labels, found in found_in.items():
            gauge.add_metric(labels, found[what])
        yield gauge


def _log_metrics(stats: Stats) -> Iterator[Metric]:
    log = stats["served_log"]
    for name, value, text in (
        ("served_log_rows", log["rows"], "Rows given to the log of served rows."),
        ("served_log_lost_rows", log["lost"], "Rows that the disk refused."),
        ("served_log_errors", log["errors"], "Failed disk calls of the log of served rows."),
        ("monitor_errors", stats["monitor_errors"], "Batches of served rows that the monitors failed on."),
    ):
        yield CounterMetricFamily(f"penstock_{name}", text, value=value)
    text = "Size of the log of served rows."
    yield GaugeMetricFamily("penstock_served_log_bytes", text, value=log["bytes"])


def _server_metrics(server: Stats) -> Iterator[Metric]:
    for name, what, text in (
        ("connections_accepted", "accepted", "Connections taken."),
        ("connections_refused", "refused", "Connections refused for want of room."),
        ("slow_readers", "slow_readers", "Times a connection did not take its replies at once."),
        ("slow_readers_dropped", "slow_readers_dropped", "Connections dropped for that."),
        ("dropped_notifications", "dropped_notifications", "Notifications that ask for an answer."),
    ):
        yield CounterMetricFamily(f"penstock_{name}", text, value=server[what])
    for name, what, text in (
        ("connections", "connections", "Open connections."),
        ("calls_outstanding", "calls_outstanding", "Calls that are no predictions and have no answer yet."),
        ("admin_calls_outstanding", "admin_calls_outstanding", "Admin calls that have no answer yet."),
    ):
        yield GaugeMetricFamily(f"penstock_{name}", text, value=server[what])
