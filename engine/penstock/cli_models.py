"""`penstock models`: list, add, promote, try and roll back the models of a data directory.

Each command is one call of `call_models`, whose arguments and result are plain values. While a server holds
the data directory, a change of what is served goes through its socket; `list` and `add` change nothing that
is served and work on the registry itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from penstock.cli_holder import alone, holder, holder_client
from penstock.errors import InvalidArgumentError, PenstockError, to_wire

app = typer.Typer(
    help="List, add, promote, try and roll back model versions.", no_args_is_help=True, add_completion=False
)

_CHANGES = ("promote", "rollback", "canary", "shadow")  # what a server serves
_CONFIG_NAME = "inference-config.yaml"
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="The data directory.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help=f"Take data_dir from this file; ./{_CONFIG_NAME} if there is one."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Name = Annotated[str, typer.Argument(help="The model's name.")]


@app.command("list")
def list_models(data_dir: DataDir = None, config: ConfigFile = None, as_json: JsonFlag = False) -> None:
    """List every version with its aliases."""
    result = _run(data_dir, config, as_json, "list", {})
    if as_json:
        return
    if not result["models"]:
        typer.echo("no models")
        return
    header = ("NAME", "VERSION", "ALIASES", "BACKEND", "OUTPUT", "INPUTS", "SERVICE", "METRICS")
    rows = [header, *(_row(info) for info in result["models"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


@app.command()
def add(
    path: Annotated[Path, typer.Argument(help="The folder of the bundle.")],
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Verify a bundle and copy it in. The first version of a model becomes its champion."""
    result = _run(data_dir, config, as_json, "add", {"path": str(path.absolute())})
    if not as_json:
        aliases = f" ({', '.join(result['aliases'])})" if result["aliases"] else ""
        typer.echo(f"added {result['name']} {result['version']}: {result['format']}{aliases}")


@app.command()
def promote(
    name: Name,
    version: Annotated[
        str | None, typer.Argument(help="A version or an alias; the challenger if left out.")
    ] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a version the champion; the one before it is kept for a rollback."""
    result = _run(data_dir, config, as_json, "promote", {"name": name, "version": version})
    if not as_json:
        typer.echo(f"champion of {result['model']} is {result['version']}")


@app.command()
def rollback(
    name: Name, data_dir: DataDir = None, config: ConfigFile = None, as_json: JsonFlag = False
) -> None:
    """Make the champion before this one the champion again."""
    result = _run(data_dir, config, as_json, "rollback", {"name": name})
    if not as_json:
        typer.echo(f"champion of {result['model']} is {result['version']}")


Version = Annotated[str | None, typer.Argument(help="A version or an alias; the challenger if left out.")]
Share = Annotated[float, typer.Option("--share", help="Of the sticky keys, 0 to 1; 0 ends the trial.")]


@app.command()
def canary(
    name: Name,
    share: Share,
    version: Version = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Have a version answer a share of the keys, until another champion or a share of 0 ends the trial."""
    _try(data_dir, config, as_json, "canary", name, version, share)


@app.command()
def shadow(
    name: Name,
    share: Share,
    version: Version = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Have a version score a share of the keys too, unseen, while the champion answers."""
    _try(data_dir, config, as_json, "shadow", name, version, share)


def _try(
    data_dir: Path | None,
    config: Path | None,
    as_json: bool,
    mode: str,
    name: str,
    version: str | None,
    share: float,
) -> None:
    params = {"name": name, "version": version, "share": share}
    result = _run(data_dir, config, as_json, mode, params)
    if as_json:
        return
    if result["version"] is None:
        typer.echo(f"no version of {result['model']} is on trial")
    else:
        typer.echo(f"{mode} of {result['model']} is {result['version']}, share {result['share']:g}")


def call_models(data_dir: Path, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Do `method` on the registry in `data_dir`, or by the server that holds it; plain values in and out.

    list {} -> {"models": [version, ...]}; add {path} -> version; promote {name, version | None} and
    rollback {name} -> {"model", "version"}; canary and shadow {name, version | None, share} -> {"model",
    "version" | None, "mode", "share"}.
    A version is `ModelInfo.to_dict()`. Raises PenstockError or OSError.
    """
    if method in _CHANGES and (server := holder(data_dir)) is not None:
        with holder_client(server) as client:
            name = params["name"]
            if method in ("canary", "shadow"):
                tried = client.call(method, name, params["share"], params["version"])
                return {key: tried[key] for key in ("model", "version", "mode", "share")}
            found = client.promote(name, params["version"]) if method == "promote" else client.rollback(name)
            return {"model": found["model"], "version": found["version"]}
    from penstock.models.registry import ModelRegistry, Trial

    registry = ModelRegistry(data_dir / "models", data_dir / "registry")
    if method == "list":
        return {"models": [info.to_dict() for info in registry.list()]}
    if method == "add":
        return registry.add(params["path"]).to_dict()
    if method in ("promote", "rollback"):
        name = params["name"]
        with alone(data_dir):
            chosen = (
                registry.promote(name, params["version"]) if method == "promote" else registry.rollback(name)
            )
        return {"model": name, "version": chosen}
    if method in ("canary", "shadow"):
        name, share = params["name"], params["share"]
        if not 0 <= share <= 1:
            raise InvalidArgumentError(f"share is {share}; expected a number from 0 to 1")
        with alone(data_dir):
            version = None
            if share > 0:
                version = registry.get(name, params["version"] or "challenger").version
            registry.set_trial(
                name,
                None
                if version is None
                else Trial(version, "canary" if method == "canary" else "shadow", share),
            )
        return {"model": name, "version": version, "mode": method, "share": share}
    raise InvalidArgumentError(
        f"method is {method!r}; expected one of add, canary, list, promote, rollback, shadow"
    )


def _run(
    data_dir: Path | None, config: Path | None, as_json: bool, method: str, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Do one command and print its JSON; an error is printed and ends the command with exit code 1."""
    try:
        result = call_models(_find_data_dir(data_dir, config), method, params)
    except (PenstockError, OSError) as error:
        if as_json:
            typer.echo(json.dumps({"error": to_wire(error)}))
        else:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(result))
    return result


def _find_data_dir(data_dir: Path | None, config: Path | None) -> Path:
    if data_dir is not None and config is not None:
        raise typer.BadParameter("give --data-dir or --config, not both")
    if data_dir is not None:
        return data_dir
    file = Path(_CONFIG_NAME) if config is None else config
    if config is None and not file.exists():
        raise typer.BadParameter(f"give --data-dir or --config (there is no {_CONFIG_NAME} here)")
    from penstock.config import load_config

    return load_config(file).data_dir


def _row(info: Mapping[str, Any]) -> tuple[str, ...]:
    aliases = list(info["aliases"])
    if info["trial"]:
        aliases.append(f"{info['trial']['mode']} {info['trial']['share']:g}")
    head = (info["name"], info["version"], ",".join(aliases) or "-")
    if info["fault"]:
        return (*head, f"unreadable: {info['fault']}", "", "", "", "")
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in info["metrics"].items())
    return (
        *head,
        info["format"],
        info["output_kind"],
        str(info["n_inputs"]),
        info["service"] or "-",
        metrics or "-",
    )
