"""Where the loop thread's time goes, by load: `perf` on the thread, and its time for a request by /proc.

Needs Linux' perf and the right to use it.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import OURS, QUICK, Run
from common import Absent, machine, rows_of, write
from servers import Contender, measure

from penstock.loadgen import Load

ROUNDS, WARMUP, WINDOW, RECORDED = 3, 1.0, 6.0, 2
_TICKS = os.sysconf("SC_CLK_TCK")
LOADS: dict[str, dict[str, Any]] = {
    "1 in flight": {"connections": 1, "in_flight": 1},
    "64 connections, 1 in flight each": {"connections": 64, "in_flight": 1},
    "8 connections, 64 in flight each": {"connections": 8, "in_flight": 64},
}
TIME = "loop thread, us a request"
PARTS = {
    "kernel, %": r"\[kernel",
    "native core, %": r"_core\.",
    "CPython, %": r"(lib)?python3",
    "uvloop, %": r"loop\.cpython",
}
REST = "libc, clock, %"


def thread_seconds(pid: int) -> float:
    """User and system time of a process' first thread, which runs the loop."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def shares(recording: Path) -> dict[str, float]:
    """Percent of the samples by part."""
    command = ["perf", "report", "-i", str(recording), "--sort", "dso", "--stdio"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict.fromkeys([*PARTS, REST], 0.0)
    for percent, dso in re.findall(r"^ *([\d.]+)% +(\S+)", report, re.MULTILINE):
        part = next((part for part, pattern in PARTS.items() if re.match(pattern, dso)), REST)
        found[part] += float(percent)
    return found


def sampled(ours: Contender, load: dict[str, Any], recording: Path) -> dict[str, float]:
    """One window under a load."""
    pid = ours.server.process.pid
    spent: list[float] = []

    def record() -> None:
        began, before = time.monotonic(), thread_seconds(pid)
        command = ["perf", "record", "-q", "-t", str(pid), "-o", str(recording), "--", "sleep", str(RECORDED)]
        subprocess.run(command, check=True)
        spent.append((thread_seconds(pid) - before) / (time.monotonic() - began))

    timer = threading.Timer(WARMUP + 1, record)
    timer.start()
    rate = measure(ours, Load(ours.address, **load, warmup=WARMUP, duration=WINDOW)).result.rate
    timer.join()
    return {TIME: 1e6 * spent[0] / rate, **shares(recording)}


def main() -> None:
    facts = machine()
    samples: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        run = Run(Path(name), QUICK, stack)
        try:
            ours = run.ours("ours")[OURS]
        except Absent as error:
            raise SystemExit(str(error)) from error
        for _ in range(ROUNDS):
            for text, load in LOADS.items():
                for column, value in sampled(ours, load, run.folder / "perf").items():
                    samples.setdefault((text, column), []).append(value)
    write(
        "serving-cycles",
        rows_of(samples),
        facts=facts,
        settings={"unit": "load", "rounds": ROUNDS},
        packages=("uvloop", "numpy"),
    )


if __name__ == "__main__":
    main()
