"""Times a feature program's fused kernel on a GPU against a device-to-device copy of the bytes it must move.

Run it with `make gpu`. The method is in README.md beside this file. Without a device, or without Penstock, it
says "not measured", and leaves a measured result as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from bench_counts import publish, spread, times_us

from penstock_kernels import dispatch

RESULT = Path(__file__).parents[1] / "results" / "gpu-programs.json"
SHAPES = (1_000_000, 16_000_000, 64)
CHECKED_ROWS = 100_000


def program_of_20() -> tuple[Any, dict[str, str]]:
    """20 operations of one output: the program of `bench/features` ("20 operations")."""
    from penstock.features.expressions import col, now

    x = (now() - col("t")).seconds()
    for i in range(9):
        x = x * col("f") + (i + 1)
    return [("score", x)], {"t": "timestamp", "f": "float32"}


def program_of_math() -> tuple[Any, dict[str, str]]:
    """exp, log and pow, whose steps have a fixed order: some hundred instructions a row."""
    from penstock.features.expressions import col

    f, g = col("f"), col("g")
    return [("score", (f * 0.25).exp() + (g + 1.0).log() + (g + 0.5) ** f)], {"f": "float32", "g": "float64"}


def columns(inputs: list[tuple[str, str]], rows: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(7)
    start = 1_767_225_600_000_000
    found = []
    for name, _ in inputs:
        if name in ("f", "g"):
            found.append(rng.random(rows).astype(np.float32).astype(np.float64))
        elif name == "t":
            found.append(start + rng.integers(0, 10**12, rows))
        else:
            found.append(np.full(rows, start + 10**12))
    return found


def measure(name: str, made: Any, rows: int, repeats: int, warm_up: int) -> dict[str, Any]:
    import cupy

    from penstock import _core
    from penstock.features.backends.triton_backend import TritonProgram
    from penstock.features.program import lower

    program = lower(*made)
    compiled = TritonProgram(program)
    host = columns(list(program.inputs), rows)
    part = [(values[:CHECKED_ROWS], None) for values in host]
    native = _core.FeatureProgram(program.to_bytes())
    want = np.asarray(native.run(part, rows=len(part[0][0]))[0][0])
    found = compiled.run([(cupy.asarray(values), None) for values, _ in part])[0][0].get()
    if want.tobytes() != found.tobytes():
        raise SystemExit(f"{name}: the device's bits differ from the core's; nothing is reported")
    device = [(cupy.asarray(values), None) for values in host]
    # What the kernel moves: 8 bytes and a validity byte of each input and of each output.
    moved = 9 * rows * (len(program.inputs) + len(program.outputs))
    source = cupy.ones(moved // 2, np.uint8)
    target = cupy.empty_like(source)

    def copy() -> None:
        target.data.copy_from_device_async(source.data, source.nbytes, cupy.cuda.get_current_stream())

    ran = spread(times_us(lambda: compiled.run(device), repeats, warm_up))
    copied = spread(times_us(copy, repeats, warm_up))
    return {
        "program": name,
        "operations": len(program.code),
        "rows": rows,
        "bytes": moved,
        "kernel": ran,
        "copy": copied,
        "kernel_per_copy": round(ran["median_us"] / copied["median_us"], 3),
    }


def reason_not() -> str | None:
    reason = dispatch.no_device()
    if reason is None:
        try:
            import penstock._core  # noqa: F401
        except ImportError:
            reason = "penstock is not installed"
    return reason


def main() -> None:
    def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
        programs = (("20 operations", program_of_20()), ("exp, log, pow", program_of_math()))
        return [
            measure(name, made, rows, options.repeats, options.warm_up)
            for name, made in programs
            for rows in SHAPES
        ]

    for s in publish("gpu-programs", reason_not(), measured, RESULT):
        print(
            f"{s['program']:>14}, {s['rows']:>9} rows: kernel {s['kernel']['median_us']:.1f} us, "
            f"copy {s['copy']['median_us']:.1f} us ({s['kernel_per_copy']:.2f} copies)"
        )


if __name__ == "__main__":
    main()
