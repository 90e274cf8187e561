"""A list of features compiled once and used offline and online, so that both give the same bits.

Stored columns of each view enter the program as "view:column", request inputs as "source:input". A
request-time expression reads its source columns from hidden stored columns; where a view has no row for the
key, it reads nulls. Plans are immutable; any thread may use them.

A dictionary only grows, and a code keeps its text. So a model fits a plan whose dictionaries begin with those
that it was trained with: a text that came later is a code that it has never seen. Such a code reaches the
model as the number that it is, in serving as in the historical join.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from penstock import _core
from penstock.errors import (
    DefinitionError,
    FeatureNameCollisionError,
    InvalidArgumentError,
    NotFoundError,
)
from penstock.features.compute import StoredView
from penstock.features.definitions import FeatureView, RequestSource, ViewProjection, check_unversioned
from penstock.features.expressions import Expr, asks_about_text, col, columns_read, walk
from penstock.features.program import Distribution, compile_program

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Column = tuple[NDArray[Any], NDArray[np.bool_] | None]

Texts = Mapping[tuple[str, str], Sequence[str]]
"""Dictionaries: texts by code, by source and column."""


@dataclass(frozen=True, eq=False)
class ServicePlan:
    """How to get an ordered list of features.

    Attributes:
        name: the service's, or one for an ad-hoc list.
        refs: "view:feature" or "request_source:input", in order.
        output_names, output_dtypes: of each ref.
        views: views in the order in which refs first mention them, once for each name.
        view_names: by which refs call them: their own, or that of a projection.
        entities: (column, "int64" or "string") distinct join keys, in first-mention order.
        view_keys: for each view, the positions in `entities` of its join keys, in key order.
        inputs: (name, dtype) of the request inputs that are used.
        program: bytes for `_core.FeatureProgram`; outputs in the order of `refs`.
        on_missing: "nan" or "error".
        parts: what decides the values besides the dictionaries, as plain values.
        coded: for each of `views`, its stored columns that depend on codes, with source and source columns.
        texts: the dictionaries of `coded`, as they were when the plan was made.
    """

    name: str
    refs: tuple[str, ...]
    output_names: tuple[str, ...]
    output_dtypes: tuple[str, ...]
    views: tuple[FeatureView, ...]
    view_names: tuple[str, ...]
    entities: tuple[tuple[str, str], ...]
    view_keys: tuple[tuple[int, ...], ...]
    inputs: tuple[tuple[str, str], ...]
    program: bytes
    on_missing: str
    parts: Mapping[str, Any]
    coded: tuple[tuple[tuple[str, str, tuple[str, ...]], ...], ...]
    texts: Texts
    request_name: str | None = None

    @cached_property
    def _native(self) -> _core.FeatureProgram:
        return _core.FeatureProgram(self.program)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the values, these dictionaries included."""
        return self._digest(self.texts, legacy=False)

    @property
    def text_counts(self) -> dict[tuple[str, str], int]:
        """How many texts each dictionary has."""
        return {key: len(texts) for key, texts in self.texts.items()}

    def fits(self, fingerprint: str | None, text_counts: Mapping[tuple[str, str], int] | None) -> bool:
        """Whether what has this fingerprint may be given this plan's rows.

        Args:
            fingerprint: of the plan that it was made with.
            text_counts: the lengths of that plan's dictionaries, which must be the beginnings of these. None:
                it does not say, as of a bundle of an earlier build, so none may have grown.
        """
        if text_counts is None:
            return fingerprint in (self.fingerprint, self._digest(self.texts, legacy=True))
        if text_counts.keys() != self.texts.keys():
            return False
        if any(count > len(self.texts[key]) for key, count in text_counts.items()):
            return False
        begun = {key: texts[: text_counts[key]] for key, texts in self.texts.items()}
        return fingerprint == self._digest(begun, legacy=False)

    def _digest(self, texts: Texts, *, legacy: bool) -> str:
        """`legacy`: as builds did that counted the texts of columns that are strings alone."""
        views: list[list[Any]] = []
        for (definition, ranks), coded in zip(self.parts["views"], self.coded):
            found: list[list[Any]] = []
            for stored, source, columns in coded:
                if stored in self.parts["strings"][len(views)]:
                    found.append([stored, texts[source, columns[0]]])
                elif not legacy:
                    found += [[stored, column, texts[source, column]] for column in columns]
            views.append([definition, ranks, found])
        parts = [*self.parts["head"], views, *self.parts["aliases"]]
        return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()

    def evaluate(self, columns: Mapping[str, Column], now: Column) -> list[Column]:
        """Run the program.

        Args:
            columns: (values, valid) by program input name ("view:column", "source:input"), n rows each.
            now: request time of each row, int64 microseconds.

        Returns:
            (values, valid) of each ref.
        """
        inputs = [now if name == "now" else columns[name] for name, _ in self._native.inputs]
        return self._native.run(inputs, rows=len(now[0]))


def compile_plan(
    name: str,
    refs: Sequence[str],
    views: Mapping[str, FeatureView],
    computers: Mapping[str, StoredView],
    request: RequestSource | None = None,
    *,
    aliases: Mapping[str, ViewProjection] | None = None,
    full_feature_names: bool = False,
    on_missing: str = "nan",
) -> ServicePlan:
    """Compile a feature list.

    Args:
        name: of the service, or any for an ad-hoc list.
        refs: "view:feature" or "request_source:input".
        views: all views, by name.
        computers: by view name; those of the views in `refs` are read.
        request: the source of the request inputs.
        aliases: projections by name; a name may hide a view's.
        full_feature_names: name outputs "view__feature" instead of "feature".
        on_missing: what serving does about a missing row; "nan" or "error".

    Raises:
        NotFoundError: an unknown view, feature or input.
        FeatureNameCollisionError: two outputs with one name.
        InvalidArgumentError: a malformed ref, or none.
        DefinitionError: definitions that do not go together.
    """
    if isinstance(refs, str) or not refs:
        raise InvalidArgumentError(f"features is {refs!r}; expected a list of 'view:feature'")
    if request is not None and request.name in views:
        raise DefinitionError(f"request source '{request.name}' has the name of a view")
    used_aliases = dict(aliases or {})
    views = {**views, **{name: alias.view for name, alias in used_aliases.items()}}
    parsed = [_resolve(ref, views, request) for ref in refs]
    names = tuple(f"{owner}__{short}" if full_feature_names else short for owner, short in parsed)
    _check_names(refs, names)
    used = list(dict.fromkeys(owner for owner, _ in parsed if owner in views))
    at = {name: computers[views[name].name] for name in used}
    keys = {
        name: used_aliases[name].join_keys if name in used_aliases else views[name].join_keys for name in used
    }
    schema = {f"{name}:{column}": dtype for name in used for column, dtype in at[name].schema}
    inputs: dict[str, str] = {}
    outputs: list[tuple[str, Expr]] = []
    ranks: dict[str, Distribution] = {}
    for (owner, short), output in zip(parsed, names):
        if owner in views:
            outputs.append((output, _feature(owner, views[owner], short, at[owner].distributions, ranks)))
        else:
            assert request is not None
            inputs[short] = schema[f"{owner}:{short}"] = request.schema[short]
            outputs.append((output, col(f"{owner}:{short}")))
    program = compile_program(outputs, schema, ranks)
    dtypes = tuple(dtype for _, dtype in _core.FeatureProgram(program).outputs)
    entities = _entities(keys, at)
    positions = {column: i for i, column in enumerate(entities)}
    columns = set(columns_read(*(value for _, value in outputs)))
    coded = tuple(
        tuple(
            (stored, views[owner].source.name, sources)
            for stored, sources in sorted(computer.coded.items())
            if f"{owner}:{stored}" in columns
        )
        for owner, computer in at.items()
    )
    named = [used_aliases[name] for name in used if name in used_aliases]
    return ServicePlan(
        name=name,
        refs=tuple(refs),
        output_names=names,
        output_dtypes=dtypes,
        views=tuple(views[view] for view in used),
        view_names=tuple(used),
        entities=tuple(entities.items()),
        view_keys=tuple(tuple(positions[key] for key in keys[view]) for view in used),
        inputs=tuple(inputs.items()),
        program=program,
        on_missing=on_missing,
        parts={
            # Output names are left out: they decide no value.
            "head": [name, list(refs), on_missing, list(inputs.items())],
            "views": [_view_parts(computer) for computer in at.values()],
            "strings": [set(computer.dictionaries) for computer in at.values()],
            "aliases": [[alias.describe() for alias in named]] * bool(named),
        },
        coded=coded,
        texts=newest_texts(coded, list(at.values())),
        request_name=request.name if request is not None and inputs else None,
    )


def _near(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known) or 'none'}"


def _resolve(ref: str, views: Mapping[str, FeatureView], request: RequestSource | None) -> tuple[str, str]:
    check_unversioned(ref)
    parts = ref.split(":") if isinstance(ref, str) else []
    if len(parts) != 2 or not all(parts):
        raise InvalidArgumentError(f"feature is {ref!r}; expected 'view:feature'")
    owner, short = parts
    if request is not None and owner == request.name:
        if short not in request.schema:
            raise NotFoundError(f"'{ref}': no such request input; {_near(short, request.schema)}")
    elif owner not in views:
        owners = [*views] + ([request.name] if request else [])
        raise NotFoundError(f"'{ref}': no such view '{owner}'; {_near(owner, owners)}")
    elif short not in views[owner].features:
        raise NotFoundError(f"'{ref}': no such feature '{short}'; {_near(short, views[owner].features)}")
    return owner, short


def _check_names(refs: Sequence[str], names: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for ref, name in zip(refs, names):
        if name in first:
            hint = "it is listed twice" if first[name] == ref else "use full_feature_names=True"
            raise FeatureNameCollisionError(
                f"features '{first[name]}' and '{ref}' would both be named '{name}'; {hint}"
            )
        first[name] = ref


def _feature(
    owner: str,
    view: FeatureView,
    name: str,
    distributions: Mapping[str, Distribution],
    ranks: dict[str, Distribution],
) -> Expr:
    """The feature over program inputs. `ranks` gets the distributions under the renamed fingerprints."""
    if name not in view.request_time:
        return col(f"{owner}:{name}")
    renamed: dict[str, Expr] = {}
    for node in walk(view.request_time[name]):
        if asks_about_text(node):
            renamed[node.fingerprint()] = col(f"{owner}:{view.hidden[node.fingerprint()]}")
            continue
        if node.op == "col" and node.param not in view.hidden:
            continue  # only asked about
        args = tuple(renamed[arg.fingerprint()] for arg in node.args)
        param = f"{owner}:{view.hidden[node.param]}" if node.op == "col" else node.param
        renamed[node.fingerprint()] = node.with_args(args, param)
        if node.op == "percentile_rank" and node.args[0].fingerprint() in distributions:
            ranks[args[0].fingerprint()] = distributions[node.args[0].fingerprint()]
    return renamed[view.request_time[name].fingerprint()]


def _entities(keys: Mapping[str, Sequence[str]], computers: Mapping[str, StoredView]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in keys:
        for key, dtype in zip(keys[name], computers[name].join_dtypes):
            if found.setdefault(key, dtype) != dtype:
                raise DefinitionError(
                    f"join key '{key}' is {dtype} in view '{name}' but {found[key]} in another view"
                )
    return found


def _view_parts(computer: StoredView) -> tuple[str, list[Any]]:
    ranks = [
        [key, [v.hex() for v in fitted.values], fitted.cumulative]
        for key, fitted in sorted(computer.distributions.items())
    ]
    return computer.view.fingerprint(), ranks


def newest_texts(
    coded: Sequence[Sequence[tuple[str, str, tuple[str, ...]]]], computers: Sequence[StoredView]
) -> Texts:
    """The dictionaries that `ServicePlan.coded` names: of views on one source, the longest reading's."""
    found: dict[tuple[str, str], Sequence[str]] = {}
    for uses, computer in zip(coded, computers):
        for _, source, columns in uses:
            for column in columns:
                texts = computer.texts(column)
                if len(texts) >= len(found.get((source, column), ())):
                    found[source, column] = texts
    return found
