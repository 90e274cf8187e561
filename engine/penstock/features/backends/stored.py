"""Which back end computes stored features: C++, or numpy where an expression holds a `udf`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from penstock import _core
from penstock.features.expressions import Expr, walk
from penstock.features.program import Distribution, lower

if TYPE_CHECKING:
    from penstock.features.backends.numpy_backend import NumpyProgram


def stored_program(
    outputs: Sequence[tuple[str, Expr]],
    schema: Mapping[str, str],
    distributions: Mapping[str, Distribution] | None = None,
) -> _core.FeatureProgram | NumpyProgram:
    """Compile named expressions to be run by Python; see `program.lower`."""
    program = lower(outputs, schema, distributions)
    if not program.functions:
        return _core.FeatureProgram(program.to_bytes())
    from penstock.features.backends.numpy_backend import NumpyProgram

    return NumpyProgram(program)


def is_opaque(value: Expr) -> bool:
    """Whether an expression holds a `udf`."""
    return any(node.op == "udf" for node in walk(value))
