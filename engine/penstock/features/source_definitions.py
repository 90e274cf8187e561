"""What a feature repository declares about where events come from. Nothing here reads data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.errors import DefinitionError


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
        field_mapping: name in the files -> name by which everything else, the time columns included, calls
            the column. It takes the place of a column that the files have under that name.
    """

    path: str
    timestamp: str
    created: str | None = None
    field_mapping: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for what, value in (("path", self.path), ("timestamp", self.timestamp)):
            if not isinstance(value, str) or not value:
                raise DefinitionError(f"{type(self).__name__}: {what} is {value!r}; expected a text")
        if self.created is not None and (not self.created or self.created == self.timestamp):
            raise DefinitionError(
                f"{type(self).__name__}: created is {self.created!r}; expected another column"
            )
        object.__setattr__(self, "field_mapping", _checked_mapping(type(self).__name__, self.field_mapping))

    @property
    def name(self) -> str:
        return str(self.path)

    def describe(self) -> list[Any]:
        renamed = [sorted(self.field_mapping.items())] if self.field_mapping else []
        return [type(self).__name__, str(self.path), self.timestamp, self.created, *renamed]

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


class ParquetSource(FileSource):
    """Events in Parquet."""


class CSVSource(FileSource):
    """Events in CSV with a header."""


class ArrowSource(FileSource):
    """Events in an Arrow IPC file."""
