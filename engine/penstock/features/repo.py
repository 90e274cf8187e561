"""A feature repository read from its folder: `feature_store.yaml` and Python files of definitions.

Each Python file runs as a module of its own, which another file of the folder may import by name; none stays
behind in `sys.modules`. Names are unique in the repository. Loading is serialised: it borrows `sys.path`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

import yaml

from penstock.errors import ConfigError, DefinitionError
from penstock.features.definitions import Entity, FeatureService, FeatureView, RequestSource, ViewProjection
from penstock.features.source_definitions import DuckDBSource, PushSource, TableSource
from penstock.features.store_settings import (
    JoinSettings,
    OnlineStoreSettings,
    PushSettings,
    join_settings,
    online_store_settings,
    push_settings,
)
from penstock.features.times import to_us

CONFIG_NAME = "feature_store.yaml"
_KNOWN_KEYS = ("project", "data_dir", "fit_until", "push", "online_store", "reader_rows", "join")
READER_ROWS = 100_000
_loading = threading.RLock()


@dataclass(frozen=True)
class Repo:
    """What a repository declares.

    Attributes:
        path: its folder.
        project: its name.
        data_dir: folder of the registry and the online store.
        push_settings, online_store: the sections `push` and `online_store` of `feature_store.yaml`.
        reader_rows: rows of a view that `online_reader` keeps in memory.
        join: the section `join`.
        fit_until_us: distributions are fitted to rows known before this time; None: to all rows.
        entities, views, services, requests, projections: the definitions by name.
    """

    path: Path
    project: str
    data_dir: Path
    fit_until_us: int | None
    entities: Mapping[str, Entity] = field(default_factory=dict)
    views: Mapping[str, FeatureView] = field(default_factory=dict)
    services: Mapping[str, FeatureService] = field(default_factory=dict)
    requests: Mapping[str, RequestSource] = field(default_factory=dict)
    projections: Mapping[str, ViewProjection] = field(default_factory=dict)
    push_settings: PushSettings = field(default_factory=PushSettings)
    online_store: OnlineStoreSettings = field(default_factory=OnlineStoreSettings)
    reader_rows: int = READER_ROWS
    join: JoinSettings = field(default_factory=JoinSettings)

    @property
    def push_sources(self) -> dict[str, PushSource]:
        """The push sources of the views, by name."""
        sources = (view.source for view in self.views.values())
        return {source.name: source for source in sources if isinstance(source, PushSource)}


def load_repo(path: Path) -> Repo:
    """Read a repository.

    Raises:
        ConfigError: there is no folder or `feature_store.yaml`, or that is wrong.
        DefinitionError: a Python file failed (the message names the file and line), or a name is given twice.
    """
    path = path.resolve()
    config = _read_config(path / CONFIG_NAME)
    data_dir = path / config.get("data_dir", ".penstock")
    found: dict[type, dict[str, Any]] = {
        kind: {} for kind in (Entity, FeatureView, FeatureService, RequestSource, ViewProjection)
    }
    origin: dict[int, str] = {}
    for file, namespace in _run_files(path, data_dir):
        for value in namespace.values():
            if isinstance(value, ViewProjection) and value.name == value.view.name:
                continue  # a choice of features, or an alias for the lists that hold the object
            if type(value) in found:
                _collect(found[type(value)], value, file, origin)
    entities = found[Entity]
    for view in found[FeatureView].values():
        for entity in view.entities:
            if entities.setdefault(entity.name, entity).join_keys != entity.join_keys:
                raise DefinitionError(
                    f"view '{view.name}': entity '{entity.name}' has the join keys {entity.join_keys}, "
                    f"elsewhere {entities[entity.name].join_keys}"
                )
    _check_sources(found[FeatureView])
    for kind, what in ((RequestSource, "request source"), (ViewProjection, "projection")):
        for name in found[kind]:
            if name in found[FeatureView]:
                raise DefinitionError(f"{what} '{name}' has the name of a view")
    for name, projection in found[ViewProjection].items():
        if found[FeatureView].get(projection.view.name) is not projection.view:
            raise DefinitionError(
                f"projection '{name}' is of view '{projection.view.name}', which no file names"
            )
    return Repo(
        path, config["project"], data_dir, config.get("fit_until"), entities, found[FeatureView],
        {name: service.bound(found[ViewProjection]) for name, service in found[FeatureService].items()},
        found[RequestSource], found[ViewProjection],
        config.get("push", PushSettings()), config.get("online_store", OnlineStoreSettings()),
        config.get("reader_rows", READER_ROWS), config.get("join", JoinSettings()),
    )  # fmt: skip


def _check_sources(views: Mapping[str, FeatureView]) -> None:
    """Refuse two queries or tables of one name: the registry keeps schemas and dictionaries by name."""
    first: dict[str, FeatureView] = {}
    for view in views.values():
        other = first.setdefault(view.source.key, view)
        one, two = other.source, view.source
        what = None
        if isinstance(one, DuckDBSource) and isinstance(two, DuckDBSource) and one.query != two.query:
            what = "query"
        elif isinstance(one, TableSource) and isinstance(two, TableSource) and one.table is not two.table:
            what = "table"
        elif isinstance(two, PushSource) and one != two:
            what = "definition"
        if what is not None:
            raise DefinitionError(
                f"source '{two.name}' of view '{view.name}' has another {what} than the source of that name "
                f"of view '{other.name}'; expected distinct names"
            )


def _collect(known: dict[str, Any], value: Any, file: str, origin: dict[int, str]) -> None:
    first = known.get(value.name)
    if first is value:
        return
    if first is not None:
        kind = type(value).__name__
        other = origin[id(first)]
        places = f"both times in {file}" if other == file else f"in {other} and in {file}"
        raise DefinitionError(f"{kind} '{value.name}' is defined twice: {places}")
    known[value.name] = value
    origin[id(value)] = file


def _read_config(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; a feature repository has a {CONFIG_NAME}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{file}{line}: is not YAML: {problem}") from error
    if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{file}:1: is a {type(data).__name__}; expected a mapping with 'project'")
    lines: dict[Any, int] = {}
    faults: list[str] = []
    for key_node, _ in node.value:
        line, key = key_node.start_mark.line + 1, key_node.value
        if key in lines:
            faults.append(f"{file}:{line}: {key} is given twice; first on line {lines[key]}")
        lines.setdefault(key, line)
    made: dict[str, Any] = {}
    for key, value in data.items():
        try:
            made[key] = _setting(key, value)
        except ValueError as error:
            faults.append(f"{file}:{lines.get(str(key), 1)}: {error}")
    if "project" not in data:
        faults.append(f"{file}:1: project is missing; expected a name")
    if faults:
        raise ConfigError("\n".join(faults))
    return made


def _setting(key: Any, value: Any) -> Any:
    """The value of a key; a ValueError says what is wrong with it."""
    if key not in _KNOWN_KEYS:
        near = difflib.get_close_matches(str(key), _KNOWN_KEYS, 1)
        hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(_KNOWN_KEYS)}"
        raise ValueError(f"unknown key {key}; {hint}")
    if key == "fit_until":
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)
        return to_us(value, "fit_until")
    if key == "reader_rows":
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"reader_rows is {value!r}; expected a whole number of at least 1")
        return value
    if key == "join":
        return join_settings(value)
    if key == "push":
        return push_settings(value)
    if key == "online_store":
        return online_store_settings(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} is {value!r}; expected a text")
    return value


def _run_files(path: Path, data_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each Python file's path, relative to the folder, and its names."""
    files = sorted(
        file
        for file in path.rglob("*.py")
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not file.is_relative_to(data_dir)
    )
    with _importing_from(path):
        for file in files:
            parts = file.relative_to(path).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield str(file.relative_to(path)), vars(_run(path, file, name))


@contextmanager
def _importing_from(path: Path) -> Iterator[None]:
    """Let files of the folder import each other, and forget them in the end."""
    with _loading:
        before, writes = set(sys.modules), sys.dont_write_bytecode
        sys.path.insert(0, str(path))
        sys.dont_write_bytecode = True
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(str(path))
            sys.dont_write_bytecode = writes
            for name in set(sys.modules) - before:
                if _is_below(sys.modules[name], path):
                    del sys.modules[name]


def _is_below(module: Any, path: Path) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place and Path(place).is_relative_to(path) for place in places)


def _run(path: Path, file: Path, name: str) -> Any:
    ready = sys.modules.get(name)
    if ready is not None and getattr(ready, "__file__", None) == str(file):
        return ready  # a file before this one has imported it
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        # A file named like a module that is loaded already keeps out of its way: no file can import it.
        if ready is None:
            sys.modules[name] = module
        spec.loader.exec_module(module)
    except Exception as error:
        raise DefinitionError(_trace(error, path, file)) from error
    return module


def _trace(error: Exception, path: Path, file: Path) -> str:
    """The error with the last place in the folder that led to it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    place = str(file)
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).is_relative_to(path):
            place = f"{frame.filename}:{frame.lineno}"
    return f"{place}: {type(error).__name__}: {error}"
