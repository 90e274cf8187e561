"""What the engine tells other systems: the exposition for Prometheus, and spans of traced requests.

Either is imported and started only where it is configured. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from penstock.config import Config
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from penstock.integrations.otel import SpanMaker
    from penstock.integrations.prometheus import PrometheusExporter
    from penstock.serving.live import LiveModel


class Telemetry:
    """The exporters of one engine; `start` starts those that are configured, `close` stops them.

    Attributes:
        server_stats: the counters of the socket server; set by the server, None without one.
    """

    def __init__(self, config: Config, stats: Callable[[], dict[str, Any]]) -> None:
        self.server_stats: Callable[[], dict[str, int]] | None = None
        self.spans: SpanMaker | None = None
        self.prometheus: PrometheusExporter | None = None
        self._config, self._stats = config, stats

    def start(self) -> None:
        """Start what is configured.

        Raises ConfigError where an extra is not installed, UnavailableError where the address of Prometheus
        cannot be had.
        """
        config = self._config
        tracing, prometheus = config.monitoring.tracing, config.monitoring.prometheus
        if tracing is not None:
            try:
                from penstock.integrations.otel import SpanMaker, make_exporter
            except ImportError as error:
                raise ConfigError(f"monitoring.tracing is set: {error}; install penstock[otel]") from error
            self.spans = SpanMaker(
                make_exporter(tracing.exporter, tracing.endpoint),
                sample=tracing.sample,
                capacity=tracing.capacity,
                service=tracing.service,
            )
        if prometheus is not None:
            try:
                from penstock.integrations.prometheus import EngineCollector, PrometheusExporter
            except ImportError as error:
                raise ConfigError(
                    f"monitoring.prometheus is set: {error}; install penstock[prometheus]"
                ) from error
            from penstock import __version__

            block = config.serving.autoscaling
            autoscaling = None if block is None else block.model_dump()
            collector = EngineCollector(self._stats, self._server, autoscaling, __version__)
            self.prometheus = PrometheusExporter(prometheus.listen, collector)

    def take(self, models: Iterable[LiveModel]) -> None:
        """Make spans of the traced requests that the models answered."""
        if self.spans is None:
            return
        for model in models:
            records = model.served.drain_traces()
            if records:
                self.spans.submit(model.bundle.name, model.bundle.version, records)

    def stats(self) -> dict[str, Any]:
        """Where they listen, and their counters; None for what is not configured."""
        return {
            "prometheus": None if self.prometheus is None else {"address": self.prometheus.address},
            "tracing": None if self.spans is None else self.spans.stats(),
        }

    def stop_scrapes(self) -> None:
        """No scrape reads the engine from now on. A second call does nothing."""
        exporter, self.prometheus = self.prometheus, None
        if exporter is not None:
            exporter.close()

    def close(self) -> None:
        """Export the spans that wait, and stop everything."""
        self.stop_scrapes()
        spans, self.spans = self.spans, None
        if spans is not None:
            spans.close()

    def _server(self) -> dict[str, int] | None:
        return None if self.server_stats is None else self.server_stats()
