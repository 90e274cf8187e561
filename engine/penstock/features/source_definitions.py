"""What a feature repository declares about where events come from. Nothing here reads data."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.errors import DefinitionError
from penstock.features.arguments import named_fields
from penstock.features.expressions import DTYPES, digest

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\Z")


class Source(ABC):
    """Where a view's events come from. Equal descriptions mean equal events.

    Attributes:
        name: what messages and the registry call it.
        timestamp: column of the event's time.
        created: column of the time when the row became known, or None.
        event_id: column that names an event: rows of a key with one name are versions of one event; or None.
        deleted: bool column; true in a version that takes its event back; or None.
        schema: dtype of columns that must be there, or None: then what `apply` finds is the schema.
    """

    name: str
    timestamp: str
    created: str | None = None
    event_id: str | None = None
    deleted: str | None = None
    schema: Mapping[str, str] | None = None

    @abstractmethod
    def describe(self) -> list[Any]:
        """All that decides its events, as JSON values."""

    @property
    def key(self) -> str:
        """Its name with its kind, which tells sources of one name apart."""
        return f"{type(self).__name__} {self.name}"

    @property
    def own_columns(self) -> list[str]:
        """The columns that are the source's own, whatever the view reads: times first."""
        given = (self.timestamp, self.created, self.event_id, self.deleted)
        return [name for name in given if name is not None]

    def _versions(self) -> list[Any]:
        """The part of a description that sources without versions of events do not have."""
        return [] if self.event_id is None else [{"event_id": self.event_id, "deleted": self.deleted}]

    def _check(self) -> None:
        """Refuse column names and a schema that cannot be right."""
        kind = type(self).__name__
        if not isinstance(self.timestamp, str) or not self.timestamp:
            raise DefinitionError(f"{kind}: timestamp is {self.timestamp!r}; expected a text")
        taken = [self.timestamp]
        for what in ("created", "event_id", "deleted"):
            value = getattr(self, what)
            if value is None:
                continue
            if not isinstance(value, str) or not value or value in taken:
                raise DefinitionError(f"{kind}: {what} is {value!r}; expected another column")
            taken.append(value)
        if self.deleted is not None and self.event_id is None:
            raise DefinitionError(
                f"{kind}: deleted is {self.deleted!r} without event_id; expected the column that says "
                "which event is taken back"
            )
        self._check_schema(kind)

    def _check_schema(self, kind: str) -> None:
        if self.schema is None:
            return
        if not isinstance(self.schema, Mapping) or not self.schema:
            raise DefinitionError(f"{kind}: schema is {self.schema!r}; expected a map of column to dtype")
        for column, dtype in self.schema.items():
            if not isinstance(column, str) or dtype not in DTYPES:
                raise DefinitionError(
                    f"{kind}: schema has {column!r}: {dtype!r}; expected one of {', '.join(DTYPES)}"
                )
        for name, wanted in (
            (self.timestamp, "timestamp"),
            (self.created, "timestamp"),
            (self.deleted, "bool"),
        ):
            if name is not None and self.schema.get(name, wanted) != wanted:
                raise DefinitionError(
                    f"{kind}: schema has {name!r}: {self.schema[name]!r}; expected {wanted!r} by its use"
                )


@dataclass(frozen=True)
class FileSource(Source):
    """A table of events in files.

    Attributes:
        path: file, folder or glob, relative to the repository.
        timestamp: column of the event's time.
        created: column of the time when the row became known, or None.
        event_id, deleted, schema: see `Source`.
        field_mapping: name in the files -> name by which everything else, the time columns included, calls
            the column. It takes the place of a column that the files have under that name.
    """

    name: str = field(init=False, repr=False, compare=False)
    path: str
    timestamp: str
    created: str | None = None
    event_id: str | None = field(default=None, kw_only=True)
    deleted: str | None = field(default=None, kw_only=True)
    schema: Mapping[str, str] | None = field(default=None, kw_only=True, hash=False)
    field_mapping: Mapping[str, str] = field(default_factory=dict, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise DefinitionError(f"{type(self).__name__}: path is {self.path!r}; expected a text")
        object.__setattr__(self, "name", self.path)
        object.__setattr__(self, "field_mapping", _checked_mapping(type(self).__name__, self.field_mapping))
        self._check()

    def describe(self) -> list[Any]:
        renamed = [sorted(self.field_mapping.items())] if self.field_mapping else []
        return [type(self).__name__, self.path, self.timestamp, self.created, *self._versions(), *renamed]

    @property
    def key(self) -> str:
        renamed = f" {digest([sorted(self.field_mapping.items())])[:8]}" if self.field_mapping else ""
        return super().key + renamed

    def file_columns(self, names: Iterable[str]) -> list[str]:
        """What the files call these columns."""
        before = {name: column for column, name in self.field_mapping.items()}
        return [before.get(name, name) for name in names]

    def renames(self, columns: Iterable[str]) -> dict[str, str]:
        """Name of each column of the files that stays: a renamed one takes the place of another."""
        targets = {self.field_mapping[column] for column in columns if column in self.field_mapping}
        kept = [c for c in columns if c in self.field_mapping or c not in targets]
        return {column: self.field_mapping.get(column, column) for column in kept}


def _checked_mapping(where: str, given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping) or not all(
        isinstance(text, str) and text for pair in given.items() for text in pair
    ):
        raise DefinitionError(f"{where}: field_mapping is {given!r}; expected names of columns by name")
    for name in given.values():
        if list(given.values()).count(name) > 1:
            raise DefinitionError(f"{where}: field_mapping gives two columns the name '{name}'")
    return dict(given)


@named_fields
@dataclass(frozen=True)
class DuckDBSource(Source):
    """The rows of a SELECT that DuckDB runs (the extra `duckdb`).

    Paths in the query count from the repository's folder. Of events that tie in time and known-at the last
    row counts, so a query whose rows have no order of their own needs an ORDER BY.

    Attributes:
        query: one SELECT or WITH ... SELECT; nothing else is run.
        timestamp, created, event_id, deleted, schema: see `Source`.
        name: what messages and the registry call it; by default one made from the query.
    """

    query: str
    timestamp: str
    created: str | None = None
    name: str = field(default="", kw_only=True)
    event_id: str | None = field(default=None, kw_only=True)
    deleted: str | None = field(default=None, kw_only=True)
    schema: Mapping[str, str] | None = field(default=None, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.query, str) or not self.query.strip():
            raise DefinitionError(f"DuckDBSource: query is {self.query!r}; expected a SELECT")
        if not self.name:
            made = f"query-{hashlib.sha256(self.query.encode()).hexdigest()[:12]}"
            object.__setattr__(self, "name", made)
        self._check()

    def describe(self) -> list[Any]:
        return ["DuckDBSource", self.query, self.timestamp, self.created, *self._versions()]


@dataclass(frozen=True, eq=False)
class TableSource(Source):
    """A table in memory. It must not be changed while a store uses it.

    Attributes:
        name: what messages and the registry call it.
        table: pandas, polars or Arrow table, or anything with `__arrow_c_stream__`.
        timestamp, created, event_id, deleted, schema: see `Source`.
    """

    name: str
    table: Any = field(repr=False)
    timestamp: str
    created: str | None = None
    event_id: str | None = field(default=None, kw_only=True)
    deleted: str | None = field(default=None, kw_only=True)
    schema: Mapping[str, str] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise DefinitionError(f"TableSource: name is {self.name!r}; expected a text")
        self._check()

    def describe(self) -> list[Any]:
        return ["TableSource", self.name, self.timestamp, self.created, *self._versions()]


@named_fields
class ParquetSource(FileSource):
    """Events in Parquet."""


@named_fields
class CSVSource(FileSource):
    """Events in CSV with a header."""


@named_fields
class ArrowSource(FileSource):
    """Events in an Arrow IPC file."""


@named_fields
class PushSource(Source):
    """Events that are pushed. Its history is the rows of `batch`, then the pushed ones in their order.

    Attributes:
        schema: dtype of each column of a push, time columns included.
        timestamp: column of the event's time; dtype timestamp.
        created: column of the time when the row became known, or None: a pushed row became known when it
            arrived.
        event_id: column (int64 or string) that tells the events of one key apart. Rows with equal ids are
            versions of one event, of which the newest counts. None: every row is an event of its own.
        deleted: bool column; a version that has it removes the event. A push may leave the column out.
        batch: files with the earlier rows, by the same column names, or None.
    """

    def __init__(
        self,
        name: str,
        schema: Mapping[str, str],
        timestamp: str,
        created: str | None = None,
        event_id: str | None = None,
        deleted: str | None = None,
        batch: FileSource | None = None,
    ) -> None:
        where = f"PushSource '{name}'"
        if not isinstance(name, str) or not _NAME.match(name) or name.startswith("__"):
            raise DefinitionError(
                f"PushSource: name is {name!r}; expected letters, digits and '_', not starting with '__'"
            )
        if not isinstance(schema, Mapping) or not schema:
            raise DefinitionError(f"{where}: schema is {schema!r}; expected a mapping of column to dtype")
        for column, dtype in schema.items():
            if not isinstance(column, str) or not column or column.startswith("__"):
                raise DefinitionError(
                    f"{where}: column name is {column!r}; expected a text not starting with '__'"
                )
            if dtype not in DTYPES:
                raise DefinitionError(
                    f"{where}: column '{column}' has dtype {dtype!r}; expected one of {', '.join(DTYPES)}"
                )
        roles = (
            ("timestamp", timestamp, ("timestamp",)),
            ("created", created, ("timestamp",)),
            ("event_id", event_id, ("int64", "string")),
            ("deleted", deleted, ("bool",)),
        )
        for role, given, dtypes in roles:
            if given is None and role in ("created", "event_id", "deleted"):
                continue
            if given is None or schema.get(given) not in dtypes:
                raise DefinitionError(
                    f"{where}: {role} is {given!r}; expected a column of dtype {' or '.join(dtypes)}"
                )
        columns = [given for _, given, _ in roles if given is not None]
        if len(set(columns)) < len(columns):
            raise DefinitionError(f"{where}: timestamp, created, event_id and deleted name a column twice")
        if deleted is not None and event_id is None:
            raise DefinitionError(f"{where}: deleted is {deleted!r} without event_id; expected both")
        if batch is not None and not isinstance(batch, FileSource):
            raise DefinitionError(f"{where}: batch is {batch!r}; expected a ParquetSource or None")
        if batch is not None and batch.timestamp != timestamp:
            raise DefinitionError(
                f"{where}: batch has the timestamp '{batch.timestamp}'; expected '{timestamp}'"
            )
        self.name = name
        self.schema: Mapping[str, str] = dict(schema)
        self.timestamp, self.created = timestamp, created
        self.event_id, self.deleted = event_id, deleted
        self.batch = batch

    def describe(self) -> list[Any]:
        columns = [list(pair) for pair in self.schema.items()]
        batch = None if self.batch is None else self.batch.describe()
        roles = [self.timestamp, self.created, self.event_id, self.deleted]
        return ["PushSource", self.name, columns, roles, batch]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PushSource) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(self.name)
