"""Entity keys of join-key columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock import _core
from penstock.features.sources import SourceColumn

if TYPE_CHECKING:
    from numpy.typing import NDArray


def entity_keys(
    columns: Sequence[SourceColumn], n: int, seed: bytes
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Keys uint64[n, 2] and nulls bool[n] of join-key columns (int64 or string), in key order."""
    nulls = np.zeros(n, np.bool_)
    for column in columns:
        if column.valid is not None:
            nulls |= ~column.valid
    if not columns:  # a view without entities: one key
        return np.zeros((n, 2), np.uint64), nulls
    if len(columns) == 1 and columns[0].dictionary is not None:
        texts = columns[0].dictionary
        per_code, _ = _core.keys128([texts], seed)
        keys = per_code[columns[0].values] if texts else np.zeros((n, 2), np.uint64)
    elif len(columns) == 1:
        keys = np.zeros((n, 2), np.uint64)  # a lone integer is kept as it is
        keys[:, 0] = columns[0].values.view(np.uint64)
    else:
        keys, _ = _core.keys128([_parts(column, nulls) for column in columns], seed)
    keys[nulls] = 0
    return keys, nulls


def _parts(column: SourceColumn, nulls: NDArray[np.bool_]) -> Any:
    if column.dictionary is None:
        return column.values
    if not column.dictionary:
        return [""] * len(nulls)
    return np.array(column.dictionary, dtype=object)[column.values].tolist()
