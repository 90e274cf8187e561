"""The commands that serve and that ask a server: `penstock serve` and `penstock predict`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from penstock.cli_features import config_of
from penstock.cli_holder import connect
from penstock.errors import InvalidArgumentError, PenstockError

if TYPE_CHECKING:
    from penstock.config import Config

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(serve)
    app.command()(predict)


def serve(
    config: Annotated[Path, typer.Argument(help="The configuration file.")] = Path("inference-config.yaml"),
    listen: Annotated[
        list[str] | None, typer.Option(help="Listen here instead; may be repeated. Port 0: any free port.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that serve side by side, 1 to 32.", min=1, max=32)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is in flight and exit."""
    from penstock.config import load_config
    from penstock.serving.engine import Engine
    from penstock.serving.server import ServerSettings, run

    logging.basicConfig(format="penstock: %(message)s")
    logging.getLogger("penstock").setLevel(logging.INFO)  # what the models' own processes print

    def on_listening(addresses: list[str]) -> None:
        if engine.lock is not None:
            engine.lock.announce(addresses)  # other commands find the server by it
        for address in addresses:
            typer.echo(f"penstock: listening on {address}", err=True)
        if as_json:
            ready = {"event": "listening", "addresses": addresses, "pid": os.getpid()}
            typer.echo(json.dumps(ready))

    try:
        loaded = load_config(config)
        if (workers or loaded.server.workers) > 1:
            serve_side_by_side(config, loaded, workers or loaded.server.workers, listen, as_json)

        def read_settings() -> ServerSettings:
            settings = ServerSettings.from_config(load_config(config))
            return dataclasses.replace(settings, listen=tuple(listen)) if listen else settings

        settings = read_settings()
        engine = Engine.from_config(config)
        try:
            status = run(engine, settings, on_listening, read_settings)
        finally:
            engine.close()
    except PenstockError as error:
        raise _failed(error) from None
    raise typer.Exit(status)


def serve_side_by_side(
    path: Path, config: Config, workers: int, listen: list[str] | None, as_json: bool
) -> NoReturn:
    """Serve with several processes; ends the command."""
    from penstock.serving.supervisor import Supervisor

    def on_listening(addresses: list[str]) -> None:
        for address in addresses:
            typer.echo(f"penstock: listening on {address}, {workers} workers", err=True)
        if as_json:
            ready = {"event": "listening", "addresses": addresses, "pid": os.getpid()}
            typer.echo(json.dumps({**ready, "workers": supervisor.pids}))

    supervisor = Supervisor(path, config, workers, listen or list(config.server.listen))
    raise typer.Exit(supervisor.run(on_listening))


def predict(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    entities: Annotated[str, typer.Argument(help="Entity columns as JSON, such as '{\"user_id\": [7, 8]}'.")],
    inputs: Annotated[str | None, typer.Option(help="Request inputs as JSON, of the same shape.")] = None,
    to: Annotated[list[str] | None, typer.Option(help="Address of a server; may be repeated.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Ask where this inference-config.yaml listens.")
    ] = None,
    deadline_ms: Annotated[float | None, typer.Option(help="Give up after so many milliseconds.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask a server for predictions: the one at --to, else where the configuration listens."""
    from penstock.config import load_config
    from penstock.serving.protocol import DEFAULT_ADDRESS

    try:
        named = config_of(config, None)
        if not to and named is not None:
            to = load_config(named).server.listen
        columns = _columns("ENTITIES", entities)
        features = None if inputs is None else _columns("--inputs", inputs)
        with connect(to or [DEFAULT_ADDRESS]) as client:
            made = client.predict(model, columns, features, deadline_ms=deadline_ms)
    except PenstockError as error:
        raise _failed(error) from None
    scores, ids = made.scores.tolist(), made.request_ids.tolist()
    if as_json:
        status = None if made.status is None else made.status.tolist()
        typer.echo(
            json.dumps({"scores": scores, "version": made.version, "request_ids": ids, "status": status})
        )
        return
    typer.echo(f"{model} version {made.version}")
    for request_id, score in zip(ids, scores):
        values = score if isinstance(score, list) else [score]
        typer.echo(f"{request_id:>20}  " + "  ".join(f"{value:.6g}" for value in values))


def _columns(what: str, text: str) -> dict[str, Any]:
    try:
        made = json.loads(text)
    except ValueError as error:
        raise InvalidArgumentError(f"{what} is {text!r}; expected JSON: {error}") from error
    if not isinstance(made, dict):
        raise InvalidArgumentError(f"{what} is {text!r}; expected a JSON object of columns")
    return made


def _failed(error: PenstockError) -> typer.Exit:
    typer.echo(f"penstock: {error}", err=True)
    return typer.Exit(1)
