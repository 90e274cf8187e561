"""The events of a view's source in batches, with all that a reading of the whole source would say of them.

A pass gives each row, grows the dictionaries in the order of the rows, and raises the errors of values, also
in rows that nobody asks for; the codes and the messages are those of `read_file_source` and
`read_push_source`. One pass at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.features.compute import columns_of_view, stored_texts
from penstock.features.definitions import FeatureView
from penstock.features.event_log import EventLog
from penstock.features.index import entity_keys
from penstock.features.push_table import (
    batch_events,
    checked_columns,
    erased_names,
    logged_table,
    without_erased,
)
from penstock.features.source_batches import SourceBatches
from penstock.features.source_definitions import PushSource
from penstock.features.source_reading import source_bytes, where_of
from penstock.features.source_schema import as_expected, feature_dtype, is_text
from penstock.features.source_tables import concat_tables
from penstock.features.sources import (
    SourceColumn,
    SourceTable,
    arrow_column,
    expected_types,
    null_times,
    source_table,
    time_column,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_ROWS, _LEAST_ROWS = 1 << 16, 1 << 8
_BATCHES = 16  # that the memory of a join has room for
_CAN_FAIL = ("int64", "timestamp", "duration")  # whose values may be out of range


class ViewEvents:
    """An opened source.

    Attributes:
        schema: of the tables that a pass gives: the columns that the view reads, without dictionaries.
        dictionaries: of stored texts, by source column: what was given, and what the last pass has met.
        pushed: the pushed events, which come after those of the files, after a pass over a push source.
        expected_bytes: about the memory that all rows would take; 0: unknown.
    """

    def __init__(
        self,
        view: FeatureView,
        base: Path,
        log: EventLog,
        seed: bytes,
        given: Mapping[str, list[str]],
        recorded: Mapping[str, str] | None,
        most_bytes: int,
    ) -> None:
        """Look at the source and the log.

        Args:
            view: the definition; its source has files, or is a query or a table.
            base: folder from which paths count.
            log: pushed events, and what was erased.
            seed: of the key hash.
            given: codes given earlier, by source column.
            recorded: the schema that `apply` recorded, if the source is held to it.
            most_bytes: memory of a join, by which batches are sized.

        Raises:
            InvalidArgumentError, FailedPreconditionError: the errors of a reading, as far as types tell.
        """
        source = view.source
        self._view, self._seed, self._recorded = view, seed, recorded
        self._push = source if isinstance(source, PushSource) else None
        files = source.batch if isinstance(source, PushSource) else source
        assert files is not None
        self._files = files
        columns = columns_of_view(view)
        if self._push is not None:
            self._logged, _ = log.read(source.name)
            self._wanted = checked_columns(self._push, columns)
        else:
            self._wanted = list(dict.fromkeys([*source.own_columns, *columns]))
        self._erased = log.erased(source.name)
        self._asked = [*self._wanted, *erased_names(self._erased, self._wanted)]
        self._names = list(dict.fromkeys([*files.own_columns, *self._asked]))
        self._given = dict(given)
        self.dictionaries: dict[str, list[str]] = dict(given)
        self._batches = SourceBatches(files, base, self._names)
        self.schema = self._batches.table_schema
        source_table(files, self.schema.empty_table(), self._batches.schema, self._names, given, recorded)
        self.schema = self._plain(self.schema.empty_table()).schema
        self.pushed: SourceTable | None = None
        self.expected_bytes = source_bytes(files, base, self._names, 0)
        width = sum(16 if is_text(kind) else 8 for kind in self.schema.types)
        self._rows = max(_LEAST_ROWS, min(_MOST_ROWS, most_bytes // (_BATCHES * width)))

    def table(self, rows: pa.Table, dictionaries: Mapping[str, list[str]]) -> SourceTable:
        """Rows of a pass as events, without erased ones."""
        table = source_table(
            self._files, rows, self._batches.schema, self._names, dictionaries, self._recorded
        )
        if self._push is not None:
            table = batch_events(self._push, table, self._asked)
        return without_erased(table, self._wanted, self._erased, self._seed)

    def no_events(self) -> SourceTable:
        """The table without rows, by the types of the source and with the dictionaries known by now."""
        table = self.table(self.schema.empty_table(), self.dictionaries)
        if self._push is not None:
            table = concat_tables(table, logged_table(self._push, [], self.dictionaries, self._wanted))
        return table

    def read(self) -> Iterator[tuple[pa.Table, NDArray[np.uint64], NDArray[np.bool_]]]:
        """A pass over the rows that have an event time, pushed events aside: rows, keys [n, 2], null keys.

        After the last one `dictionaries` are whole, and `pushed` is there.

        Raises:
            InvalidArgumentError: a value that a reading of the source would refuse.
        """
        files, where = self._files, where_of(self._files)
        times = [name for name in (files.timestamp, files.created) if name is not None]
        leads: dict[str, pa.ChunkedArray] = {}  # the first text of a time column
        texts = stored_texts(self._view)
        codes = {
            name: dict.fromkeys(self._given.get(name, ()))
            for name, kind in zip(self.schema.names, self.schema.types)
            if name in texts and is_text(kind)
        }
        n_rows = n_nulls = first_null = 0
        for raw in self._batches.read(self._rows):
            rows = self._plain(raw)
            made: dict[str, SourceColumn] = {}
            for name in self._names:
                column, what = rows[name], f"{where}: column '{name}'"
                if name in times and is_text(column.type):
                    lead = leads.get(name, column.slice(0, 0))
                    together = pa.chunked_array([*lead.chunks, *column.chunks], column.type)
                    found = time_column(together, what, one_kind=files.schema is not None)
                    made[name] = found.take(np.arange(len(lead), len(together)))
                    if not len(lead):
                        leads[name] = column.drop_null().slice(0, 1)
                elif name in times:
                    made[name] = time_column(column, what, one_kind=files.schema is not None)
                elif name in self._view.join_keys or feature_dtype(column.type) in _CAN_FAIL:
                    made[name] = arrow_column(column, what)
            for name, known in codes.items():
                known.update(dict.fromkeys(pc.unique(rows[name].drop_null()).to_pylist()))
            keys, nulls = entity_keys([made[k] for k in self._view.join_keys], rows.num_rows, self._seed)
            present = made[files.timestamp].valid
            if present is not None:
                absent = np.flatnonzero(~present)
                first_null = n_rows + int(absent[0]) if not n_nulls and len(absent) else first_null
                n_nulls += len(absent)
                rows, keys, nulls = rows.filter(pa.array(present)), keys[present], nulls[present]
            n_rows += len(raw)
            yield rows, keys, nulls
        if n_nulls and files.schema is not None:
            raise null_times(files, n_nulls, n_rows, first_null)
        found_texts = {**self._given, **{name: list(known) for name, known in codes.items()}}
        if self._push is not None:
            self.pushed = logged_table(self._push, self._logged, found_texts, self._wanted)
            later = self.pushed.dictionaries
            found_texts = {name: later.get(name, known) for name, known in found_texts.items()}
        self.dictionaries = found_texts

    def tables(self) -> Iterator[SourceTable]:
        """A pass as events, the pushed ones last, with codes that hold for one table alone."""
        for rows, _, _ in self.read():
            yield self.table(rows, {})
        if self.pushed is not None:
            yield self.pushed

    def _plain(self, raw: pa.Table) -> pa.Table:
        """The columns, typed by their use, in their order; texts without dictionaries, of any length."""
        table = as_expected(self._files, raw, expected_types(self._files, self._recorded), self._names)
        columns: dict[str, pa.ChunkedArray] = {}
        for name in self._names:
            column = table[name]
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if is_text(column.type):
                column = column.cast(pa.large_string())
            columns[name] = column
        return pa.table(columns)


def keys_of(table: SourceTable, join_keys: Sequence[str], seed: bytes) -> NDArray[np.uint64]:
    """The keys uint64[n, 2] of events; zero where null."""
    keys, _ = entity_keys([table.columns[name] for name in join_keys], table.n_rows, seed)
    return keys
