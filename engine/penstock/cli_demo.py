"""`penstock demo`: the main job in one command, on the flights that left New York in 2013."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer

_INTERRUPTED = 130  # as shells report a command that Ctrl-C ended


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(demo)


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)  # unwinds, so that the server is stopped


def demo(
    short: Annotated[bool, typer.Option("--short", help="Fewer days: under a minute.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    directory: Annotated[
        Path, typer.Option("--dir", help="Folder of the run; an earlier run in it is replaced.")
    ] = Path("demo-run"),
) -> None:
    """Build features from real flights, train, serve, replay through the socket, and show what came of it."""
    from rich.console import Console

    from penstock.errors import PenstockError
    from penstock.examples.flights.demo import FULL, SHORT, run_demo
    from penstock.examples.flights.show import faults, figures, show

    console = Console(stderr=as_json)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result = run_demo(directory, SHORT if short else FULL, console)
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(_INTERRUPTED) from None
    except PenstockError as error:
        console.print(f"{error.code}: {error}", markup=False, style="red")
        raise typer.Exit(1) from None
    show(result, console)
    if as_json:
        typer.echo(json.dumps(figures(result)))
    if faults(result):
        raise typer.Exit(1)
