"""A Feast repository's definitions, turned into Penstock's.

They come as a serialized `feast.core.Registry`: from the file that `feast apply` wrote, or made by Feast
itself from the repository's Python files, if it is installed. What Penstock cannot run is left out and its
reason kept under its name, so that only a request for it fails. Tags, owners and permissions mean nothing
here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from penstock.errors import ConfigError, DefinitionError
from penstock.features.definitions import Entity, FeatureService, FeatureView, ViewProjection
from penstock.features.expressions import col
from penstock.features.repo import Repo
from penstock.features.source_definitions import ParquetSource
from penstock.integrations.feast_wire import (
    T_BOOL,
    T_DOUBLE,
    T_FLOAT,
    T_INT32,
    T_INT64,
    T_STRING,
    T_TIMESTAMP,
    Message,
    type_name,
)

CONFIG_NAME = "feature_store.yaml"
_DUMMY_ENTITY = "__dummy"  # Feast's entity of a view without entities
DUMMY_KEY = "__dummy_id"
STORED_TYPES = (T_BOOL, T_INT32, T_INT64, T_FLOAT, T_DOUBLE, T_STRING, T_TIMESTAMP)
_SOURCE_KINDS = {0: "no", 1: "file", 2: "BigQuery", 3: "Kafka", 4: "Kinesis", 5: "Redshift", 6: "custom",
                 7: "request", 8: "Snowflake", 9: "push", 10: "Trino", 11: "Spark", 12: "Athena",
                 13: "Iceberg"}  # fmt: skip
_MAX_TTL_US = 2**62
_REMOTE = re.compile(r"[a-z][a-z0-9+]*://")


@dataclass(frozen=True)
class FeastConfig:
    """What `feature_store.yaml` says.

    Attributes:
        registry: the registry file, or None where it is none.
        registry_kind: what it is instead.
        online_store: its section.
        versioned: online names carry the version of their view.
    """

    project: str
    registry: Path | None
    registry_kind: str
    online_store: Mapping[str, Any]
    versioned: bool


@dataclass(frozen=True)
class FeastView:
    """A view as Feast's online store knows it.

    Attributes:
        online_name: its name there.
        types: value type of each feature.
        key_types: value type of each join key, in key order; 0 where the registry does not know.
        ttl_us: microseconds, None for no end.
    """

    name: str
    online_name: str
    types: Mapping[str, int]
    key_types: Mapping[str, int]
    ttl_us: int | None


@dataclass(frozen=True)
class OnDemandView:
    """An on-demand view: an opaque Python function over features and request inputs.

    Attributes:
        mode: "pandas" (a frame in and out) or "python" (dicts of lists, or of one row's values).
        refs: "view:feature" names that it reads.
        inputs: request inputs that it reads.
        outputs: its features.
        body, source: the function as Feast serialized it with dill, and its text.
    """

    name: str
    mode: str
    singleton: bool
    refs: tuple[str, ...]
    aliases: Mapping[str, ViewProjection]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: bytes
    source: str


@dataclass(frozen=True)
class FeastService:
    """A feature service: names in order and the aliases among them."""

    name: str
    refs: tuple[str, ...]
    aliases: Mapping[str, ViewProjection]


@dataclass(frozen=True)
class FeastDefinitions:
    """All that Penstock knows of a Feast repository.

    Attributes:
        repo: the views that Penstock's own store can have.
        views: what the online store has, by view.
        on_demand, services: by name.
        refused: why a view, "view:feature", or service cannot be used, by name.
    """

    config: FeastConfig
    repo: Repo
    views: Mapping[str, FeastView]
    on_demand: Mapping[str, OnDemandView]
    services: Mapping[str, FeastService]
    refused: Mapping[str, str] = field(default_factory=dict)


def read_config(path: Path) -> FeastConfig:
    """Read a Feast repository's `feature_store.yaml`; environment variables in it are expanded.

    Raises:
        ConfigError: no such file, or it is no Feast configuration that Penstock can read.
    """
    file = path / CONFIG_NAME
    try:
        given = yaml.safe_load(os.path.expandvars(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("project"), str):
        raise ConfigError(f"{file}: has no project; expected a Feast configuration")
    version = given.get("entity_key_serialization_version", 3)
    if version != 3:
        raise ConfigError(f"{file}: entity_key_serialization_version is {version!r}; expected 3")
    registry = given.get("registry")
    section = registry if isinstance(registry, dict) else {"path": registry or ""}
    kind, place = section.get("registry_type", "file"), str(section.get("path", ""))
    if kind == "file" and _REMOTE.match(place):
        kind = place.split(":")[0]
    online = given.get("online_store") or {}
    if isinstance(online, str):
        online = {"type": online}
    return FeastConfig(
        project=given["project"],
        registry=path / place if kind == "file" and place else None,
        registry_kind=str(kind),
        online_store={"type": "sqlite", **online},
        versioned=bool(section.get("enable_online_feature_view_versioning", False)),
    )


def read_definitions(
    path: Path, data_dir: Path, definitions: str = "auto", *, absolute: bool = False
) -> FeastDefinitions:
    """Read a Feast repository.

    Args:
        path: its folder.
        data_dir: where Penstock keeps its own registry and online store.
        definitions: "registry", "files", or "auto": the registry file if there is one, else the files.
        absolute: make the paths of sources absolute.

    Raises:
        ConfigError: neither a registry file that can be read nor an installed Feast.
        DefinitionError: the registry is corrupt, or Feast refuses the files.
    """
    config = read_config(path)
    if definitions not in ("auto", "registry", "files"):
        raise ConfigError(f"definitions is {definitions!r}; expected 'auto', 'registry' or 'files'")
    there = config.registry is not None and config.registry.is_file()
    if definitions == "registry" or (definitions == "auto" and there):
        if not there or config.registry is None:
            raise ConfigError(
                f"{path / CONFIG_NAME}: the registry is {config.registry or config.registry_kind}; "
                "expected a file that `feast apply` wrote"
            )
        data, where = config.registry.read_bytes(), str(config.registry)
    else:
        data, where = _registry_of_files(path), str(path)
    try:
        return _Reader(config, path, data_dir, Message(data), absolute).read()
    except (ValueError, UnicodeDecodeError) as error:
        if isinstance(error, DefinitionError):
            raise
        raise DefinitionError(f"{where} is no Feast registry: {error}") from error


def _registry_of_files(path: Path) -> bytes:
    """The registry that Feast makes of the repository's Python files, without writing anything."""
    try:
        from feast.repo_operations import parse_repo
    except ImportError as error:
        raise ConfigError(
            f"{path} has no registry file, and its Python files need Feast: pip install 'penstock[feast]', "
            f"or run `feast apply` ({error})"
        ) from error
    from feast.protos.feast.core.Registry_pb2 import Registry

    before, names = Path.cwd(), set(sys.modules)
    sys.path.insert(0, str(path))
    try:
        os.chdir(path)  # Feast finds modules relative to it
        contents = parse_repo(path.resolve())
        made: bytes = contents.to_registry_proto().SerializeToString()
    except Exception as error:
        raise DefinitionError(f"{path}: Feast cannot read its Python files: {error}") from error
    finally:
        os.chdir(before)
        sys.path.remove(str(path))
        for name in set(sys.modules) - names:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(path.resolve()):
                del sys.modules[name]
    assert isinstance(made, bytes) and Registry.FromString(made)
    return made


class _Reader:
    """One pass over a registry message."""

    def __init__(
        self, config: FeastConfig, path: Path, data_dir: Path, registry: Message, absolute: bool
    ) -> None:
        self._config, self._path, self._data_dir, self._registry = config, path, data_dir, registry
        self._absolute = absolute
        self._refused: dict[str, str] = {}
        self._entities: dict[str, Message] = {}
        self._views: dict[str, FeatureView] = {}
        self._feast: dict[str, FeastView] = {}
        self._on_demand: dict[str, OnDemandView] = {}

    def read(self) -> FeastDefinitions:
        def mine(number: int) -> list[Message]:
            specs = [message.message(1) for message in self._registry.messages(number)]
            return [spec for spec in specs if spec.text(2) in ("", self._config.project)]

        found = [message.message(1).text(2) for message in self._registry.messages(6)]
        if found and not {"", self._config.project} & set(found):
            raise DefinitionError(
                f"project is '{self._config.project}'; the registry has views of "
                f"{', '.join(sorted(set(found)))} alone"
            )
        for item in self._registry.messages(1):
            spec = item.message(1)
            if spec.text(9) in ("", self._config.project):
                self._entities[spec.text(1)] = spec
        for item in self._registry.messages(6):
            if item.message(1).text(2) in ("", self._config.project):
                self._view(item.message(1), item.message(2).number(4))
        for spec in mine(14):
            self._refused[spec.text(1)] = "is a stream feature view; Penstock cannot run its transformation"
        for spec in mine(19):
            self._refused[spec.text(1)] = "is a label view; expected a feature view"
        for spec in mine(8):
            self._on_demand_view(spec)
        services = {spec.text(1): self._service(spec) for spec in mine(7)}
        repo = Repo(
            self._path.resolve(),
            self._config.project,
            self._data_dir,
            None,
            {entity.name: entity for view in self._views.values() for entity in view.entities},
            self._views,
            self._penstock_services(services.values()),
        )
        return FeastDefinitions(
            self._config, repo, self._feast, self._on_demand, services, dict(sorted(self._refused.items()))
        )

    def _view(self, spec: Message, version: int) -> None:
        name = spec.text(1)
        features = {f.text(1): f.number(2) for f in spec.messages(4)}
        key_columns = {f.text(1): f.number(2) for f in spec.messages(12)}
        duration = spec.message(6)
        ttl_us = duration.number(1) * 1_000_000 + duration.number(2) // 1000
        if not 0 <= ttl_us <= _MAX_TTL_US:
            raise ValueError(f"view '{name}' has a ttl of {ttl_us} us")
        entities = []
        key_types: dict[str, int] = {}
        for entity in spec.texts(3):
            if entity == _DUMMY_ENTITY:
                continue
            if entity not in self._entities:
                raise DefinitionError(f"view '{name}' has the entity '{entity}', which the registry lacks")
            known = self._entities[entity]
            key = known.text(4) or entity
            key_types[key] = key_columns.get(key) or known.number(2)
            entities.append((entity, key))
        online_name = f"{name}_v{version}" if self._config.versioned and version > 0 else name
        self._feast[name] = FeastView(name, online_name, features, key_types, ttl_us or None)
        stored = {f: col(f) for f, kind in features.items() if kind in STORED_TYPES}
        for feature, kind in features.items():
            if kind not in STORED_TYPES:
                self._refused[f"{name}:{feature}"] = (
                    f"is of type {type_name(kind)}, which no stored feature can have"
                )
        try:
            source = self._source(spec)
            if not stored:
                raise DefinitionError("has no feature of a type that a stored feature can have")
            self._views[name] = FeatureView(
                name,
                [Entity(entity, [key]) for entity, key in entities],
                source,
                stored,
                timedelta(microseconds=ttl_us) if ttl_us else None,
            )
        except DefinitionError as error:
            self._refused[name] = str(error)

    def _source(self, spec: Message) -> ParquetSource:
        if spec.has(14) or spec.has(15):
            raise DefinitionError("is computed by a transformation of its own, which Penstock cannot run")
        source = spec.message(7)
        kind, options = source.number(1), source.message(11)
        if kind != 1:
            what = _SOURCE_KINDS.get(kind, f"type {kind}")
            raise DefinitionError(f"has a {what} source '{source.text(20)}'; expected a Parquet file")
        place = options.text(2)
        if place.startswith("file://"):
            place = place.removeprefix("file://")
        if _REMOTE.match(place):
            raise DefinitionError(f"has the source '{place}'; expected a path on this machine")
        if options.message(1).has(2):
            raise DefinitionError(f"has the source '{place}' in Delta format; expected Parquet")
        if self._absolute:
            place = str((self._path / place).resolve())
        if not source.text(3):
            raise DefinitionError(f"has the source '{place}' without a timestamp_field; run `feast apply`")
        return ParquetSource(
            place, timestamp=source.text(3), created=source.text(5) or None, field_mapping=source.mapping(2)
        )

    def _projection(self, message: Message) -> tuple[list[str], dict[str, ViewProjection]]:
        """Names of a projection's features, and its alias if it has one."""
        view, name = message.text(1), message.text(3) or message.text(1)
        features = [f.text(1) for f in message.messages(2)]
        mapping = message.mapping(4)
        refs = [f"{name}:{feature}" for feature in features]
        if name == view and not mapping:
            return refs, {}
        if view not in self._views:
            reason = self._refused.get(view, "is unknown")
            raise DefinitionError(f"reads view '{view}' as '{name}', which {reason}")
        return refs, {name: self._views[view].with_name(name).with_join_key_map(mapping)}

    def _on_demand_view(self, spec: Message) -> None:
        name, mode = spec.text(1), spec.text(11) or "pandas"
        refs: list[str] = []
        aliases: dict[str, ViewProjection] = {}
        inputs: list[str] = []
        function = spec.message(10).message(1) if spec.has(10) else spec.message(5)
        mode = function.text(4) or mode
        try:
            if mode not in ("pandas", "python") or spec.message(10).has(2):
                raise DefinitionError(f"is an on-demand view in mode '{mode}'; expected 'pandas' or 'python'")
            if spec.has(16):
                raise DefinitionError("is an on-demand view with aggregations, which Penstock cannot run")
            for entry in spec.messages(4):
                source = entry.message(2)
                if source.has(2):
                    inputs += [f.text(1) for f in source.message(2).message(18).messages(3)]
                    continue
                found: tuple[list[str], dict[str, ViewProjection]]
                if not source.has(3):
                    view = source.message(1).message(1)
                    found = ([f"{view.text(1)}:{f.text(1)}" for f in view.messages(4)], {})
                else:
                    found = self._projection(source.message(3))
                refs += found[0]
                aliases.update(found[1])
        except DefinitionError as error:
            self._refused[name] = str(error)
            return
        self._on_demand[name] = OnDemandView(
            name=name,
            mode=mode,
            singleton=bool(spec.number(15)),
            refs=tuple(refs),
            aliases=aliases,
            inputs=tuple(inputs),
            outputs=tuple(f.text(1) for f in spec.messages(3)),
            body=function.data(2),
            source=function.text(3),
        )

    def _penstock_services(self, services: Iterable[FeastService]) -> dict[str, FeatureService]:
        """The services that a model can be served from: those of stored features only.

        Where short names collide the service has full names, which in Feast each caller must ask for.
        """
        found = {}
        for service in services:
            items: list[Any] = []
            for ref in service.refs:
                owner, short = ref.split(":")
                view = service.aliases[owner].view.name if owner in service.aliases else owner
                if view in self._views and short in self._views[view].features:
                    items.append(service.aliases[owner][[short]] if owner in service.aliases else ref)
            if service.name not in self._refused and len(items) == len(service.refs) > 0:
                try:
                    shorts = [ref.split(":")[1] for ref in service.refs]
                    found[service.name] = FeatureService(
                        service.name, items, full_feature_names=len(set(shorts)) < len(shorts)
                    )
                except DefinitionError as error:
                    self._refused[service.name] = f"cannot be a service: {error}"
        return found

    def _service(self, spec: Message) -> FeastService:
        refs: list[str] = []
        aliases: dict[str, ViewProjection] = {}
        for projection in spec.messages(3):
            try:
                found = self._projection(projection)
            except DefinitionError as error:
                self._refused[spec.text(1)] = str(error)
                continue
            refs += found[0]
            aliases.update(found[1])
        return FeastService(spec.text(1), tuple(refs), aliases)
