"""Codes of pushed texts: those of the registry, to which new texts are added before their codes are used.

Of one thread at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.errors import StoreError
from penstock.features.registry import Registry
from penstock.features.sources import SourceColumn

_TRIES = 100


class TextCodes:
    """The dictionaries of push sources, with the code of each text at hand."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._codes: dict[tuple[str, str], tuple[list[str], dict[str, int]]] = {}

    def encode(self, source: str, column: str, values: Any) -> SourceColumn:
        """An Arrow string column in the registry's codes, which are durable then.

        Raises:
            StoreError: the registry cannot be written.
        """
        given = values.to_pylist()
        valid = None if not values.null_count else np.array([text is not None for text in given])
        for _ in range(_TRIES):
            texts, codes = self._newest(source, column)
            fresh = [text for text in dict.fromkeys(given) if text is not None and text not in codes]
            if not fresh:
                numbers = np.array([0 if text is None else codes[text] for text in given], np.int64)
                return SourceColumn("string", numbers, valid, texts)
            if self._registry.extend_dictionaries(source, {column: [*texts, *fresh]}):
                for text in fresh:
                    codes[text] = len(texts)
                    texts.append(text)
            else:
                self._codes.pop((source, column), None)  # another process gave codes meanwhile
        raise StoreError(f"the dictionary of source '{source}', column '{column}' changes too fast")

    def known(self, source: str, column: str) -> list[str]:
        """A copy of the texts by code."""
        return list(self._newest(source, column)[0])

    def _newest(self, source: str, column: str) -> tuple[list[str], dict[str, int]]:
        recorded = self._registry.state.dictionaries.get(source, {}).get(column, [])
        known = self._codes.get((source, column))
        if known is None or len(known[0]) < len(recorded):
            texts = list(recorded)
            known = self._codes[source, column] = (texts, {text: i for i, text in enumerate(texts)})
        return known
