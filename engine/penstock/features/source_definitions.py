"""What a feature repository declares about where events come from. Nothing here reads data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.errors import DefinitionError
from penstock.features.expressions import DTYPES

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\Z")


class Source:
    """Where a view's events come from. Equal descriptions mean equal events.

    Attributes:
        timestamp: column of the event's time.
        created: column of the time when the row became known, or None.
    """

    timestamp: str
    created: str | None

    @property
    def name(self) -> str:
        """What messages and the registry call it."""
        raise NotImplementedError

    def describe(self) -> list[Any]:
        """All that decides its events, as JSON values."""
        raise NotImplementedError


@dataclass(frozen=True)
class FileSource(Source):
    """A table of events in files.

    Attributes:
        path: file, folder or glob, relative to the repository.
        timestamp: column of the event's time.
        created: column of the time when the row became known, or None.
    """

    path: str
    timestamp: str
    created: str | None = None

    def __post_init__(self) -> None:
        for what, value in (("path", self.path), ("timestamp", self.timestamp)):
            if not isinstance(value, str) or not value:
                raise DefinitionError(f"{type(self).__name__}: {what} is {value!r}; expected a text")
        if self.created is not None and (not self.created or self.created == self.timestamp):
            raise DefinitionError(
                f"{type(self).__name__}: created is {self.created!r}; expected another column"
            )

    @property
    def name(self) -> str:
        return str(self.path)

    def describe(self) -> list[Any]:
        return [type(self).__name__, str(self.path), self.timestamp, self.created]


class ParquetSource(FileSource):
    """Events in Parquet."""


class CSVSource(FileSource):
    """Events in CSV with a header."""


class ArrowSource(FileSource):
    """Events in an Arrow IPC file."""


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
        self._name = name
        self.schema: Mapping[str, str] = dict(schema)
        self.timestamp, self.created = timestamp, created
        self.event_id, self.deleted = event_id, deleted
        self.batch = batch

    @property
    def name(self) -> str:
        return self._name

    def describe(self) -> list[Any]:
        columns = [list(pair) for pair in self.schema.items()]
        batch = None if self.batch is None else self.batch.describe()
        roles = [self.timestamp, self.created, self.event_id, self.deleted]
        return ["PushSource", self.name, columns, roles, batch]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PushSource) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(self.name)
