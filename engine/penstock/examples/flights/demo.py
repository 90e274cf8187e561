"""The main job, end to end: build features, train, serve, replay, compare.

A run lives in one folder: `year` (the event tables of the whole year, kept between runs), `repo`
(definitions, and the tables as they were when the replay begins; the rest is pushed), `models`, `data` (the
server's), `inference-config.yaml`, `server.log`.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from penstock.errors import InvalidArgumentError
from penstock.examples.flights import data
from penstock.examples.flights.compare import Comparison, compare_log
from penstock.examples.flights.replay import Replay, Tally
from penstock.examples.flights.server import ServerProcess, serve_command, write_config
from penstock.examples.flights.train import Span, Trained, auc, train
from penstock.features.store import FeatureStore

_MARK = ".penstock-demo"  # a folder that has it may be cleared


@dataclass(frozen=True)
class Scenario:
    """Which days a run takes."""

    training: Span
    holdout: Span
    live: Span
    july: Span


_HOLDOUT = Span.days(5, 1, 5, 16)
FULL = Scenario(Span.days(1, 1, 5, 1), _HOLDOUT, Span.days(5, 16, 6, 1), Span.days(7, 1, 7, 8))
SHORT = Scenario(Span.days(2, 1, 5, 1), _HOLDOUT, Span.days(5, 16, 5, 19), Span.days(7, 1, 7, 3))


@dataclass(frozen=True)
class Snapshot:
    """The server's own account after a replay: the results of `stats` and `drift`.

    It counts its AUC from the labels that it was sent; `auc` is the exact one of the scores that came back.
    """

    stats: dict[str, Any]
    drift: dict[str, Any]
    auc: float


@dataclass(frozen=True)
class Result:
    """What a run found. `never_labelled`: flights of the whole year that never landed."""

    trained: Trained
    tally: Tally
    live: Snapshot
    july: Snapshot
    comparison: Comparison
    never_labelled: int
    server_exit: int


def prepare(run: Path) -> Path:
    """Make or clear the folder of a run, put the definitions there, and return the repository's folder.

    Raises:
        InvalidArgumentError: the folder holds something, and no run made it.
    """
    if run.exists() and not (run.is_dir() and ((run / _MARK).exists() or not any(run.iterdir()))):
        raise InvalidArgumentError(f"dir is {str(run)!r}, which holds something else; expected a new folder")
    run.mkdir(parents=True, exist_ok=True)
    (run / _MARK).touch()
    for name in ("models", "data"):
        shutil.rmtree(run / name, ignore_errors=True)
    repo = run / "repo"
    shutil.copytree(
        Path(__file__).parent / "repo",
        repo,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return repo


@contextmanager
def _step(console: Console, title: str) -> Iterator[None]:
    with console.status(title):
        yield
    console.print(f"[green]done[/] {title}")


def run_demo(run: Path, scenario: Scenario, console: Console) -> Result:
    """Do the whole job in the folder `run`. Any way out of it stops the server."""
    run = run.resolve()
    repo = prepare(run)
    with _step(console, "event tables of 336 776 flights"):
        flights = pq.read_table(data.build(run / "year") / "flights.parquet")
        events = data.split(run / "year", repo, scenario.live.start_us)
    with (
        _step(console, "features of the past, model, bundle"),
        closing(FeatureStore(repo, data_dir=run / "data")) as store,
    ):
        store.apply()
        trained = train(
            store,
            flights,
            run / "models",
            span=scenario.training,
            holdout=scenario.holdout,
        )
    with tempfile.TemporaryDirectory(prefix="penstock-") as sockets:  # a socket's path must be short
        address = f"unix://{sockets}/serve.sock"
        config = write_config(run, trained.bundle.path, address)
        server = ServerProcess(serve_command(config), run / "server.log")
        with _step(console, "server start"):
            server.start()
        try:
            tally, live, july = asyncio.run(_replay(address, flights, events, scenario, console))
        finally:
            code = server.stop()
    with (
        _step(console, "served features beside the historical join"),
        closing(FeatureStore(repo, data_dir=run / "data")) as store,
    ):
        comparison = compare_log(store, flights, run / "data" / "log")
    return Result(trained, tally, live, july, comparison, flights["late"].null_count, code)


async def _replay(
    address: str, flights: pa.Table, events: dict[str, pa.Table], scenario: Scenario, console: Console
) -> tuple[Tally, Snapshot, Snapshot]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    snapshots = []
    async with Replay(address, events) as replay:
        with Progress(*columns, console=console) as progress:
            for title, span in (("late May", scenario.live), ("July", scenario.july)):
                task = progress.add_task(f"replay of {title}", total=span.of(flights).num_rows)
                before = len(replay.tally.rows)
                await replay.run(flights, span, partial(progress.advance, task))
                exact = _auc_of_replies(flights, replay.tally, before)
                snapshots.append(Snapshot(await replay.client.stats(), await replay.client.drift(), exact))
    return replay.tally, snapshots[0], snapshots[1]


def _auc_of_replies(flights: pa.Table, tally: Tally, first: int) -> float:
    """AUC of the replies from `first` on, over the flights that landed."""
    order = np.argsort(flights["row"].to_numpy())
    late = flights["late"].fill_null(-1).to_numpy()[order][tally.rows[first:]]
    scores = np.array(tally.scores[first:])
    return auc(late[late >= 0], scores[late >= 0])
