"""`penstock bench`: load a running server and show what came of it.

The load comes from a process of its own (penstock.loadgen), so that neither this command nor its progress
display is part of what is measured.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.errors import InvalidArgumentError, NotFoundError, PenstockError, to_wire

if TYPE_CHECKING:
    import numpy as np

    from penstock.loadgen import Load, LoadResult, Requests

_INTERRUPTED = 130  # as shells report a command that Ctrl-C ended
_DISTINCT = 4096  # random rows
_MOST_BYTES = 64 << 20  # of random rows


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(bench)


def bench(
    model: Annotated[str | None, typer.Argument(help="The model's name; not needed if there is one.")] = None,
    to: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The server; tcp://127.0.0.1:7064 if left out.")
    ] = None,
    connections: Annotated[int, typer.Option(min=1, max=65536)] = 8,
    in_flight: Annotated[
        int, typer.Option(min=1, max=65535, help="Requests in flight per connection; with --rate: at most.")
    ] = 8,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests per second, whatever the server does; as fast as it answers if left out."
        ),
    ] = None,
    even: Annotated[bool, typer.Option("--even", help="With --rate: evenly spaced, not Poisson.")] = False,
    duration: Annotated[float, typer.Option(help="Seconds that are measured.")] = 10.0,
    warmup: Annotated[float, typer.Option(help="Seconds before, not measured.")] = 2.0,
    rows_per_request: Annotated[int, typer.Option(min=1, max=1 << 20)] = 1,
    rows: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rows to score: .npy [rows, features], or .parquet with a column per feature; "
            "random if left out.",
        ),
    ] = None,
    entities: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Ask by entity instead: .parquet with the join keys and the request inputs."
        ),
    ] = None,
    expect: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The score of each row, .npy: every answer is verified."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference from an expected score.")] = 1e-5,
    deadline_ms: Annotated[float | None, typer.Option(help="Deadline of each request, milliseconds.")] = None,
    goodput_ms: Annotated[float, typer.Option(help="An answer counts as good within so much.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Of the random rows and of the arrivals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Load a running server. Fails if an answer is wrong or none is right."""
    from penstock.loadgen import Load
    from penstock.serving.client import Client
    from penstock.serving.protocol import DEFAULT_ADDRESS

    if rows is not None and entities is not None:
        raise typer.BadParameter("--rows and --entities are both given; expected one of them")
    if expect is not None and rows is None and entities is None:
        raise typer.BadParameter("--expect is given without --rows or --entities, whose scores it has")
    address = to or DEFAULT_ADDRESS
    load = Load(
        address,
        connections,
        in_flight,
        rate,
        poisson=not even,
        seed=seed,
        warmup=warmup,
        duration=duration,
        goodput_ms=goodput_ms,
        series=as_json,
    )
    options = {} if deadline_ms is None else {"deadline_ms": deadline_ms}
    try:
        with Client(address) as client:
            name, facts = _choose(client.models(), model)
        if entities is not None:
            requests = _by_entity(name, facts, entities, rows_per_request, expect, tolerance, options)
        else:
            requests = _by_vector(name, facts, rows, rows_per_request, expect, tolerance, options, seed)
        result = _run(load, requests, as_json)
    except (PenstockError, OSError) as error:
        if as_json:
            fault = to_wire(error) if isinstance(error, PenstockError) else {"message": str(error)}
            typer.echo(json.dumps({"error": fault}))
        else:
            typer.echo(f"penstock: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        setting = {"model": name, "version": facts["version"], "rows_per_request": rows_per_request}
        typer.echo(
            json.dumps({**setting, "load": vars(load), "verified": expect is not None, **result.to_dict()})
        )
    else:
        _show(name, facts, load, requests, rows_per_request, result)
    if result.stopped:
        raise typer.Exit(_INTERRUPTED)
    if result.wrong or result.ok is None:
        raise typer.Exit(1)


def _choose(models: Mapping[str, Any], name: str | None) -> tuple[str, Mapping[str, Any]]:
    known = ", ".join(sorted(models)) or "none is served"
    if name is None:
        if len(models) != 1:
            raise NotFoundError(f"the server has not one model but these: {known}; name one")
        (name,) = models
    if name not in models:
        raise NotFoundError(f"model '{name}' is unknown; expected one of: {known}")
    return name, models[name]


def _by_vector(
    name: str,
    facts: Mapping[str, Any],
    file: Path | None,
    rows_per_request: int,
    expect: Path | None,
    tolerance: float,
    options: Mapping[str, Any],
    seed: int,
) -> Requests:
    import numpy as np

    from penstock.loadgen import vector_requests

    features = [feature for feature, *_ in facts["features"]]
    if file is None:
        most = max(_MOST_BYTES // (4 * len(features) * rows_per_request), 1)
        count = min(max(_DISTINCT // rows_per_request, 512), most) * rows_per_request
        rows = np.random.default_rng(seed).standard_normal((count, len(features)), np.float32)
    else:
        rows = _read_rows(file, features)
    return vector_requests(
        name,
        rows,
        rows_per_request=rows_per_request,
        expected=_read_scores(expect, len(rows)),
        options=options,
        tolerance=tolerance,
    )


def _read_rows(file: Path, features: list[str]) -> np.ndarray:
    import numpy as np

    if file.suffix == ".parquet":
        columns = _read_table(file, features)
        return np.column_stack([np.asarray(columns[name], np.float32) for name in features])
    rows = _load(file)
    if rows.ndim != 2 or rows.shape[1] != len(features):
        raise InvalidArgumentError(f"{file} has the shape {rows.shape}; expected (rows, {len(features)})")
    return rows.astype(np.float32)


def _read_scores(file: Path | None, rows: int) -> np.ndarray | None:
    if file is None:
        return None
    scores = _load(file)
    if scores.ndim == 0 or len(scores) != rows:
        raise InvalidArgumentError(
            f"{file} has the shape {scores.shape}; expected a score for each of {rows} rows"
        )
    return scores


def _load(file: Path) -> np.ndarray:
    import numpy as np

    try:
        array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            raise ValueError("no numbers")
    except (ValueError, EOFError) as error:
        raise InvalidArgumentError(f"{file} cannot be read; expected an array of numbers, .npy") from error
    return array


def _read_table(file: Path, names: list[str]) -> dict[str, Any]:
    """Columns as numpy arrays (numbers) or lists."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except pa.ArrowInvalid as error:
        raise InvalidArgumentError(f"{file} cannot be read: {error}") from error
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise InvalidArgumentError(f"{file} lacks the column {missing[0]!r}; expected {', '.join(names)}")
    columns = {}
    for name in names:
        column = table.column(name)
        numeric = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        columns[name] = column.to_numpy() if numeric else column.to_pylist()
    return columns


def _by_entity(
    name: str,
    facts: Mapping[str, Any],
    file: Path,
    rows_per_request: int,
    expect: Path | None,
    tolerance: float,
    options: Mapping[str, Any],
) -> Requests:
    import numpy as np

    from penstock.loadgen import requests_of, rpc_request
    from penstock.serving.protocol import to_columns

    keys = list(facts["entities"])
    inputs = [column for column, *_ in facts["inputs"]]
    if not keys:
        raise InvalidArgumentError(f"model '{name}' has no entities; expected --rows")
    columns = _read_table(file, [*keys, *inputs])
    total = len(columns[keys[0]])
    count = total // rows_per_request
    if count == 0:
        raise InvalidArgumentError(f"{file} has {total} rows; expected at least {rows_per_request}")
    frames = []
    for at in range(0, count * rows_per_request, rows_per_request):
        part = slice(at, at + rows_per_request)
        asked, given = (
            to_columns(group, {column: columns[column][part] for column in names})
            for group, names in (("entities", keys), ("inputs", inputs))
        )
        frames.append(rpc_request("predict", [name, asked, given or None, *([options] if options else [])]))
    scores = _read_scores(expect, total)
    if scores is not None:
        scores = np.asarray(scores, np.float64)[: count * rows_per_request].reshape(count, -1)
    return requests_of(frames, expected=scores, tolerance=tolerance)


def _run(load: Load, requests: Requests, as_json: bool) -> LoadResult:
    """Ctrl-C ends the load and keeps its figures."""
    from penstock.loadgen import run_apart

    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True

    status = None
    if not as_json and sys.stderr.isatty():
        from rich.console import Console

        status = Console(stderr=True).status("connecting")

    def watch(phase: str, seconds: float, ok: int, failed: int) -> bool:
        if status is not None and phase != "connect":
            left = max(0.0, load.warmup + load.duration - seconds)
            status.update(f"{phase}: {ok:,} answers, {failed:,} failures, {left:.0f} s to go")
        return not interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with status or nullcontext():
            return run_apart(load, requests, watch)
    finally:
        signal.signal(signal.SIGINT, before)


def _show(
    name: str,
    facts: Mapping[str, Any],
    load: Load,
    requests: Requests,
    rows_per_request: int,
    result: LoadResult,
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    loop = (
        f"as fast as it answers, {load.in_flight} in flight on each of {load.connections} connections"
        if load.rate is None
        else f"{load.rate:,.0f} requests/s fall due{'' if load.poisson else ' evenly'}, "
        f"over {load.connections} connections"
    )
    console.print(
        f"{name} version {facts['version']} at {load.address}", highlight=False, soft_wrap=True, markup=False
    )
    console.print(
        f"{loop}; {rows_per_request} row{'s' if rows_per_request > 1 else ''} a request, "
        f"{len(requests)} distinct requests, "
        f"answers {'not ' if requests.expected is None else ''}verified, "
        f"{result.window:.1f} s{' (stopped)' if result.stopped else ''}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("answers", no_wrap=True)
    for column in ("count", "/s", "p50 ms", "p99 ms", "p99.9", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    for outcome, latency in result.outcomes.items():
        shares = (latency.p50, latency.p99, latency.p999, latency.max)
        per_second = result.rate if outcome == "OK" else latency.count / max(result.window, 1e-9)
        table.add_row(
            outcome, f"{latency.count:,}", f"{per_second:,.0f}", *(f"{us / 1e3:.3f}" for us in shares)
        )
    console.print(table)
    console.print(
        f"{result.rate * rows_per_request:,.0f} rows/s; "
        f"{result.goodput:,.0f} answers/s within {load.goodput_ms:g} ms; "
        f"the generator used {result.cpu:.2f} of a core",
        highlight=False,
        soft_wrap=True,
    )
    for count, text in (
        (result.unsent, "never sent: every connection was full"),
        (result.held_back, "sent late: every connection was full"),
        (result.unanswered, "without an answer"),
        (result.transport_errors, f"lost with {result.broken_connections} broken connections"),
        (result.unexpected, "answers to no request"),
    ):
        if count:
            console.print(f"{count:,} {text}", highlight=False, soft_wrap=True)
