"""What a feature repository declares: entities, sources, views, services. Nothing here reads data or a clock.

A view's features fall into three lots, found when the view is made: window aggregates and expressions without
`now()` are stored columns; an expression with `now()` is computed at request time, and the source columns
that it reads become hidden stored columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from penstock.errors import DefinitionError
from penstock.features.aggregates import WindowAggregate
from penstock.features.expressions import DTYPES, Expr, digest, stored_parts, uses_now
from penstock.features.source_definitions import Source

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\Z")
HIDDEN_PREFIX = "__column_"


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.match(name) or name.startswith("__"):
        raise DefinitionError(f"{what} is {name!r}; expected letters, digits and '_', not starting with '__'")


def _check_distinct(what: str, names: Sequence[str]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise DefinitionError(f"{what} '{name}' is given twice")


@dataclass(frozen=True)
class Entity:
    """A thing that features describe; `join_keys` name its columns, in key order."""

    name: str
    join_keys: Sequence[str]

    def __post_init__(self) -> None:
        _check_name("entity name", self.name)
        if isinstance(self.join_keys, str) or not self.join_keys:
            raise DefinitionError(f"entity '{self.name}': join_keys is {self.join_keys!r}; expected a list")
        for key in self.join_keys:
            _check_name(f"entity '{self.name}': join key", key)
        _check_distinct(f"entity '{self.name}': join key", self.join_keys)
        object.__setattr__(self, "join_keys", tuple(self.join_keys))


@dataclass(frozen=True)
class RequestSource:
    """Values that come with a request; `schema` maps each name to its dtype."""

    name: str
    schema: Mapping[str, str]

    def __post_init__(self) -> None:
        _check_name("request source name", self.name)
        for column, dtype in self.schema.items():
            _check_name(f"request source '{self.name}': input", column)
            if dtype not in DTYPES:
                raise DefinitionError(
                    f"request source '{self.name}': input '{column}' has dtype {dtype!r}; "
                    f"expected one of {', '.join(DTYPES)}"
                )


@dataclass(frozen=True, eq=False)
class StoredColumn:
    """A column of a view's stored row. A hidden one serves request-time expressions and is no feature."""

    name: str
    value: Expr | WindowAggregate
    hidden: bool = False


@dataclass(frozen=True, eq=False)
class FeatureView:
    """Features of one entity set computed from one source.

    Attributes:
        stored: columns of the stored row: features in the order given, then hidden columns by name.
        request_time: expressions to evaluate for each request; they read source columns by their own names.
        hidden: hidden stored column of each source column that request-time expressions read, and, by
            fingerprint, of what they ask about a string.
    """

    name: str
    entities: Sequence[Entity]
    source: Source
    features: Mapping[str, Expr | WindowAggregate]
    ttl: timedelta | None = None
    stored: tuple[StoredColumn, ...] = field(init=False)
    request_time: Mapping[str, Expr] = field(init=False)
    hidden: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        _check_name("view name", self.name)
        where = f"view '{self.name}'"
        if not self.entities or not all(isinstance(e, Entity) for e in self.entities):
            raise DefinitionError(f"{where}: entities is {self.entities!r}; expected a list of Entity")
        if not isinstance(self.source, Source):
            raise DefinitionError(
                f"{where}: source is {self.source!r}; expected a source such as ParquetSource(...)"
            )
        if self.ttl is not None and self.ttl <= timedelta(0):
            raise DefinitionError(f"{where}: ttl is {self.ttl}; expected more than zero, or None")
        if not self.features:
            raise DefinitionError(f"{where} has no features")
        _check_distinct(f"{where}: entity", [e.name for e in self.entities])
        keys = self.join_keys
        _check_distinct(f"{where}: join key", keys)
        stored: list[StoredColumn] = []
        request_time: dict[str, Expr] = {}
        for name, value in self.features.items():
            _check_name(f"{where}: feature name", name)
            if name in keys:
                raise DefinitionError(f"{where}: feature '{name}' has the name of a join key")
            if isinstance(value, Expr) and uses_now(value):
                request_time[name] = value
            elif isinstance(value, Expr | WindowAggregate):
                stored.append(StoredColumn(name, value))
            else:
                raise DefinitionError(
                    f"{where}: feature '{name}' is {value!r}; expected an expression or an aggregate"
                )
        parts = stored_parts(*request_time.values())
        hidden = {
            k: HIDDEN_PREFIX + k if part.op == "col" else f"__text_{k[:32]}" for k, part in parts.items()
        }
        stored += [StoredColumn(hidden[k], part, True) for k, part in parts.items()]
        for attribute, found in (
            ("entities", tuple(self.entities)),
            ("features", dict(self.features)),
            ("stored", tuple(stored)),
            ("request_time", request_time),
            ("hidden", hidden),
        ):
            object.__setattr__(self, attribute, found)

    @property
    def join_keys(self) -> list[str]:
        """Join-key columns of all entities, in key order."""
        return [key for entity in self.entities for key in entity.join_keys]

    @property
    def ttl_us(self) -> int | None:
        """The ttl in microseconds."""
        return None if self.ttl is None else self.ttl // timedelta(microseconds=1)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the view's values."""
        features = [[name, value.fingerprint()] for name, value in self.features.items()]
        entities = [[e.name, list(e.join_keys)] for e in self.entities]
        return digest([self.name, entities, self.source.describe(), self.ttl_us, features])


@dataclass(frozen=True, eq=False)
class FeatureService:
    """The ordered inputs of a model: "view:feature" and, from the request, "request_source:input" names."""

    name: str
    features: Sequence[str]
    request: RequestSource | None = None
    on_missing: str = "nan"

    def __post_init__(self) -> None:
        _check_name("service name", self.name)
        where = f"service '{self.name}'"
        if isinstance(self.features, str) or not self.features:
            raise DefinitionError(
                f"{where}: features is {self.features!r}; expected a list of 'view:feature'"
            )
        for reference in self.features:
            parts = reference.split(":") if isinstance(reference, str) else []
            if len(parts) != 2 or not all(map(_NAME.match, parts)):
                raise DefinitionError(f"{where}: feature is {reference!r}; expected 'view:feature'")
            if self.request and parts[0] == self.request.name and parts[1] not in self.request.schema:
                known = ", ".join(self.request.schema)
                raise DefinitionError(f"{where}: '{reference}' is no request input; expected one of {known}")
        _check_distinct(f"{where}: feature", self.features)
        if self.on_missing not in ("nan", "error"):
            raise DefinitionError(f"{where}: on_missing is {self.on_missing!r}; expected 'nan' or 'error'")
        object.__setattr__(self, "features", tuple(self.features))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the service's own declaration; views have their own."""
        request = None if self.request is None else [self.request.name, list(self.request.schema.items())]
        return digest([self.name, list(self.features), request, self.on_missing])
