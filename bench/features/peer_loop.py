"""What a peer's process does: it reads a case on a line, runs a round of it, and writes a line of JSON.

Run under the peer's own interpreter; needs the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(cases: dict[str, Callable[..., Any]]) -> None:
    """Answer until standard input ends. A case gets the other fields of its line as arguments."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            reply = {"ok": cases[asked.pop("case")](**asked)}
        except Exception as error:  # the parent decides what it means
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and what it gives."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def percentiles(work: Callable[[Any], Any], arguments: list[Any]) -> dict[str, float]:
    """p50 and p99 in microseconds of one call for each argument."""
    taken = []
    for argument in arguments:
        start = time.perf_counter_ns()
        work(argument)
        taken.append((time.perf_counter_ns() - start) / 1e3)
    taken.sort()
    return {"p50": taken[len(taken) // 2], "p99": taken[min(len(taken) - 1, len(taken) * 99 // 100)]}
