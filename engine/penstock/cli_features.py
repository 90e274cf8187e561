"""The commands for feature repositories: `penstock init`, `apply` and `materialize`.

While a server holds the data folder, `apply` and `materialize` go through its socket: it is the only writer,
and its caches must learn of the change.
"""

from __future__ import annotations

import contextlib
import json
import pkgutil
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from penstock.cli_holder import alone, holder, holder_client, holder_name
from penstock.cli_plan import bundles_of, change_lines
from penstock.errors import FailedPreconditionError, InvalidArgumentError, PenstockError

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
RepoOption = Annotated[Path | None, typer.Option("--repo", help="Folder with feature_store.yaml.")]
DataOption = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of the registry and the online store.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Take both folders from this inference-config.yaml.")
]
_CONFIG = Path("inference-config.yaml")


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(init)
    app.command()(apply)
    app.command()(materialize)


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    example: Annotated[str, typer.Option(help="Which example to copy.")] = "shop",
    as_json: JsonFlag = False,
) -> None:
    """Copy an example, its data included, into a folder."""
    with _reporting():
        names = example_names()
        if example not in names:
            raise typer.BadParameter(f"'{example}' is no example; expected one of {', '.join(names)}")
        with _spinner(as_json, f"Making {example}") as note:
            files = write_example(example, directory, note)
    if as_json:
        typer.echo(json.dumps({"example": example, "path": str(directory), "files": files}))
        return
    typer.echo(f"{example} is in {directory}. Next:\n\n  cd {directory}")
    typer.echo("  penstock apply\n  penstock materialize")
    steps = _folder(example) / "next_steps.txt"
    if steps.exists():
        typer.echo("\nor in Python:\n\n" + steps.read_text(encoding="utf-8").rstrip())


def example_names() -> list[str]:
    """The examples that can be copied."""
    examples = import_module("penstock.examples")
    return sorted(found.name for found in pkgutil.iter_modules(examples.__path__) if found.ispkg)


def _folder(example: str) -> Path:
    file = import_module(f"penstock.examples.{example}").__file__
    assert file is not None
    return Path(file).parent


def write_example(
    example: str, directory: Path, note: Callable[[str], None] = lambda name: None
) -> list[str]:
    """Write an example into a new or empty folder, whole or not at all.

    Args:
        example: its name.
        directory: the folder; `feature_repo` in it gets the definitions and the data.
        note: told the name of each table that is made.

    Returns:
        The files, relative to the folder.

    Raises:
        InvalidArgumentError: the folder holds something, or is a file, or cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidArgumentError(f"DIR is '{directory}', which holds something; expected a new folder")
    scratch = directory.absolute().parent / f".{directory.absolute().name}-{uuid.uuid4().hex[:8]}"
    try:
        repo = scratch / "feature_repo"
        shutil.copytree(_folder(example) / "repo", repo, ignore=shutil.ignore_patterns("__pycache__"))
        import_module(f"penstock.examples.{example}.data").build(repo, note)
        scratch.replace(directory)
    except OSError as error:
        raise InvalidArgumentError(f"DIR '{directory}' cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def apply(
    repo: RepoOption = None,
    data_dir: DataOption = None,
    config: ConfigOption = None,
    plan: Annotated[
        bool, typer.Option("--plan", "--dry-run", help="Only say what would change and what would break.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check the definitions against their sources, fit distributions, and record the result.

    With --plan the exit code is 1 if something would break: a bundle, a service, or the apply itself.
    """
    from penstock.features.store import FeatureStore

    with _reporting():
        folder, data = _folders(repo, data_dir, config)
        bundles = bundles_of(data, config_of(config, repo))
        server = None if plan else holder(data)
        with _spinner(as_json, "Reading sources"):
            if server is not None:
                with holder_client(server) as client:
                    changes = client.apply()
                _check_same(holder_name(server), changes.pop("fingerprints", {}), folder)
            else:
                # A plan changes nothing, so it may look while a server holds the folder.
                held = contextlib.nullcontext() if plan else alone(data)
                with held, FeatureStore(folder, data_dir=data) as store:
                    found = store.plan(bundles) if plan else store.apply(bundles)
                    changes = found.to_dict()
    if as_json:
        typer.echo(json.dumps(changes))
    else:
        typer.echo("\n".join(change_lines(changes)) or "nothing has changed")
    if plan and changes["breaks"]:
        raise typer.Exit(1)


def _check_same(server: str, served: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    """Refuse a server whose definitions, read when it started, are no longer those of the repository."""
    from penstock.features.repo import load_repo

    repo = load_repo(folder)
    others = []
    for kind, found in (("view", repo.views), ("service", repo.services)):
        now = {name: definition.fingerprint() for name, definition in found.items()}
        then = served.get(f"{kind}s", now)
        others += [f"{kind} {name}" for name in sorted(now.keys() | then) if now.get(name) != then.get(name)]
    if others:
        raise FailedPreconditionError(
            f"{server} applied the definitions that it started with, no longer those of {folder} "
            f"({', '.join(others)}); stop it, apply, and start it again"
        )


def materialize(
    repo: RepoOption = None,
    data_dir: DataOption = None,
    config: ConfigOption = None,
    end: Annotated[str | None, typer.Option(help="Time in ISO 8601, UTC; now if left out.")] = None,
    start: Annotated[
        str | None, typer.Option(help="Write every key, as the time span from here on may have changed.")
    ] = None,
    view: Annotated[list[str] | None, typer.Option(help="Only this view; may be repeated.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Bring the online store up to a time: what has changed since the last run, or all with --start."""
    from penstock.clock import SystemClock
    from penstock.features.store import FeatureStore
    from penstock.features.times import iso, to_us

    with _reporting():
        end_us = SystemClock().now_us() if end is None else to_us(end, "--end")
        start_us = None if start is None else to_us(start, "--start")
        folder, data = _folders(repo, data_dir, config)
        server = holder(data)
        if server is not None:
            if start_us is not None:
                raise FailedPreconditionError(
                    f"--start: {holder_name(server)} uses the data folder; leave it out"
                )
            with _spinner(as_json, "Materialising"), holder_client(server) as client:
                rows = client.materialize(end_us, view)["rows"]
        else:
            with (
                alone(data),
                FeatureStore(folder, data_dir=data, holds_data_dir=True) as store,
                _bars(as_json) as progress,
            ):
                if start_us is None:
                    report = store.materialize_incremental(end_us, views=view, progress=progress)
                else:
                    report = store.materialize(start_us, end_us, views=view, progress=progress)
                rows = report.rows
    if as_json:
        typer.echo(json.dumps({"end": iso(end_us), "end_us": end_us, "rows": rows}))
        return
    for name, count in rows.items():
        typer.echo(f"{count:>10}  rows of {name}")
    typer.echo(f"materialised up to {iso(end_us)}")


def config_of(config: Path | None, repo: Path | None) -> Path | None:
    """The configuration: the one named, or the usual one where no repository is named."""
    return _CONFIG if config is None and repo is None and _CONFIG.exists() else config


def _folders(repo: Path | None, data_dir: Path | None, config: Path | None) -> tuple[Path, Path]:
    """The repository and the data folder: from options, the configuration, or where they usually are."""
    from penstock.config import load_config
    from penstock.features.repo import load_repo

    config = config_of(config, repo)
    if config is not None:
        loaded = load_config(config)
        repo = repo or loaded.feature_store.repo_path
        data_dir = data_dir or loaded.data_dir
        if repo is None:
            raise InvalidArgumentError(f"{config} sets no feature_store.repo_path; give --repo")
    if repo is None:
        repo = Path() if Path("feature_store.yaml").exists() else Path("feature_repo")
    return repo, load_repo(repo).data_dir if data_dir is None else data_dir


def _on_terminal() -> bool:
    return sys.stderr.isatty()


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
    """Errors of ours end the command with code 1 and their message."""
    try:
        yield
    except PenstockError as error:
        typer.echo(f"penstock: {error}", err=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _spinner(as_json: bool, title: str) -> Iterator[Callable[[str], None]]:
    """Shows that work goes on, on a terminal; the callable adds what has just been done."""
    if as_json or not _on_terminal():
        yield lambda name: None
        return
    from rich.console import Console

    with Console(stderr=True).status(title) as status:
        yield lambda name: status.update(f"{title}: {name}")


@contextlib.contextmanager
def _bars(as_json: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each view, on a terminal."""
    if as_json or not _on_terminal():
        yield None
        return
    from penstock.features.progress_bars import progress_bars

    with progress_bars() as show:
        yield show
