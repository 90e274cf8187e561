"""Penstock: real-time ML inference in one process.

Names load what they need when they are first used, so that `import penstock` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.features.aggregates import (
        count,
        distinct,
        ewma,
        first,
        last,
        max,
        mean,
        min,
        std,
        sum,
        top_k,
        var,
    )
    from penstock.features.definitions import Entity, FeatureService, FeatureView, RequestSource
    from penstock.features.expressions import (
        coalesce,
        col,
        lit,
        maximum,
        minimum,
        now,
        percentile_rank,
        udf,
        where,
    )
    from penstock.features.source_definitions import (
        ArrowSource,
        CSVSource,
        DuckDBSource,
        ParquetSource,
        PushSource,
        TableSource,
    )
    from penstock.features.store import FeatureStore
    from penstock.features.vectors import vector
    from penstock.serving.async_client import AsyncClient
    from penstock.serving.client import Client
    from penstock.serving.engine import Engine

__version__ = "0.1.0"

__all__ = [
    "ArrowSource",
    "AsyncClient",
    "CSVSource",
    "Client",
    "DuckDBSource",
    "Engine",
    "Entity",
    "FeatureService",
    "FeatureStore",
    "FeatureView",
    "ParquetSource",
    "PushSource",
    "RequestSource",
    "TableSource",
    "coalesce",
    "col",
    "count",
    "distinct",
    "ewma",
    "first",
    "last",
    "lit",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "now",
    "percentile_rank",
    "std",
    "sum",
    "top_k",
    "udf",
    "var",
    "vector",
    "where",
]

_HOMES = {
    "penstock.features.aggregates": (
        "count", "distinct", "ewma", "first", "last", "max", "mean", "min", "std", "sum", "top_k", "var",
    ),
    "penstock.features.definitions": ("Entity", "FeatureService", "FeatureView", "RequestSource"),
    "penstock.features.source_definitions": (
        "ArrowSource", "CSVSource", "DuckDBSource", "ParquetSource", "PushSource", "TableSource",
    ),
    "penstock.features.expressions": (
        "coalesce", "col", "lit", "maximum", "minimum", "now", "percentile_rank", "udf", "where",
    ),
    "penstock.features.store": ("FeatureStore",),
    "penstock.features.vectors": ("vector",),
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
