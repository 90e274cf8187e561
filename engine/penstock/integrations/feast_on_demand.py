"""On-demand feature views of Feast, run over a historical join.

Their functions are opaque: nothing is known of them but their inputs and outputs, so they run offline only,
on the whole join at once, as Feast runs them, and promise none of what compiled features promise. A function
comes out of the registry: dill rebuilds it where that is installed (as Feast does), else its source text is
compiled, with `pd` and `np` for its only globals. Like Feast, this runs code that the registry holds.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from penstock.errors import DefinitionError, InvalidArgumentError
from penstock.features.offline import to_frame
from penstock.integrations.feast_registry import OnDemandView


def load_function(view: OnDemandView) -> Callable[[Any], Any]:
    """The view's function.

    Raises:
        DefinitionError: it can be rebuilt neither from its bytes nor from its source.
    """
    try:
        import dill
    except ImportError:
        return _compiled(view)
    try:
        function: Callable[[Any], Any] = dill.loads(view.body)
    except Exception:  # written by another Python or with modules that are not here
        return _compiled(view)
    return function


def _compiled(view: OnDemandView) -> Callable[[Any], Any]:
    import pandas as pd

    where = f"on-demand view '{view.name}'"
    try:
        tree = ast.parse(textwrap.dedent(view.source))
        function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
        function.decorator_list = []
        function.returns = None
        for argument in function.args.args:
            argument.annotation = None
        names: dict[str, Any] = {"pd": pd, "np": np}
        module = ast.Module([function], [])
        exec(compile(ast.fix_missing_locations(module), f"<{where}>", "exec"), names)
    except (SyntaxError, StopIteration, ValueError) as error:
        raise DefinitionError(
            f"{where} has no source that can be compiled: {error!r}; pip install dill"
        ) from error
    found: Callable[[Any], Any] = names[function.name]
    return found


def run(view: OnDemandView, inputs: pa.Table) -> dict[str, pa.Array]:
    """The view's outputs for each row of its inputs.

    Args:
        view: what to run.
        inputs: n rows with a column for each input under its short and its full name.

    Raises:
        DefinitionError: the function failed, or gave other columns or another number of rows.
    """
    where = f"on-demand view '{view.name}'"
    n = inputs.num_rows
    try:
        function = load_function(view)
        if view.mode == "pandas":
            found = function(to_frame(inputs))
            columns = {str(name): found[name].to_numpy() for name in found.columns}
        elif view.singleton:
            rows = [function(row) for row in inputs.to_pylist()]
            columns = {name: [row[name] for row in rows] for name in view.outputs}
        else:
            columns = dict(function(inputs.to_pydict()))
        arrays = {name: pa.array(columns[name], from_pandas=True) for name in view.outputs if name in columns}
    except Exception as error:
        raise DefinitionError(f"{where} failed: {type(error).__name__}: {error}") from error
    for name in view.outputs:
        got = len(arrays[name]) if name in arrays else "none"
        if got != n:
            raise DefinitionError(f"{where} gave {got} rows of '{name}'; expected {n}")
    return arrays


def input_table(view: OnDemandView, refs: Sequence[str], joined: pa.Table, entities: pa.Table) -> pa.Table:
    """What the function reads: joined features under both names, and the request inputs.

    Args:
        refs: the features that Penstock can give; the function fails if it reads another.
        joined: features named `view__feature`.
        entities: the entity table.

    Raises:
        InvalidArgumentError: a request input is missing.
    """
    columns: dict[str, Any] = {}
    for ref in refs:
        owner, short = ref.split(":")
        columns[f"{owner}__{short}"] = columns[short] = _plain(joined[f"{owner}__{short}"])
    for name in view.inputs:
        if name not in entities.column_names:
            raise InvalidArgumentError(
                f"entity_df has no request input '{name}', which on-demand view '{view.name}' reads"
            )
        columns[name] = entities[name]
    if not columns:
        raise DefinitionError(f"on-demand view '{view.name}' reads nothing")
    return pa.table(columns)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
