"""OpenTelemetry spans of sampled requests (`monitoring.tracing`, extra `otel`).

A request that carries a sampled `traceparent` gets a server span in the caller's trace, as a child of the
caller's span, and a child span for each stage. Nothing of it runs on the request's path: the native core
keeps the times of such requests, the monitor hands them over, and a thread of this module makes and exports
the spans. Both queues are bounded; what finds one full is dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from penstock.errors import ConfigError

_log = logging.getLogger("penstock.integrations")

_STAGES = ("receive", "gather", "queue", "run", "encode")

# Of _core.ServedModel.drain_traces.
Record = tuple[int, int, int, int, int, int, int, int, int, int, int, str]


def make_exporter(kind: str, endpoint: str | None) -> SpanExporter:
    """An exporter: "otlp" (HTTP, to `endpoint` or by the standard variables) or "console"."""
    if kind == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(f"monitoring.tracing.exporter is otlp: {error}; install penstock[otel]") from error
    return OTLPSpanExporter(endpoint=endpoint)


class _Collected(SpanProcessor):
    """Keeps the spans that ended, until they are exported."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


class SpanMaker:
    """Makes and exports spans on a thread of its own, until `close`.

    Args:
        exporter: where spans go; it is shut down by `close`.
        sample: share of the sampled traces to keep, 0 to 1, by trace id.
        capacity: requests that may wait; more are dropped and counted.
        service: the `service.name` of the spans.
        offset_ns: gives wall-clock less monotonic time, nanoseconds.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        *,
        sample: float = 1.0,
        capacity: int = 4096,
        service: str = "penstock",
        offset_ns: Callable[[], int] = lambda: time.time_ns() - time.monotonic_ns(),
    ) -> None:
        self._exporter, self._capacity, self._offset_ns = exporter, capacity, offset_ns
        self._collected = _Collected()
        provider = TracerProvider(
            resource=Resource.create({"service.name": service}),
            sampler=ParentBased(ALWAYS_OFF, remote_parent_sampled=TraceIdRatioBased(sample)),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._collected)
        self._tracer = provider.get_tracer("penstock")
        self._queue: queue.SimpleQueue[tuple[str, str, Sequence[Record]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = self._dropped = self._failed = self._exported = 0
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def submit(self, model: str, version: str, records: Sequence[Record]) -> None:
        """Take requests of one model version. Never blocks; any thread."""
        with self._lock:
            kept = min(len(records), self._capacity - self._waiting)
            self._waiting += kept
            self._dropped += len(records) - kept
        if kept:
            self._queue.put((model, version, records[:kept]))

    def stats(self) -> dict[str, int]:
        """Requests `waiting` and `dropped` here; spans `exported`, and `failed`: refused by the exporter."""
        with self._lock:
            return {
                "waiting": self._waiting,
                "dropped": self._dropped,
                "exported": self._exported,
                "failed": self._failed,
            }

    def close(self) -> None:
        """Export what waits, then end."""
        self._queue.put(None)
        self._thread.join()
        self._exporter.shutdown()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            model, version, records = item
            offset = self._offset_ns()
            for record in records:
                self._spans(model, version, record, offset)
            spans, self._collected.spans = self._collected.spans, []
            done = False
            try:
                done = not spans or self._exporter.export(spans) is SpanExportResult.SUCCESS
            except Exception:  # an exporter that breaks must not end the thread
                _log.exception("spans could not be exported")
            with self._lock:
                self._waiting -= len(records)
                if done:
                    self._exported += len(spans)
                else:
                    self._failed += len(spans)

    def _spans(self, model: str, version: str, record: Record, offset: int) -> None:
        high, low, parent, received_ns, *times, total_ns, rows, code = record
        caller = SpanContext(high << 64 | low, parent, True, TraceFlags(TraceFlags.SAMPLED))
        start = received_ns + offset
        span = self._tracer.start_span(
            "predict",
            set_span_in_context(NonRecordingSpan(caller), Context()),
            SpanKind.SERVER,
            {
                "penstock.model": model,
                "penstock.version": version,
                "penstock.rows": rows,
                "penstock.code": code,
            },
            start_time=start,
        )
        if not span.is_recording():
            return
        within = set_span_in_context(span, Context())
        at = start
        for stage, ns in zip(_STAGES, times):
            if ns > 0:
                self._tracer.start_span(stage, within, start_time=at).end(at + ns)
                at += ns
        if code != "OK":
            span.set_status(Status(StatusCode.ERROR, code))
        span.end(start + total_ns)
