"""Times the histogram counts on a GPU against a device-to-device copy of the same bytes.

Run it with `make gpu`. METHOD is in README.md beside this file. Without a device it says "not measured", and
leaves a measured result as it is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from penstock_kernels import dispatch, reference

RESULT = Path(__file__).parents[1] / "results" / "gpu-counts.json"
COLUMNS = 100
SHAPES = [(1_000_000, 64), (1_000_000, 1280), (64, 1280)]
CHECKED_ROWS = 20_000


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def facts() -> dict[str, Any]:
    """What a reader needs to judge or repeat the figures."""
    packages = ("numpy", "triton", "cupy-cuda12x", "cupy-cuda13x")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := version(name))},
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cpus": os.cpu_count()},
    }


def device_facts() -> dict[str, Any]:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "name": properties["name"].decode(),
        "compute_capability": cupy.cuda.Device().compute_capability,
        "memory_bytes": int(properties["totalGlobalMem"]),
        "multiprocessors": int(properties["multiProcessorCount"]),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "runtime": cupy.cuda.runtime.runtimeGetVersion(),
    }


def times_us(work: Callable[[], Any], repeats: int, warm_up: int) -> list[float]:
    """Microseconds of each call, by events on the current stream: the launch from Python included."""
    import cupy

    for _ in range(warm_up):
        work()
    out = []
    for _ in range(repeats):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        work()
        end.record()
        end.synchronize()
        out.append(cupy.cuda.get_elapsed_time(begin, end) * 1000.0)
    return out


def spread(samples: list[float]) -> dict[str, float | int]:
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {
        "median_us": round(statistics.median(samples), 3),
        "p10_us": round(cuts[0], 3),
        "p90_us": round(cuts[-1], 3),
        "min_us": round(min(samples), 3),
        "max_us": round(max(samples), 3),
        "samples": len(samples),
    }


def measure(rows: int, bins: int, repeats: int, warm_up: int) -> dict[str, Any]:
    """One shape: counts of float32 [rows, COLUMNS] at `bins` fine bins a column, and the copy."""
    import cupy

    rng = np.random.default_rng(7)
    sample = rng.standard_normal((50_000, COLUMNS), dtype=np.float32)
    spec = reference.HistogramSpec([reference.capture_edges(sample[:, j], bins) for j in range(COLUMNS)])
    host = rng.standard_normal((rows, COLUMNS), dtype=np.float32)
    part = host[:CHECKED_ROWS]
    if (
        dispatch.count_rows(spec, cupy.asarray(part)).get().tolist()
        != reference.count_rows(spec, part).tolist()
    ):
        raise SystemExit("the device's counts differ from the reference; nothing is reported")
    device = cupy.asarray(host)
    target = cupy.empty_like(device)

    def copy() -> None:
        target.data.copy_from_device_async(device.data, device.nbytes, cupy.cuda.get_current_stream())

    counts = spread(times_us(lambda: dispatch.count_rows(spec, device), repeats, warm_up))
    copied = spread(times_us(copy, repeats, warm_up))
    return {
        "rows": rows,
        "columns": COLUMNS,
        "bins": bins,
        "bytes": device.nbytes,
        "counts": counts,
        "copy": copied,
        "counts_per_copy": round(counts["median_us"] / copied["median_us"], 3),
    }


def publish(
    benchmark: str,
    reason: str | None,
    measured: Callable[[argparse.Namespace], list[dict[str, Any]]],
    result: Path,
) -> list[dict[str, Any]]:
    """Measure the shapes and write them; with a reason not to, say so and keep what was measured before."""
    parser = argparse.ArgumentParser(prog=benchmark)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--out", type=Path, default=result)
    options = parser.parse_args()
    document: dict[str, Any] = {"benchmark": benchmark, **facts()}
    shapes: list[dict[str, Any]] = []
    if reason is not None:
        print(f"not measured: {reason}")
        if options.out.exists() and json.loads(options.out.read_text()).get("status") == "measured":
            return shapes
        document |= {"status": "not measured", "reason": reason}
    else:
        shapes = measured(options)
        document |= {"status": "measured", "device": device_facts(), "shapes": shapes}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    return shapes


def main() -> None:
    def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
        return [measure(*shape, options.repeats, options.warm_up) for shape in SHAPES]

    for s in publish("gpu-counts", dispatch.no_device(), measured, RESULT):
        print(
            f"{s['rows']:>9} x {s['columns']} float32, {s['bins']:>4} bins: "
            f"counts {s['counts']['median_us']:.1f} us, copy {s['copy']['median_us']:.1f} us "
            f"({s['counts_per_copy']:.2f} copies)"
        )


if __name__ == "__main__":
    main()
