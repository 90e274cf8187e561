"""The reference distributions of a model version: what its training rows and scores looked like.

Counts over fixed fine bins (penstock_kernels.reference), taken once at training, against which drift is
measured for as long as the version serves. The bins never change, so counts of any two windows compare.
Immutable; safe to share between threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import InvalidArgumentError
from penstock_kernels.reference import (
    DEFAULT_FINE_BINS,
    EXTRA_SLOTS,
    MAX_CODES,
    HistogramSpec,
    capture_edges,
    count_rows,
    single_bins,
)

if TYPE_CHECKING:
    import pyarrow as pa

NUMERIC, CATEGORICAL, SCORE = "numeric", "categorical", "score"
SCORE_NAME = "score"
_FORMAT = b"penstock.reference"
_VERSION = b"1"


@dataclass(frozen=True, eq=False)
class ReferenceDistribution:
    """Fine-bin counts of F model inputs and of the score.

    Attributes:
        names: the F input names, in model order.
        kinds: "numeric" or "categorical", per input.
        spec: the bins of the inputs; counts: uint64 [spec.n_slots].
        score_spec: the bins of the score, one column; score_counts: uint64 [score_spec.n_slots].
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    spec: HistogramSpec
    counts: NDArray[np.uint64]
    score_spec: HistogramSpec
    score_counts: NDArray[np.uint64]

    @classmethod
    def capture(
        cls,
        names: Sequence[str],
        rows: NDArray[np.float32],
        scores: NDArray[np.float64],
        categorical: Mapping[str, int] | None = None,
    ) -> ReferenceDistribution:
        """The reference of float32 rows [n, F] (NaN is missing) and their float64 scores [n].

        `categorical` maps the name of a column of codes to its number of codes. Raises InvalidArgumentError
        for other shapes or dtypes, no rows, repeated names, or a categorical name that is not an input.
        """
        names, categorical = tuple(names), dict(categorical or {})
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != len(names):
            raise InvalidArgumentError(
                f"rows is {rows.dtype} {rows.shape}; expected float32 [n, {len(names)}]"
            )
        if not len(rows):
            raise InvalidArgumentError("rows has no rows; a reference needs at least 1")
        if scores.dtype != np.float64 or scores.shape != (len(rows),):
            raise InvalidArgumentError(
                f"scores is {scores.dtype} {scores.shape}; expected float64 [{len(rows)}]"
            )
        if len(set(names)) != len(names):
            raise InvalidArgumentError(f"names {sorted(names)} has a repeated name")
        for name, codes in categorical.items():
            if name not in names:
                raise InvalidArgumentError(f"categorical column {name!r} is not one of {sorted(names)}")
            if isinstance(codes, bool) or not isinstance(codes, int) or not 1 <= codes <= MAX_CODES:
                raise InvalidArgumentError(
                    f"categorical column {name!r} has {codes!r} codes; expected an integer, 1 to {MAX_CODES}"
                )
        spec = HistogramSpec(
            [
                categorical[name] if name in categorical else capture_edges(rows[:, j])
                for j, name in enumerate(names)
            ]
        )
        column = score_column(scores)
        score_spec = HistogramSpec([capture_edges(column)])
        return cls(
            names,
            tuple(CATEGORICAL if name in categorical else NUMERIC for name in names),
            spec,
            count_rows(spec, rows),
            score_spec,
            count_rows(score_spec, column),
        )

    @property
    def n_rows(self) -> int:
        """Number of rows that the reference was taken from."""
        part = self.score_spec.column(self.score_counts, 0)
        return int(part.bins.sum()) + part.missing

    def native_spec(self) -> list[NDArray[np.float32] | int]:
        """The argument of _core.HistogramCounts for the inputs: float32 edges, or the number of codes."""
        return list(self.spec.columns)

    def native_score_spec(self) -> list[NDArray[np.float32] | int]:
        """The argument of _core.HistogramCounts for the score: one column, counted over `score_column`."""
        return list(self.score_spec.columns)

    def atoms(self, j: int) -> NDArray[np.float32]:
        """Values of input j that hold the mass of a fine bin, each in a bin of its own; float32 [a]."""
        return _atoms(self.spec, self.counts, j)

    def to_arrow(self) -> pa.Table:
        """One row per input, in order, then the score.

        Columns: feature, kind, edges list<float32>, codes uint32 (0: numeric), counts list<uint64> by bin,
        atoms list<float32>, slots list<uint64> = missing, unseen, -inf, +inf.
        """
        import pyarrow as pa

        table: dict[str, list[Any]] = {field.name: [] for field in _schema()}
        parts = [(self.spec, self.counts, j, *named) for j, named in enumerate(zip(self.names, self.kinds))]
        parts.append((self.score_spec, self.score_counts, 0, SCORE_NAME, SCORE))
        for spec, counts, j, name, kind in parts:
            column = spec.columns[j]
            codes = column if isinstance(column, int) else 0
            slots = counts[spec.offsets[j] : spec.offsets[j + 1]]
            row = (
                name,
                kind,
                np.empty(0, np.float32) if isinstance(column, int) else column,
                codes,
                slots[:-EXTRA_SLOTS],
                _atoms(spec, counts, j),
                slots[-EXTRA_SLOTS:],
            )
            for values, value in zip(table.values(), row):
                values.append(value)
        return pa.table(table, schema=_schema())

    @classmethod
    def from_arrow(cls, table: pa.Table) -> ReferenceDistribution:
        """The inverse of `to_arrow`. Raises InvalidArgumentError naming the column or row at fault."""
        expected = _schema()
        if (table.schema.metadata or {}).get(_FORMAT) != _VERSION:
            raise InvalidArgumentError(f"reference: schema metadata lacks {_FORMAT.decode()} = 1")
        if not table.schema.equals(expected):
            raise InvalidArgumentError(
                f"reference: columns are {table.schema.names} with other types or names"
            )
        rows = table.to_pylist()
        if not rows or rows[-1]["kind"] != SCORE or any(row["kind"] == SCORE for row in rows[:-1]):
            raise InvalidArgumentError("reference: expected one row of kind 'score', the last")
        columns: list[NDArray[np.float32] | int] = []
        slots: list[NDArray[np.uint64]] = []
        for row in rows:
            where = f"reference: {row['kind']} {row['feature']!r}"
            if any(value is None for value in row.values()):
                raise InvalidArgumentError(f"{where} has a null")
            if row["kind"] not in (NUMERIC, CATEGORICAL, SCORE):
                raise InvalidArgumentError(f"{where}: unknown kind")
            is_codes = row["kind"] == CATEGORICAL
            if is_codes != (row["codes"] > 0) or (is_codes and row["edges"]):
                raise InvalidArgumentError(f"{where}: edges and codes do not fit the kind")
            n_bins = row["codes"] if is_codes else len(row["edges"]) + 1
            if len(row["counts"]) != n_bins or len(row["slots"]) != EXTRA_SLOTS:
                raise InvalidArgumentError(
                    f"{where} has {len(row['counts'])} counts and {len(row['slots'])} slots; "
                    f"expected {n_bins} and {EXTRA_SLOTS}"
                )
            columns.append(row["codes"] if is_codes else np.array(row["edges"], np.float32))
            slots.append(np.array(row["counts"] + row["slots"], np.uint64))
        try:
            spec, score_spec = HistogramSpec(columns[:-1]), HistogramSpec(columns[-1:])
        except ValueError as error:
            raise InvalidArgumentError(f"reference: {error}") from error
        return cls(
            tuple(row["feature"] for row in rows[:-1]),
            tuple(row["kind"] for row in rows[:-1]),
            spec,
            np.concatenate([*slots[:-1], np.empty(0, np.uint64)]),
            score_spec,
            slots[-1],
        )


def score_column(scores: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64 scores [n] as the float32 [n, 1] over which they are counted, at training and when served."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(scores, np.float32).reshape(-1, 1)


def _atoms(spec: HistogramSpec, counts: NDArray[np.uint64], j: int) -> NDArray[np.float32]:
    edges, bins = spec.columns[j], spec.column(counts, j).bins
    if isinstance(edges, int) or not len(edges):
        return np.empty(0, np.float32)
    heavy = bins * np.uint64(DEFAULT_FINE_BINS) >= max(1, bins.sum())
    return edges[(heavy & single_bins(edges))[:-1]]


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("feature", pa.string()),
            ("kind", pa.string()),
            ("edges", pa.list_(pa.float32())),
            ("codes", pa.uint32()),
            ("counts", pa.list_(pa.uint64())),
            ("atoms", pa.list_(pa.float32())),
            ("slots", pa.list_(pa.uint64())),
        ],
        metadata={_FORMAT: _VERSION},
    )
