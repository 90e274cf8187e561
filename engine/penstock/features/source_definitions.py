"""What a feature repository declares about where events come from. Nothing here reads data."""

from __future__ import annotations

from dataclasses import dataclass
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
