"""The sums of several workers' counters."""

from __future__ import annotations

from typing import Any

from penstock.serving.worker_stats import merge_stats


def part(**model: Any) -> dict[str, Any]:
    return {"models": {"m": model}, "caches": {}, "monitor_errors": 1}


def test_counts_add_up_and_of_ratios_the_worst_is_told():
    made = merge_stats(
        {
            0: part(
                requests={"ok": 3},
                stages={"run": {"count": 2, "p99_ns": 7, "le_us": [[1, 1], [2, 2]]}},
                slo={"met": 3, "due": 4, "attainment": 0.75, "attainment_10s": None},
                busy_ratio=0.2,
                breaker={"state": "closed", "busy": False, "opens": 1},
                edge={"active": False, "hits": 2},
                limit_ms=50,
                version="1",
            ),
            1: part(
                requests={"ok": 5},
                stages={"run": {"count": 4, "p99_ns": 5, "le_us": [[1, 0], [2, 4]]}},
                slo={"met": 1, "due": 2, "attainment": 0.5, "attainment_10s": 1.0},
                busy_ratio=0.9,
                breaker={"state": "open", "busy": True, "opens": 0},
                edge={"active": True, "hits": 1},
                limit_ms=50,
                version="1",
            ),
        },
        {0: {"pid": 10, "generation": 1}, 1: {"pid": 11, "generation": 2}},
    )
    assert made["models"]["m"] == {
        "requests": {"ok": 8},
        "stages": {"run": {"count": 6, "p99_ns": 7, "le_us": [[1, 1], [2, 6]]}},
        "slo": {"met": 4, "due": 6, "attainment": 0.5, "attainment_10s": 1.0},
        "busy_ratio": 0.9,
        "breaker": {"state": "open", "busy": True, "opens": 1},
        "edge": {"active": True, "hits": 3},
        "limit_ms": 50,
        "version": "1",
    }
    assert made["monitor_errors"] == 2
    assert {index: worker["pid"] for index, worker in made["workers"].items()} == {"0": 10, "1": 11}
    assert made["workers"]["1"]["models"]["m"]["requests"] == {"ok": 5}


def test_a_worker_that_has_not_loaded_a_model_yet_adds_nothing():
    idle = {"models": {}, "caches": {}}
    made = merge_stats({0: part(requests={"ok": 3}, slo={"attainment": None}), 1: idle}, {})
    assert made["models"]["m"] == {"requests": {"ok": 3}, "slo": {"attainment": None}}
