"""Distributions for `percentile_rank`, fitted to the rows of a view's source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from penstock.errors import DefinitionError
from penstock.features.aggregates import WindowAggregate
from penstock.features.backends.stored import stored_program
from penstock.features.definitions import FeatureView
from penstock.features.expressions import Expr, uses_now, walk
from penstock.features.program import Distribution
from penstock.features.text_inputs import input_column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from penstock.features.sources import SourceTable

_COUNTED = 1 << 20  # values that are counted together


def rank_arguments(view: FeatureView) -> dict[str, Expr]:
    """The argument of each `percentile_rank` of a view, by fingerprint; inner ones first."""
    values = (v.value if isinstance(v, WindowAggregate) else v for v in view.features.values())
    nodes = walk(*(value for value in values if value is not None))
    return {node.args[0].fingerprint(): node.args[0] for node in nodes if node.op == "percentile_rank"}


def fit_key(view: FeatureView, argument: str) -> str:
    """Name in the registry of the distribution of an argument, given by fingerprint."""
    source = hashlib.sha256(json.dumps(view.source.describe()).encode()).hexdigest()
    return f"{view.name}:{source[:16]}:{argument}"


def fit_view(view: FeatureView, table: SourceTable, fit_until_us: int | None) -> dict[str, Distribution]:
    """Fit the distributions that a view needs, by the fingerprint of the argument.

    Args:
        view: the definition.
        table: its source.
        fit_until_us: only rows known before this time count; None: all rows.

    Raises:
        DefinitionError: an argument reads `now()`, or no row gives it a value.
    """
    return fit_tables(view, lambda: [table], fit_until_us)


def fit_tables(
    view: FeatureView, tables: Callable[[], Iterable[SourceTable]], fit_until_us: int | None
) -> dict[str, Distribution]:
    """As `fit_view`, of a source in parts: each call of `tables` gives all of them. One call an argument."""
    fitted: dict[str, Distribution] = {}
    for key, argument in rank_arguments(view).items():
        where = f"view '{view.name}': percentile_rank"
        if uses_now(argument):
            raise DefinitionError(f"{where} of a value that reads now() has no distribution to fit")
        counted = _Counts()
        for table in tables():
            program = stored_program([("value", argument)], table.schema, fitted)
            inputs = [input_column(name, table.columns) for name, _ in program.inputs]
            values, valid = program.run(inputs, rows=table.n_rows)[0]
            known = valid if fit_until_us is None else valid & (table.known_at < fit_until_us)
            counted.add(values[known].astype(np.float64))
        distinct, counts = counted.settled()
        if not len(distinct):
            until = "" if fit_until_us is None else " known before fit_until"
            raise DefinitionError(f"{where}: source '{view.source.name}' has no value{until} to fit it to")
        fitted[key] = Distribution(tuple(distinct.tolist()), tuple(np.cumsum(counts).tolist()))
    return fitted


class _Counts:
    """How often each value occurs, of values that come in parts. NaN is left out, and -0.0 is 0.0."""

    def __init__(self) -> None:
        self._distinct, self._counts = np.zeros(0), np.zeros(0, np.int64)
        self._waiting: list[NDArray[np.float64]] = []
        self._n = 0

    def add(self, values: NDArray[np.float64]) -> None:
        self._waiting.append(values[~np.isnan(values)] + 0.0)
        self._n += len(self._waiting[-1])
        if self._n > _COUNTED:
            self.settled()

    def settled(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The values, ascending, and how often each was added."""
        values, counts = np.unique(np.concatenate([np.zeros(0), *self._waiting]), return_counts=True)
        self._waiting, self._n = [], 0
        if not len(self._distinct):
            self._distinct, self._counts = values, counts
        elif len(values):
            both, at = np.unique(np.concatenate([self._distinct, values]), return_inverse=True)
            added = np.zeros(len(both), np.int64)
            np.add.at(added, at, np.concatenate([self._counts, counts]))
            self._distinct, self._counts = both, added
        return self._distinct, self._counts
