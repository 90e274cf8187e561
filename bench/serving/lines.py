"""The lines of the target table: for each what is measured, beside whom, and what it must reach.

A line that a build or a machine cannot run says so in place of a figure; it is never filled in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Line:
    """One line of the table.

    Attributes:
        ours, theirs: figures in `unit`; theirs is `peer`'s, of the same run.
        ratio: what is compared with the target.
        passed: None where it could not be measured.
    """

    measure: str
    target: str
    unit: str = ""
    ours: float | None = None
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    passed: bool | None = None
    note: str = ""


@dataclass
class Book:
    """What a run found: samples per (contender, column), the lines, and what was left out."""

    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)  # requests without a right answer, by contender

    def add(self, who: str, column: str, value: float) -> None:
        self.samples.setdefault((who, column), []).append(value)

    def median(self, who: str, column: str) -> float | None:
        values = self.samples.get((who, column))
        return None if not values else statistics.median(values)

    def best(self, names: list[str], column: str) -> tuple[str, float] | None:
        """The largest median among `names`."""
        found = [(name, value) for name in names if (value := self.median(name, column)) is not None]
        return max(found, key=lambda pair: pair[1], default=None)

    def compare(
        self, measure: str, column: str, ours: str, theirs: str, unit: str, target: float, *, below: bool
    ) -> None:
        """A line on the ratio ours / theirs: at most (`below`) or at least `target`."""
        sign = "<=" if below else ">="
        line = Line(measure, f"{sign} {target:g}x {theirs}", unit, peer=theirs)
        line.ours, line.theirs = self.median(ours, column), self.median(theirs, column)
        if line.ours is not None and line.theirs:
            line.ratio = line.ours / line.theirs
            line.passed = line.ratio <= target if below else line.ratio >= target
        else:
            line.note = "not available"
        self.lines.append(line)

    def limit(self, measure: str, ours: float | None, unit: str, target: float, note: str = "") -> None:
        """A line on a figure that may be `target` at most."""
        passed = None if ours is None else ours <= target
        text = f"<= {target:g} {unit}"
        self.lines.append(Line(measure, text, unit, ours, passed=passed, note=note or _missing(ours)))

    def share(
        self, measure: str, part: float | None, whole: float | None, target: float, unit: str, note: str = ""
    ) -> None:
        """A line on part / whole, `target` at least."""
        line = Line(measure, f">= {target:g}x", unit, part, "its other side", whole)
        if part is not None and whole:
            line.ratio = part / whole
            line.passed = line.ratio >= target
        line.note = note or _missing(line.ratio)
        self.lines.append(line)

    def missing(self, measure: str, target: str, why: str) -> None:
        self.lines.append(Line(measure, target, note=why))

    def plain_lines(self) -> list[dict[str, Any]]:
        return [asdict(line) for line in self.lines]


def _missing(value: float | None) -> str:
    return "" if value is not None else "not available"


def attempt(book: Book, measure: str, target: str, work: Callable[[], None]) -> None:
    """Run `work`; what it lacks (Absent) becomes the line's note."""
    from common import Absent

    try:
        work()
    except Absent as error:
        book.missing(measure, target, f"not available: {error}")


def kernel_lines(book: Book, model: dict[str, Any] | None) -> None:
    """The tree kernel's lines, from results/model.json as bench/model/bench.py left it."""
    if model is None:
        book.missing("tree kernel", "<= 1/25 of the best peer", "not available: run bench/model/bench.py")
        return
    medians = {
        (row["case"], column): figure["median"]
        for row in model["rows"]
        for column, figure in row["figures"].items()
    }
    levels = {"AVX-512": 25.0, "AVX2": 10.0, "portable": 3.0}
    for forest, column, targets in (
        ("200 x 31", "batch 64", levels),
        ("200 x 31", "batch 1", {"best": 3.0}),
        ("1 000 x 255", "batch 64", {"best": 4.0}),
    ):
        by_case = {
            case.removeprefix(f"{forest}: "): value
            for (case, at), value in medians.items()
            if at == column and case.startswith(f"{forest}: ") and "(ratio)" not in case
        }
        against = min(
            ((value, case) for case, value in by_case.items() if not case.startswith("Penstock")),
            default=None,
        )
        for level, target in targets.items():
            measure = f"tree kernel, {forest}, {column}" + ("" if level == "best" else f", {level}")
            cases = [
                value
                for case, value in by_case.items()
                if case.startswith("Penstock in C++") and (level == "best" or level in case)
            ]
            text = f"<= 1/{target:g} of the best peer"
            if against is None or not cases:
                book.missing(measure, text, "not available: not in results/model.json")
                continue
            theirs, peer = against
            ours = min(cases)
            book.lines.append(
                Line(
                    measure,
                    text,
                    "us",
                    ours,
                    peer,
                    theirs,
                    ours / theirs,
                    ours / theirs <= 1 / target,
                    note=f"results/model.json, commit {model['commit']}",
                )
            )


def shown(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def row_of(line: dict[str, Any]) -> list[str]:
    """Cells of a line as a table shows it: measure, ours, theirs, ratio, target, verdict, note."""
    verdict = {True: "pass", False: "MISS", None: "-"}[line["passed"]]
    theirs = shown(line["theirs"], line["unit"])
    if line["theirs"] is not None and line["peer"]:
        theirs += f" ({line['peer']})"
    return [
        line["measure"],
        shown(line["ours"], line["unit"]),
        theirs,
        "-" if line["ratio"] is None else f"{line['ratio']:.3g}x",
        line["target"],
        verdict,
        line["note"],
    ]


def report(book: Book, title: str) -> None:
    """Print the lines as a table, and what was left out."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=170)
    table = Table(title=title, show_lines=False)
    for name in ("measure", "ours", "the peer's", "ratio", "target", "", "note"):
        table.add_column(name)
    for line in book.plain_lines():
        table.add_row(*row_of(line))
    console.print(table)
    for text in book.absent:
        console.print(f"left out: {text}", markup=False)
    for who, count in book.failures.items():
        console.print(f"{who}: {count} requests of the closed loops had no right answer", markup=False)
