"""What a feature repository declares: entities, sources, views, services. Nothing here reads data or a clock.

A view's features fall into three lots, found when the view is made: window aggregates and expressions without
`now()` are stored columns; an expression with `now()` is computed at request time, and the source columns
that it reads become hidden stored columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from penstock.errors import DefinitionError, InvalidArgumentError
from penstock.features.aggregates import WindowAggregate
from penstock.features.arguments import named_fields
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


@named_fields
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


@named_fields
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


@named_fields
@dataclass(frozen=True, eq=False)
class FeatureView:
    """Features of one entity set computed from one source. Without entities it has one row, for all.

    Attributes:
        schema: dtype that a stored feature must have; without `features` it names source columns.
        as_known: only events known by the time asked count, in plain features and in aggregates.
        stored: columns of the stored row: features in the order given, then hidden columns by name.
        request_time: expressions to evaluate for each request; they read source columns by their own names.
        hidden: hidden stored column of each source column that request-time expressions read, and, by
            fingerprint, of what they ask about a string.
    """

    name: str
    entities: Sequence[Entity]
    source: Source
    features: Mapping[str, Expr | WindowAggregate] = field(default_factory=dict)
    ttl: timedelta | None = None
    schema: Mapping[str, str] = field(default_factory=dict)
    as_known: bool = False
    stored: tuple[StoredColumn, ...] = field(init=False)
    request_time: Mapping[str, Expr] = field(init=False)
    hidden: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        _check_name("view name", self.name)
        where = f"view '{self.name}'"
        if not isinstance(self.entities, list | tuple) or not all(
            isinstance(e, Entity) for e in self.entities
        ):
            raise DefinitionError(f"{where}: entities is {self.entities!r}; expected a list of Entity")
        if not isinstance(self.source, Source):
            raise DefinitionError(
                f"{where}: source is {self.source!r}; expected a source such as ParquetSource(...)"
            )
        if self.ttl is not None and not isinstance(self.ttl, timedelta):
            raise DefinitionError(f"{where}: ttl is {self.ttl!r}; expected a datetime.timedelta, or None")
        if self.ttl is not None and self.ttl <= timedelta(0):
            raise DefinitionError(f"{where}: ttl is {self.ttl}; expected more than zero, or None")
        if not isinstance(self.as_known, bool):
            raise DefinitionError(f"{where}: as_known is {self.as_known!r}; expected True or False")
        features = self.features or {name: Expr("col", name) for name in self.schema}
        if not features:
            raise DefinitionError(f"{where} has no features")
        _check_distinct(f"{where}: entity", [e.name for e in self.entities])
        keys = self.join_keys
        _check_distinct(f"{where}: join key", keys)
        stored: list[StoredColumn] = []
        request_time: dict[str, Expr] = {}
        for name, value in features.items():
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
        for name, dtype in self.schema.items():
            if dtype not in DTYPES or name not in features or name in request_time:
                expected = f"a dtype of {', '.join(DTYPES)} for a stored feature"
                raise DefinitionError(f"{where}: schema has '{name}': {dtype!r}; expected {expected}")
        parts = stored_parts(*request_time.values())
        hidden = {
            k: HIDDEN_PREFIX + k if part.op == "col" else f"__text_{k[:32]}" for k, part in parts.items()
        }
        stored += [StoredColumn(hidden[k], part, True) for k, part in parts.items()]
        for attribute, found in (
            ("entities", tuple(self.entities)),
            ("features", dict(features)),
            ("schema", dict(self.schema)),
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
        known = ["as_known"] * self.as_known
        return digest([self.name, entities, self.source.describe(), self.ttl_us, features, *known])

    def with_name(self, name: str) -> ViewProjection:
        """The view under another name, in feature lists and in `view__feature`."""
        return ViewProjection(self, name, tuple(self.features), {})

    def with_join_key_map(self, join_key_map: Mapping[str, str]) -> ViewProjection:
        """The view for other columns of the request: join key -> column."""
        return self.with_name(self.name).with_join_key_map(join_key_map)

    def __getitem__(self, features: Sequence[str]) -> ViewProjection:
        """Some features of the view."""
        return self.with_name(self.name)[features]

    __iter__ = None


@dataclass(frozen=True, eq=False)
class ViewProjection:
    """Features of a view under a name and for entity columns of its own; it shares the view's rows.

    Attributes:
        features: those that it stands for where it is listed itself.
        join_key_map: join key -> column that holds it.
    """

    view: FeatureView
    name: str
    features: tuple[str, ...]
    join_key_map: Mapping[str, str]

    def with_name(self, name: str) -> ViewProjection:
        """The same under another name."""
        _check_name("view name", name)
        return replace(self, name=name)

    def with_join_key_map(self, join_key_map: Mapping[str, str]) -> ViewProjection:
        """The same for other columns."""
        where = f"view '{self.view.name}' as '{self.name}'"
        for key, column in join_key_map.items():
            _check_name(f"{where}: column of join key '{key}'", column)
            if key not in self.view.join_keys:
                known = ", ".join(self.view.join_keys) or "none"
                raise DefinitionError(f"{where}: '{key}' is no join key; expected one of {known}")
        return replace(self, join_key_map=dict(join_key_map))

    def __getitem__(self, features: Sequence[str]) -> ViewProjection:
        if isinstance(features, str) or not isinstance(features, list | tuple) or not features:
            raise DefinitionError(f"view '{self.name}': features is {features!r}; expected a list of names")
        for feature in features:
            if feature not in self.view.features:
                known = ", ".join(self.view.features)
                raise DefinitionError(
                    f"view '{self.name}' has no feature '{feature}'; expected one of {known}"
                )
        return replace(self, features=tuple(features))

    __iter__ = None

    @property
    def join_keys(self) -> list[str]:
        """Columns that hold the view's join keys, in key order."""
        return [self.join_key_map.get(key, key) for key in self.view.join_keys]

    @property
    def is_alias(self) -> bool:
        """Whether it is more than a choice of features."""
        return self.name != self.view.name or bool(self.join_key_map)

    def describe(self) -> list[Any]:
        """What it adds to the view, as JSON values."""
        return [self.name, self.view.name, sorted(self.join_key_map.items())]


def list_features(given: Any) -> tuple[list[str], dict[str, ViewProjection]]:
    """Names "view:feature" of a feature list, and the aliases that are objects in it, by name.

    Raises:
        DefinitionError: two projections of one name that differ.
    """
    refs: list[str] = []
    aliases: dict[str, ViewProjection] = {}
    for item in given:
        if isinstance(item, FeatureView):
            item = item.with_name(item.name)
        if not isinstance(item, ViewProjection):
            refs.append(item)
            continue
        refs += [f"{item.name}:{feature}" for feature in item.features]
        if item.is_alias and aliases.setdefault(item.name, item).describe() != item.describe():
            raise DefinitionError(f"two different projections are named '{item.name}'; use with_name")
    return refs, aliases


@named_fields
@dataclass(frozen=True, eq=False)
class FeatureService:
    """The ordered inputs of a model: "view:feature" and, from the request, "request_source:input" names.

    Attributes:
        full_feature_names: name the inputs "view__feature", whoever asks: for lists whose short names
            collide.
        features: names; a view or a projection in the list stands for its features.
        aliases: the projections among them that have a name or join keys of their own, by name.
    """

    name: str
    features: Sequence[Any]
    request: RequestSource | None = None
    on_missing: str = "nan"
    full_feature_names: bool = False
    aliases: Mapping[str, ViewProjection] = field(init=False)

    def __post_init__(self) -> None:
        _check_name("service name", self.name)
        where = f"service '{self.name}'"
        if isinstance(self.features, str) or not self.features:
            raise DefinitionError(
                f"{where}: features is {self.features!r}; expected a list of 'view:feature'"
            )
        refs, aliases = list_features(self.features)
        for reference in refs:
            check_unversioned(reference)
            parts = reference.split(":") if isinstance(reference, str) else []
            if len(parts) != 2 or not all(map(_NAME.match, parts)):
                raise DefinitionError(f"{where}: feature is {reference!r}; expected 'view:feature'")
            if self.request and parts[0] == self.request.name and parts[1] not in self.request.schema:
                known = ", ".join(self.request.schema)
                raise DefinitionError(f"{where}: '{reference}' is no request input; expected one of {known}")
        _check_distinct(f"{where}: feature", refs)
        if not isinstance(self.full_feature_names, bool):
            raise DefinitionError(
                f"{where}: full_feature_names is {self.full_feature_names!r}; expected True or False"
            )
        if self.on_missing not in ("nan", "error"):
            raise DefinitionError(f"{where}: on_missing is {self.on_missing!r}; expected 'nan' or 'error'")
        object.__setattr__(self, "features", tuple(refs))
        object.__setattr__(self, "aliases", aliases)

    @property
    def base_refs(self) -> list[str]:
        """`features` with the names of the views that the aliases stand for."""
        owners = (ref.split(":") for ref in self.features)
        return [f"{self.aliases[o].view.name if o in self.aliases else o}:{f}" for o, f in owners]

    def bound(self, projections: Mapping[str, ViewProjection]) -> FeatureService:
        """The service with the repository's projections that its list calls by name."""
        used = {ref.split(":")[0] for ref in self.features}
        found = {name: alias for name, alias in projections.items() if name in used}
        made = copy(self)
        object.__setattr__(made, "aliases", {**found, **self.aliases})
        return made

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the service's own declaration; views have their own."""
        request = None if self.request is None else [self.request.name, list(self.request.schema.items())]
        aliases = [[self.aliases[name].describe() for name in sorted(self.aliases)]] * bool(self.aliases)
        full = ["full"] * self.full_feature_names
        return digest([self.name, list(self.features), request, self.on_missing, *aliases, *full])


def check_unversioned(reference: Any) -> None:
    """Refuse "view@v2:feature"."""
    if isinstance(reference, str) and "@" in reference.split(":")[0]:
        raise InvalidArgumentError(
            f"feature is '{reference}'; a repository has one version of a view: expected "
            f"'{reference.split('@')[0]}:{reference.split(':')[-1]}'"
        )
