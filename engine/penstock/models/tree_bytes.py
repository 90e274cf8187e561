"""Changes of a converted forest's output, on the bytes of trees.bin (csrc/model/tree_format.h)."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_HEAD = struct.Struct("<8s10IdII")
_IDENTITY = 0
# Positions of fields in the unpacked header.
_OUTPUTS, _TREES, _SPLITS, _LEAVES, _VALUES, _TRANSFORM, _CRC = 3, 4, 5, 6, 7, 9, 12


def without_transform(trees: bytes) -> bytes:
    """The same forest with its margins as its scores."""
    head = list(_HEAD.unpack_from(trees))
    head[_TRANSFORM] = _IDENTITY
    return _HEAD.pack(*head) + trees[_HEAD.size :]


def second_output(trees: bytes) -> bytes:
    """A forest whose leaves hold shares of two classes as one that gives the share of the second alone."""
    head = list(_HEAD.unpack_from(trees))
    if head[_OUTPUTS] != 2 or head[_VALUES] != 2 * head[_LEAVES] or head[_TRANSFORM] != _IDENTITY:
        raise ValueError("trees: expected leaves of two shares and no transform")
    body = trees[_HEAD.size :]
    tables = 8 * (head[_TREES] + 1)  # first splits and first leaves of the trees
    outputs = 16 + tables
    splits = outputs + 4 * head[_TREES]
    values = splits + 28 * head[_SPLITS]
    words = values + 8 * head[_VALUES]
    leaves = np.frombuffer(body, "<f8", head[_VALUES], values)
    body = b"".join(
        (
            body[8 : 16 + tables],
            bytes(4 * head[_TREES]),  # each tree adds to output 0
            body[splits:values],
            leaves[1::2].tobytes(),
            body[words:],
        )
    )
    head[_OUTPUTS], head[_VALUES], head[_CRC] = 1, head[_LEAVES], zlib.crc32(body)
    return _HEAD.pack(*head) + body
