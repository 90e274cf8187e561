"""Pushes of plain values, coded natively: the way of small pushes from a call to the events of the views.

`PushCoding` is prepared for one source over one reading of its views. It takes dicts of lists or scalars
whose values are of the plain kinds (times as int microseconds, texts that the views have met) and says None
to all else, wrong values too: `push_rows` then takes the rows or names the fault, and the outcome is the same
for whatever both take. Any thread may code; `append` and `sync` run under `LiveViews.locked`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from penstock import _core
from penstock.features.live import LiveView
from penstock.features.push_rows import ARROW_TYPES, push_schema, required_columns
from penstock.features.push_table import columns_of
from penstock.features.source_definitions import PushSource
from penstock.features.sources import SourceColumn

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PushCoding:
    """Codes the pushes of one source.

    Attributes:
        source: its definition.
        views: the views that it feeds, each over the reading that the codes fit.
        readings: see `LiveViews.readings`; with other ones a new coding is needed.
        schema: the Arrow schema of the logged events.
    """

    def __init__(
        self, source: PushSource, views: Sequence[LiveView], readings: object, key_seed: bytes
    ) -> None:
        self.source, self.views, self.readings = source, list(views), readings
        self.schema = push_schema(source)
        self._names = columns_of(source, source.schema)
        self._native: _core.PushCoder | None = None
        self._texts: list[tuple[int, int, str]] = []  # view, its raw column, name: where that is a string
        at = {name: i for i, name in enumerate(self._names)}
        raws = [live.computer.raw_columns() for live in self.views]
        if any(raw is None for raw in raws):
            return  # values that only Python can make
        required = required_columns(source, {k for live in views for k in live.computer.view.join_keys})

        def role(name: str | None) -> int:
            return -1 if name is None else at[name]

        self._native = _core.PushCoder(
            columns=[(name, source.schema[name], name in required) for name in self._names],
            time=role(source.timestamp),
            created=role(source.created),
            event_id=role(source.event_id),
            deleted=role(source.deleted),
            seed=key_seed,
            views=[
                (
                    live.computer.events,
                    [at[name] for name in live.computer.view.join_keys],
                    [at[name] for name in raw or ()],
                    live.computer.n_values,
                )
                for live, raw in zip(self.views, raws)
            ],
        )
        for v, raw in enumerate(raws):
            self._texts += [(v, i, n) for i, n in enumerate(raw or ()) if source.schema[n] == "string"]
        self.sync()

    def code(self, rows: Any) -> _core.PushedRows | None:
        """The events of a push, checked and coded; None where only the slow path can tell."""
        return None if self._native is None else self._native.code(rows)

    def sync(self) -> None:
        """Learn the texts that the views have met since."""
        for view, raw, name in self._texts:
            assert self._native is not None
            texts = self.views[view].computer.texts(name)
            known = self._native.n_texts(view, raw)
            if len(texts) > known:
                self._native.add_texts(view, raw, texts[known:])

    def keys(self, view: int, rows: _core.PushedRows) -> NDArray[np.uint64]:
        """The distinct entity keys uint64[k, 2] of a view, by its place in `views`."""
        assert self._native is not None
        keys = self._native.keys(view, rows)
        return keys if rows.n == 1 else np.unique(keys, axis=0)

    def append(self, view: int, rows: _core.PushedRows, arrival_us: int) -> None:
        """Add the events to a view, by its place in `views`."""
        native = self._native
        assert native is not None
        self.views[view].computer.append_coded(
            lambda: native.append(view, rows, arrival_us), lambda name: self._column(name, rows)
        )

    def _column(self, name: str, rows: _core.PushedRows) -> SourceColumn:
        assert self._native is not None
        values, valid = self._native.column(self._names.index(name), rows)
        dtype = self.source.schema[name]
        if dtype != "string":
            return SourceColumn(dtype, values, valid)
        texts = list(dict.fromkeys(values))
        at = {text: code for code, text in enumerate(texts)}
        return SourceColumn(dtype, np.array([at[text] for text in values], np.int64), valid, texts)

    def message(self, rows: _core.PushedRows) -> bytes:
        """The events as an Arrow message with the schema `push_schema`."""
        assert self._native is not None
        at = {name: i for i, name in enumerate(self._names)}
        arrays = []
        for name, dtype in self.source.schema.items():
            values, valid = self._native.column(at[name], rows)
            kind = ARROW_TYPES[dtype]
            if dtype == "string":
                arrays.append(pa.array(values, kind))
                continue
            mask = None if valid is None else ~valid
            made = pa.array(values, mask=mask)
            arrays.append(made.view(kind) if dtype in ("timestamp", "duration") else made)
        message: bytes = pa.RecordBatch.from_arrays(arrays, schema=self.schema).serialize().to_pybytes()
        return message
