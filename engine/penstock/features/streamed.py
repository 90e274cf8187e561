"""A view whose source is too large to be held: its rows are computed part by part of the keys.

A pass over the source drops the rows of keys that nobody asks for. What is left is held, or, where it is too
much, kept in a file by the hash of its key and read back part by part, each part as an event table of its
own. A key's events are all in one part, in the order of the source, so its row has the bits that it would
have beside all other keys. Of one thread at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from penstock.errors import UnavailableError
from penstock.features.compute import ViewComputer, ViewRows
from penstock.features.definitions import FeatureView
from penstock.features.program import Distribution
from penstock.features.source_tables import concat_tables, take_rows
from penstock.features.sources import SourceTable
from penstock.features.spill import Spill
from penstock.features.store_settings import JoinSettings
from penstock.features.view_events import ViewEvents, keys_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_READ_TRIES = 5
_LEAST_PARTS, _USUAL_PARTS, _MOST_PARTS = 16, 256, 4096
_SHARE = 4  # parts of what is held at once
_ROWS = 65_536  # joined at once


class StreamedView:
    """What a historical join reads of a view, without its events. Attributes as of `ViewComputer`.

    `dictionaries` are whole once rows were read.
    """

    def __init__(
        self,
        view: FeatureView,
        opened: Callable[[], ViewEvents],
        stamp: Callable[[], str],
        record: Callable[[Mapping[str, list[str]]], bool],
        settings: JoinSettings,
        seed: bytes,
        distributions: Mapping[str, Distribution],
    ) -> None:
        """Compile the view over the types of its source.

        Args:
            view: the definition.
            opened: looks at the source as it is now.
            stamp: changes with the events.
            record: makes codes of texts durable; false where others were given meanwhile.
            settings: what may be held, and where the rest goes.
            seed: of the key hash.
            distributions: fitted, of each `percentile_rank`.

        Raises:
            InvalidArgumentError, DefinitionError, FailedPreconditionError: as a reading and a computer.
        """
        self.view = view
        self._opened, self._stamp, self._record = opened, stamp, record
        self._settings, self._seed = settings, seed
        made = ViewComputer(view, opened().no_events(), seed, distributions)
        self.schema, self.row_schema = made.schema, made.row_schema
        self.join_dtypes, self.distributions = made.join_dtypes, made.distributions
        self.dictionaries, self.coded, self._texts = made.dictionaries, made.coded, made.texts

    def texts(self, column: str) -> list[str]:
        """As `ViewComputer.texts`; whole once rows were read."""
        return self._texts(column)

    def rows_at(
        self,
        keys: NDArray[np.uint64],
        now_us: NDArray[np.int64],
        *,
        nulls: NDArray[np.bool_],
        known_by: NDArray[np.int64] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ViewRows:
        """The row of each key at each time. Arguments as of `ViewComputer.rows_at`.

        Args:
            progress: called with the rows joined and to join; with none joined as the source is read.

        Raises:
            InvalidArgumentError: a value of the source that a reading would refuse.
            UnavailableError: the source changes all the time, or what does not fit cannot be written.
        """
        n = len(keys)
        tell = progress or (lambda done, total: None)
        found: ViewRows | None = None
        done = 0
        asked: NDArray[np.uint64] = np.unique(keys[~nulls, 0])
        with contextlib.closing(self._parts(asked, lambda: tell(0, n))) as parts:
            for part in parts:
                at = part_of(keys, part.n_parts)
                rows = np.flatnonzero((at >= part.first) & (at < part.last))
                if not len(rows) and not (found is None and part.last == part.n_parts):
                    continue
                computer = self._computer(part)
                del part  # the next one is read with nothing held
                for start in range(0, max(len(rows), 1), _ROWS):
                    some = rows[start : start + _ROWS]
                    cut = None if known_by is None else known_by[some]
                    made = computer.rows_at(keys[some], now_us[some], nulls=nulls[some], known_by=cut)
                    found = found or _room(made, n)
                    _put(found, some, made)
                    done += len(some)
                    tell(done, n)
                del computer
        assert found is not None
        return found

    def computers(self) -> Iterator[ViewComputer]:
        """The events of all keys, part by part. Errors as of `rows_at`."""
        with contextlib.closing(self._parts(None, lambda: None)) as parts:
            for part in parts:
                computer = self._computer(part)
                del part
                yield computer
                del computer

    def _parts(
        self, asked: NDArray[np.uint64] | None, told: Callable[[], None]
    ) -> Generator[_Part, None, None]:
        """The events of the keys that are asked for, each part once.

        Args:
            asked: first words of keys, ascending; None: all keys.
            told: called for each batch.
        """
        most = self._settings.memory_bytes // _SHARE
        for _ in range(_READ_TRIES):
            stamp = self._stamp()
            events = self._opened()
            n_parts = _part_count(events.expected_bytes, most)
            with Spill(events.schema, n_parts, most, self._settings.spill_dir) as spill:
                for rows, keys, nulls in events.read():
                    kept = ~nulls if asked is None else ~nulls & _among(keys[:, 0], asked)
                    if kept.all():
                        spill.add(rows, part_of(keys, n_parts))
                    else:
                        spill.add(rows.filter(pa.array(kept)), part_of(keys[kept], n_parts))
                    told()
                texts, pushed = events.dictionaries, events.pushed
                if self._stamp() != stamp or not self._record(texts):
                    continue
                for first, last, rows in spill.groups():
                    part = _Part(first, last, n_parts, events.table(rows, texts))
                    del rows
                    if pushed is not None:
                        at = part_of(keys_of(pushed, self.view.join_keys, self._seed), n_parts)
                        later = take_rows(pushed, (at >= first) & (at < last))
                        part = replace(part, table=concat_tables(part.table, later))
                    yield part
                    del part
                return
        raise UnavailableError(f"source '{self.view.source.name}' changes while it is read")

    def _computer(self, part: _Part) -> ViewComputer:
        made = ViewComputer(self.view, part.table, self._seed, self.distributions)
        self.dictionaries, self._texts = made.dictionaries, made.texts
        return made


@dataclass(frozen=True)
class _Part:
    """The events of the keys in parts `first` to `last` - 1 of `n_parts`."""

    first: int
    last: int
    n_parts: int
    table: SourceTable


def part_of(keys: NDArray[np.uint64], n_parts: int) -> NDArray[np.uint16]:
    """The part of each key [n, 2], of a power of two of parts: the first bits of a hash of its first word."""
    words = keys[:, 0].copy()  # a lone integer key is no hash yet
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    bits = n_parts.bit_length() - 1
    return (words >> np.uint64(64 - bits)).astype(np.uint16) if bits else np.zeros(len(keys), np.uint16)


def _part_count(expected_bytes: int, most: int) -> int:
    """Parts of which each fits: four times as many as would do if keys had equal shares."""
    if not expected_bytes:
        return _USUAL_PARTS
    needed = max(_LEAST_PARTS, min(_MOST_PARTS, 4 * expected_bytes // max(most, 1)))
    return 1 << (needed - 1).bit_length()


def _among(words: NDArray[np.uint64], asked: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which words are in an ascending array. Keys that share a first word are all kept; no harm is done."""
    if not len(asked):
        return np.zeros(len(words), np.bool_)
    at = np.searchsorted(asked, words)
    at[at == len(asked)] = 0
    found: NDArray[np.bool_] = asked[at] == words
    return found


def _room(like: ViewRows, n: int) -> ViewRows:
    columns = [(np.zeros(n, values.dtype), np.zeros(n, np.bool_)) for values, _ in like.columns]
    return ViewRows(columns, np.zeros(n, np.uint8), np.zeros((n, 4), np.int64), like.row_schema)


def _put(found: ViewRows, rows: NDArray[np.int64], part: ViewRows) -> None:
    for (values, valid), (new_values, new_valid) in zip(found.columns, part.columns):
        values[rows], valid[rows] = new_values, new_valid
    found.status[rows], found.meta[rows] = part.status, part.meta
