"""The figures of a run: as one JSON object, and as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from penstock.examples.flights.demo import Result, Snapshot
from penstock.examples.flights.train import LEAK_AUC, MODEL

_WORST_FIRST = ("alert", "warn", "ok", "insufficient")


def _model(snapshot: Snapshot) -> dict[str, Any]:
    found: dict[str, Any] = snapshot.stats["models"][MODEL]
    return found


def live_auc(snapshot: Snapshot) -> float:
    """AUC of the labels that came back within the window, as the server counts it."""
    return float(_model(snapshot)["performance"]["auc"])


def drifted(snapshot: Snapshot) -> list[str]:
    """Inputs (and the score) in warn or alert."""
    return list(snapshot.drift[MODEL]["drift"]["drifted"])


def mean_batch(snapshot: Snapshot) -> float:
    """Rows a batch, on average."""
    runs = {int(size): int(n) for size, n in _model(snapshot)["batches"].items()}
    return sum(size * n for size, n in runs.items()) / max(1, sum(runs.values()))


def hit_rates(snapshot: Snapshot) -> dict[str, float]:
    """Share of reads that the feature cache answered, by view.

    A flight that waits for a load reads every view once more, and one slot holds one time's row of a key.
    """
    rates = {}
    for view, counts in snapshot.stats["caches"].items():
        reads = sum(counts[what] for what in ("hits", "misses", "expired", "busy"))
        rates[view] = counts["hits"] / reads if reads else float("nan")
    return rates


def figures(result: Result) -> dict[str, Any]:
    """The line of JSON. Latencies are the server's, milliseconds; `client_*` are seen by the client."""
    latency = _model(result.july)["latency"]
    tally = result.tally
    return {
        "holdout_auc": round(result.trained.holdout_auc, 4),
        "live_auc": round(live_auc(result.live), 4),
        "july_auc": round(live_auc(result.july), 4),
        "requests": tally.requests,
        "ok": tally.ok,
        "errors": sum(tally.errors.values()),
        "error_codes": dict(tally.errors),
        "p50_ms": round(latency["p50_ns"] / 1e6, 3),
        "p99_ms": round(latency["p99_ns"] / 1e6, 3),
        "client_p50_ms": round(tally.wait_ms(0.5), 3),
        "client_p99_ms": round(tally.wait_ms(0.99), 3),
        "rows_per_s": round(tally.rows_per_s, 1),
        "mean_batch": round(mean_batch(result.july), 2),
        "hit_rates": {view: round(rate, 4) for view, rate in hit_rates(result.july).items()},
        "drifted": drifted(result.july),
        "pushed": tally.pushed,
        "labels": tally.labels,
        "never_labelled": result.never_labelled,
        "rows_compared": result.comparison.rows,
        "rows_differing": result.comparison.differing,
    }


def faults(result: Result) -> list[str]:
    """What must not be: each makes the run fail."""
    tally, found = result.tally, []
    if tally.ok != tally.requests:
        found.append(f"{tally.requests - tally.ok} of {tally.requests} requests failed: {dict(tally.errors)}")
    if result.comparison.rows != tally.ok:
        found.append(f"{result.comparison.rows} served rows are in the log, of {tally.ok} answered")
    if result.comparison.differing:
        names = ", ".join(f"{name} ({n})" for name, n in result.comparison.by_feature.most_common())
        found.append(f"{result.comparison.differing} served rows differ from the historical join: {names}")
    if tally.matched != tally.labels:
        found.append(f"{tally.matched} of {tally.labels} labels found their prediction")
    for name, snapshot in (("late May", result.live), ("July", result.july)):
        counted, bound = live_auc(snapshot), float(_model(snapshot)["performance"]["auc_error_bound"])
        if not abs(counted - snapshot.auc) <= bound + 1e-9:
            found.append(
                f"the server's AUC of {name} is {counted:.4f}, that of its replies {snapshot.auc:.4f}"
            )
        if counted > LEAK_AUC:
            found.append(f"the AUC of {name} is {counted:.4f}: a feature knows what was not yet known")
    if "temperature" not in drifted(result.july):
        found.append("the temperature of July shows no drift")
    if result.server_exit:
        found.append(f"the server ended with exit code {result.server_exit}")
    return found


def _summary(result: Result) -> Table:
    shown, trained, tally = figures(result), result.trained, result.tally
    runs = {int(size): n for size, n in _model(result.july)["batches"].items()}
    table = Table(title="Late arrivals, predicted 60 minutes before departure", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in (
        ("trained on", f"{trained.train_rows:,} flights; {trained.holdout_rows:,} held out"),
        ("AUC, holdout", f"{shown['holdout_auc']:.4f}"),
        ("AUC, live in late May", f"{shown['live_auc']:.4f}, from the labels that came back"),
        ("AUC, live in July", f"{shown['july_auc']:.4f}"),
        ("predictions", f"{tally.ok:,} of {tally.requests:,} requests; {shown['errors']} errors"),
        ("events", f"{tally.pushed:,} pushed as they happened"),
        ("labels", f"{tally.labels:,} sent as flights landed, {tally.matched:,} found their prediction"),
        ("latency in the server", f"p50 {shown['p50_ms']:.2f} ms, p99 {shown['p99_ms']:.2f} ms"),
        (
            "latency seen by the client",
            f"p50 {shown['client_p50_ms']:.2f}, p99 {shown['client_p99_ms']:.2f} ms",
        ),
        ("predictions a second", f"{shown['rows_per_s']:,.0f} while serving"),
        ("batch sizes", f"mean {shown['mean_batch']:.1f}, 1 to {max(runs, default=0)}"),
        ("served beside joined", f"{shown['rows_compared']:,} vectors, {shown['rows_differing']} mismatches"),
    ):
        table.add_row(name, value)
    return table


def _caches(result: Result) -> Table:
    table = Table(title="Feature cache")
    table.add_column("view")
    table.add_column("reads answered", justify="right")
    for view, rate in hit_rates(result.july).items():
        table.add_row(view, f"{rate:.1%}")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _drift(result: Result) -> Table:
    report = result.july.drift[MODEL]["drift"]
    rows = [*report["features"], report["score"]]
    rows.sort(key=lambda row: (_WORST_FIRST.index(row["state"]), -(row["psi"] or 0.0)))
    table = Table(title=f"Drift in July against training ({report['n']:,} rows)")
    table.add_column("input")
    for title in ("PSI", "KS", "missing", "in training"):
        table.add_column(title, justify="right")
    table.add_column("state")
    styles = {"alert": "red", "warn": "yellow", "ok": "green"}
    for row in rows:
        shares = (_number(row["missing"]), _number(row["missing_reference"]))
        state = f"[{styles.get(row['state'], 'dim')}]{row['state']}[/]"
        table.add_row(row["name"], _number(row["psi"]), _number(row["ks_low"]), *shares, state)
    return table


def show(result: Result, console: Console) -> None:
    """Print the tables, the note on labels, and each fault."""
    for table in (_drift(result), _caches(result), _summary(result)):
        console.print(table)
    console.print(
        f"{result.never_labelled:,} flights of 2013 were cancelled or diverted: they are asked for like any "
        "other, and never get a label."
    )
    for fault in faults(result):
        console.print(f"FAILED: {fault}", style="red", markup=False)
