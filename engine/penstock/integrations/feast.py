"""An existing Feast repository, read and served by Penstock.

`FeastRepository.open` turns its definitions into Penstock's and gives historical joins, materialisation into
Penstock's own online store, and online reads from either that store or Feast's own Redis or SQLite. It can
also write rows where Feast's readers look for them. Where Feast and Penstock differ, Penstock's rules hold:
every entity row stays, in order; ttl is one rule, both ends inclusive, online too; a null key matches
nothing. A declared Float32 over a column of doubles is a double here, as it is in Feast's own training
frames.

Feast itself is imported only to read Python files that `feast apply` has not recorded. Not thread-safe, but
for `store`, which is a `FeatureStore` like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from penstock.clock import SystemClock
from penstock.errors import FeatureNameCollisionError, InvalidArgumentError, NotFoundError
from penstock.features import offline
from penstock.features.compute import PRESENT
from penstock.features.definitions import ViewProjection, check_unversioned
from penstock.features.materialize import MaterializeReport
from penstock.features.progress_bars import Progress
from penstock.features.retrieval import OnlineResult, RetrievalJob
from penstock.features.sources import SourceColumn
from penstock.features.store import FeatureStore
from penstock.features.times import Time, to_us
from penstock.integrations import feast_on_demand
from penstock.integrations.feast_online import FeastOnlineStore, RowWrite, open_online_store
from penstock.integrations.feast_reading import (
    FeastOnlineResult,
    ReadPlan,
    compile_reads,
    encoded_keys,
    key_encoder,
    python_values,
    read_rows,
)
from penstock.integrations.feast_registry import (
    FeastDefinitions,
    FeastView,
    OnDemandView,
    read_definitions,
)
from penstock.integrations.feast_wire import (
    T_INT64,
    T_STRING,
    encode_value,
)

_MAX_PLANS = 256
_WRITE_ROWS = 5_000  # of one pipeline


@dataclass(frozen=True)
class _Asked:
    """A feature list, taken apart."""

    refs: list[str]  # stored features, in order
    aliases: dict[str, ViewProjection]
    on_demand: list[tuple[OnDemandView, str]]

    def items(self) -> list[Any]:
        """What a FeatureStore takes for `refs`."""
        return [_item(ref, self.aliases) for ref in self.refs]


def _item(ref: str, aliases: Mapping[str, ViewProjection]) -> Any:
    owner, short = ref.split(":")
    return aliases[owner][[short]] if owner in aliases else ref


class FeastRepository:
    """A Feast repository.

    Attributes:
        definitions: what was read, and what was refused with the reason.
        store: a Penstock feature store over its views and services; models can be served from it.
    """

    def __init__(self, definitions: FeastDefinitions, clock: SystemClock | None = None) -> None:
        self.definitions = definitions
        self._clock = SystemClock() if clock is None else clock
        self.store = FeatureStore(definitions.repo, clock=clock)
        self._online: FeastOnlineStore | None = None
        self._read_plans: dict[Any, ReadPlan] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        data_dir: str | Path | None = None,
        clock: SystemClock | None = None,
        definitions: str = "auto",
    ) -> FeastRepository:
        """Read a Feast repository.

        Args:
            path: its folder, with `feature_store.yaml`.
            data_dir: where Penstock keeps its registry and online store; `.penstock` in the folder by
                default.
            clock: gives `now` where a call names none.
            definitions: "registry": what `feast apply` recorded; "files": the Python files, read by an
                installed Feast; "auto": the registry if there is one.

        Raises:
            ConfigError: it is no Feast repository, or neither way of reading it is open.
            DefinitionError: the definitions are corrupt, or have names that Penstock cannot use.
        """
        base = Path(path)
        where = base / ".penstock" if data_dir is None else Path(data_dir)
        return cls(read_definitions(base, where.resolve(), definitions), clock)

    def __enter__(self) -> FeastRepository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of both online stores."""
        self.store.close()
        if self._online is not None:
            self._online.close()
            self._online = None

    @property
    def refused(self) -> Mapping[str, str]:
        """Why a view, "view:feature" or service of the repository cannot be used, by name."""
        return self.definitions.refused

    # Historical

    def get_historical_features(
        self,
        entity_df: Any = None,
        features: str | Sequence[str] = (),
        full_feature_names: bool = False,
        *,
        start_date: Time | None = None,
        end_date: Time | None = None,
        filter_by_created_timestamp: bool = False,
        with_status: bool = False,
        with_age: bool = False,
    ) -> RetrievalJob:
        """Features as they were at each row's time; see `FeatureStore.get_historical_features`.

        Args:
            entity_df: a table, a SELECT, or None for a snapshot; on-demand features need a table.
            features: "view:feature" names, those of on-demand views too, or the name of a service. On-demand
                features have neither status nor age.

        Raises:
            NotFoundError, InvalidArgumentError: an unknown or refused name, or a missing column.
            FeatureNameCollisionError: two columns with one name.
        """
        asked = self._asked(features)

        def join(entities: Any, items: Sequence[Any], full: bool, **more: Any) -> RetrievalJob:
            cut = filter_by_created_timestamp
            return self.store.get_historical_features(
                entities, items, full, filter_by_created_timestamp=cut, **more
            )

        columns = {"with_status": with_status, "with_age": with_age}
        if not asked.on_demand:
            dates = {"start_date": start_date, "end_date": end_date}
            return join(entity_df, asked.items(), full_feature_names, **columns, **dates)
        if entity_df is None or isinstance(entity_df, str):
            raise InvalidArgumentError(f"entity_df is {entity_df!r}; on-demand features need a table")
        table = offline.entity_table(entity_df)

        def compute() -> pa.Table:
            result = None
            if asked.refs:
                result = join(table, asked.items(), full_feature_names, **columns).to_arrow()
            outputs: dict[str, dict[str, pa.Array]] = {}
            for view, feature in asked.on_demand:
                if view.name not in outputs:
                    refs = [ref for ref in view.refs if self._base(ref, view.aliases) not in self.refused]
                    items = [_item(ref, view.aliases) for ref in refs]
                    joined = join(table, items, True).to_arrow() if refs else table
                    result = joined.select(table.column_names) if result is None else result
                    inputs = feast_on_demand.input_table(view, refs, joined, table)
                    outputs[view.name] = feast_on_demand.run(view, inputs)
                assert result is not None
                name = f"{view.name}__{feature}" if full_feature_names else feature
                if name in result.column_names:
                    raise FeatureNameCollisionError(
                        f"feature '{view.name}:{feature}' would be named '{name}', which is a column "
                        "already; use full_feature_names=True"
                    )
                result = result.append_column(name, outputs[view.name][feature])
            return result

        return RetrievalJob(compute)

    # Online

    def materialize(
        self, start: Time, end: Time, *, views: Sequence[str] | None = None, progress: Progress | None = None
    ) -> MaterializeReport:
        """Write the row that every key has at `end` into Penstock's online store."""
        return self.store.materialize(start, end, views=views, progress=progress)

    def materialize_incremental(
        self, end: Time, *, views: Sequence[str] | None = None, progress: Progress | None = None
    ) -> MaterializeReport:
        """Bring the rows of Penstock's online store up to `end`."""
        return self.store.materialize_incremental(end, views=views, progress=progress)

    def get_online_features(
        self,
        features: str | Sequence[str],
        entity_rows: Any,
        *,
        origin: str = "store",
        now: Time | None = None,
        full_feature_names: bool = False,
    ) -> OnlineResult | FeastOnlineResult:
        """Features at `now`.

        Args:
            features: "view:feature" names, or the name of a service. Feast's store also has what Penstock
                cannot compute: lists, bytes, and views of other sources.
            entity_rows: list of dicts, dict of lists or scalars, pandas, polars or Arrow table.
            origin: "store": Penstock's, with the bits of a historical join; "feast": what Feast's online
                store holds, in the types that Feast declares.
            now: request time; the clock's by default.

        Raises:
            InvalidArgumentError: an on-demand feature, which runs offline only, or another wrong argument.
            UnavailableError: the online store failed.
        """
        if origin not in ("store", "feast"):
            raise InvalidArgumentError(f"origin is {origin!r}; expected 'store' or 'feast'")
        if origin == "feast":
            now_us = self._clock.now_us() if now is None else to_us(now, "now")
            plan = self._read_plan(features, full_feature_names)
            return read_rows(plan, self._online_store(), entity_rows, now_us)
        asked = self._stored_only(features)
        return self.store.get_online_features(
            asked.items(), entity_rows, now=now, full_feature_names=full_feature_names
        )

    def _read_plan(self, features: Any, full_feature_names: bool) -> ReadPlan:
        listed = isinstance(features, list | tuple) and all(isinstance(ref, str) for ref in features)
        key = (tuple(features) if listed else str(features), full_feature_names)
        known = listed or isinstance(features, str)
        if known and key in self._read_plans:
            return self._read_plans[key]
        asked = self._stored_only(features, stored=True)
        views = self.definitions.views
        plan = compile_reads(asked.refs, asked.aliases, views, self._key_types, full_feature_names)
        if known:
            if len(self._read_plans) >= _MAX_PLANS:
                self._read_plans.clear()
            self._read_plans[key] = plan
        return plan

    def _stored_only(self, features: Any, *, stored: bool = False) -> _Asked:
        asked = self._asked(features, stored=stored)
        for view, feature in asked.on_demand:
            raise InvalidArgumentError(
                f"'{view.name}:{feature}' is an on-demand feature, an opaque Python function: it runs in "
                "historical joins only; compute it from its inputs, or write it as a Penstock expression"
            )
        return asked

    def write_online(self, end: Time, *, views: Sequence[str] | None = None) -> dict[str, int]:
        """Write the row that every key has at `end` into Feast's own online store, for Feast's readers.

        Rows that are expired at `end` are left out; a newer row there stays.

        Args:
            end: time of the rows.
            views: names; all that Penstock can compute by default.

        Returns:
            Rows written, by view.

        Raises:
            NotFoundError, InvalidArgumentError: an unknown view, or a type that cannot be written.
            UnavailableError: the online store failed; rows written before stay.
        """
        end_us = to_us(end, "end")
        names = list(self.store.views if views is None else views)
        for name in names:
            self._known(name, f"view '{name}'")
        return {name: self._write_view(name, end_us) for name in names}

    def _write_view(self, name: str, end_us: int) -> int:
        feast, computer = self.definitions.views[name], self.store.computer(name)
        words, joins = computer.entities()
        found = computer.rows_at(words, np.full(len(words), end_us, np.int64))
        kept = np.flatnonzero(found.status == PRESENT)
        types = self._key_types(feast)
        cells = [python_values(column.take(kept)) for column in joins]
        keys = encoded_keys(key_encoder(types), cells, len(kept))
        values: dict[str, list[bytes]] = {}
        for (feature, dtype), (column, valid) in zip(computer.schema, found.columns):
            if dtype == "timestamp":
                column = column // 1_000_000  # Feast's timestamps are seconds
            texts = computer.dictionaries.get(feature)
            cell = python_values(SourceColumn(dtype, column[kept], valid[kept], texts))
            values[feature] = [encode_value(feast.types[feature], value) for value in cell]
        written = 0
        for start in range(0, len(kept), _WRITE_ROWS):
            rows = []
            for i in range(start, min(start + _WRITE_ROWS, len(kept))):
                key = keys[i]
                assert key is not None
                event_us = int(found.meta[kept[i], 2])
                rows.append(RowWrite(key, event_us, {feature: cell[i] for feature, cell in values.items()}))
            written += self._online_store().write(feast.online_name, rows)
        return written

    # Names

    def _online_store(self) -> FeastOnlineStore:
        if self._online is None:
            self._online = open_online_store(self.definitions.config, self.definitions.repo.path)
        return self._online

    def _asked(self, features: Any, *, stored: bool = False) -> _Asked:
        """Take a feature list apart; `stored`: what Feast's online store has is enough."""
        if isinstance(features, str):
            service = self.definitions.services.get(features)
            if service is None:
                known = ", ".join(sorted(self.definitions.services)) or "none"
                raise NotFoundError(f"service '{features}' is unknown; the services are {known}")
            if features in self.refused:
                raise InvalidArgumentError(f"service '{features}' {self.refused[features]}")
            features, aliases = service.refs, dict(service.aliases)
        else:
            aliases = {}
        if not isinstance(features, Iterable):
            raise InvalidArgumentError(
                f"features is {features!r}; expected a service or 'view:feature' names"
            )
        asked = _Asked([], aliases, [])
        for ref in features:
            check_unversioned(ref)
            parts = ref.split(":") if isinstance(ref, str) else []
            if len(parts) != 2 or not all(parts):
                raise InvalidArgumentError(f"feature is {ref!r}; expected 'view:feature'")
            owner, short = parts
            view = self.definitions.on_demand.get(owner)
            if view is None:
                asked.refs.append(ref)
            elif short not in view.outputs:
                raise NotFoundError(f"'{ref}': no such feature; expected one of {', '.join(view.outputs)}")
            else:
                asked.on_demand.append((view, short))
        if not asked.refs and not asked.on_demand:
            raise InvalidArgumentError("features is empty; expected at least one 'view:feature'")
        for ref in asked.refs:
            base = self._base(ref, aliases)
            owner, short = base.split(":")
            if not stored:
                self._known(owner, f"'{ref}': view '{owner}'")
                self._known(base, f"'{ref}'")
            elif owner not in self.definitions.views or short not in self.definitions.views[owner].types:
                raise NotFoundError(f"'{ref}' is no feature of a view in Feast's online store")
        for view, short in asked.on_demand:
            for ref in view.refs:
                owner = self._base(ref, view.aliases).split(":")[0]
                self._known(owner, f"'{view.name}:{short}' reads view '{owner}', which")
        return asked

    def _base(self, ref: str, aliases: Mapping[str, ViewProjection]) -> str:
        owner, short = ref.split(":")
        return f"{aliases[owner].view.name if owner in aliases else owner}:{short}"

    def _known(self, name: str, what: str) -> None:
        if name in self.refused:
            raise InvalidArgumentError(f"{what} {self.refused[name]}")
        if ":" not in name and name not in self.definitions.views:
            known = ", ".join(sorted(self.definitions.views)) or "none"
            raise NotFoundError(f"{what} is unknown; the views are {known}")

    def _feast_view(self, owner: str, aliases: Mapping[str, ViewProjection]) -> FeastView:
        return self.definitions.views[aliases[owner].view.name if owner in aliases else owner]

    def _key_types(self, view: FeastView) -> dict[str, int]:
        """Value types of the join keys; those that Feast has not recorded come from the source."""
        types = dict(view.key_types)
        if not all(types.values()):
            if view.name not in self.store.views:
                raise InvalidArgumentError(
                    f"view '{view.name}': Feast has not recorded the types of its join keys; "
                    "run `feast apply`"
                )
            dtypes = self.store.computer(view.name).join_dtypes
            inferred = (T_STRING if dtype == "string" else T_INT64 for dtype in dtypes)
            types = {key: kind or guess for (key, kind), guess in zip(types.items(), inferred)}
        return types


def import_definitions(path: str | Path, *, definitions: str = "auto") -> dict[str, Any]:
    """The definitions of a Feast repository, for the Python file of a Penstock repository.

    With `globals().update(import_definitions(Path(__file__).parent / "feast_repo"))` the Feast repository's
    views and services are the Penstock repository's own: to serve models from, to apply, and to list features
    of beside others. Paths of sources become absolute; what is refused is left out.

    Args:
        path: folder of the Feast repository.
        definitions: as for `FeastRepository.open`.

    Returns:
        Views and services by a name for each.

    Raises:
        ConfigError, DefinitionError: as `FeastRepository.open`.
    """
    repo = read_definitions(Path(path), Path(path), definitions, absolute=True).repo
    views = {f"feast_view_{name}": view for name, view in repo.views.items()}
    return {**views, **{f"feast_service_{name}": service for name, service in repo.services.items()}}


__all__ = ["FeastOnlineResult", "FeastRepository", "import_definitions"]
