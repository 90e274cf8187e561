"""`penstock report`: what a running server has seen of its models, on the terminal, as HTML and as JSON.

The server does the work (`stats` and `drift`); the command only asks, arranges and shows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli_holder import connect, holder, holder_client
from penstock.errors import FailedPreconditionError, PenstockError, to_wire

if TYPE_CHECKING:
    from penstock.monitoring.report_data import ReportData
    from penstock.serving.client import Client

_CONFIG_NAME = "inference-config.yaml"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(report)


def _seconds(text: str) -> float:
    from pydantic import TypeAdapter, ValidationError

    from penstock.config_values import Seconds

    try:
        seconds = TypeAdapter(Seconds).validate_python(text)
    except ValidationError:
        seconds = 0.0
    if not seconds > 0.0:
        raise typer.BadParameter(f"'{text}' is no duration; expected one such as 90s, 30m, 6h or 1d")
    return seconds


def report(
    config: Annotated[
        Path | None,
        typer.Option(help=f"Ask the server of this file's data_dir; ./{_CONFIG_NAME} if there is one."),
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Ask the server at this address instead.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Only this model.")] = None,
    window: Annotated[
        float | None,
        typer.Option(
            parser=_seconds,
            metavar="DURATION",
            help="Drift and freshness of the last 90s, 30m, 6h, 1d of requests; "
            "the server's whole window if left out.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the report as a web page too; of several models, FILE-MODEL each."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Show drift, performance, latency and freshness of the models that a server runs."""
    from penstock.monitoring.report import write_report

    try:
        with _client(config, to) as client:
            reports = collect(client, model, window)
        pages = [] if html is None else _pages(html, [data["model"] for data in reports])
        for page, data in zip(pages, reports):
            write_report(page, data)
    except (PenstockError, OSError) as error:
        if as_json:
            typer.echo(json.dumps({"error": to_wire(error)}))
        else:
            typer.echo(f"penstock: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps({"reports": _plain(reports), "html": [str(page) for page in pages]}))
    else:
        _show(reports, pages)


def collect(client: Client, model: str | None = None, window_s: float | None = None) -> list[ReportData]:
    """Ask for the reports of the live models (or of one), in the order of their names.

    Args:
        window_s: seconds of request time up to the newest row served; None: all that the server keeps. It
            holds for drift and freshness; performance is that of the server's window, latency that of all
            requests.

    Raises:
        NotFoundError: the server runs no such model. UnavailableError: there is no server.
    """
    from penstock.clock import SystemClock

    drifts = client.drift(model, window_s)
    stats = client.stats()["models"]
    generated_us = SystemClock().now_us()
    reports: list[ReportData] = []
    for name, found in sorted(drifts.items()):
        data: ReportData = {
            "model": name,
            "version": found["version"],
            "generated_us": generated_us,
            "drift": found["drift"],
            "freshness": found["freshness"],
        }
        entry = stats.get(name)
        if entry is not None and entry["version"] == found["version"]:  # else promoted between the two calls
            data["performance"] = entry.get("performance")
            data["latency"] = entry["latency"] | {"limit_ms": entry["limit_ms"]}
            data["stages"] = entry["stages"]
            data["service"] = {
                "slo": entry["slo"],
                "goodput": entry["goodput"],
                "busy_ratio": entry["busy_ratio"],
                "queue_delay_ratio": entry["queue_delay_ratio"],
            }
        reports.append(data)
    return reports


def _client(config: Path | None, to: str | None) -> Client:
    if to is not None:
        if config is not None:
            raise typer.BadParameter("give --to or --config, not both")
        return connect(to)
    file = Path(_CONFIG_NAME) if config is None else config
    if config is None and not file.exists():
        raise typer.BadParameter(
            f"give --to or --config (there is no {_CONFIG_NAME} here); `penstock serve` starts a server"
        )
    from penstock.config import load_config

    data_dir = load_config(file).data_dir
    found = holder(data_dir)
    if found is None:
        raise FailedPreconditionError(
            f"no server uses the data folder {data_dir}; start one with `penstock serve {file}`"
        )
    return holder_client(found)


def _pages(html: Path, models: list[str]) -> list[Path]:
    if len(models) == 1:
        return [html]
    return [html.with_name(f"{html.stem}-{name}{html.suffix}") for name in models]


def _show(reports: list[ReportData], pages: list[Path]) -> None:
    from rich.console import Console

    from penstock.monitoring.report import print_report

    if not reports:
        typer.echo("the server runs no models")
    console = Console()
    for k, data in enumerate(reports):
        if k:
            console.print()
        print_report(data, console)
    for page in pages:
        typer.echo(f"wrote {page}")


def _plain(value: Any) -> Any:
    """As JSON has it: a figure that is no number is null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
