"""Feature cache: 64 rows of 32 floats into one array, beside what Python programs use for it today.

Every contestant fills the same (64, 32) float32 array from 64 keys and is checked against the table first.
The dictionaries are given str objects that they have not seen, as a request's are; Penstock is given hashed
keys, and once more str keys that it hashes within the timed call.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    Absent,
    Case,
    build_native,
    import_peer,
    interleave,
    last_level_cache_bytes,
    machine,
    rows_of,
    summary,
    write,
)

from penstock import _core

BATCH = 64
FLOATS = 32
SEED = bytes(range(16))
NOW_US, MONO_NS = 10, 10
Fill = Callable[[list[str], np.ndarray], None]


def names_of(numbers: np.ndarray) -> list[str]:
    return [f"user:{number}" for number in numbers.tolist()]


def table_of(keys: int) -> np.ndarray:
    return np.random.default_rng(1).random((keys, FLOATS), np.float32)


def penstock_cache(keys: np.ndarray, table: np.ndarray) -> _core.FeatureCache:
    cache = _core.FeatureCache(capacity=2 * len(keys), row_words=FLOATS // 2)
    meta = np.tile(np.array([0, 1 << 60, 5, 5], np.int64), (len(keys), 1))
    cache.put_many(keys, table.view(np.uint64), meta, 1, 0)
    return cache


def with_dict(make: Callable[[], Any], names: list[str], table: np.ndarray) -> Fill:
    store = make()
    for name, row in zip(names, table):
        store[name] = row.copy()

    def fill(batch: list[str], out: np.ndarray) -> None:
        np.stack([store[name] for name in batch], out=out)

    return fill


def with_take(names: list[str], table: np.ndarray) -> Fill:
    places = {name: number for number, name in enumerate(names)}
    held = table.copy()

    def fill(batch: list[str], out: np.ndarray) -> None:
        np.take(held, [places[name] for name in batch], axis=0, out=out, mode="clip")

    return fill


def with_lock(make: Callable[[], Any], names: list[str], table: np.ndarray) -> Fill:
    inner, lock = with_dict(make, names, table), threading.Lock()

    def fill(batch: list[str], out: np.ndarray) -> None:
        with lock:
            inner(batch, out)

    return fill


def with_penstock(names: list[str], table: np.ndarray) -> Fill:
    cache = penstock_cache(_core.keys128([names], SEED)[0], table)
    status = np.empty(BATCH, np.uint8)

    def fill(batch: list[str], out: np.ndarray) -> None:
        keys, _ = _core.keys128([batch], SEED)
        if cache.get_many(keys, NOW_US, MONO_NS, out.view(np.uint64), status) != len(batch):
            # A bucket of 15 ways may overflow at any fill: the caller loads such rows from the store.
            out[status[: len(batch)] != 0] = np.nan

    return fill


def contestants(absent: list[str]) -> dict[str, Callable[[list[str], np.ndarray], Fill]]:
    found: dict[str, Callable[[list[str], np.ndarray], Fill]] = {
        "Penstock, str keys hashed in the call": with_penstock,
        "dict, np.stack": lambda names, table: with_dict(dict, names, table),
        "dict of row numbers, np.take": with_take,
    }
    try:
        cachetools = import_peer("cachetools")

        def ttl() -> Any:
            return cachetools.TTLCache(1 << 30, 1 << 30)

        found["cachetools.TTLCache, np.stack"] = lambda names, table: with_dict(ttl, names, table)
        found["cachetools.TTLCache with a lock, np.stack"] = lambda names, table: with_lock(ttl, names, table)
    except Absent as error:
        absent.append(str(error))
    try:
        cachebox = import_peer("cachebox")

        def boxed() -> Any:
            return cachebox.TTLCache(1 << 30, 1 << 30)

        found["cachebox.TTLCache, np.stack"] = lambda names, table: with_dict(boxed, names, table)
    except Absent as error:
        absent.append(str(error))
    return found


def check(fill: Fill, table: np.ndarray, who: str) -> None:
    rng = np.random.default_rng(3)
    missing = 0
    out = np.empty((BATCH, FLOATS), np.float32)
    for _ in range(50):
        numbers = rng.integers(0, len(table), BATCH)
        fill(names_of(numbers), out)
        here = ~np.isnan(out[:, 0])
        missing += BATCH - int(here.sum())
        if not np.array_equal(out[here], table[numbers][here]):
            raise SystemExit(f"{who}: a row differs from the table")
    if missing > 0.02 * 50 * BATCH:
        raise SystemExit(f"{who}: {missing} of {50 * BATCH} rows are missing")


def rotating(fill: Fill, keys: int, batches: int, seed: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(run, fresh): `fresh` makes new str objects for each round before the clock starts."""
    rng = np.random.default_rng(seed)
    out = np.empty((BATCH, FLOATS), np.float32)
    prepared = [rng.integers(0, keys, BATCH) for _ in range(batches)]
    waiting: list[list[str]] = []

    def fresh() -> None:
        waiting[:] = [names_of(numbers) for numbers in prepared]

    def run() -> None:
        for batch in waiting:
            fill(batch, out)

    return run, fresh


def hashed(
    keys: int, batches: int, seed: int, table: np.ndarray
) -> tuple[Callable[[], None], Callable[[], None]]:
    rng = np.random.default_rng(seed)
    all_keys = np.stack(
        [np.arange(keys, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), np.arange(keys, dtype=np.uint64)],
        1,
    )
    cache = penstock_cache(all_keys, table)
    out = np.empty((BATCH, FLOATS // 2), np.uint64)
    status = np.empty(BATCH, np.uint8)
    numbers = rng.integers(0, keys, BATCH)
    cache.get_many(np.ascontiguousarray(all_keys[numbers]), NOW_US, MONO_NS, out, status)
    hit = status == 0
    if hit.mean() < 0.95 or not np.array_equal(out.view(np.float32)[hit], table[numbers][hit]):
        raise SystemExit("Penstock: a row differs from the table")
    waiting: list[np.ndarray] = []

    def fresh() -> None:
        waiting[:] = [np.ascontiguousarray(all_keys[rng.integers(0, keys, BATCH)]) for _ in range(batches)]

    def run() -> None:
        for batch in waiting:
            cache.get_many(batch, NOW_US, MONO_NS, out, status)

    return run, fresh


def native(absent: list[str], large: int) -> list[dict[str, Any]]:
    """The C++ call, without Python, per row."""
    try:
        program = build_native(Path(__file__).with_name("feature_cache_bench.cc"), ["cache", "base"])
    except Absent as error:
        absent.append(str(error))
        return []
    rows = []
    for label, keys in (("slab larger than the last-level cache", large), ("1 000 keys", 1000)):
        arguments = [str(keys), str(FLOATS // 2), str(BATCH), "16", "3000"]
        done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
        rows.append(
            {
                "case": f"Penstock in C++, {label}",
                "figures": {"ns per row": summary(answer["ns_per_row"][1:])},
                "slab_bytes": answer["bytes"],
                "hit_share": answer["hit_share"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batches", type=int, default=150, help="batches a round")
    options = parser.parse_args()
    facts = machine()
    absent: list[str] = []
    large = min(4_000_000, max(500_000, int(2.5 * last_level_cache_bytes() / 300)))
    cases = []
    for column, keys in (("100 000 keys", 100_000), ("1 000 keys", 1000)):
        table = table_of(keys)
        names = names_of(np.arange(keys))
        run, fresh = hashed(keys, options.batches, 7, table)
        cases.append(Case("Penstock, hashed keys", column, run, options.batches, fresh))
        for who, make in contestants(absent).items():
            fill = make(names, table)
            check(fill, table, who)
            run, fresh = rotating(fill, keys, options.batches, 7)
            cases.append(Case(who, column, run, options.batches, fresh))
    run, fresh = hashed(large, options.batches, 7, table_of(large))
    who = "Penstock, hashed keys"
    cases.append(Case(who, "slab larger than the last-level cache", run, options.batches, fresh))
    samples = interleave(cases, rounds=options.rounds)
    del cases, run, fresh
    run, fresh = hashed(large, 10 * options.batches, 7, table_of(large))
    alone = Case(who, "the same, nothing run in between", run, 10 * options.batches, fresh)
    samples |= interleave([alone], rounds=options.rounds)
    del alone, run, fresh
    settings = {
        "batch": BATCH,
        "floats": FLOATS,
        "keys_of_the_large_slab": large,
        "last_level_cache_bytes": last_level_cache_bytes(),
        "rounds": options.rounds,
        "batches_a_round": options.batches,
        "unit": "us per batch of 64 rows",
    }
    packages = ["numpy", "cachetools", "cachebox"]
    missing = sorted(set(absent))
    write("cache", rows_of(samples), facts=facts, settings=settings, packages=packages, absent=missing)
    rows = native(absent, large)
    if rows:
        settings = settings | {"unit": "ns per row", "rounds": 15, "batches_a_round": 3000}
        write("cache_native", rows, facts=facts, settings=settings, packages=[])
    for text in sorted(set(absent)):
        print(f"left out: {text}")


if __name__ == "__main__":
    main()
