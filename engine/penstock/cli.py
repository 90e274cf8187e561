"""The `penstock` command. Exit codes: 0 success, 1 the work failed, 2 wrong usage."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated

import typer

import penstock
from penstock import (
    cli_bench,
    cli_demo,
    cli_features,
    cli_lineage,
    cli_models,
    cli_push,
    cli_report,
    cli_serving,
)

app = typer.Typer(
    name="penstock",
    help="Real-time ML inference in one process.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.callback()
def _root() -> None:
    """Real-time ML inference in one process."""


@app.command()
def version(as_json: JsonFlag = False) -> None:
    """Print the version."""
    if as_json:
        typer.echo(json.dumps({"penstock": penstock.__version__, "python": platform.python_version()}))
    else:
        typer.echo(f"penstock {penstock.__version__}")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="The inference-config.yaml to check.")],
    as_json: JsonFlag = False,
) -> None:
    """Check a configuration file, and that its models are there; print every fault with its line."""
    from penstock.config import check_config

    _, faults = check_config(path, bundles=True)
    if as_json:
        errors = [{"line": fault.line, "message": fault.message} for fault in faults]
        typer.echo(json.dumps({"path": str(path), "ok": not faults, "errors": errors}))
    elif faults:
        for fault in faults:
            where = f"{path}:{fault.line}" if fault.line else str(path)
            typer.echo(f"{where}: {fault.message}", err=True)
    else:
        typer.echo(f"{path}: ok")
    if faults:
        raise typer.Exit(1)


cli_features.register(app)
cli_push.register(app)
cli_serving.register(app)
app.add_typer(cli_lineage.app, name="features")
app.add_typer(cli_models.app, name="models")
cli_report.register(app)
cli_bench.register(app)
cli_demo.register(app)


def main() -> None:
    """Entry point of the `penstock` script."""
    app()
