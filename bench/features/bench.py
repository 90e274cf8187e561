"""The feature store beside its peers: online reads, joins, windows, pushes, materialisation, memory.

Peers run in processes of their own environments and take turns with Penstock, round after round; every answer
is compared with theirs or with an oracle. bench/README.md says how the figures are made.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(2, str(Path(__file__).resolve().parents[1] / "peers"))

import data
import ours
from common import Absent, machine, rows_of, write
from serving.lines import Book, report
from targets import (
    COLD,
    DURABLE,
    FEAST,
    FILES,
    LONG,
    MANY,
    MATERIALIZE,
    MEMORY,
    ONE,
    OPS,
    OURS,
    REDIS,
    SHORT,
    SQLITE,
    VISIBLE,
    WARM,
    WIDE,
    WINDOW,
    target_lines,
)
from worker import Worker, redis_server

from penstock import FeatureStore, _core

FRAMES = ("polars", "duckdb", "pandas", "pyarrow", "numpy")
FEAST_PACKAGES = ("feast[redis]", "pandas", "pyarrow", "numpy")
USERS, ROWS, ASKED = 10_000, 1_000_000, 100_000
SPAN_US = ROWS * 1_000_000
END_US = data.START_US + SPAN_US
DAY_US = 86_400_000_000
WINDOW_KEYS, WINDOW_ROWS = 2, 400_000  # 2e5 events of a key over 60 days: 1e5 in a window


@dataclass(frozen=True)
class Plan:
    """How much of each: rounds, calls of a round, entities that Feast's answers are compared for."""

    rounds: int
    calls: int
    feast_calls: int
    feast_rounds: int
    compared: int
    pushes: int
    feast_join: bool


FULL = Plan(
    rounds=11, calls=4000, feast_calls=400, feast_rounds=3, compared=10_000, pushes=400, feast_join=True
)
QUICK = Plan(rounds=3, calls=500, feast_calls=50, feast_rounds=1, compared=1000, pushes=60, feast_join=False)


class Run:
    """The data, what is measured, and who takes part."""

    def __init__(self, folder: Path, plan: Plan, stack: contextlib.ExitStack) -> None:
        self.folder, self.plan, self.stack = folder, plan, stack
        self.data = folder / "data"
        self.book = Book()
        self.why: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.rng = np.random.default_rng(17)
        self.through = ""

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def absent(self, who: str, error: Exception) -> None:
        self.book.absent.append(f"{who}: {error}")
        self.say(f"left out: {who}: {error}")

    def worker(
        self, name: str, environment: str, packages: tuple[str, ...], script: str, *options: str
    ) -> Worker:
        made = Worker(environment, packages, script, *options, log=self.folder / f"{name}.log")
        self.stack.callback(made.close)
        self.versions |= {f"{environment}: {package}": v for package, v in made.versions().items()}
        return made

    def store(self, repo: Path, name: str) -> FeatureStore:
        return FeatureStore(repo, data_dir=self.folder / name)


def equal(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Stop where two answers differ; NaN equals NaN."""
    if not np.array_equal(found, expected.astype(found.dtype), equal_nan=True):
        differ = ~((found == expected) | (np.isnan(found) & np.isnan(expected)))
        raise SystemExit(f"{what}: {int(differ.sum())} of {differ.size} values differ")


def write_data(run: Run) -> None:
    run.say("writing the data")
    events = data.events(ROWS, USERS, 1)
    for name, keys in (("join", USERS), ("long", ROWS // 1000), ("short", ROWS // 20)):
        table = events if name == "join" else data.events(ROWS, keys, 2)
        data.write(table, run.data / name / "events.parquet")
        data.write(data.entities(ASKED, keys, SPAN_US, 3), run.data / name / "entities.parquet")
    data.write(events, run.data / "online" / "events.parquet")
    for v in range(5):
        data.write(data.latest(USERS, 10 + v, features=10, prefix=f"v{v}_"), run.data / f"wide{v}.parquet")
    fifty = data.latest(USERS, 20, features=50, prefix="x")
    data.write(fifty.rename_columns(["item_id", *fifty.column_names[1:]]), run.data / "fifty_items.parquet")
    step = 60 * DAY_US // WINDOW_ROWS
    data.write(
        data.events(WINDOW_ROWS, WINDOW_KEYS, 4, features=2, step_us=step), run.data / "windows.parquet"
    )


# Historical joins


def joins(run: Run) -> None:
    """From memory with and without an index, from Parquet, and over long and short histories."""
    run.say("historical joins")
    peers: Worker | None = None
    try:
        peers = run.worker("joins", "frames", FRAMES, "peer_joins.py", "--folder", str(run.data))
    except Absent as error:
        run.absent("polars, DuckDB, pandas", error)
    sets = {name: _Joined(run, name) for name in ("join", "long", "short")}
    columns = {"join": COLD, "long": LONG, "short": SHORT}
    for round_number in range(run.plan.rounds + 1):
        kept = round_number > 0
        first = round_number == 0
        for name, joined in sets.items():
            taken = joined.cold()
            if kept:
                run.book.add(OURS, columns[name], taken * 1e3)
            for peer in ("polars", "DuckDB", "pandas") if peers is not None else ():
                answer = str(run.folder / f"{name}-{peer}.npy") if first else None
                taken = peers.ask("memory", data=name, peer=peer, answer=answer)
                if kept:
                    run.book.add(peer, columns[name], taken * 1e3)
                else:
                    equal(joined.answer, np.load(str(answer)), f"historical join {name}, {peer}")
        taken = sets["join"].warm()
        if kept:
            run.book.add(OURS, WARM, taken * 1e3)
        taken = sets["join"].files()
        if kept:
            run.book.add(OURS, FILES, taken * 1e3)
        if peers is not None:
            taken = peers.ask("parquet", data="join", peer="polars")
            if kept:
                run.book.add("polars", FILES, taken * 1e3)
    sets["join"].close()
    if peers is not None:
        peers.close()


class _Joined:
    """Our joins over one set."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self.path = run.data / name
        self.asked = pq.read_table(self.path / "entities.parquet")
        events = pq.read_table(self.path / "events.parquet")
        self.memory = ours.repository(
            run.folder / f"memory-{name}", run.data, source=ours.in_memory(name, events)
        )
        source = ours.parquet_source(self.path / "events.parquet")
        self.parquet = ours.repository(run.folder / f"parquet-{name}", run.data, source=source)
        self.answer = np.zeros((0, 0), np.float32)
        self.open: FeatureStore | None = None

    def cold(self) -> float:
        """Seconds of the first join of a store over a table in memory: reading, sorting, joining."""
        with self.run.store(self.memory, f"data-{self.name}") as store:
            start = time.perf_counter()
            found = store.get_historical_features(self.asked, "stats").to_arrow()
            taken = time.perf_counter() - start
        self._check(found)
        return taken

    def warm(self) -> float:
        """Seconds of a further join of a store."""
        if self.open is None:
            self.open = self.run.store(self.memory, f"data-{self.name}")
            self.open.get_historical_features(self.asked, "stats").to_arrow()
        start = time.perf_counter()
        found = self.open.get_historical_features(self.asked, "stats").to_arrow()
        taken = time.perf_counter() - start
        self._check(found)
        return taken

    def files(self) -> float:
        """Seconds from two Parquet files to a pandas frame."""
        with self.run.store(self.parquet, f"data-files-{self.name}") as store:
            start = time.perf_counter()
            asked = pq.read_table(self.path / "entities.parquet")
            frame = store.get_historical_features(asked, "stats").to_df()
            taken = time.perf_counter() - start
        equal(frame[list(data.FEATURES)].to_numpy(np.float32), self.answer, "historical join from Parquet")
        return taken

    def _check(self, found: pa.Table) -> None:
        values = ours.join_answer(found)
        if self.answer.size:
            equal(values, self.answer, f"historical join {self.name}")
        self.answer = values

    def close(self) -> None:
        if self.open is not None:
            self.open.close()


# Online reads, materialisation, request-time operations, memory


def online(run: Run) -> None:
    """Reads beside Feast, whose two stores are filled first, each materialisation timed beside ours."""
    run.say("materialize")
    plan, book = run.plan, run.book
    feasts: dict[str, Worker] = {}
    for who in (SQLITE, REDIS):
        try:
            options = ["--data", str(run.data), "--folder", str(run.folder / who.replace(" ", "-"))]
            if who == REDIS:
                options += ["--redis", run.stack.enter_context(redis_server(run.folder))]
            feasts[who] = run.worker(
                who.replace(" ", "-"), "feast", FEAST_PACKAGES, "peer_feast.py", *options
            )
            wide = [f"wide{v}" for v in range(5)]
            feasts[who].ask("materialize", views=[*wide, "fifty"], start_us=data.START_US - 1, end_us=END_US)
        except Absent as error:
            feasts.pop(who, None)
            run.absent(who, error)
    span = {"views": ["stats"], "start_us": data.START_US - 1, "end_us": END_US}
    source = ours.parquet_source(run.data / "online" / "events.parquet")
    materialized = ours.repository(run.folder / "materialize", run.data, source=source)
    for round_number in range(plan.feast_rounds + 1):
        shutil.rmtree(run.folder / "data-materialize", ignore_errors=True)
        with run.store(materialized, "data-materialize") as store:
            start = time.perf_counter()
            written = store.materialize(data.START_US, END_US).rows
            taken = time.perf_counter() - start
        if written != {"stats": USERS}:
            raise SystemExit(f"materialize: wrote {written}; expected {USERS} rows")
        if round_number:
            book.add(OURS, MATERIALIZE, taken)
        for who in [who for who in feasts if round_number]:
            book.add(who, MATERIALIZE, feasts[who].ask("materialize", **span))
    repo = ours.repository(run.folder / "online", run.data, "wide", "ops", source=source)
    with run.store(repo, "data-online") as store:
        store.materialize(data.START_US, END_US)
        reads(run, store, feasts)
        operations(run, store, feasts)
    memory(run, feasts)
    if plan.feast_join and SQLITE in feasts:
        run.say("Feast's own historical join")
        taken = feasts[SQLITE].ask("join", answer=str(run.folder / "feast-join.npy"))
        book.add(FEAST, COLD, taken * 1e3)
        rows = len(np.load(run.folder / "feast-join.npy"))
        run.book.absent += [f"{ASKED - rows} rows of the historical join that Feast drops"] * (rows < ASKED)
    for feast in feasts.values():
        feast.close()


def reads(run: Run, store: FeatureStore, feasts: dict[str, Worker]) -> None:
    run.say("online reads")
    plan, book = run.plan, run.book
    every = np.arange(USERS)
    for service, what in (("stats", "stats"), ("wide", "wide")):
        expected = store.get_online_features(service, {"user_id": every}, now=END_US).to_numpy()
        if np.isnan(expected).any():
            raise SystemExit(f"online {service}: a value is missing")
        read = ours.Reads(store, service, 100, END_US)
        run.through = read.through
        for at in range(0, USERS, 100):  # every row is in memory afterwards, if the store keeps rows there
            found = read(ours.request(every[at : at + 100]))
            equal(found, expected[at : at + 100], f"online {service}, {read.through}")
        for who, feast in feasts.items():
            file = str(run.folder / "answer.npy")
            feast.ask("answer", what=what, keys=every[: plan.compared].tolist(), path=file)
            equal(expected[: plan.compared], np.load(file), f"online {service}, {who}")
    for column, service, rows in ((ONE, "stats", 1), (MANY, "stats", 64), (WIDE, "wide", 100)):
        read = ours.Reads(store, service, rows, END_US)
        for round_number in range(plan.rounds + 1):
            keys = run.rng.integers(0, USERS, (max(plan.calls // rows, 30), rows))
            found = ours.percentiles(read, [ours.request(one) for one in keys])
            if round_number:
                book.add(OURS, column, found["p50"])
                book.add(OURS, column.replace("p50", "p99"), found["p99"])
        for who, feast in feasts.items():
            for _ in range(plan.feast_rounds + 1):
                keys = run.rng.integers(0, USERS, (max(plan.feast_calls // rows, 10), rows)).tolist()
                found = feast.ask("read", what=service, keys=keys)
                book.add(who, column, found["p50"])
                book.add(who, column.replace("p50", "p99"), found["p99"])


def operations(run: Run, store: FeatureStore, feasts: dict[str, Worker]) -> None:
    """20 operations at request time: our program alone on one row; what the pandas view adds to a read."""
    run.say("request-time operations")
    plan = store.service_plan("ops")
    program = _core.FeatureProgram(plan.program)
    rng, inputs = run.rng, []
    factor, at = rng.random(USERS).astype(np.float32).astype(np.float64), rng.integers(0, ROWS, USERS)
    given = {"ops:__column_f1": factor, "ops:__column_event_timestamp": data.START_US + at * 1_000_000}
    given["now"] = np.full(USERS, END_US)
    for i in range(USERS):
        inputs.append([(given[name][i : i + 1], None) for name, _ in program.inputs])
    x = (END_US - given["ops:__column_event_timestamp"]) / 1e6
    for i in range(9):
        x = x * factor + (i + 1)
    found = np.array([program.run(one, rows=1)[0][0][0] for one in inputs])
    equal(found, x, "20 operations")
    calls = run.plan.calls
    for round_number in range(run.plan.rounds + 1):
        chosen = [inputs[i] for i in rng.integers(0, USERS, calls)]
        taken = ours.percentiles(lambda one: program.run(one, rows=1), chosen)["p50"]
        if round_number:
            run.book.add(OURS, OPS, taken)
    for who, feast in feasts.items():
        file = str(run.folder / "ops.npy")
        feast.ask("answer", what="ops", keys=list(range(100)), path=file)
        answer = np.load(file)
        score = answer[:, 0]
        for i in range(10):
            score = score * answer[:, 1] + (i + 1)
        if not np.allclose(score, answer[:, 2], rtol=1e-12):
            raise SystemExit(f"20 operations, {who}: the answer differs")
        for _ in range(run.plan.feast_rounds + 1):
            keys = rng.integers(0, USERS, (max(run.plan.feast_calls // 4, 10), 1)).tolist()
            with_ops = feast.ask("read", what="ops", keys=keys)["p50"]
            run.book.add(who, OPS, with_ops - feast.ask("read", what="two", keys=keys)["p50"])


def memory(run: Run, feasts: dict[str, Worker]) -> None:
    """Bytes that the store's pages take for an entity, its key and its overhead included."""
    run.say("memory of an entity")
    repo = ours.repository(run.folder / "fifty", run.data, "fifty")
    with run.store(repo, "data-fifty") as store:
        store.materialize(data.START_US, END_US)
    run.book.add(OURS, MEMORY, ours.stored_bytes(run.folder / "data-fifty") / USERS)
    if REDIS in feasts:
        run.book.add(REDIS, MEMORY, feasts[REDIS].ask("memory", keys=1000))


# Windows and pushes


def windows(run: Run) -> None:
    """One read of ten aggregates over 30 days at a time nobody has asked for before."""
    run.say("windows")
    repo = ours.repository(run.folder / "windows", run.data, "windows")
    table = pq.read_table(run.data / "windows.parquet")
    users, times = table["user_id"].to_numpy(), table["event_timestamp"].cast(pa.int64()).to_numpy()
    with run.store(repo, "data-windows") as store:
        read = ours.Reads(store, "bursts", 1, END_US)
        width = len(store.services["bursts"].features)

        def asked(count: int) -> list[tuple[dict[str, Any], int]]:
            now = data.START_US + run.rng.integers(31 * DAY_US, 59 * DAY_US, count)
            keys = run.rng.integers(0, WINDOW_KEYS, (count, 1))
            return [(ours.request(key), int(at)) for key, at in zip(keys, now)]

        for key, at in asked(20):
            inside = (users == key["user_id"]) & (times > at - 30 * DAY_US) & (times <= at)
            expected = []
            for name in ("f0", "f1"):
                values = table[name].to_numpy()[inside].astype(np.float64)
                values = values[np.argsort(times[inside])]
                expected += [len(values), values.sum(), values.mean(), values.min(), values.max()]
            if not np.allclose(read(key, at)[0], expected, rtol=1e-6) or width != len(expected):
                raise SystemExit(f"windows at {at}: {read(key, at)[0]}; expected {expected}")
        for round_number in range(run.plan.rounds + 1):
            found = ours.percentiles(lambda one: read(*one), asked(max(run.plan.calls // 20, 30)))
            if round_number:
                run.book.add(OURS, WINDOW, found["p99"])
                run.book.add(OURS, WINDOW.replace("p99", "p50"), found["p50"])


def pushes(run: Run) -> None:
    """From the call of `push` to the first read that gives the value, while the push is not yet durable."""
    if not hasattr(FeatureStore, "push"):
        run.why[VISIBLE] = "this build takes no pushes"
        return
    run.say("pushes")
    repo = ours.repository(run.folder / "push", run.data, "push")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with run.store(repo, "data-push") as store:
            _push_rounds(run, store)
    finally:
        sys.setswitchinterval(before)


class _Push:
    """One push on a thread of its own, and when it began and was acknowledged, in nanoseconds."""

    def __init__(self, store: FeatureStore, value: float) -> None:
        self._store, self._value = store, value
        self.began = self.acknowledged = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        row = {"user_id": [7], "at": [data.START_US + int(self._value)], "x": [self._value]}
        self.began = time.perf_counter_ns()
        self._store.push("clicks", row)
        self.acknowledged = time.perf_counter_ns()

    def join(self) -> None:
        self._thread.join()


def _push_rounds(run: Run, store: FeatureStore) -> None:
    key = {"user_id": 7}
    store.push("clicks", {"user_id": [7], "at": [data.START_US], "x": [0.0]})
    read = ours.Reads(store, "pushed", 1, END_US)
    for round_number in range(max(run.plan.feast_rounds, 3) + 1):
        visible, durable = [], []
        for i in range(run.plan.pushes):
            value = float(round_number * run.plan.pushes + i + 1)
            push = _Push(store, value)
            until = time.monotonic() + 10
            while read(key)[0, 0] != value:
                if time.monotonic() > until:
                    raise SystemExit(f"push: the value {value} was not readable within 10 s")
            seen = time.perf_counter_ns()
            push.join()
            visible.append((seen - push.began) / 1e3)
            durable.append((push.acknowledged - push.began) / 1e3)
        if round_number:
            run.book.add(OURS, VISIBLE, float(np.percentile(visible, 99)))
            run.book.add(OURS, VISIBLE.replace("p99", "p50"), float(np.percentile(visible, 50)))
            run.book.add(OURS, DURABLE, float(np.percentile(durable, 99)))


PARTS: dict[str, tuple[Callable[[Run], None], tuple[str, ...]]] = {
    "joins": (joins, (COLD, WARM, FILES, LONG)),
    "online": (online, (ONE, MANY, WIDE, MATERIALIZE, OPS, MEMORY)),
    "windows": (windows, (WINDOW,)),
    "pushes": (pushes, (VISIBLE,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about two minutes, figures of little weight")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some parts; nothing is written then")
    options = parser.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        run = Run(Path(name), QUICK if options.quick else FULL, stack)
        write_data(run)
        for part, (work, columns) in PARTS.items():
            if options.only is not None and part not in options.only:
                run.why |= dict.fromkeys(columns, "left out by --only")
                continue
            work(run)
        target_lines(run.book, run.why)
    report(run.book, "Targets of the feature store")
    if options.only is not None:
        return
    settings: dict[str, Any] = {
        "unit": "measure",
        "rounds": run.plan.rounds,
        "rounds_of_feast": run.plan.feast_rounds,
        "source_rows": ROWS,
        "entity_rows": ASKED,
        "users": USERS,
        "reads_through": run.through,
        "quick": options.quick,
        "peer_versions": run.versions,
    }
    write(
        "features-quick" if options.quick else "features",
        rows_of({(column, who): values for (who, column), values in run.book.samples.items()}),
        facts=facts,
        settings=settings,
        packages=["numpy", "pyarrow", "pandas", "lmdb", "numba", "penstock"],
        absent=run.book.absent,
        targets=run.book.plain_lines(),
    )


if __name__ == "__main__":
    main()
