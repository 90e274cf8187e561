"""Write the benchmark tables between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`, from results/."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import RESULTS, ROOT
from serving.lines import row_of

READMES = (ROOT / "README.md", ROOT / "bench" / "README.md")
MARKED = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cell(figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    return f"{number(figure['median'])} ({number(figure['p10'])}-{number(figure['p90'])})"


def targets(lines: list[dict[str, Any]]) -> str:
    """The target table of a benchmark that has one."""
    head = ("measure", "Penstock", "beside it", "ratio", "target", "", "")
    rows = [head, ("---",) * len(head), *(row_of(line) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table(document: dict[str, Any]) -> str:
    """Markdown tables and the line that says what they rest on."""
    columns: list[str] = []
    for row in document["rows"]:
        columns += [column for column in row["figures"] if column not in columns]
    lines = ["| " + " | ".join([document["settings"]["unit"], *columns]) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in document["rows"]:
        cells = [cell(row["figures"].get(column)) for column in columns]
        lines.append("| " + " | ".join([row["case"], *cells]) + " |")
    facts = document["machine"]
    where = "virtual" if facts["virtual"] else "bare"
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    under = (
        f"Median (10th-90th percentile) of {document['settings']['rounds']} rounds; {facts['cores']} {where} "
        f"cores of {facts['cpu']}, Linux {facts['kernel']}, load {facts['load_before']:.1f} before; "
        f"{versions}; commit {document['commit']}; `{document['command']}`."
    )
    parts = ["\n".join(lines), "", under]
    if document.get("targets"):
        parts = [targets(document["targets"]), "", *parts]
    if document["absent"]:
        parts.append(f"Left out: {'; '.join(document['absent'])}.")
    parts += document["notes"]
    return "\n".join(parts) + "\n"


def device_table(document: dict[str, Any]) -> str:
    """The table of a benchmark on a GPU, or why there is none."""
    if document["status"] != "measured":
        return f"Not measured: {document['reason']}.\n"
    lines = ["| us | kernel | copy | copies |", "|---|---|---|---|"]
    for shape in document["shapes"]:
        name = shape.get("program") or f"counts, {shape['columns']} columns, {shape['bins']} bins"
        took, ratio = ("kernel", "kernel_per_copy") if "kernel" in shape else ("counts", "counts_per_copy")
        cells = [
            f"{number(one['median_us'])} ({number(one['p10_us'])}-{number(one['p90_us'])})"
            for one in (shape[took], shape["copy"])
        ]
        lines.append(f"| {name}, {shape['rows']:,} rows | {' | '.join(cells)} | {number(shape[ratio])} |")
    device = document["device"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    calls = document["shapes"][0]["copy"]["samples"]
    lines.append("")
    lines.append(
        f"Median (10th-90th percentile) of {calls} calls; {device['name']}; {versions}; "
        f"commit {document['commit']}; `{document['command']}`."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    texts = {path: path.read_text() for path in READMES}
    marked = {match[2] for text in texts.values() for match in MARKED.finditer(text)}
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    for name in sorted(marked - found.keys()):
        print(f"no results for the table {name}: left as it is")

    def written(name: str) -> str:
        return (device_table if name.startswith("gpu") else table)(found[name])

    for path, text in texts.items():
        path.write_text(MARKED.sub(lambda m: m[1] + written(m[2]) + m[3] if m[2] in found else m[0], text))
    print(f"README.md, bench/README.md: {len(marked & found.keys())} tables")


if __name__ == "__main__":
    main()
