"""Rows read straight from Feast's own online store.

A feature list is compiled once into a `ReadPlan`, an immutable value; reading is a function of the plan, the
store, the entity rows and `now`. A row is there from its event time on, and until its event time plus ttl,
both
included: Penstock's rule, not Feast's, which forgets the ttl online.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from penstock.errors import FeatureNameCollisionError, InvalidArgumentError, UnavailableError
from penstock.features import offline, retrieval
from penstock.features.compute import EXPIRED, NOT_FOUND, NULL, PRESENT
from penstock.features.definitions import ViewProjection
from penstock.features.sources import SourceColumn
from penstock.integrations.feast_online import FeastOnlineStore, StoredRow, ViewRead
from penstock.integrations.feast_registry import DUMMY_KEY, FeastView
from penstock.integrations.feast_wire import (
    T_INT32,
    T_INT64,
    T_STRING,
    KeyEncoder,
    arrow_type,
    decode_value,
    type_name,
)

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

_NEVER = -(2**63)
_KEY_TYPES = {T_STRING: "string", T_INT32: "int64", T_INT64: "int64"}


@dataclass(frozen=True)
class _View:
    """What to read of a view, and the columns of the entity rows that hold its key."""

    name: str
    online_name: str
    features: tuple[str, ...]
    columns: tuple[str, ...]
    encoder: KeyEncoder
    ttl_us: int | None


@dataclass(frozen=True)
class _Output:
    """A feature: its name in the result, its reference, its view's position, and its type."""

    name: str
    ref: str
    view: int
    feature: str
    kind: int


@dataclass(frozen=True)
class ReadPlan:
    """A compiled feature list. `keys`: value type of each column of the entity rows."""

    views: tuple[_View, ...]
    outputs: tuple[_Output, ...]
    keys: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class FeastOnlineResult:
    """Rows read from Feast's own online store.

    Attributes:
        plan: what was asked.
        keys: the join keys given, by column.
        values: of each feature, n Python values; None where empty.
        status: uint8[n, features]: PRESENT 0, NULL 1, NOT_FOUND 2 (never written, or not before `now`) or
            EXPIRED 3. All but PRESENT cells are None.
        event_time: int64[n, views], microseconds UTC; INT64_MIN where nothing was written.
    """

    plan: ReadPlan
    keys: Mapping[str, list[Any]]
    values: Sequence[list[Any]]
    status: NDArray[np.uint8]
    event_time: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.status)

    @property
    def names(self) -> list[str]:
        """The names of the features."""
        return [output.name for output in self.plan.outputs]

    @property
    def views(self) -> list[str]:
        """The views asked, by their names in the list."""
        return [view.name for view in self.plan.views]

    def to_dict(self) -> dict[str, list[Any]]:
        """Lists of Python values by column, join keys first; None where empty."""
        return {**self.keys, **dict(zip(self.names, self.values))}

    def statuses(self) -> dict[str, list[int]]:
        """The status of each cell, by feature."""
        return dict(zip(self.names, self.status.T.tolist()))

    @cached_property
    def _table(self) -> pa.Table:
        arrays = {
            name: pa.array(values, arrow_type(self.plan.keys[name])) for name, values in self.keys.items()
        }
        for output, values in zip(self.plan.outputs, self.values):
            try:
                arrays[output.name] = pa.array(values, arrow_type(output.kind))
            except (pa.ArrowException, OverflowError) as error:
                raise UnavailableError(
                    f"Feast's online store has a value at '{output.ref}' that is no "
                    f"{type_name(output.kind)}: {error}"
                ) from error
        return pa.table(arrays)

    def to_arrow(self, *, with_status: bool = False) -> pa.Table:
        """Join keys, then features; with status, `<feature>__status` behind each."""
        table = self._table
        if with_status:
            for i, name in enumerate(self.names):
                codes = pa.array(self.status[:, i], pa.int8())
                column = pa.DictionaryArray.from_arrays(codes, pa.array(offline.STATUS_NAMES))
                table = table.add_column(table.column_names.index(name) + 1, name + "__status", column)
        return table

    def to_df(self) -> pd.DataFrame:
        """A pandas frame; integers and booleans with nulls become Int64 and boolean."""
        return offline.to_frame(self._table)


def compile_reads(
    refs: Sequence[str],
    aliases: Mapping[str, ViewProjection],
    views: Mapping[str, FeastView],
    key_types: Callable[[FeastView], Mapping[str, int]],
    full_feature_names: bool,
) -> ReadPlan:
    """Compile a list of features that the views have.

    Raises:
        InvalidArgumentError: a type that cannot be read.
        FeatureNameCollisionError: two columns with one name.
    """
    owners: dict[str, list[str]] = {}
    for ref in refs:
        owner, short = ref.split(":")
        owners.setdefault(owner, []).append(short)
    keys: dict[str, int] = {}
    compiled: list[_View] = []
    for owner, shorts in owners.items():
        alias = aliases.get(owner)
        view = views[owner if alias is None else alias.view.name]
        mapping = {} if alias is None else alias.join_key_map
        types = key_types(view)
        for key, kind in types.items():
            if kind not in _KEY_TYPES:
                raise InvalidArgumentError(
                    f"view '{view.name}': join key '{key}' is {type_name(kind)}; "
                    "expected Int32, Int64 or String"
                )
            keys[mapping.get(key, key)] = kind
        columns = tuple(mapping.get(key, key) for key in types)
        compiled.append(
            _View(owner, view.online_name, tuple(shorts), columns, key_encoder(types), view.ttl_us)
        )
    outputs: list[_Output] = []
    taken = set(keys)
    for ref in refs:
        owner, short = ref.split(":")
        kind = views[aliases[owner].view.name if owner in aliases else owner].types[short]
        name = f"{owner}__{short}" if full_feature_names else short
        if arrow_type(kind) is None:
            raise InvalidArgumentError(f"'{ref}' is of type {type_name(kind)}, which cannot be read")
        if name in taken:
            raise FeatureNameCollisionError(
                f"feature '{ref}' would be named '{name}', which is a column already; "
                "use full_feature_names=True"
            )
        taken.add(name)
        outputs.append(_Output(name, ref, list(owners).index(owner), short, kind))
    return ReadPlan(tuple(compiled), tuple(outputs), keys)


def key_encoder(types: Mapping[str, int]) -> KeyEncoder:
    """The encoder of a view's keys; one without entities has a key of its own in Feast."""
    return KeyEncoder(list(types), list(types.values())) if types else KeyEncoder([DUMMY_KEY], [T_STRING])


def encoded_keys(encoder: KeyEncoder, cells: Sequence[Sequence[Any]], n: int) -> list[bytes | None]:
    """The serialized entity key of each of n rows, None where one of its values is null."""
    if not cells:
        return [encoder.encode([""])] * n
    return [None if None in row else encoder.encode(row) for row in zip(*cells)]


def read_rows(plan: ReadPlan, store: FeastOnlineStore, entity_rows: Any, now_us: int) -> FeastOnlineResult:
    """Read.

    Args:
        entity_rows: list of dicts, dict of lists or scalars, pandas, polars or Arrow table.

    Raises:
        InvalidArgumentError: a join key is missing or of a wrong type, or a column is none.
        UnavailableError: the store failed or holds something else.
    """
    keys = _plain_keys(entity_rows, plan.keys)
    if keys is None:
        keys, n = _converted_keys(entity_rows, plan.keys)
    else:
        n = len(next(iter(keys.values())))
    reads = [
        ViewRead(v.online_name, v.features, encoded_keys(v.encoder, [keys[c] for c in v.columns], n))
        for v in plan.views
    ]
    answers = store.read(reads)
    values: list[list[Any]] = []
    statuses: list[list[int]] = []
    for output in plan.outputs:
        ttl_us = plan.views[output.view].ttl_us
        oldest = _NEVER if ttl_us is None else now_us - ttl_us
        cells = [_cell(row, output, oldest, now_us) for row in answers[output.view]]
        values.append([value for value, _ in cells])
        statuses.append([status for _, status in cells])
    times = [[_NEVER if row is None else row.event_us for row in rows] for rows in answers]
    return FeastOnlineResult(
        plan,
        keys,
        values,
        np.array(statuses, np.uint8).reshape(len(statuses), n).T,
        np.array(times, np.int64).reshape(len(times), n).T,
    )


def _cell(row: StoredRow | None, output: _Output, oldest: int, now_us: int) -> tuple[Any, int]:
    if row is None or row.event_us > now_us:
        return None, NOT_FOUND
    if row.event_us < oldest:
        return None, EXPIRED
    data = row.values.get(output.feature)
    if data is None:
        return None, NOT_FOUND
    try:
        value = decode_value(data, output.kind)
    except ValueError as error:
        raise UnavailableError(
            f"Feast's online store has no {type_name(output.kind)} at '{output.ref}', but {error}"
        ) from error
    return value, NULL if value is None else PRESENT


def _plain_keys(entity_rows: Any, wanted: Mapping[str, int]) -> dict[str, list[Any]] | None:
    """Keys that need no conversion; None where they are in another form, or wrong."""
    columns: dict[str, list[Any]] = {}
    if type(entity_rows) is dict:
        if entity_rows.keys() != wanted.keys() or not all(type(v) is list for v in entity_rows.values()):
            return None
        columns = {name: list(entity_rows[name]) for name in wanted}
        if len({len(values) for values in columns.values()}) != 1:
            return None
    elif type(entity_rows) is list and wanted and entity_rows:
        if not all(type(row) is dict and row.keys() == wanted.keys() for row in entity_rows):
            return None
        columns = {name: [row[name] for row in entity_rows] for name in wanted}
    else:
        return None
    for name, kind in wanted.items():
        expected = str if kind == T_STRING else int
        if not all(type(value) is expected or value is None for value in columns[name]):
            return None
    return columns


def _converted_keys(entity_rows: Any, wanted: Mapping[str, int]) -> tuple[dict[str, list[Any]], int]:
    table, floats = retrieval.entity_row_table(entity_rows)
    n = table.num_rows
    columns = {}
    for name, kind in wanted.items():
        given = retrieval.key_column(table, name, _KEY_TYPES[kind], floats=floats)
        columns[name] = python_values(given)
    for name in table.column_names:
        if name not in wanted:
            known = ", ".join(sorted(wanted)) or "none"
            raise InvalidArgumentError(f"entity_rows: column '{name}' is no join key; expected {known}")
    return columns, n


def python_values(column: SourceColumn) -> list[Any]:
    """Python values of a column; None where null."""
    values: list[Any] = column.values.tolist()
    if column.dictionary is not None:
        texts = column.dictionary
        values = [texts[code] if texts else None for code in values]
    elif column.dtype == "bool":
        values = [bool(value) for value in values]
    if column.valid is not None:
        values = [value if ok else None for value, ok in zip(values, column.valid.tolist())]
    return values
