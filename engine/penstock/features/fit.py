"""Distributions for `percentile_rank`, fitted to the rows of a view's source."""

from __future__ import annotations

import hashlib
import json
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
    from penstock.features.sources import SourceTable


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
    known = np.ones(table.n_rows, np.bool_) if fit_until_us is None else table.known_at < fit_until_us
    fitted: dict[str, Distribution] = {}
    for key, argument in rank_arguments(view).items():
        where = f"view '{view.name}': percentile_rank"
        if uses_now(argument):
            raise DefinitionError(f"{where} of a value that reads now() has no distribution to fit")
        program = stored_program([("value", argument)], table.schema, fitted)
        inputs = [input_column(name, table.columns) for name, _ in program.inputs]
        values, valid = program.run(inputs, rows=table.n_rows)[0]
        samples = values[valid & known].astype(np.float64)
        distinct, counts = np.unique(samples[~np.isnan(samples)], return_counts=True)
        if not len(distinct):
            until = "" if fit_until_us is None else " known before fit_until"
            raise DefinitionError(f"{where}: source '{view.source.name}' has no value{until} to fit it to")
        fitted[key] = Distribution(tuple(distinct.tolist()), tuple(np.cumsum(counts).tolist()))
    return fitted
