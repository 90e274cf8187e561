"""A feature list read again and again into float32 rows: the fast form of `get_online_features`.

A reader keeps the rows that it has read in feature caches of its store (`ReaderCaches`), one a view, which
all readers share. A push empties its keys there once it is visible, so the next read computes them anew;
another reading of a source takes other caches. Rows that no cache has are computed by the native core from
the views' events; where the rows lie in a store on another machine, they are asked for there first. The bits
are those of `get_online_features(...).to_numpy()`. Any thread may read.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from penstock import _core
from penstock.clock import SystemClock
from penstock.errors import InvalidArgumentError
from penstock.features import retrieval
from penstock.features.live import LiveView, LiveViews
from penstock.features.plan import ServicePlan
from penstock.features.times import Time, to_us

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Loaded = tuple[NDArray[np.uint64], NDArray[np.int64]]
    Load = Callable[[LiveView, NDArray[np.uint64], NDArray[np.int64]], Loaded]

_LOOK_NS = 1_000_000  # so often a read looks for what other processes have pushed
_NO_KEYS = np.zeros((0, 2), np.uint64)


class ReaderCaches:
    """The rows that the readers of a store have read, by view. Any thread."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        # By reading: whoever prepares over one that was replaced must not take the cache of another.
        self._caches: weakref.WeakKeyDictionary[LiveView, _core.FeatureCache] = weakref.WeakKeyDictionary()
        self.stamp = 0  # rises before a row that was touched may be read

    def of(self, live: LiveView) -> _core.FeatureCache:
        """The cache of a view's reading; another reading of the view gets a new one."""
        with self._lock:
            found = self._caches.get(live)
            if found is None:
                found = self._caches[live] = _core.FeatureCache(self._capacity, live.row_words)
            return found

    def touched(self, live: LiveView, keys: NDArray[np.uint64]) -> None:
        """Rows of these keys have changed: none that was read before is given any more."""
        with self._lock:
            self.stamp += 1
            found = self._caches.get(live)
            if found is not None and len(keys):
                found.discard_many(np.ascontiguousarray(keys), self.stamp)


class OnlineReader:
    """Reads one feature list; see `FeatureStore.online_reader`.

    Attributes:
        names: of the columns, in order.
    """

    def __init__(
        self, plan: Callable[[], ServicePlan], live: LiveViews, caches: ReaderCaches, load: Load | None,
        look: Callable[[LiveView], object], clock: SystemClock, seed: bytes,
    ) -> None:  # fmt: skip
        """`load` is asked for rows that no cache has; None: they are computed."""
        self._plan_of, self._live, self._caches, self._load_rows = plan, live, caches, load
        self._look, self._clock, self._seed = look, clock, seed
        self._looked_ns = 0
        self._prepared: _Prepared | None = None
        self._packers = threading.local()
        self.names: tuple[str, ...] = self._prepare().plan.output_names

    def read(
        self, entity_rows: Any, out: NDArray[np.float32] | None = None, *, now: Time | None = None
    ) -> NDArray[np.float32]:
        """Features at `now` as float32[n, features]: NaN where null, a string as its dictionary code.

        Args:
            entity_rows: dict of columns (lists or arrays) or scalars (one row) with the join keys and the
                request inputs; also what `get_online_features` takes.
            out: array to fill and return; C-contiguous float32 of that shape.
            now: request time; the clock's by default.

        Raises:
            InvalidArgumentError: a column or value that is wrong, by name.
            StoreError: the online store failed; `out` may be half-filled.
        """
        prepared = self._prepared
        if prepared is None or prepared.readings is not self._live.readings:
            prepared = self._prepare()
        clock = self._clock
        now_us = clock.now_us() if now is None else to_us(now, "now")
        mono_ns = clock.mono_ns()
        if mono_ns - self._looked_ns > _LOOK_NS and prepared.pushed:
            self._looked_ns = mono_ns
            for view in prepared.pushed:
                self._look(view)
            if prepared.readings is not self._live.readings:
                prepared = self._prepare()
        if type(entity_rows) is not dict:
            entity_rows = _columns(entity_rows)
        params = self._pack(prepared, entity_rows)
        try:
            stamp = self._caches.stamp  # before the rows are computed: a push meanwhile has a greater one
            load = None if self._load_rows is None else prepared.loader(self, now_us, mono_ns)
            return prepared.native.read(params, now_us, mono_ns, out, stamp, load)
        except ValueError as error:
            if isinstance(error, InvalidArgumentError):
                raise
            raise InvalidArgumentError(str(error)) from None

    def _pack(self, prepared: _Prepared, rows: Mapping[str, Any]) -> bytes:
        if prepared.inputs:
            given = {name: value for name, value in rows.items() if name in prepared.inputs}
            rows = {name: value for name, value in rows.items() if name not in prepared.inputs}
        else:
            given = None
        try:
            packer = self._packers.packer
        except AttributeError:
            packer = self._packers.packer = msgpack.Packer(default=_plain)
        try:
            packed: bytes = packer.pack(("-", rows, given))
            return packed
        except (OverflowError, TypeError, ValueError) as error:
            packer.reset()
            raise InvalidArgumentError(f"entity_rows cannot be read: {error}") from error

    def _prepare(self) -> _Prepared:
        plan = self._plan_of()
        for _, dtype in plan.inputs:
            if dtype == "string":
                raise InvalidArgumentError(
                    "a reader takes no text as a request input; use get_online_features"
                )
        while True:
            readings = self._live.readings
            views = [self._live.view(view.name) for view in plan.views]
            if readings is self._live.readings:
                break
        computes = self._load_rows is None
        self._prepared = prepared = _Prepared(plan, views, readings, self._caches, self._seed, computes)
        return prepared

    def _load(
        self, prepared: _Prepared, keys: list[NDArray[np.uint64]], now_us: int, mono_ns: int
    ) -> list[Loaded]:
        assert self._load_rows is not None
        loaded: list[Loaded] = []
        for live, cache, asked in zip(prepared.views, prepared.caches, keys):
            if not len(asked):
                loaded.append((np.zeros((0, live.row_words), np.uint64), np.zeros((0, 4), np.int64)))
                continue
            stamp = self._caches.stamp  # before the load: a push meanwhile has a greater one
            rows, meta = self._load_rows(live, asked, np.full(len(asked), now_us, np.int64))
            cache.put_many(asked, rows, meta, stamp, mono_ns)
            loaded.append((rows, meta))
        return loaded


class _Prepared:
    """A plan over one reading of its views, in native form."""

    def __init__(
        self, plan: ServicePlan, views: list[LiveView], readings: object, caches: ReaderCaches, seed: bytes,
        computes: bool,
    ) -> None:  # fmt: skip
        self.plan, self.views, self.readings = plan, views, readings
        self.caches = [caches.of(live) for live in views]
        self.pushed = [live for live in views if live.source is not None]
        self.inputs = frozenset(name for name, _ in plan.inputs)
        self.native = _core.FeatureReader(
            {
                "entities": list(plan.entities),
                "views": [
                    {
                        "name": name,
                        "rows_of": live.computer.view.name,
                        "cache": cache,
                        "fields": live.computer.schema,
                        "key_columns": list(positions),
                    }
                    for name, live, cache, positions in zip(
                        plan.view_names, views, self.caches, plan.view_keys
                    )
                ],
                "request_source": plan.request_name or "",
                "inputs": list(plan.inputs),
                "program": plan.program,
                "key_seed": seed,
                "error_on_missing": False,
            },
            [live.computer.events for live in views] if computes else [],
        )

    def loader(
        self, reader: OnlineReader, now_us: int, mono_ns: int
    ) -> Callable[[list[NDArray[np.uint64]]], list[Loaded]]:
        return lambda keys: reader._load(self, keys, now_us, mono_ns)


def _columns(entity_rows: Any) -> dict[str, Any]:
    table, _ = retrieval.entity_row_table(entity_rows)
    return {name: table[name].to_pylist() for name in table.column_names}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "isoformat"):
        return to_us(value, "entity_rows: a time")
    raise TypeError(f"a {type(value).__name__} is no value")
