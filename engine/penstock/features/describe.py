"""Definitions as texts and plain values, for people and for JSON. Reads no data; pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from penstock.features.aggregates import WindowAggregate
from penstock.features.definitions import FeatureService, FeatureView, RequestSource
from penstock.features.expressions import Expr
from penstock.features.source_definitions import DuckDBSource, FileSource, Source

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "==", "and": "&",
          "or": "|"}  # fmt: skip
_UNITS = ((86_400_000_000, "d"), (3_600_000_000, "h"), (60_000_000, "m"), (1_000_000, "s"))


def length(us: int | None) -> str | None:
    """A length of time as it is written in definitions, "90m"; microseconds where no unit divides it."""
    if us is None:
        return None
    for unit, letter in _UNITS:
        if us % unit == 0 and us:
            return f"{us // unit}{letter}"
    return f"{us}us"


def expression_text(expr: Expr) -> str:
    """An expression as one would write it."""
    args = [expression_text(arg) for arg in expr.args]
    if expr.op == "col":
        return f"col('{expr.param}')"
    if expr.op == "lit":
        return repr(expr.param[1])
    if expr.op in _INFIX and len(args) == 2:
        return f"({args[0]} {_INFIX[expr.op]} {args[1]})"
    if expr.op == "in_unit":
        return f"{args[0]}.{expr.param}()"
    if expr.param is not None:
        args.append(repr(expr.param))
    return f"{expr.op}({', '.join(args)})"


def feature_text(value: Expr | WindowAggregate) -> str:
    """A feature's definition as one would write it."""
    if isinstance(value, Expr):
        return expression_text(value)
    parts = [] if value.value is None else [expression_text(value.value)]
    for option in fields(value):
        given = getattr(value, option.name)
        if option.name in ("kind", "value") or given is None or given == option.default:
            continue
        if option.name.endswith("_us"):
            parts.append(f"{option.name.removesuffix('_us')}='{length(given)}'")
        else:
            parts.append(f"{option.name}={given!r}")
    return f"{value.kind}({', '.join(parts)})"


def describe_view(
    view: FeatureView, services: Mapping[str, FeatureService], dtypes: Mapping[str, str]
) -> dict[str, Any]:
    """A view. `dtypes` are those that `apply` recorded; a feature without one has None."""
    features = [
        {
            "name": name,
            "dtype": dtypes.get(name),
            "stage": "request time" if name in view.request_time else "stored",
            "definition": feature_text(value),
            "fingerprint": value.fingerprint(),
        }
        for name, value in view.features.items()
    ]
    return {
        "kind": "view",
        "name": view.name,
        "entities": {entity.name: list(entity.join_keys) for entity in view.entities},
        "source": view.source.name,
        "ttl": length(view.ttl_us),
        "features": features,
        "services": [
            s.name for s in services.values() if any(r.split(":")[0] == view.name for r in s.base_refs)
        ],
        "fingerprint": view.fingerprint(),
    }


def describe_service(service: FeatureService) -> dict[str, Any]:
    """A service."""
    request = service.request
    return {
        "kind": "service",
        "name": service.name,
        "features": list(service.features),
        "aliases": {
            n: {"view": a.view.name, "join_keys": dict(a.join_key_map)} for n, a in service.aliases.items()
        },
        "request": None if request is None else {"name": request.name, "inputs": dict(request.schema)},
        "on_missing": service.on_missing,
        "fingerprint": service.fingerprint(),
    }


def describe_request(request: RequestSource, services: Mapping[str, FeatureService]) -> dict[str, Any]:
    """The inputs that come with a request."""
    return {
        "kind": "request source",
        "name": request.name,
        "inputs": dict(request.schema),
        "services": [s.name for s in services.values() if s.request is not None and s.request == request],
    }


def describe_source(
    source: Source, views: Mapping[str, FeatureView], recorded: Mapping[str, str] | None
) -> dict[str, Any]:
    """A source. `recorded` is the schema that `apply` recorded."""
    made: dict[str, Any] = {"kind": "source", "name": source.name, "type": type(source).__name__}
    if isinstance(source, FileSource):
        made["path"] = source.path
    elif isinstance(source, DuckDBSource):
        made["query"] = source.query
    for column in ("timestamp", "created", "event_id", "deleted"):
        made[column] = getattr(source, column)
    made["declared"] = None if source.schema is None else dict(source.schema)
    made["recorded"] = None if recorded is None else dict(recorded)
    made["views"] = [view.name for view in views.values() if view.source.key == source.key]
    return made
