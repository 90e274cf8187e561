"""What programs ask about strings, answered once a dictionary code instead of once a row.

A program sees a string as its dictionary code, which tells nothing of the text. A comparison with literals or
a hash is therefore an input of its own, named after the column and the function, whose value the host takes
from a table with one entry a code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TextColumn(Protocol):
    """A column with its dictionary, such as `sources.SourceColumn`."""

    @property
    def values(self) -> NDArray[Any]: ...
    @property
    def valid(self) -> NDArray[np.bool_] | None: ...
    @property
    def dictionary(self) -> list[str] | None: ...


@dataclass(frozen=True)
class TextFunction:
    """A function of a string column; kind "in": whether it is one of `texts`; "hash": its 64-bit hash."""

    column: str
    kind: str
    texts: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        return "bool" if self.kind == "in" else "int64"

    def of(self, text: str) -> int:
        """The value for one text: 0 or 1, or the hash as an int64."""
        return int(text in self.texts) if self.kind == "in" else text_hash(text)


def text_hash(text: str) -> int:
    """The first 8 bytes of SHA-256 over UTF-8, a little-endian int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def input_name(function: TextFunction) -> str:
    """Name of the program input that holds the function's value; "\\0" keeps it apart from columns."""
    return f"{function.column}\0{function.kind}\0{json.dumps(function.texts)}"


def function_of(name: str) -> TextFunction | None:
    """The function that an input's name stands for; None for a plain column."""
    column, *rest = name.split("\0", 2)
    return TextFunction(column, rest[0], tuple(json.loads(rest[1]))) if rest else None


def input_column(
    name: str, columns: Mapping[str, TextColumn]
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """(values, validity or None) of a program input of that name, by way of the dictionary if need be."""
    function = function_of(name)
    if function is None:
        return columns[name].values, columns[name].valid
    column = columns[function.column]
    return by_code(function, column.dictionary or ())[column.values], column.valid


def by_code(function: TextFunction, dictionary: Sequence[str]) -> NDArray[np.int64]:
    """The function's value for each code, int64; one 0 for an empty dictionary, whose rows are all null."""
    import numpy as np

    return np.array([function.of(text) for text in dictionary] or [0], np.int64)
