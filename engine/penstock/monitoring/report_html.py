"""The HTML report: one page with its styles and charts inside, light and dark, without network or script.

Every text from outside (names, reasons, labels) is escaped. The page is well-formed XML after its doctype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from penstock.monitoring.report_charts import bars, lines
from penstock.monitoring.report_data import (
    PERFORMANCE,
    STATES,
    HistoryPoint,
    LatencyData,
    ReportData,
    by_severity,
    check_data,
    count,
    duration,
    nanoseconds,
    number,
    probability,
    service_cells,
    share,
    stage_rows,
    time,
)

_CSS = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--text:#1b2430;--soft:#5d6b7a;--line:#dfe4ea;
--ref:#aab6c3;--cur:#2f6fde;--ok:#1c7c4a;--warn:#9a6200;--alert:#c22f2f;--insufficient:#5d6b7a}
@media screen and (prefers-color-scheme:dark){:root{
--page:#12161b;--card:#1b2129;--text:#e4e9ef;
--soft:#97a4b2;--line:#2d3641;
--ref:#5b6876;--cur:#6aa2ff;--ok:#5cc98d;--warn:#e6b04d;--alert:#ff7a70;--insufficient:#97a4b2}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:14px/1.45 system-ui,sans-serif}
main{max-width:1160px;margin:0 auto;padding:24px 20px 48px}
h1{font-size:22px;margin:0 0 2px}h2{font-size:16px;margin:28px 0 10px}
h3{font-size:14px;margin:0;overflow-wrap:anywhere}
p{margin:4px 0}.soft{color:var(--soft)}
.tiles,.plots{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.plots{grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}
.plots.wide{grid-template-columns:repeat(auto-fill,minmax(440px,1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.tile b{display:block;font-size:20px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft)}
.head{display:flex;justify-content:space-between;align-items:baseline;gap:8px}
.state{font-weight:600;white-space:nowrap}.state::before{content:"";display:inline-block;width:8px;height:8px;
border-radius:4px;background:currentColor;margin-right:6px}
.ok{color:var(--ok)}.warn{color:var(--warn)}.alert{color:var(--alert)}.insufficient{color:var(--insufficient)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:500}tr:last-child td{border-bottom:0}
th:first-child,td:first-child,.left{text-align:left}
td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:140px}.why{white-space:normal;min-width:220px;text-align:left}
svg{display:block;width:100%;height:auto;margin-top:8px}svg text{font-size:11px;fill:var(--soft)}
path.ref,circle.ref{fill:var(--ref)}path.cur,circle.cur{fill:var(--cur)}.tip{fill:transparent}
.axis,.grid{stroke:var(--line);fill:none}.limit{stroke:var(--alert);stroke-dasharray:4 4;fill:none}
path.line{fill:none;stroke-width:1.8}path.line.cur{stroke:var(--cur)}path.line.ref{stroke:var(--ref)}
.key{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 5px 0 12px}
.key.r{background:var(--ref)}.key.c{background:var(--cur)}
@media print{.card{break-inside:avoid}}
"""


def render(data: ReportData) -> str:
    """The page. Raises InvalidArgumentError where a needed part of the data is missing."""
    check_data(data)
    drift = data["drift"]
    features = by_severity(drift["features"])
    latency, history = data.get("latency"), data.get("history") or []
    title = f"{escape(data['model'])} version {escape(data['version'])}"
    sections = [
        f"<h1>{title} {_state(drift['state'])}</h1>",
        f'<p class="soft">{time(drift.get("start_us"))} to {time(drift.get("end_us"))}; '
        f"made {time(data['generated_us'])}</p>",
        _tiles(data, features),
        _history(history, latency),
        _feature_table([drift["score"], *features]),
        _plots([drift["score"], *features]),
        _freshness(data.get("freshness")),
        _stages(data),
        _footnote(drift.get("thresholds")),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"/>'
        f"<title>{title}: Penstock report</title><style>{_CSS}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _state(state: str) -> str:
    return f'<span class="state {state}">{state}</span>' if state in STATES else escape(state)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    css = [{"State": ' class="left"', "Why": ' class="why"'}.get(cell, "") for cell in head]
    top = "".join(f"<th{at}>{cell}</th>" for at, cell in zip(css, head))
    body = "".join(
        "<tr>" + "".join(f"<td{at}>{cell}</td>" for at, cell in zip(css, row)) + "</tr>" for row in rows
    )
    return f'<div class="card scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _tiles(data: ReportData, features: Sequence[dict[str, Any]]) -> str:
    drift, latency, metrics = data["drift"], data.get("latency"), data.get("performance")
    tiles = [(count(drift["n"]), "rows in the window")]
    tiles += [
        (count(n), f"features: {state}")
        for state in STATES
        if (n := sum(item["state"] == state for item in features))
    ]
    tiles += [
        (count(drift[key]), text) for key, text in (("late", "rows too late to count"),) if drift.get(key)
    ]
    if latency and latency["count"]:
        tiles += [
            (nanoseconds(latency["p50_ns"]), "latency p50"),
            (nanoseconds(latency["p99_ns"]), "latency p99"),
        ]
        limit = latency.get("limit_ms")
        end = "" if limit is None else f"; limit {duration(1e3 * limit)}"
        tiles.append((nanoseconds(latency["max_ns"]), f"latency, longest{end}"))
    service = data.get("service")
    if service and service["slo"]["due"]:
        tiles += [(figure, text[:1].lower() + text[1:]) for text, figure in service_cells(service)]
    if metrics and metrics.get("labelled"):
        for key, text in PERFORMANCE:
            tiles.append((number(metrics.get(key), 4), text))
        tiles.append((share(metrics.get("coverage")), f"of {count(metrics['n'])} rows labelled"))
    return (
        '<div class="tiles" style="margin-top:16px">'
        + "".join(
            f'<div class="card tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
            for value, text in tiles
        )
        + "</div>"
    )


def _history(history: Sequence[HistoryPoint], latency: LatencyData | None) -> str:
    points = sorted(history, key=lambda point: point["time_us"])
    times = [point["time_us"] for point in points]
    charts = []
    p50, p99, auc = (
        _series(points, key, scale) for key, scale in (("p50_ns", 1e-6), ("p99_ns", 1e-6), ("auc", 1.0))
    )
    if any(v is not None for v in [*p50, *p99]):
        limit = latency.get("limit_ms") if latency else None
        chart = lines(
            times, [("p99", p99), ("p50", p50)], "Latency", bounds=(0.0, 0.0), limit=limit, unit=" ms"
        )
        keys = '<span class="key c"></span>p99<span class="key r"></span>p50'
        charts.append(
            '<div class="card"><div class="head"><h3>Latency</h3>'
            f'<span class="soft">{keys}</span></div>{chart}</div>'
        )
    if any(v is not None for v in auc):
        chart = lines(times, [("AUC", auc)], "AUC", bounds=(0.5, 1.0))
        charts.append(f'<div class="card"><h3>AUC</h3>{chart}</div>')
    return f'<h2>Over time</h2><div class="plots wide">{"".join(charts)}</div>' if charts else ""


def _stages(data: ReportData) -> str:
    stages = data.get("stages")
    rows = stage_rows(stages) if stages else []
    if not rows:
        return ""
    head = ("Stage", "Requests", "p50", "p99", "longest", "Share")
    return f"<h2>Where the time goes</h2>{_table(head, [[*map(escape, row)] for row in rows])}"


def _series(points: Sequence[HistoryPoint], key: str, scale: float) -> list[float | None]:
    values: list[float | None] = [point.get(key) for point in points]  # type: ignore[misc]
    return [None if v is None or not math.isfinite(v) else v * scale for v in values]


def _feature_table(items: Sequence[dict[str, Any]]) -> str:
    head = ("Feature", "State", "PSI", "adjusted", "q", "KS distance", "q", "Missing", "was", "Why")
    rows = [
        (
            escape(item["name"]) + (" (model output)" if item["kind"] == "score" else ""),
            _state(item["state"]),
            escape(number(item["psi"])),
            escape(number(item["psi_adj"])),
            escape(probability(item["psi_q"])),
            _band(item),
            escape(probability(item["ks_q"])),
            escape(share(item["missing"])),
            escape(share(item["missing_reference"])),
            escape(item["reason"]),
        )
        for item in items
    ]
    return f"<h2>Drift from the training data</h2>{_table(head, rows)}"


def _band(item: dict[str, Any]) -> str:
    low, high = item["ks_low"], item["ks_high"]
    if low is None:
        return "-"
    return escape(number(low) if number(low) == number(high) else f"{number(low)} to {number(high)}")


def _plots(items: Sequence[dict[str, Any]]) -> str:
    cards = []
    for item in items:
        groups = item["groups"]
        chart = bars(groups["labels"], groups["reference"], groups["current"], item["name"])
        ends = [groups["labels"][0], groups["labels"][-1]] if len(groups["labels"]) > 1 else groups["labels"]
        cards.append(
            f'<div class="card"><div class="head"><h3>{escape(item["name"])}</h3>'
            f'{_state(item["state"])}</div>{chart}<p class="head soft">'
            + "".join(f"<span>{escape(end)}</span>" for end in ends)
            + "</p></div>"
        )
    keys = '<span class="key r"></span>training<span class="key c"></span>served'
    return f'<h2>Distributions <span class="soft">{keys}</span></h2><div class="plots">{"".join(cards)}</div>'


def _freshness(data: dict[str, Any] | None) -> str:
    if not data or not data["views"]:
        return ""
    head = (
        "View",
        "Age p50",
        "p95",
        "p99",
        "longest",
        "Limit",
        "Not found",
        "Expired",
        "In the future",
        "Newest event",
    )
    rows = [
        (
            escape(view["view"]),
            duration(view["p50_us"]),
            duration(view["p95_us"]),
            duration(view["p99_us"]),
            duration(view["max_us"]),
            duration(view["ttl_us"]),
            count(view["not_found"]),
            count(view["expired"]),
            count(view["negative"]),
            time(view["newest_event_us"]),
        )
        for view in data["views"]
    ]
    note = f'<p class="soft">Quantiles are within {100 * data["quantile_error"]:.1f} % of a served age.</p>'
    return f"<h2>Freshness of served values</h2>{_table(head, rows)}{note}"


def _footnote(thresholds: dict[str, Any] | None) -> str:
    if not thresholds:
        return ""
    t = thresholds
    limits = ", ".join(
        f"{text} {t[f'{name}_warn']:g} and {t[f'{name}_alert']:g}"
        for name, text in (
            ("psi", "adjusted PSI from"),
            ("ks", "KS distance from"),
            ("missing", "a missing share that moved by"),
            ("unseen", "an unseen share that moved by"),
        )
    )
    return (
        f'<p class="soft" style="margin-top:24px">PSI over {t["psi_groups"]} groups of equal training mass, '
        "missing values a bin of their own; adjusted: less its mean without drift. The KS distance is given "
        f"as certified bounds. Warn and alert need q &lt; {t['q']:g} (Benjamini-Hochberg) and an effect: "
        f"{limits}.</p>"
    )
