"""The commands `penstock features list`, `describe`, `lineage` and `verify`.

They change no definition: they read these, what `apply` recorded, and what each bundle's model.yaml says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli_features import (
    ConfigOption,
    DataOption,
    JsonFlag,
    RepoOption,
    _folders,
    _reporting,
    _spinner,
    config_of,
)
from penstock.cli_plan import bundles_of
from penstock.cli_verify import verify
from penstock.errors import NotFoundError, PenstockError

if TYPE_CHECKING:
    from penstock.features.changes import BundleFacts
    from penstock.features.lineage import Lineage, Node
    from penstock.features.registry import RegistryState
    from penstock.features.repo import Repo

app = typer.Typer(
    help="Look at features: what there is, how it is defined, where it comes from.", no_args_is_help=True
)
app.command()(verify)


@app.command("list")
def list_features(
    repo: RepoOption = None,
    data_dir: DataOption = None,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Every feature: its view, type, definition, keys and source. Types are those of the last `apply`."""
    with _reporting():
        found, state, _ = _opened(repo, data_dir, config)
        rows = [row for view in found.views for row in _feature_rows(found, state, view)]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    if not rows:
        typer.echo("there are no features")
        return
    _print_table(
        ("feature", "dtype", "keys", "source", "definition"),
        [(r["feature"], r["dtype"] or "-", ", ".join(r["keys"]), r["source"], r["definition"]) for r in rows],
    )


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help="A view, service, source, or 'view:feature'.")],
    repo: RepoOption = None,
    data_dir: DataOption = None,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """One view, service, source or feature in full."""
    with _reporting():
        found, state, _ = _opened(repo, data_dir, config)
        described = _described(found, state, name)
    if as_json:
        typer.echo(json.dumps(described if len(described) > 1 else described[0]))
        return
    typer.echo("\n\n".join("\n".join(_lines(one)) for one in described))


@app.command()
def lineage(
    name: Annotated[
        str | None, typer.Argument(help="A source, view, service, bundle (NAME/VERSION) or 'view:feature'.")
    ] = None,
    repo: RepoOption = None,
    data_dir: DataOption = None,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Source, view, service, bundle: who uses what, all of it or what is above and below NAME.

    A bundle is checked against the service as it is now, which reads the sources.
    """
    from penstock.features.lineage import around
    from penstock.features.lineage import lineage as whole

    with _reporting(), _spinner(as_json, "Reading sources"):
        found, _, (data, bundles) = _opened(repo, data_dir, config)
        graph = whole(found.views, found.services, bundles)
        if name is not None:
            graph = around(graph, name, found.services)
        shown = {node.name for node in graph.nodes if node.kind == "bundle"}
        notes = _fits(found, data, [bundle for bundle in bundles if bundle.label in shown])
        graph = whole(found.views, found.services, bundles, notes)
        if name is not None:
            graph = around(graph, name, found.services)
    if as_json:
        typer.echo(json.dumps(graph.to_dict()))
        return
    typer.echo(
        "\n".join(line for root in graph.roots() for line in _tree(graph, root, 0)) or "there is nothing"
    )


def _opened(
    repo: Path | None, data_dir: Path | None, config: Path | None
) -> tuple[Repo, RegistryState | None, tuple[Path, list[BundleFacts]]]:
    """The definitions, what `apply` recorded (None: it never ran), and data folder and bundles."""
    from penstock.features.registry import Registry
    from penstock.features.repo import load_repo

    folder, data = _folders(repo, data_dir, config)
    recorded = Registry(data / "registry").state if (data / "registry").is_dir() else None
    return load_repo(folder), recorded, (data, bundles_of(data, config_of(config, repo)))


def _recorded(state: RegistryState | None, kind: str, name: str) -> dict[str, str] | None:
    found: dict[str, str] | None = None if state is None else state.recorded(kind).get(name)
    return found


def _feature_rows(repo: Repo, state: RegistryState | None, view: str) -> list[dict[str, Any]]:
    from penstock.features.describe import describe_view

    one = describe_view(repo.views[view], repo.services, _recorded(state, "dtypes", view) or {})
    keys = [key for join_keys in one["entities"].values() for key in join_keys]
    return [
        {
            **feature,
            "feature": f"{view}:{feature['name']}",
            "keys": keys,
            "source": one["source"],
            "ttl": one["ttl"],
        }
        for feature in one["features"]
    ]


def _described(repo: Repo, state: RegistryState | None, name: str) -> list[dict[str, Any]]:
    """All that has the name."""
    from penstock.features.describe import (
        describe_request,
        describe_service,
        describe_source,
        describe_view,
    )

    found: list[dict[str, Any]] = []
    if name in repo.views:
        dtypes = _recorded(state, "dtypes", name) or {}
        found.append(describe_view(repo.views[name], repo.services, dtypes))
    if name in repo.services:
        found.append(describe_service(repo.services[name]))
    for source in {view.source.key: view.source for view in repo.views.values()}.values():
        if name in (source.name, source.key):
            found.append(describe_source(source, repo.views, _recorded(state, "sources", source.key)))
    requests = {s.request.name: s.request for s in repo.services.values() if s.request is not None}
    if name in requests:
        found.append(describe_request(requests[name], repo.services))
    owner, _, short = name.partition(":")
    if owner in repo.views and short in repo.views[owner].features:
        found += [
            {
                "kind": "feature",
                **row,
                "services": [s.name for s in repo.services.values() if name in s.features],
            }
            for row in _feature_rows(repo, state, owner)
            if row["feature"] == name
        ]
    if not found:
        sources = dict.fromkeys(view.source.name for view in repo.views.values())
        known = ", ".join([*repo.views, *repo.services, *sources, *requests]) or "none"
        raise NotFoundError(f"'{name}' is no view, service, source or feature; there are {known}")
    return found


def _fits(repo: Repo, data: Path, bundles: Sequence[BundleFacts]) -> dict[str, str]:
    """Whether each bundle's features are still those of its service."""
    from penstock.features.store import FeatureStore

    notes = {bundle.label: "" for bundle in bundles}
    checked = [bundle for bundle in bundles if bundle.service in repo.services]
    if not checked:
        return notes
    with FeatureStore(repo.path, data_dir=data) as store:
        for bundle in checked:
            assert bundle.service is not None
            try:
                plan = store.fitting_plan(bundle.service, bundle.fingerprint, bundle.text_counts)
                notes[bundle.label] = "does not fit: its fingerprint differs" if plan is None else "fits"
            except PenstockError as error:
                notes[bundle.label] = f"cannot be checked: {error}"
    return notes


def _tree(graph: Lineage, node: Node, depth: int) -> Iterable[str]:
    note = f"  ({node.note})" if node.note else ""
    yield f"{'  ' * depth}{node.kind} {node.name}{note}"
    for user in graph.below(node.key):
        yield from _tree(graph, user, depth + 1)


def _lines(value: Mapping[str, Any]) -> Iterable[str]:
    """A description as `key: value` lines; lists and maps one entry a line below their key."""
    for key, given in value.items():
        if isinstance(given, Mapping) and given:
            yield f"{key}:"
            yield from (f"  {name}: {_plain(inner)}" for name, inner in given.items())
        elif isinstance(given, list) and given and isinstance(given[0], Mapping):
            yield f"{key}:"
            yield from (
                f"  {entry['name']}: {entry['dtype'] or '-'}, {entry['stage']}: {entry['definition']}"
                for entry in given
            )
        else:
            yield f"{key}: {_plain(given)}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items()) or "-"
    return "-" if value is None or value == "" else str(value)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        typer.echo("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())
