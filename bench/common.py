"""What every benchmark shares: interleaved rounds, medians with spread, machine facts, result files.

A case is a callable that performs a known number of operations. Cases run in turn, round after round, so
that a slow minute of the machine falls on all of them; a figure is the median over rounds, beside the 10th
and 90th percentile over rounds.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BUILD = ROOT / "build" / "bench"


class Absent(Exception):
    """A peer or a tool that this machine lacks; the text says which."""


@dataclass(frozen=True)
class Case:
    """`run` performs `operations` operations after an untimed `prepare`; `row` and `column` place it."""

    row: str
    column: str
    run: Callable[[], object]
    operations: int
    prepare: Callable[[], object] = lambda: None


def interleave(cases: Sequence[Case], *, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Microseconds per operation of each case in each round, after one round that is thrown away."""
    samples: dict[tuple[str, str], list[float]] = {}
    for round_number in range(rounds + 1):
        for case in cases:
            case.prepare()
            start = time.perf_counter_ns()
            case.run()
            us = (time.perf_counter_ns() - start) / 1e3 / case.operations
            if round_number > 0:
                samples.setdefault((case.row, case.column), []).append(us)
    return samples


def summary(samples: Iterable[float]) -> dict[str, float | int]:
    """Median, 10th and 90th percentile, and the number of samples."""
    values = sorted(samples)
    if len(values) == 1:
        return {"median": values[0], "p10": values[0], "p90": values[0], "n": 1}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[8], "n": len(values)}


def rows_of(samples: Mapping[tuple[str, str], Sequence[float]]) -> list[dict[str, Any]]:
    """The samples as table rows, in order of first mention: {"case", "figures": {column: summary}}."""
    rows: dict[str, dict[str, Any]] = {}
    for (row, column), values in samples.items():
        rows.setdefault(row, {"case": row, "figures": {}})["figures"][column] = summary(values)
    return list(rows.values())


def import_peer(name: str) -> Any:
    """The module `name`, or Absent."""
    try:
        return __import__(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed") from error


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def last_level_cache_bytes() -> int:
    """Size of the largest cache of core 0; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes, default=32 << 20)


def machine() -> dict[str, Any]:
    """What the figures depend on and the source does not say."""
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        caches[f"L{_first_line(f'{folder}/level')} {_first_line(f'{folder}/type')}"] = _first_line(
            f"{folder}/size"
        )
    wide = [flag for flag in ("avx2", "avx512f") if flag in info.get("flags", "").split()]
    return {
        "cpu": f"{info.get('model name', platform.processor())} (family {info.get('cpu family', '?')}, "
        f"model {info.get('model', '?')})",
        "cores": os.cpu_count(),
        "vectors": wide,
        "virtual": "hypervisor" in info.get("flags", "").split(),
        "caches": caches,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_before": os.getloadavg()[0],
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with "+changes" where tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md"
    )
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")


def write(
    name: str,
    rows: list[dict[str, Any]],
    *,
    facts: dict[str, Any],
    settings: Mapping[str, Any],
    packages: Iterable[str],
    absent: Iterable[str] = (),
    notes: Iterable[str] = (),
    targets: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write bench/results/NAME.json.

    Args:
        facts: those of machine(), read before the measurement.
        targets: lines with the keys of bench/serving/lines.Line, shown above the rows.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    document = {
        "name": name,
        "command": shlex.join(["python", str(shown), *sys.argv[1:]]),
        "commit": commit(),
        "machine": facts,
        "versions": versions(packages),
        "settings": dict(settings),
        "rows": rows,
        "absent": list(absent),
        "notes": list(notes),
    }
    if targets is not None:
        document["targets"] = [dict(line) for line in targets]
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return path


def build_native(source: Path, areas: Sequence[str]) -> Path:
    """Compile one benchmark program with the core's sources of `areas`, with the flags of a release build."""
    compiler = os.environ.get("CXX", "g++")
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    objects = BUILD / source.stem
    objects.mkdir(parents=True, exist_ok=True)
    sources = [source, *(path for area in areas for path in sorted((ROOT / "csrc" / area).glob("*.cc")))]
    made = []
    for path in sources:
        level = "v3" if path.stem.endswith("_avx2") else "v4" if path.stem.endswith("_avx512") else "v2"
        if level != "v2" and not x86:
            continue
        target = objects / f"{path.stem}.o"
        march = [f"-march=x86-64-{level}"] if x86 else []
        try:
            subprocess.run([compiler, *flags, *march, "-c", str(path), "-o", str(target)], check=True)
        except FileNotFoundError as error:
            raise Absent(f"no C++ compiler ({compiler})") from error
        made.append(str(target))
    program = objects / source.stem
    subprocess.run([compiler, *made, "-o", str(program), "-pthread"], check=True)
    return program
