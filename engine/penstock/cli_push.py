"""The commands `penstock push` (events of a file into a push source) and `penstock erase`.

While a server holds the data folder they go through its socket, so that it serves what has changed; else the
command writes by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli_features import ConfigOption, DataOption, JsonFlag, RepoOption, _folders, _reporting
from penstock.cli_holder import alone, holder, holder_client, holder_name
from penstock.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, PenstockError

if TYPE_CHECKING:
    import pyarrow as pa

    from penstock.features.source_definitions import PushSource

_FORMATS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".jsonl": "json", ".ndjson": "json",
            ".json": "json"}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(push)
    app.command()(erase)


def push(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Name of a push source.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Parquet, CSV or JSON lines, by its suffix.")],
    repo: RepoOption = None,
    data_dir: DataOption = None,
    config: ConfigOption = None,
    rows: Annotated[int, typer.Option(min=1, help="Events of one push.")] = 10_000,
    as_json: JsonFlag = False,
) -> None:
    """Push the events of a file; they are durable and served when the command ends."""
    from penstock.features.repo import load_repo
    from penstock.features.store import FeatureStore

    with _reporting():
        folder, data = _folders(repo, data_dir, config)
        definition = _source(load_repo(folder).push_sources, source)
        table = read_events(file, definition)
        server = holder(data)
        accepted = 0
        try:
            if server is not None:
                with holder_client(server) as client:
                    for part in _parts(table, rows):
                        accepted += client.push(source, part)
            else:
                with alone(data), FeatureStore(folder, data_dir=data, holds_data_dir=True) as store:
                    for part in _parts(table, rows):
                        accepted += store.push(source, part)
        except PenstockError as error:
            if accepted:
                typer.echo(
                    f"penstock: the first {accepted} events were taken in, the others not; "
                    "rows are counted from there",
                    err=True,
                )
            if server is not None and isinstance(error, NotFoundError):
                raise FailedPreconditionError(
                    f"{holder_name(server)} serves other definitions than {folder}: {error}; restart it"
                ) from error
            raise error
    typer.echo(json.dumps({"accepted": accepted}) if as_json else f"{accepted} events of {source}")


def erase(
    view: Annotated[str, typer.Argument(metavar="VIEW", help="A view with the entity's join keys.")],
    key: Annotated[list[str], typer.Option("--key", help="COLUMN=VALUE, once for each join key.")],
    repo: RepoOption = None,
    data_dir: DataOption = None,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Erase one entity from the log of pushed events, the online store and the caches; print the receipt."""
    from penstock.features.store import FeatureStore

    with _reporting():
        folder, data = _folders(repo, data_dir, config)
        server = holder(data)
        with FeatureStore(folder, data_dir=data, holds_data_dir=server is None) as store:
            if view not in store.views:
                known = ", ".join(sorted(store.views)) or "none"
                raise NotFoundError(f"view '{view}' is unknown; the views are {known}")
            names = store.views[view].join_keys
            keys = _keys(key, dict(zip(names, store.computer(view).join_dtypes)))
            if server is None:
                with alone(data):
                    receipt = store.erase(view, keys)
        if server is not None:
            with holder_client(server) as client:
                receipt = client.erase(view, keys)
    if as_json:
        typer.echo(json.dumps(receipt))
        return
    for where, count in receipt["removed"].items():
        typer.echo(f"{count:>10}  {where.replace('_', ' ')}")
    for what in receipt["kept"]:
        typer.echo(f"      kept  {what}")
    typer.echo(f"erased at {receipt['at']}; receipt {receipt['digest']}")


def _keys(given: list[str], dtypes: dict[str, str]) -> dict[str, list[Any]]:
    """The join keys of one entity from COLUMN=VALUE texts."""
    keys: dict[str, list[Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in dtypes or name in keys:
            raise InvalidArgumentError(
                f"--key is '{text}'; expected COLUMN=VALUE, once for each of {', '.join(dtypes)}"
            )
        try:
            keys[name] = [int(value) if dtypes[name] == "int64" else value]
        except ValueError:
            raise InvalidArgumentError(f"--key is '{text}'; expected an integer") from None
    return keys


def read_events(file: Path, source: PushSource) -> pa.Table:
    """The events of a file, its text columns as the source's schema has them.

    Raises:
        InvalidArgumentError: another suffix, or a file that cannot be read.
    """
    import pyarrow as pa

    kind = _FORMATS.get(file.suffix.lower())
    if kind is None:
        raise InvalidArgumentError(f"FILE is '{file}'; expected one of {', '.join(_FORMATS)}")
    if not file.is_file():
        raise InvalidArgumentError(f"FILE '{file}' cannot be read: it is no file")
    try:
        if kind == "parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(file) as opened:
                return opened.read()
        if kind == "csv":
            return _read_csv(file, source)
        with file.open("rb") as lines:
            return _table([_event(line, at, file) for at, line in enumerate(lines, 1) if line.strip()], file)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"FILE '{file}' cannot be read: {error}") from error


def _read_csv(file: Path, source: PushSource) -> pa.Table:
    """The columns in the types of the schema, times as they come. One thread, so that errors name the row."""
    import pyarrow as pa
    from pyarrow import csv

    plain = {"string": pa.string(), "float64": pa.float64(), "float32": pa.float32(), "bool": pa.bool_()}
    options = csv.ConvertOptions(
        null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False,
        column_types={name: plain[dtype] for name, dtype in source.schema.items() if dtype in plain},
    )  # fmt: skip
    table = csv.read_csv(file, read_options=csv.ReadOptions(use_threads=False), convert_options=options)
    table.column_names  # noqa: B018  decodes the header, which Arrow leaves unchecked
    return table


def _event(line: bytes, number: int, file: Path) -> dict[str, Any]:
    """One event of a file of JSON lines."""
    try:
        event = json.loads(line)
    except ValueError as error:
        raise InvalidArgumentError(f"FILE '{file}': line {number} is no JSON: {error}") from error
    if not isinstance(event, dict):
        raise InvalidArgumentError(f"FILE '{file}': line {number} is {event!r}; expected an object")
    return event


def _table(events: list[dict[str, Any]], file: Path) -> pa.Table:
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(name for event in events for name in event):
        try:
            columns[name] = pa.array([event.get(name) for event in events])
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise InvalidArgumentError(f"FILE '{file}': column '{name}': {error}") from error
    return pa.table(columns)


def _parts(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    for at in range(0, table.num_rows, rows):
        yield table.slice(at, rows)


def _source(known: dict[str, PushSource], name: str) -> PushSource:
    if name not in known:
        names = ", ".join(sorted(known)) or "none"
        raise NotFoundError(f"push source '{name}' is unknown; the push sources are {names}")
    return known[name]
