"""The views of an open store, each over one reading of its source.

A reading is replaced as a whole: a reader keeps the one that it took. Only pushed events are added to one, by
`pushes`, which holds `locked` meanwhile. The layout of a view's rows stays what it was when the view was
first read. All methods may be called from any thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from penstock.errors import (
    FailedPreconditionError,
    MissingColumnError,
    NotFoundError,
    UnavailableError,
)
from penstock.features.compute import ViewComputer, columns_of_view, stored_texts
from penstock.features.definitions import FeatureView
from penstock.features.event_log import EventLog
from penstock.features.expressions import Expr, walk
from penstock.features.fit import fit_key, fit_tables, fit_view, rank_arguments
from penstock.features.program import Distribution
from penstock.features.push_table import push_stamp, read_file_source, read_push_source
from penstock.features.registry import Registry
from penstock.features.repo import Repo
from penstock.features.source_definitions import PushSource
from penstock.features.source_reading import SourceTooLarge, source_stamp
from penstock.features.sources import SourceTable
from penstock.features.streamed import StreamedView
from penstock.features.view_events import ViewEvents

_READ_TRIES = 5


_ROW_FORMAT = 2  # of the online store's rows; another one gets other view numbers


@dataclass(eq=False)
class LiveView:
    """A view as one reading of its source gives it.

    Attributes:
        computer: its rows at any time.
        tag: stamp of the source when it was read.
        number: the view's number in the online store.
        source: its name, if events are pushed to it.
        sequence: number of the newest pushed event that `computer` has; changes under `LiveViews.locked`.
    """

    computer: ViewComputer
    tag: str
    number: int
    source: str | None = None
    sequence: int = 0

    @property
    def row_words(self) -> int:
        return self.computer.row_schema.row_words


@dataclass(frozen=True)
class Reading:
    """A view over a new reading, with distributions that no registry knows yet, and the source's schema.

    Where the source is too large to be held, `computer` has no events and `held` is false.
    """

    computer: ViewComputer
    tag: str
    sequence: int
    fits: dict[str, Distribution]
    schema: dict[str, str]
    held: bool = True


class LiveViews:
    """Views by name, read when they are first used."""

    def __init__(self, repo: Repo, registry: Registry, log: EventLog) -> None:
        self._repo = repo
        self._registry = registry
        self._log = log
        self.settle: Callable[[], None] = lambda: None  # waits until what was pushed is in the log
        self._changing = threading.RLock()  # one thread reads sources or replaces readings
        self._live: dict[str, LiveView] = {}  # replaced, never changed in place
        self._too_large: dict[str, str] = {}  # stamps of sources that a join reads in batches
        self._not_held: set[int] = set()

    @property
    def readings(self) -> object:
        """Another object whenever a reading was made or replaced."""
        return self._live

    def locked(self) -> contextlib.AbstractContextManager[object]:
        """Keep other threads from replacing readings; reads go on."""
        return self._changing

    def view(self, name: str) -> LiveView:
        """The newest reading of a view.

        Raises:
            NotFoundError: an unknown name.
            InvalidArgumentError: its source is missing or corrupt, or does not fit the view.
        """
        live = self._live.get(name)
        if live is not None:
            return live
        if name not in self._repo.views:
            known = ", ".join(sorted(self._repo.views)) or "none"
            raise NotFoundError(f"view '{name}' is unknown; the views are {known}")
        with self._changing:
            if name not in self._live:
                self._live = {**self._live, name: self._build(self._repo.views[name])}
            return self._live[name]

    def for_join(self, name: str) -> ViewComputer | StreamedView:
        """A view for a historical join: as it is held, or what reads it in batches if it is too large.

        Raises:
            NotFoundError, InvalidArgumentError: as `view`.
        """
        live, view = self._live.get(name), self._repo.views.get(name)
        if live is not None or view is None:
            return self.view(name).computer
        with self._changing:
            if name not in self._live and self._too_large.get(name) != self._stamp(view):
                try:
                    built = self._build(view, self._repo.join.memory_bytes)
                    self._live = {**self._live, name: built}
                except SourceTooLarge:
                    self._too_large[name] = self._stamp(view)
            if name in self._live:
                return self._live[name].computer
            return self._streamed(view)

    def _streamed(self, view: FeatureView) -> StreamedView:
        """A view that is read in batches; its distributions are in the registry then."""
        opened = partial(self._open, view, self._registry.state.recorded("sources").get(view.source.key))
        fitted = self._fitted(view)
        if fitted is None:
            made = fit_tables(view, opened().tables, self._repo.fit_until_us)
            named = {fit_key(view, argument): distribution for argument, distribution in made.items()}
            self._registry.record_fits(named, self._repo.fit_until_us, refit=False)
            fitted = self._fitted(view) or {}
        return StreamedView(
            view, opened, partial(self._stamp, view), partial(self._extend, view), self._repo.join,
            self._registry.seed, fitted,
        )  # fmt: skip

    def _pass_over(self, view: FeatureView, only_look: bool) -> Reading:
        """What a reading says of a source, its events aside. As `_read`, and errors too."""
        for _ in range(_READ_TRIES):
            stamp = self._stamp(view)
            events = self._open(view, None)
            fits = fit_tables(view, events.tables, self._repo.fit_until_us)
            for _ in events.read():
                pass
            if self._stamp(view) == stamp and (only_look or self._extend(view, events.dictionaries)):
                table = events.no_events()
                computer = ViewComputer(view, table, self._registry.seed, fits)
                return Reading(computer, stamp, 0, fits, table.found, False)
        raise UnavailableError(f"source '{view.source.name}' changes while it is read")

    def _open(self, view: FeatureView, recorded: Mapping[str, str] | None) -> ViewEvents:
        if isinstance(view.source, PushSource):
            self.settle()
        with _says_who_reads(view):
            return ViewEvents(
                view, self._repo.path, self._log, self._registry.seed, self._given(view), recorded,
                self._repo.join.memory_bytes,
            )  # fmt: skip

    def _given(self, view: FeatureView) -> dict[str, list[str]]:
        """The codes that the registry has of a view's stored texts, by source column."""
        known = self._registry.state.dictionaries.get(view.source.name, {})
        plain = stored_texts(view)
        return {name: texts for name, texts in known.items() if name in plain}

    def _extend(self, view: FeatureView, texts: Mapping[str, list[str]]) -> bool:
        with self._changing:
            return self._registry.extend_dictionaries(view.source.name, texts)

    def numbers(self) -> set[int]:
        """The numbers of all views that are read, and of those that the last `adopt` could not hold."""
        return {live.number for live in self._live.values()} | self._not_held

    def fed_by(self, source: str) -> list[LiveView]:
        """The views whose events are pushed to a source; those not read yet are read.

        Raises:
            NotFoundError: no view has a push source of that name.
        """
        names = [
            name
            for name, view in self._repo.views.items()
            if isinstance(view.source, PushSource) and view.source.name == source
        ]
        if not names:
            known = ", ".join(sorted(self.push_sources())) or "none"
            raise NotFoundError(f"push source '{source}' is unknown; the push sources are {known}")
        return [self.view(name) for name in names]

    def push_sources(self) -> dict[str, PushSource]:
        """The push sources of all views, by name."""
        return self._repo.push_sources

    def reread_source(self, source: str) -> list[LiveView]:
        """Replace the readings of the views on a source."""
        with self._changing:
            fresh = {}
            for name, live in self._live.items():
                if self._repo.views[name].source.name == source:
                    fresh[name] = self._build(self._repo.views[name])
                    _same_layout(live.computer, fresh[name].computer)
            self._live = {**self._live, **fresh}
            return list(fresh.values())

    def on_source(self, source: str) -> list[LiveView]:
        """The views on a source, of any kind; those not read yet are read."""
        names = [name for name, view in self._repo.views.items() if view.source.name == source]
        return [self.view(name) for name in names]

    def whole_table(self, view: str, columns: Iterable[str]) -> SourceTable:
        """The history of a view's source as it is now, with these columns."""
        source = self._repo.views[view].source
        seed = self._registry.seed
        if isinstance(source, PushSource):
            self.settle()
            return read_push_source(source, self._repo.path, self._log, {}, columns, seed)[0]
        return read_file_source(source, self._repo.path, self._log, {}, columns, seed)

    def refresh(self) -> bool:
        """Replace the readings whose source has changed; on an error none. Returns whether any had."""
        with self._changing:
            fresh = {}
            for name, live in self._live.items():
                if self._stamp(self._repo.views[name]) != live.tag:
                    fresh[name] = self._build(self._repo.views[name])
                    _same_layout(live.computer, fresh[name].computer)
            self._live = {**self._live, **fresh}
            return bool(fresh)

    def reread(self) -> None:
        """Replace every reading, whether its source has changed or not; on an error none."""
        with self._changing:
            fresh = {}
            for name, live in self._live.items():
                fresh[name] = self._build(self._repo.views[name])
                _same_layout(live.computer, fresh[name].computer)
            self._live = {**self._live, **fresh}

    def rebuild(self, *, only_look: bool = False) -> dict[str, Reading]:
        """Read every view and fit its distributions anew, without any effect yet but on the dictionaries.

        The sources are not held to the schemas that were recorded, for it is `apply` that records them. With
        `only_look` the codes of new strings are not recorded either. A view that is not read yet and whose
        source is too large for a join is only passed over.
        """
        found = {}
        for name, view in self._repo.views.items():
            most = None if name in self._live else self._repo.join.memory_bytes
            try:
                table, tag, sequence = self._read(view, None, only_look, most)
            except SourceTooLarge:
                found[name] = self._pass_over(view, only_look)
                continue
            fits = fit_view(view, table, self._repo.fit_until_us)
            computer = ViewComputer(view, table, self._registry.seed, fits)
            found[name] = Reading(computer, tag, sequence, fits, table.found)
            if name in self._live:
                _same_layout(self._live[name].computer, found[name].computer)
        return found

    def adopt(self, fresh: Mapping[str, Reading]) -> None:
        """Record the distributions of all readings, and replace the ones before."""
        named = {
            fit_key(self._repo.views[name], argument): distribution
            for name, reading in fresh.items()
            for argument, distribution in reading.fits.items()
        }
        self._registry.record_fits(named, self._repo.fit_until_us, refit=True)
        numbered = {name: self._number(r.computer, r.tag, r.sequence) for name, r in fresh.items()}
        self._live = {name: live for name, live in numbered.items() if fresh[name].held}
        self._too_large = {name: reading.tag for name, reading in fresh.items() if not reading.held}
        self._not_held = {numbered[name].number for name in self._too_large}

    def _build(self, view: FeatureView, most_bytes: int | None = None) -> LiveView:
        recorded = self._registry.state.recorded("sources").get(view.source.key)
        table, tag, sequence = self._read(view, recorded, most_bytes=most_bytes)
        fitted = self._fitted(view)
        if fitted is None:
            made = fit_view(view, table, self._repo.fit_until_us)
            named = {fit_key(view, argument): distribution for argument, distribution in made.items()}
            self._registry.record_fits(named, self._repo.fit_until_us, refit=False)
            fitted = self._fitted(view) or {}
        return self._number(ViewComputer(view, table, self._registry.seed, fitted), tag, sequence)

    def _fitted(self, view: FeatureView) -> dict[str, Distribution] | None:
        """The recorded distributions of a view; None if one is not recorded."""
        found: dict[str, Distribution] = {}
        for argument in rank_arguments(view):
            distribution = self._registry.distribution(fit_key(view, argument))
            if distribution is None:
                return None
            found[argument] = distribution
        return found

    def _stamp(self, view: FeatureView) -> str:
        try:
            if isinstance(view.source, PushSource):
                return push_stamp(view.source, self._repo.path)
            # Stored rows know nothing of what was erased of files since, so they must not count.
            cut = self._log.cut(view.source.name)
            stamp = source_stamp(view.source, self._repo.path)
            return f"{stamp}:{cut}" if cut else stamp
        except OSError as error:
            raise UnavailableError(f"source '{view.source.name}' cannot be read: {error}") from error

    def _read(
        self,
        view: FeatureView,
        recorded: Mapping[str, str] | None,
        only_look: bool = False,
        most_bytes: int | None = None,
    ) -> tuple[SourceTable, str, int]:
        """The view's source, held to the recorded schema, its stamp, and the newest pushed event's number.

        The codes of its stored strings are in the registry then, but with `only_look`. SourceTooLarge where
        its columns take more than `most_bytes`.
        """
        source = view.source
        columns = columns_of_view(view)
        plain = stored_texts(view)
        if isinstance(source, PushSource):
            self.settle()
        for _ in range(_READ_TRIES):
            stamp = self._stamp(view)
            given = self._given(view)
            sequence = 0
            with _says_who_reads(view):
                if isinstance(source, PushSource):
                    table, sequence = read_push_source(
                        source, self._repo.path, self._log, given, columns, self._registry.seed, most_bytes
                    )
                else:
                    table = read_file_source(
                        source, self._repo.path, self._log, given, columns, self._registry.seed, recorded,
                        most_bytes,
                    )  # fmt: skip
            if self._stamp(view) != stamp:
                continue
            grown = {name: texts for name, texts in table.dictionaries.items() if name in plain}
            if only_look or self._registry.extend_dictionaries(source.name, grown):
                return table, stamp, sequence
        raise UnavailableError(f"source '{source.name}' changes while it is read")

    def _number(self, computer: ViewComputer, tag: str, sequence: int) -> LiveView:
        """Rows get a new number whenever their layout or meaning changes, so old ones are never read."""
        view = computer.view
        fits = [self._registry.state.fits.get(fit_key(view, a)) for a in rank_arguments(view)]
        parts = [
            view.fingerprint(),
            computer.schema,
            list(computer.join_dtypes),
            [None if fit is None else fit.sha256 for fit in fits],
            _ROW_FORMAT,
        ]
        identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        source = view.source.name if isinstance(view.source, PushSource) else None
        return LiveView(computer, tag, self._registry.view_id(identity), source, sequence)


@contextlib.contextmanager
def _says_who_reads(view: FeatureView) -> Iterator[None]:
    """A column that a source lacks is told with the view and the feature that reads it."""
    try:
        yield
    except MissingColumnError as error:
        message = f"view '{view.name}': {error}{_who_reads(view, error.column)}"
        raise MissingColumnError(message, error.column) from error


def _who_reads(view: FeatureView, column: str) -> str:
    """Which feature of a view reads a column, and the line where it does; or that a join key is it."""
    if column in view.join_keys:
        return "; it is a join key"
    for name, value in view.features.items():
        expression = value if isinstance(value, Expr) else value.value
        for node in () if expression is None else walk(expression):
            if node.op == "col" and node.param == column:
                return f"; feature '{name}' reads it at {node.at[0]}:{node.at[1]}"
    return ""


def _same_layout(old: ViewComputer, new: ViewComputer) -> None:
    for what, before, after in (
        ("stored columns", old.schema, new.schema),
        ("join keys", old.join_dtypes, new.join_dtypes),
    ):
        if before != after:
            raise FailedPreconditionError(
                f"view '{old.view.name}': the source has changed the types of its {what} "
                f"from {before} to {after}; open the store again"
            )
