"""The one function that computes stored features: `ViewComputer.rows_at`.

The historical join, materialisation and the cache loader all call it, so they cannot differ. Expressions are
evaluated once over the whole source; a row is then a gather plus its windows. A `ViewComputer` holds one
reading of its source, to which `append` adds what is pushed later. Any thread may use it; it reads no clock.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock import _core
from penstock.errors import DefinitionError, InvalidArgumentError
from penstock.features import windows
from penstock.features.aggregates import WindowAggregate
from penstock.features.definitions import FeatureView, StoredColumn
from penstock.features.expressions import Expr, columns_read, is_floating
from penstock.features.index import EventIndex, entity_keys
from penstock.features.program import Distribution, compile_program
from penstock.features.source_definitions import PushSource
from penstock.features.source_tables import concat_tables, take_rows
from penstock.features.sources import UNKNOWN_TIME, SourceTable
from penstock.features.windows import EXPIRED, FUTURE, NOT_FOUND, NULL, PRESENT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Column = tuple[NDArray[Any], NDArray[np.bool_]]

__all__ = ["EXPIRED", "FUTURE", "NOT_FOUND", "NULL", "PRESENT", "ViewComputer", "ViewRows"]

_SUM_DTYPES = {"float32": "float64", "float64": "float64", "int64": "int64", "bool": "int64",
               "duration": "duration"}  # fmt: skip
_MEAN_DTYPES = {"float32": "float64", "float64": "float64", "int64": "float64", "bool": "float64"}
_NONE = np.zeros(0, np.bool_)
_NO_CUT = np.zeros(0, np.int64)


def aggregate_dtype(kind: str, value: str | None) -> str | None:
    """The dtype of an aggregate over values of dtype `value`; None if it is not defined."""
    if kind == "count":
        return "int64"
    if kind in ("min", "max"):
        return None if value == "string" else value
    return (_SUM_DTYPES if kind == "sum" else _MEAN_DTYPES).get(value or "")


@dataclass
class ViewRows:
    """Rows of one view.

    Attributes:
        columns: (values float64 or int64 [n], 0 where null; valid bool [n]) in the order of the schema.
        status: uint8[n]; PRESENT, NOT_FOUND, EXPIRED or FUTURE. All but PRESENT rows are all null.
        meta: int64[n, 4]; valid_from, valid_until, event_time and known_at of the newest event, or INT64_MIN.
    """

    columns: list[Column]
    status: NDArray[np.uint8]
    meta: NDArray[np.int64]
    row_schema: _core.RowSchema = field(repr=False)

    def words(self) -> NDArray[np.uint64]:
        """Stored form, uint64[n, row_words]. A row whose events are all later is NOT_FOUND there."""
        status = np.where(self.status == FUTURE, np.uint8(NOT_FOUND), self.status)
        return self.row_schema.encode(self.columns, status)


@dataclass(frozen=True)
class _Values:
    """A column over all events, in index order. `prefix` is set where differences of it are exact."""

    values: NDArray[Any]
    valid: NDArray[np.bool_]  # of length 0: nothing is null
    prefix: NDArray[np.int64] | None = None


class ViewComputer:
    """Stored rows of one view at any time.

    Attributes:
        view: the definition.
        schema: (name, dtype) of each stored column, hidden ones last: the fields of the row.
        row_schema: the layout of `schema`.
        keys: uint64[m, 2]; the distinct keys of the source.
        join_dtypes: "int64" or "string" for each join key.
        dictionaries: texts by code, for each stored string column.
        distributions: fitted distribution of each `percentile_rank`, by the fingerprint of its argument.
    """

    def __init__(
        self,
        view: FeatureView,
        table: SourceTable,
        key_seed: bytes,
        distributions: Mapping[str, Distribution] | None = None,
    ) -> None:
        """Index the source and evaluate the view's expressions over it.

        Raises:
            InvalidArgumentError: a join key is missing or neither int64 nor string, or a column no feature.
            DefinitionError: a stored expression does not fit the source, or has no distribution.
        """
        self.view = view
        self.distributions: dict[str, Distribution] = dict(distributions or {})
        where = f"view '{view.name}'"
        self._check_columns(table, where)
        joins = [table.columns[name] for name in view.join_keys]
        self.join_dtypes: tuple[str, ...] = tuple(column.dtype for column in joins)
        keys, nulls = entity_keys(joins, table.n_rows, key_seed)
        self._key_seed = key_seed
        self._appended = threading.Lock()
        self._table = table if isinstance(view.source, PushSource) else None  # what `append` adds to
        if table.event_id is not None:
            newest = _newest_versions(keys, table)
            table, keys, nulls = take_rows(table, newest), keys[newest], nulls[newest]
        self._index = EventIndex(keys, nulls, table.event_time, table.known_at)
        self.keys = self._index.keys
        values = [(c.name, _value_of(c)) for c in view.stored]
        outputs = [(name, value) for name, value in values if value is not None]
        dtypes: dict[str, str] = {}
        found: dict[str, Column] = {}
        if outputs:
            try:
                program = _core.FeatureProgram(compile_program(outputs, table.schema, distributions))
            except DefinitionError as error:
                raise DefinitionError(f"{where}: {error}") from error
            inputs = [(table.columns[n].values, table.columns[n].valid) for n, _ in program.inputs]
            dtypes = dict(program.outputs)
            found = dict(zip(dtypes, program.run(inputs, rows=table.n_rows)))
        self.schema: list[tuple[str, str]] = []
        self._stored: dict[str, _Values] = {}
        for column in view.stored:
            dtype = dtypes.get(column.name)
            kind = column.value.kind if isinstance(column.value, WindowAggregate) else None
            result = dtype if kind is None else aggregate_dtype(kind, dtype)
            if result is None:
                raise DefinitionError(f"{where}: feature '{column.name}': {kind} is not defined on {dtype}")
            self.schema.append((column.name, result))
            self._stored[column.name] = self._ordered(found.get(column.name), kind, result)
        self.row_schema = _core.RowSchema(self.schema)
        self.dictionaries: dict[str, list[str]] = {}
        for column in view.stored:
            if isinstance(column.value, Expr) and dtypes[column.name] == "string":
                # No operation makes strings, so this is a column as it is.
                self.dictionaries[column.name] = table.columns[column.value.param].dictionary or []
        # Aggregates over the same window share its bounds.
        self._windows: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for column in view.stored:
            if isinstance(column.value, WindowAggregate):
                window = (column.value.window_us, column.value.every_us or 0)
                self._windows.setdefault(window, []).append((column.name, windows.KINDS[column.value.kind]))

        # A row of windows that all move at ticks holds from tick to tick.
        ticks = [every for _, every in self._windows]
        whole = all(isinstance(column.value, WindowAggregate) for column in view.stored)
        self._tick = min(ticks) if whole and min(ticks) > 0 and view.ttl_us is None else 0

    def _check_columns(self, table: SourceTable, where: str) -> None:
        read = columns_read(*(v for v in map(_value_of, self.view.stored) if v is not None))
        for name in [*self.view.join_keys, *read]:
            if name in table.unsupported:
                raise InvalidArgumentError(
                    f"{where}: column '{name}' has type {table.unsupported[name]}, which no feature can have"
                )
        for name in self.view.join_keys:
            dtype = table.schema.get(name)
            if dtype is None:
                known = ", ".join(table.columns)
                raise InvalidArgumentError(f"{where}: join key '{name}' is not in the source ({known})")
            if dtype not in ("int64", "string"):
                raise InvalidArgumentError(
                    f"{where}: join key '{name}' has dtype {dtype}; expected int64 or string"
                )

    def _ordered(self, column: Column | None, kind: str | None, result: str) -> _Values:
        """Bring a column into index order. A prefix replaces the values where they are not needed again."""
        order = self._index.order
        if column is None:  # count of rows
            return _Values(np.zeros(0, np.int64), _NONE, np.arange(len(order) + 1))
        values, valid = column[0][order], column[1][order]
        prefix = None
        if kind == "count" or (kind == "sum" and not is_floating(result)):
            counted = valid.astype(np.int64) if kind == "count" else np.where(valid, values, 0)
            prefix = np.zeros(len(order) + 1, np.int64)
            np.cumsum(counted, out=prefix[1:])
        if kind in ("sum", "mean") and is_floating(result):
            values = values.astype(np.float64)
        return _Values(values, _NONE if valid.all() else valid, prefix)

    def append(self, table: SourceTable) -> NDArray[np.uint64]:
        """Add later arrivals to the history. Readers see all of them or none.

        Args:
            table: the events, with the columns that the view reads.

        Returns:
            The keys that they touch, uint64[k, 2], distinct.

        Raises:
            InvalidArgumentError: a column is missing or has another dtype. Nothing is added then.
        """
        with self._appended:
            if self._table is None:
                raise InvalidArgumentError(f"view '{self.view.name}': its source takes no pushed events")
            joins = [table.columns[name] for name in self.view.join_keys]
            keys, nulls = entity_keys(joins, table.n_rows, self._key_seed)
            whole = concat_tables(self._table, table)
            fresh = ViewComputer(self.view, whole, self._key_seed, self.distributions)
            fresh._appended = self._appended
            self.__dict__ = fresh.__dict__  # one step: a reader has taken the one before (`_frozen`)
            return np.unique(keys[~nulls], axis=0)

    def _frozen(self) -> ViewComputer:
        """This computer as it is now, whatever is appended later."""
        frozen = object.__new__(ViewComputer)
        frozen.__dict__ = self.__dict__
        return frozen

    def rows_at(
        self,
        keys: NDArray[np.uint64],
        now_us: NDArray[np.int64],
        *,
        nulls: NDArray[np.bool_] | None = None,
        known_by: NDArray[np.int64] | None = None,
    ) -> ViewRows:
        """The row of each key at each time.

        Args:
            keys: uint64[n, 2], in any order, repeated or not.
            now_us: int64[n]; request time of each row.
            nulls: bool[n]; rows without a key, which are NOT_FOUND.
            known_by: int64[n]; only events known by then count. The interval then holds for that cut-off.

        Raises:
            InvalidArgumentError: an argument of another shape.
        """
        n = len(keys)
        keys = np.ascontiguousarray(keys, np.uint64)
        now = np.ascontiguousarray(now_us, np.int64)
        cut = _NO_CUT if known_by is None else np.ascontiguousarray(known_by, np.int64)
        missing = np.zeros(n, np.bool_) if nulls is None else np.ascontiguousarray(nulls, np.bool_)
        if keys.shape != (n, 2) or now.shape != (n,) or missing.shape != (n,) or len(cut) not in (0, n):
            raise InvalidArgumentError(
                f"rows_at: keys {keys.shape}, now_us {now.shape}, nulls {missing.shape}, "
                f"known_by {cut.shape}; expected (n, 2), (n), (n), (n)"
            )
        return self._frozen()._rows_at(keys, now, missing, cut)

    def _rows_at(
        self, keys: NDArray[np.uint64], now: NDArray[np.int64], missing: NDArray[np.bool_],
        cut: NDArray[np.int64],
    ) -> ViewRows:  # fmt: skip
        if len(cut) and self._table is not None and self._table.event_id is not None:
            return self._rows_known_by(keys, now, missing, cut)
        n = len(keys)
        index = self._index
        slot = index.find(keys, missing)
        latest = np.empty(n, np.int64)
        status = np.empty(n, np.uint8)
        meta = np.empty((n, 4), np.int64)
        windows.locate(
            slot, index.starts, index.event_time, index.known_at, now, cut, self.view.ttl_us or 0,
            0 if len(cut) else self._tick, latest, status, meta,
        )  # fmt: skip
        found: dict[str, Column] = {}
        present = latest >= 0
        low, high = np.empty(n, np.int64), np.empty(n, np.int64)
        for (window, every), aggregates in self._windows.items():
            windows.bounds(slot, latest, index.starts, index.event_time, now, window, every, low, high, meta)
            for name, kind in aggregates:
                found[name] = self._aggregate(name, kind, cut, low, high, present)
        for name, dtype in self.schema:
            if name not in found:
                found[name] = _gather(self._stored[name], dtype, latest, present)
        return ViewRows([found[name] for name, _ in self.schema], status, meta, self.row_schema)

    def _rows_known_by(
        self, keys: NDArray[np.uint64], now: NDArray[np.int64], missing: NDArray[np.bool_],
        cut: NDArray[np.int64],
    ) -> ViewRows:  # fmt: skip
        """Versions of events count only while they are the newest known: a computer for each cut-off."""
        assert self._table is not None
        known_at = self._table.known_at
        parts: list[tuple[NDArray[np.int64], ViewRows]] = []
        for moment in np.unique(cut):
            mine = np.flatnonzero(cut == moment)
            known = take_rows(self._table, (known_at <= moment) & (known_at != UNKNOWN_TIME))
            computer = ViewComputer(self.view, known, self._key_seed, self.distributions)
            rows = computer._rows_at(keys[mine], now[mine], missing[mine], _NO_CUT)
            later = self._index.find(keys[mine], missing[mine]) >= 0
            rows.status[(rows.status == NOT_FOUND) & later] = FUTURE
            parts.append((mine, rows))
        order = np.argsort(np.concatenate([mine for mine, _ in parts]))
        columns = [
            (
                np.concatenate([rows.columns[i][0] for _, rows in parts])[order],
                np.concatenate([rows.columns[i][1] for _, rows in parts])[order],
            )
            for i in range(len(self.schema))
        ]
        status = np.concatenate([rows.status for _, rows in parts])[order]
        meta = np.concatenate([rows.meta for _, rows in parts])[order]
        return ViewRows(columns, status, meta, self.row_schema)

    def _aggregate(
        self, name: str, kind: int, cut: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64],
        present: NDArray[np.bool_],
    ) -> Column:  # fmt: skip
        stored = self._stored[name]
        n = len(low)
        if stored.prefix is not None and not len(cut):
            out = np.empty(n, np.int64)
            windows.difference(stored.prefix, low, high, out)
            return out, present.copy()
        valid = np.empty(n, np.bool_)
        if stored.values.dtype == np.float64 and kind != windows.COUNT:
            result: NDArray[Any] = np.empty(n, np.float64)
            run = windows.aggregate_real
        else:
            result = np.empty(n, np.int64)
            run = windows.aggregate_int
        values = stored.values if kind != windows.COUNT else _NO_CUT
        run(kind, values, stored.valid, self._index.known_at, cut, low, high, result, valid)
        return result, valid & present

    def changed_keys(self, start_us: int, end_us: int) -> NDArray[np.uint64]:
        """Keys uint64[k, 2], ascending, whose row may differ between the two times; all that do are there.

        A row differs when an event came in (start, end], entered or left a window, or its ttl passed.
        """
        if end_us < start_us:
            raise InvalidArgumentError(f"changed_keys: end {end_us} is before start {start_us}")
        times, starts = self._index.event_time, self._index.starts
        touched = _between(times, start_us, end_us)
        for window, every in self._windows:
            since, until = (t // every * every if every else t for t in (start_us, end_us))
            touched |= _between(times, since - window, until - window) | _between(times, since, until)
        if self.view.ttl_us is not None and len(times):
            newest = np.empty(len(times), np.bool_)  # no younger event of the key by the moment of expiry
            newest[:-1] = times[1:] - times[:-1] > self.view.ttl_us
            newest[starts[1:] - 1] = True
            touched |= newest & _between(
                times, start_us - self.view.ttl_us - 1, end_us - self.view.ttl_us - 1
            )
        counts = np.zeros(len(times) + 1, np.int64)
        np.cumsum(touched, out=counts[1:])
        return self.keys[counts[starts[1:]] > counts[starts[:-1]]]


def _newest_versions(keys: NDArray[np.uint64], table: SourceTable) -> NDArray[np.int64]:
    """Rows that are the newest version of an event, in their order, without those that delete it."""
    assert table.event_id is not None
    event_id = table.event_id
    valid = np.ones(table.n_rows, np.bool_) if event_id.valid is None else event_id.valid
    order = np.lexsort((table.known_at, event_id.values, ~valid, keys[:, 0], keys[:, 1]))
    last = np.ones(len(order), np.bool_)
    this, after = order[:-1], order[1:]
    same = (keys[this] == keys[after]).all(axis=1) & (event_id.values[this] == event_id.values[after])
    last[:-1] = ~(same & valid[this] & valid[after])
    newest = np.sort(order[last])
    return newest if table.deleted is None else newest[~table.deleted[newest]]


def _value_of(column: StoredColumn) -> Expr | None:
    return column.value.value if isinstance(column.value, WindowAggregate) else column.value


def _between(times: NDArray[np.int64], after: int, until: int) -> NDArray[np.bool_]:
    """Which times are in (after, until]; the bounds may lie outside int64."""
    low, high = (min(max(t, -(2**63)), 2**63 - 1) for t in (after, until))
    return (times > low) & (times <= high)


def _gather(stored: _Values, dtype: str, latest: NDArray[np.int64], present: NDArray[np.bool_]) -> Column:
    if not len(stored.values):
        return np.zeros(len(latest), np.float64 if is_floating(dtype) else np.int64), np.zeros(
            len(latest), np.bool_
        )
    values = stored.values[latest]  # -1 where absent: any event, cleared below
    valid = present.copy() if not len(stored.valid) else present & stored.valid[latest]
    values[~valid] = 0
    return values, valid
