"""Reports of one model version: as tables on a terminal, and as one self-contained HTML file.

Both take a `ReportData` and only show it. Any thread.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.monitoring.report_data import (
    PERFORMANCE,
    ReportData,
    by_severity,
    check_data,
    count,
    duration,
    nanoseconds,
    number,
    service_cells,
    share,
    stage_rows,
    time,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {"ok": "green", "warn": "yellow", "alert": "bold red", "insufficient": "dim"}


def write_report(path: str | Path, data: ReportData) -> None:
    """Write the HTML report to `path`, whole or not at all. Raises InvalidArgumentError and OSError."""
    from penstock.monitoring.report_html import render

    page = render(data).encode("utf-8", "replace")
    target = Path(path)
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def print_report(data: ReportData, console: Console) -> None:
    """Print the report as tables. Raises InvalidArgumentError where a needed part is missing."""
    from rich.text import Text

    check_data(data)
    drift = data["drift"]
    head = Text.assemble(
        (f"{data['model']} version {data['version']}", "bold"),
        "  ",
        (drift["state"], _STYLES.get(drift["state"], "")),
        f"  {count(drift['n'])} rows, {time(drift.get('start_us'))} to {time(drift.get('end_us'))}",
    )
    console.print(head)
    console.print(_drift(drift))
    for part in (
        _performance(data.get("performance")),
        _latency(data),
        _stages(data),
        _service(data),
        _freshness(data.get("freshness")),
    ):
        if part is not None:
            console.print(part)


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(
            column, justify="left" if i == 0 or column in ("State", "Why") else "right", overflow="fold"
        )
    return table


def _row(table: Table, *cells: Any) -> None:
    """Add plain text: a name in brackets is no markup."""
    from rich.text import Text

    table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells))


def _drift(drift: dict[str, Any]) -> Table:
    from rich.text import Text

    table = _table("Drift from the training data", "Feature", "State", "PSI", "KS", "Missing", "Why")
    for item in [*by_severity(drift["features"]), drift["score"]]:
        _row(
            table,
            item["name"] + (" (model output)" if item["kind"] == "score" else ""),
            Text(item["state"], _STYLES.get(item["state"], "")),
            number(item["psi_adj"]),
            number(item["ks_low"]),
            share(item["missing"]),
            item["reason"],
        )
    return table


def _performance(metrics: dict[str, Any] | None) -> Table | None:
    if not metrics:
        return None
    table = _table("Performance", "Rows", "Labelled", *(text for _, text in PERFORMANCE))
    labelled = f"{count(metrics['labelled'])} ({share(metrics['coverage'])})"
    _row(table, count(metrics["n"]), labelled, *(number(metrics[key], 4) for key, _ in PERFORMANCE))
    return table


def _latency(data: ReportData) -> Table | None:
    latency = data.get("latency")
    if not latency:
        return None
    table = _table("Latency", "Requests", "p50", "p99", "longest", "Limit")
    limit = latency.get("limit_ms")
    _row(
        table,
        count(latency["count"]),
        *(nanoseconds(ns) for ns in (latency["p50_ns"], latency["p99_ns"], latency["max_ns"])),
        duration(None if limit is None else 1e3 * limit),
    )
    return table


def _stages(data: ReportData) -> Table | None:
    stages = data.get("stages")
    rows = stage_rows(stages) if stages else []
    if not rows:
        return None
    table = _table("Where the time goes", "Stage", "Requests", "p50", "p99", "longest", "Share")
    for cells in rows:
        _row(table, *cells)
    return table


def _service(data: ReportData) -> Table | None:
    service = data.get("service")
    if not service:
        return None
    cells = service_cells(service)
    table = _table("Service", *(text for text, _ in cells))
    _row(table, *(figure for _, figure in cells))
    return table


def _freshness(data: dict[str, Any] | None) -> Table | None:
    if not data or not data["views"]:
        return None
    table = _table(
        "Freshness of served values", "View", "p50", "p95", "p99", "Not found", "Expired", "Newest event"
    )
    for view in data["views"]:
        _row(
            table,
            view["view"],
            duration(view["p50_us"]),
            duration(view["p95_us"]),
            duration(view["p99_us"]),
            count(view["not_found"]),
            count(view["expired"]),
            time(view["newest_event_us"]),
        )
    return table
