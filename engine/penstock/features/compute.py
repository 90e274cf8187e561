"""The one function that computes stored features: `ViewComputer.rows_at`.

The historical join, materialisation and the cache loader all call it, so they cannot differ. The native
`EventTable` holds the events: a plain feature is its expression on the newest event of a key, an aggregate is
folded over the events of a window. `append` adds later arrivals. Any thread may use a computer; it reads no
clock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from penstock import _core
from penstock.errors import DefinitionError, InvalidArgumentError
from penstock.features.aggregates import KINDS, WindowAggregate, tile_us
from penstock.features.backends import numpy_backend
from penstock.features.backends.stored import is_opaque
from penstock.features.definitions import FeatureView, StoredColumn
from penstock.features.expressions import Expr, columns_read, is_floating, walk
from penstock.features.index import entity_keys
from penstock.features.program import Distribution, compile_program
from penstock.features.sources import SourceColumn, SourceTable
from penstock.features.text_inputs import function_of, input_column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Column = tuple[NDArray[Any], NDArray[np.bool_]]

PRESENT, NULL, NOT_FOUND, EXPIRED, FUTURE = range(5)
_THREADS = min(2, os.cpu_count() or 1)  # that share a build or a read of many rows
_SAME_VALUE = ("first", "last", "top_k")  # aggregates whose result is one of the values

__all__ = ["EXPIRED", "FUTURE", "NOT_FOUND", "NULL", "PRESENT", "StoredView", "ViewComputer", "ViewRows"]


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

    @classmethod
    def concatenate(cls, parts: Sequence[ViewRows]) -> ViewRows:
        """The rows of all parts, at least one, in order."""
        columns = [
            (np.concatenate([values for values, _ in column]), np.concatenate([valid for _, valid in column]))
            for column in zip(*(part.columns for part in parts))
        ]
        status = np.concatenate([part.status for part in parts])
        return cls(columns, status, np.concatenate([part.meta for part in parts]), parts[0].row_schema)

    def words(self) -> NDArray[np.uint64]:
        """Stored form, uint64[n, row_words]. A row whose events are all later is NOT_FOUND there."""
        status = np.where(self.status == FUTURE, np.uint8(NOT_FOUND), self.status)
        return self.row_schema.encode(self.columns, status)


class StoredView(Protocol):
    """What compiled plans and joins know of a view, whether its events are held or not."""

    @property
    def view(self) -> FeatureView: ...
    @property
    def schema(self) -> list[tuple[str, str]]: ...
    @property
    def join_dtypes(self) -> tuple[str, ...]: ...
    @property
    def dictionaries(self) -> dict[str, list[str]]: ...
    @property
    def distributions(self) -> dict[str, Distribution]: ...
    @property
    def coded(self) -> Mapping[str, tuple[str, ...]]: ...
    def texts(self, column: str) -> list[str]: ...


class ViewComputer:
    """Stored rows of one view at any time.

    Attributes:
        view: the definition.
        schema: (name, dtype) of each stored column, hidden ones last: the fields of the row.
        row_schema: the layout of `schema`.
        join_dtypes: "int64" or "string" for each join key.
        dictionaries: texts by code, for each stored string column. `append` may replace one by a longer one.
        coded: the source columns whose dictionary codes decide a stored column, where there are any.
        distributions: fitted distribution of each `percentile_rank`, by the fingerprint of its argument.
    """

    def __init__(
        self,
        view: FeatureView,
        table: SourceTable,
        key_seed: bytes,
        distributions: Mapping[str, Distribution] | None = None,
        *,
        store_tiles: bool = True,
    ) -> None:
        """Index the source and evaluate the aggregated expressions over it.

        Args:
            view: the definition.
            table: events; the arrays are referred to, so they must not be changed.
            key_seed: 16 bytes, for entity keys that are no lone integer.
            distributions: as the attribute.
            store_tiles: keep partial results of long windows. It changes speed and memory, and no bit.

        Raises:
            InvalidArgumentError: a join key is missing or neither int64 nor string, or a column no feature.
            DefinitionError: a stored expression does not fit the source, or has no distribution.
        """
        self.view = view
        self.distributions: dict[str, Distribution] = dict(distributions or {})
        self._key_seed = key_seed
        self._appending = threading.Lock()
        self._where = f"view '{view.name}'"
        self._check_columns(table)
        self.join_dtypes: tuple[str, ...] = tuple(table.columns[name].dtype for name in view.join_keys)
        self._versioned = table.event_id is not None or table.deleted is not None
        aggregated: dict[str, Expr] = {}  # distinct aggregated expressions, by fingerprint
        for column in view.stored:
            if isinstance(column.value, WindowAggregate) and column.value.value is not None:
                aggregated.setdefault(column.value.value.fingerprint(), column.value.value)
        plain = [(c.name, c.value) for c in view.stored if isinstance(c.value, Expr)]
        values = [(f"value{i}", value) for i, value in enumerate(aggregated.values())]
        self._opaque: dict[str, numpy_backend.NumpyProgram] = {}  # raw columns that a udf makes
        plain_code, plain_inputs, plain_dtypes = self._compile(plain, table)
        value_code, value_inputs, value_dtypes = self._compile(values, table)
        # Join keys of the rows that brought new keys: of the source, then of appends.
        self._joins = [[table.columns[name] for name in view.join_keys]]
        # What the programs read of a row: source columns, answers about texts, and what a udf makes.
        self._raw = plain_inputs | value_inputs
        self._read = {name: table.schema[name] for name in self._columns_read() if name in table.schema}
        raw_at = {name: i for i, name in enumerate(self._raw)}
        value_at = {fingerprint: i for i, fingerprint in enumerate(aggregated)}
        self._texts = {name: table.columns[name].dictionary or [] for name, dtype in self._raw.items()
                       if dtype == "string"}  # fmt: skip
        # No operation makes strings, so a value that is one is a column as it is.
        self._value_texts = [
            value.param if dtype == "string" else None
            for value, dtype in zip(aggregated.values(), value_dtypes)
        ]
        windows: dict[tuple[int, int, int, int, int, bool], int] = {}
        aggregates: list[tuple[int, int, int, int]] = []
        features: list[tuple[bool, int, bool]] = []
        self.schema: list[tuple[str, str]] = []
        self._coded: dict[str, str] = {}  # source column of each stored string column
        self.coded: dict[str, tuple[str, ...]] = {}
        dtypes = dict(zip((name for name, _ in plain), plain_dtypes))
        for column in view.stored:
            value = column.value
            if isinstance(value, Expr):
                dtype = dtypes[column.name]
                features.append((False, list(dtypes).index(column.name), is_floating(dtype)))
                if dtype == "string":
                    self._coded[column.name] = value.param
            else:
                of = -1 if value.value is None else value_at[value.value.fingerprint()]
                found = None if of < 0 else value_dtypes[of]
                result = value.dtype(found)
                if result is None:
                    raise DefinitionError(
                        f"{self._where}: feature '{column.name}': {value.kind} is not defined on {found}"
                    )
                dtype = result
                key = (value.enters_us, value.leaves_us, value.every_us or 0, value.lag_us,
                       tile_us(value.window_us), value.as_known or view.as_known)  # fmt: skip
                window = windows.setdefault(key, len(windows))
                features.append((True, len(aggregates), is_floating(dtype)))
                aggregates.append((KINDS[value.kind], of, window, value.param))
                if dtype == "string" and value.value is not None:
                    self._coded[column.name] = value.value.param
            declared = view.schema.get(column.name, dtype)
            if dtype != declared:
                raise DefinitionError(
                    f"{self._where}: feature '{column.name}' is {dtype}; its schema expects {declared}"
                )
            self.schema.append((column.name, dtype))
            codes = {self._coded[column.name]} if column.name in self._coded else set()
            codes |= _read_as_codes(_value_of(column))
            if codes:
                self.coded[column.name] = tuple(sorted(codes))
        self.row_schema = _core.RowSchema(self.schema)
        self.dictionaries: dict[str, list[str]] = {
            name: list(self._texts[source]) for name, source in self._coded.items()
        }
        opaque = {n for p in self._opaque.values() for n, dtype in p.inputs if dtype == "string"}
        self._opaque_texts = {name: list(table.columns[name].dictionary or []) for name in opaque}
        self._events = _core.EventTable(
            plain=plain_code,
            plain_inputs=[raw_at[name] for name in plain_inputs],
            values=value_code,
            value_inputs=[raw_at[name] for name in value_inputs],
            windows=list(windows),
            aggregates=aggregates,
            features=features,
            ttl=view.ttl_us or 0,
            tick=self._tick(list(windows), len(plain)),
            as_known=view.as_known,
            tiles=store_tiles,
            events=self._arrays(table),
            raw=self._raw_columns(table),
            texts=[None if name is None else self._texts[name] for name in self._value_texts],
            threads=_THREADS,
        )

    def _tick(self, windows: Sequence[tuple[int, int, int, int, int, bool]], plain: int) -> int:
        """Where the row is of windows that all move at ticks, it holds from tick to tick: their least."""
        moved = [every for enters, _, every, lag, _, known in windows if not (enters or lag or known)]
        if plain or self.view.ttl_us is not None or self.view.as_known or len(moved) < len(windows):
            return 0
        return min(moved, default=0)

    def _compile(
        self, outputs: list[tuple[str, Expr]], table: SourceTable
    ) -> tuple[bytes | None, dict[str, str], list[str]]:
        """A native program, the dtype of each column that it reads, and the dtypes of its outputs."""
        if not outputs:
            return None, {}, []
        schema = dict(table.schema)
        native = []
        try:
            for name, value in outputs:
                if is_opaque(value):
                    made = f"{value.fingerprint()}\0udf"
                    program = numpy_backend.compile([(made, value)], table.schema, self.distributions)
                    self._opaque[made], schema[made] = program, program.outputs[0][1]
                    value = Expr("col", made)
                native.append((name, value))
            code = compile_program(native, schema, self.distributions)
        except DefinitionError as error:
            raise DefinitionError(f"{self._where}: {error}") from error
        found = _core.FeatureProgram(code)
        return code, dict(found.inputs), [dtype for _, dtype in found.outputs]

    def _columns_read(self) -> set[str]:
        """The source columns that the programs read, in one way or another."""
        found = set()
        raw = [name for name in self._raw if name not in self._opaque]
        for name in [*raw, *(name for p in self._opaque.values() for name, _ in p.inputs)]:
            function = function_of(name)
            found.add(name if function is None else function.column)
        return found

    def _raw_columns(self, table: SourceTable) -> list[tuple[NDArray[Any], NDArray[np.bool_] | None]]:
        """The programs' input columns of a table, in order."""
        columns: list[tuple[NDArray[Any], NDArray[np.bool_] | None]] = []
        for name in self._raw:
            if name in self._opaque:
                program = self._opaque[name]
                inputs = [input_column(n, table.columns) for n, _ in program.inputs]
                columns.append(program.run(inputs, rows=table.n_rows)[0])
            else:
                values, valid = input_column(name, table.columns)
                columns.append((values, valid))
        return columns

    def _check_columns(self, table: SourceTable) -> None:
        read = columns_read(*(v for v in map(_value_of, self.view.stored) if v is not None))
        for name in [*self.view.join_keys, *read]:
            if name in table.unsupported:
                raise InvalidArgumentError(
                    f"{self._where}: column '{name}' has type {table.unsupported[name]}, "
                    "which no feature can have"
                )
        for name in self.view.join_keys:
            dtype = table.schema.get(name)
            if dtype is None:
                known = ", ".join(table.columns)
                raise InvalidArgumentError(f"{self._where}: join key '{name}' is not in the source ({known})")
            if dtype not in ("int64", "string"):
                raise InvalidArgumentError(
                    f"{self._where}: join key '{name}' has dtype {dtype}; expected int64 or string"
                )

    def _arrays(self, table: SourceTable) -> dict[str, Any]:
        """The arrays of a table's events, as `_core.EventTable` takes them."""
        joins = [table.columns[name] for name in self.view.join_keys]
        arrays: dict[str, Any] = {"event_time": np.ascontiguousarray(table.event_time)}
        if len(joins) == 1 and joins[0].dictionary is None:
            arrays["keys"] = joins[0].values
            arrays["null_keys"] = None if joins[0].valid is None else ~joins[0].valid
        else:
            arrays["keys"], arrays["null_keys"] = entity_keys(joins, table.n_rows, self._key_seed)
        if table.known_at is not table.event_time:
            arrays["known_at"] = np.ascontiguousarray(table.known_at)
        if table.event_id is not None:
            if table.event_id.dtype not in ("int64", "string"):
                raise InvalidArgumentError(
                    f"{self._where}: event_id has dtype {table.event_id.dtype}; expected int64 or string"
                )
            arrays["event_ids"], arrays["null_ids"] = entity_keys(
                [table.event_id], table.n_rows, self._key_seed
            )
        if table.deleted is not None:
            arrays["deleted"] = table.deleted
        return arrays

    @property
    def events(self) -> _core.EventTable:
        """The native table, for those who compute rows without Python."""
        return self._events

    @property
    def keys(self) -> NDArray[np.uint64]:
        """The distinct keys uint64[m, 2], ascending."""
        return self._events.keys()

    @property
    def n_events(self) -> int:
        """Events held, with the versions that a newer one has replaced."""
        return self._events.n_events

    def append(self, table: SourceTable) -> NDArray[np.uint64]:
        """Add events that have come later to the history. Readers see all of an append or nothing, per row.

        Args:
            table: the events, with the columns that the view reads.

        Returns:
            The distinct keys uint64[k, 2] that they touch.

        Raises:
            InvalidArgumentError: a column is missing or has another dtype. Nothing is added then.
        """
        for name, dtype in [*zip(self.view.join_keys, self.join_dtypes), *self._read.items()]:
            found = table.schema.get(name)
            if found != dtype:
                raise InvalidArgumentError(
                    f"{self._where}: appended column '{name}' is {found or 'missing'}; expected {dtype}"
                )
        if (table.event_id is not None or table.deleted is not None) and not self._versioned:
            raise InvalidArgumentError(
                f"{self._where}: appended rows have event ids; the view's source names none"
            )
        with self._appending:
            grown: dict[str, list[str]] = {}
            raw = []
            for name, (values, valid) in zip(self._raw, self._raw_columns(table)):
                if name in self._texts:
                    values, grown[name] = _recode(table.columns[name], self._texts[name])
                raw.append((np.ascontiguousarray(values), valid))
            texts = {name: [*self._texts[name], *new] if new else self._texts[name]
                     for name, new in grown.items()}  # fmt: skip
            for name, shorter in self._opaque_texts.items():
                longer = table.columns[name].dictionary or []
                if len(longer) > len(shorter):
                    self._opaque_texts[name] = list(longer)
            # A reader must know the text of each code that it meets.
            before = self.dictionaries, self._texts
            self.dictionaries = {name: texts[source] for name, source in self._coded.items()}
            self._texts = texts
            try:
                new_texts = [None if name is None else grown[name] for name in self._value_texts]
                known = self._events.n_keys
                touched = self._events.append(self._arrays(table), raw, new_texts)
                if self._events.n_keys > known:
                    self._joins.append([table.columns[name] for name in self.view.join_keys])
                return touched
            except Exception:
                self.dictionaries, self._texts = before
                raise

    def raw_columns(self) -> list[str] | None:
        """The columns that the native table takes of an event, in order; None: not all are the source's."""
        if self._opaque or any(function_of(name) is not None for name in self._raw):
            return None
        return list(self._raw)

    @property
    def n_values(self) -> int:
        """Distinct aggregated expressions."""
        return len(self._value_texts)

    def texts(self, column: str) -> list[str]:
        """The texts by code of a source column in `coded`; a list that is never changed."""
        found = self._texts.get(column)
        return self._opaque_texts[column] if found is None else found

    def append_coded(self, append: Callable[[], bool], column: Callable[[str], SourceColumn]) -> None:
        """Add events whose texts are all known.

        Args:
            append: adds them to `events`, and says whether there are new keys.
            column: a join key of them.
        """
        with self._appending:
            if append():
                self._joins.append([column(name) for name in self.view.join_keys])

    def entities(self) -> tuple[NDArray[np.uint64], list[SourceColumn]]:
        """The distinct keys uint64[m, 2] that have events, and the m values of each join key."""
        if not self.join_dtypes:  # the one key that a view without entities has
            return entity_keys([], min(1, self._events.n_events), self._key_seed)[0], []
        rows = self._events.source_rows()
        parts = [[column.take(rows) for column in self._joins[0]]]
        for joins in self._joins[1:]:
            valid = np.logical_and.reduce([np.ones(len(joins[0].values), np.bool_),
                                           *(c.valid for c in joins if c.valid is not None)])  # fmt: skip
            parts.append([column.take(valid) for column in joins])
        columns = [_joined([part[i] for part in parts]) for i in range(len(self.join_dtypes))]
        keys, _ = entity_keys(columns, len(columns[0].values), self._key_seed)
        if len(parts) > 1:
            _, first = np.unique(keys, axis=0, return_index=True)
            keys, columns = keys[first], [column.take(first) for column in columns]
        return keys, columns

    def newest_events(self, keys: NDArray[np.uint64], now_us: int) -> NDArray[np.int64]:
        """Time int64[k] of the newest event of each key by `now_us`; INT64_MIN where there is none."""
        return self._events.newest_events(np.ascontiguousarray(keys, np.uint64), now_us)

    def erase(self, keys: NDArray[np.uint64]) -> int:
        """Forget all events of the keys uint64[k, 2]. Returns how many of them were known."""
        return sum(self._events.erase(lo, hi) for lo, hi in keys.tolist())

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
        cut = None if known_by is None else np.ascontiguousarray(known_by, np.int64)
        missing = None if nulls is None else np.ascontiguousarray(nulls, np.bool_)
        if (
            keys.shape != (n, 2)
            or now.shape != (n,)
            or (missing is not None and missing.shape != (n,))
            or (cut is not None and cut.shape != (n,))
        ):
            shapes = [None if a is None else a.shape for a in (keys, now, missing, cut)]
            raise InvalidArgumentError(
                f"rows_at: keys {shapes[0]}, now_us {shapes[1]}, nulls {shapes[2]}, "
                f"known_by {shapes[3]}; expected (n, 2), (n), (n), (n)"
            )
        columns, status, meta = self._events.rows_at(keys, now, missing, cut, _THREADS)
        return ViewRows(columns, status, meta, self.row_schema)

    def changed_keys(self, start_us: int, end_us: int) -> NDArray[np.uint64]:
        """Keys uint64[k, 2], ascending, whose row may differ between the two times; all that do are there.

        A row differs when an event came in (start, end] or became known, entered or left a window, or its
        ttl passed.
        """
        if end_us < start_us:
            raise InvalidArgumentError(f"changed_keys: end {end_us} is before start {start_us}")
        return self._events.changed_keys(start_us, end_us)


def _value_of(column: StoredColumn) -> Expr | None:
    return column.value.value if isinstance(column.value, WindowAggregate) else column.value


def _joined(parts: Sequence[SourceColumn]) -> SourceColumn:
    """The values of all parts, none null, in order."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].dictionary is None:
        return SourceColumn(parts[0].dtype, np.concatenate([part.values for part in parts]), None)
    texts: list[str] = []
    values = []
    for part in parts:
        codes, new = _recode(part, texts)
        texts += new
        values.append(codes)
    return SourceColumn("string", np.concatenate(values), None, texts)


def _recode(column: SourceColumn, texts: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    """A string column in the codes of `texts`, and the texts that it adds."""
    own = column.dictionary or []
    if own == list(texts[: len(own)]):
        return column.values, []
    at = {text: code for code, text in enumerate(texts)}
    codes = np.array([at.setdefault(text, len(at)) for text in own], np.int64)
    return codes[column.values], list(at)[len(texts) :]


def columns_of_view(view: FeatureView) -> list[str]:
    """The source columns that a view reads, its join keys first."""
    values = (c.value if isinstance(c.value, Expr) else c.value.value for c in view.stored)
    read = columns_read(*(value for value in values if value is not None))
    return list(dict.fromkeys([*view.join_keys, *read]))


def stored_texts(view: FeatureView) -> set[str]:
    """Source columns that, where they are strings, decide a stored value by their codes, which must last."""
    values = (
        c.value if isinstance(c.value, Expr) else c.value.value if c.value.kind in _SAME_VALUE else None
        for c in view.stored
    )
    found = {value.param for value in values if value is not None and value.op == "col"}
    return found.union(*(_read_as_codes(_value_of(c)) for c in view.stored))


def _read_as_codes(value: Expr | None) -> set[str]:
    """The string columns whose codes an expression makes numbers of."""
    nodes = [] if value is None else walk(value)
    return {node.args[0].param for node in nodes if node.op == "code"}
