"""Penstock: real-time ML inference in one process.

Names load what they need when they are first used, so that `import penstock` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.features.aggregates import count, max, mean, min, sum
    from penstock.features.definitions import Entity, FeatureService, FeatureView, RequestSource
    from penstock.features.expressions import col, lit, maximum, minimum, now, percentile_rank, where
    from penstock.features.source_definitions import ArrowSource, CSVSource, ParquetSource, PushSource
    from penstock.features.store import FeatureStore
    from penstock.serving.async_client import AsyncClient
    from penstock.serving.client import Client
    from penstock.serving.engine import Engine

__version__ = "0.1.0"

__all__ = [
    "ArrowSource",
    "AsyncClient",
    "CSVSource",
    "Client",
    "Engine",
    "Entity",
    "FeatureService",
    "FeatureStore",
    "FeatureView",
    "ParquetSource",
    "PushSource",
    "RequestSource",
    "col",
    "count",
    "lit",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "now",
    "percentile_rank",
    "sum",
    "where",
]

_HOMES = {
    "penstock.features.aggregates": ("count", "max", "mean", "min", "sum"),
    "penstock.features.definitions": ("Entity", "FeatureService", "FeatureView", "RequestSource"),
    "penstock.features.source_definitions": ("ArrowSource", "CSVSource", "ParquetSource", "PushSource"),
    "penstock.features.expressions": (
        "col", "lit", "maximum", "minimum", "now", "percentile_rank", "where",
    ),
    "penstock.features.store": ("FeatureStore",),
    "penstock.serving.async_client": ("AsyncClient",),
    "penstock.serving.client": ("Client",),
    "penstock.serving.engine": ("Engine",),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'penstock' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
