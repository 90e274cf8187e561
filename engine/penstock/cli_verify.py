"""`penstock features verify`: what was served beside what the historical join makes of the same requests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli_features import (
    ConfigOption,
    DataOption,
    JsonFlag,
    RepoOption,
    _folders,
    _reporting,
    _spinner,
)

if TYPE_CHECKING:
    from penstock.features.skew import SkewReport


def verify(
    service: Annotated[str | None, typer.Option(help="Only vectors of this service.")] = None,
    repo: RepoOption = None,
    data_dir: DataOption = None,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make the sampled feature vectors again offline and compare; exit code 1 if any differs.

    `monitoring.skew.share` of the configuration says which share of the keys a server samples.
    """
    from penstock.features import skew
    from penstock.features.store import FeatureStore
    from penstock.monitoring.vector_log import read_samples

    with _reporting(), _spinner(as_json, "Making vectors again"):
        folder, data = _folders(repo, data_dir, config)
        with FeatureStore(folder, data_dir=data) as store:
            reports = skew.verify(store, read_samples(data / "log"), service)
    if as_json:
        typer.echo(json.dumps([report.to_dict() for report in reports]))
    elif not reports:
        typer.echo(
            "no vectors are logged: no server of this data folder has sampled any; "
            "monitoring.skew.share says how many it samples"
        )
    for report in [] if as_json else reports:
        _show(report)
    if any(report.mismatches for report in reports):
        raise typer.Exit(1)


def _show(report: SkewReport) -> None:
    other = f"; {report.other_definitions} of other definitions are left out" * bool(report.other_definitions)
    typer.echo(f"{report.service}: {report.vectors} vectors, {report.mismatches} mismatches{other}")
    for name, found in report.features.items():
        if not found.mismatches:
            continue
        typer.echo(
            f"  {name}: {found.mismatches} of {found.cells} differ (missing {found.missing}, "
            f"extra {found.extra}, other values {found.different}, by {found.largest:g} at most)"
        )
        for example in found.examples:
            keys = ", ".join(f"{key}={value!r}" for key, value in example["entities"].items())
            typer.echo(
                f"    {keys} at {example['now_us']} us: served {example['served']}, "
                f"made again {example['made_again']}"
            )
