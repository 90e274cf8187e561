"""Random cases of windows: views, event logs and questions, and their comparison with the oracle."""

from __future__ import annotations

import math
import random
import struct
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import window_oracle as oracle
from window_oracle import SECOND, Rule, Spec

import penstock as d
from penstock import _core
from penstock.features.aggregates import KINDS
from penstock.features.compute import ViewComputer
from penstock.features.expressions import col
from penstock.features.sources import UNKNOWN_TIME, SourceColumn, SourceTable

SEED = bytes(range(16))
SOURCE = d.ParquetSource("events.parquet", "t", created="k")
USER = d.Entity("user", ["user"])
DTYPES = {"user": "int64", "t": "timestamp", "k": "timestamp", "x": "float64", "h": "float32", "i": "int64",
          "s": "string"}  # fmt: skip
REALS = frozenset("xh")
MAKERS = {kind: getattr(d, kind) for kind in KINDS}
PARAM = {"var": "ddof", "std": "ddof", "top_k": "rank", "distinct": "exact"}
RULE = Rule()
LETTERS = ["b", "a", "d", "c", "e"]  # codes by arrival, not by text


def column(dtype: str, cells: list[Any], texts: list[str]) -> SourceColumn:
    valid = np.array([c is not None for c in cells], bool)
    kind = {"float64": np.float64, "float32": np.float32}.get(dtype, np.int64)
    if dtype == "string":
        cells = [None if c is None else texts.index(c) for c in cells]
    values = np.array([0 if c is None else c for c in cells], kind)
    return SourceColumn(dtype, values, None if valid.all() else valid, texts if dtype == "string" else None)


def table(events: list[dict[str, Any]], texts: list[str] = LETTERS, versions: bool = False) -> SourceTable:
    columns = {name: column(dtype, [e[name] for e in events], texts) for name, dtype in DTYPES.items()}
    known = np.array([UNKNOWN_TIME if e["k"] is None else e["k"] for e in events], np.int64)
    extra: dict[str, Any] = {}
    if versions:
        extra["event_id"] = column("int64", [e["id"] for e in events], [])
        extra["deleted"] = np.array([bool(e["deleted"]) for e in events], bool)
    return SourceTable(columns, len(events), columns["t"].values, known, **extra)


def seconds(us: int) -> str:
    return f"{us // SECOND}s"


def declared(spec: Spec) -> Any:
    more: dict[str, Any] = {"window": seconds(spec.window), "closed": spec.closed, "as_known": spec.as_known}
    if spec.every:
        more["every"] = seconds(spec.every)
    if spec.lag:
        more["lag"] = seconds(spec.lag)
    if spec.kind == "ewma":
        more["half_life"] = seconds(spec.param)
    elif spec.kind in PARAM:
        more[PARAM[spec.kind]] = spec.param
    return MAKERS[spec.kind](*([] if spec.of is None else [col(spec.of)]), **more)


def bits(value: Any) -> Any:
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("<d", value)
    return value


@dataclass
class Case:
    """A random log, a view over it, and questions at and around every boundary."""

    rng: random.Random
    size: int
    versions: bool = False
    events: list[dict[str, Any]] = field(default_factory=list)
    specs: dict[str, Spec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = self.rng
        self.span = rng.choice([4, 30, 700])
        self.ttl = rng.choice([0, 0, 2, 200]) * SECOND
        self.as_known = rng.random() < 0.25
        self.plain = rng.choice([("x", "i", "s"), ("h",), ()])
        self.events = [self.event() for _ in range(rng.randint(0, self.size))]
        kinds = list(KINDS)
        for n in range(rng.randint(0 if self.plain else 1, 5)):
            self.specs[f"a{n}"] = self.spec(rng.choice(kinds))

    def time(self) -> int:
        rng = self.rng
        off = rng.choice([0, 0, 0, -1, 1, 500_000])
        return rng.randint(-2, self.span) * SECOND + off

    def event(self) -> dict[str, Any]:
        rng = self.rng
        t = self.time()
        return {
            "user": rng.choice([1, 1, 1, 1, 1, 2, 2, 2**53 + 1, -7, None]),
            "t": t,
            "k": rng.choice([t, t, t + 1, t + SECOND, t + rng.randint(0, 9) * SECOND, t - SECOND, None]),
            "x": rng.choice([None, 0.1, 0.2, 0.3, -0.0, 0.0, 7.5, 1e16, -1e16, rng.random()]
                            + [math.nan, math.inf] * (rng.random() < 0.1)),
            "h": rng.choice([None, 0.5, -0.25, 3.0, float(np.float32(0.1))]),
            "i": rng.choice([None, 0, 1, 1, 2, -5, 2**53 + 1, 2**63 - 1, rng.randint(0, 50)]),
            "s": rng.choice([None, *LETTERS]),
            "id": rng.choice([None, *range(6)]) if self.versions else None,
            "deleted": self.versions and rng.random() < 0.15,
        }  # fmt: skip

    def spec(self, kind: str) -> Spec:
        rng = self.rng
        any_dtype = kind in ("count", "distinct", "top_k", "first", "last")
        of = rng.choice("xihs" if any_dtype else "xih")
        param = {"var": rng.randint(0, 2), "std": rng.randint(0, 2), "top_k": rng.randint(1, 3),
                 "distinct": rng.choice([1, 3, 1024]),
                 "ewma": rng.choice([1, 60]) * SECOND}.get(kind, 0)  # fmt: skip
        return Spec(
            kind,
            None if kind == "count" and rng.random() < 0.5 else of,
            rng.choice([1, 2, 3, 256, 300, 1300]) * SECOND,
            rng.choice([0, 0, 1, 2, 5]) * SECOND,
            rng.choice(["right", "right", "left", "both", "neither"]),
            rng.choice([0, 0, 1, 2]) * SECOND,
            rng.random() < 0.3,
            param,
        )

    def view(self) -> d.FeatureView:
        features = {f"last_{c}": col(c) for c in self.plain}
        features |= {name: declared(spec) for name, spec in self.specs.items()}
        ttl = timedelta(microseconds=self.ttl) if self.ttl else None
        return d.FeatureView("v", [USER], SOURCE, features, ttl=ttl, as_known=self.as_known)

    def computer(self, events: list[dict[str, Any]] | None = None, **more: Any) -> ViewComputer:
        events = self.events if events is None else events
        return ViewComputer(self.view(), table(events, versions=self.versions), SEED, **more)

    def moments(self, n: int) -> list[int]:
        """Times of events, window ends and ticks, and a microsecond on either side."""
        rng = self.rng
        found = []
        for _ in range(n):
            t = rng.choice(self.events)["t"] if self.events and rng.random() < 0.9 else self.time()
            if self.events and rng.random() < 0.3:
                known = rng.choice(self.events)["k"]
                t = t if known is None else known
            for spec in self.specs.values():
                if rng.random() < 0.4:
                    t += rng.choice([0, 1, 1]) * spec.window + rng.choice([0, 1]) * spec.lag
                if spec.every and rng.random() < 0.3:
                    t = t // spec.every * spec.every + rng.choice([0, spec.every])
            t += rng.choice([0, 0, 1]) * self.ttl
            found.append(t + rng.choice([-1, 0, 0, 1]))
        return found

    def users(self, n: int) -> list[int | None]:
        return [self.rng.choice([1, 1, 1, 2, 2**53 + 1, -7, 99, None]) for _ in range(n)]

    def expected(self, user: Any, now: int, known_by: int | None, rule: Rule = RULE) -> Any:
        status, row, newest = oracle.row_at(
            self.events, user, now, self.specs, plain=self.plain, reals=REALS, ttl=self.ttl,
            known_by=known_by, as_known=self.as_known, rule=rule,
        )  # fmt: skip
        names = [f"last_{c}" for c in self.plain] + list(self.specs)
        return status, newest, [bits(row.get(name)) for name in names]


def ask(made: ViewComputer, users: list[Any], times: list[int], known_by: list[int] | None = None) -> Any:
    keys, nulls = _core.keys128([list(users)], SEED)
    cut = None if known_by is None else np.array(known_by, np.int64)
    return made.rows_at(keys, np.array(times, np.int64), nulls=nulls, known_by=cut)


def cells(made: ViewComputer, rows: Any, n: int) -> list[Any]:
    found = []
    for (name, dtype), (values, valid) in zip(made.schema, rows.columns):
        value = values[n].item() if valid[n] else None
        if dtype == "string" and value is not None:
            value = made.dictionaries[name][value]
        found.append(bits(value))
    return found


def same(a: Any, b: Any) -> bool:
    columns = all(
        x[0].tobytes() == y[0].tobytes() and x[1].tobytes() == y[1].tobytes()
        for x, y in zip(a.columns, b.columns)
    )
    return columns and bool((a.status == b.status).all()) and bool((a.meta == b.meta).all())


def is_ticked(case: Case, made: ViewComputer) -> bool:
    """Whether the newest event is that of the last tick."""
    plain = not case.plain and not case.ttl and not case.as_known
    return plain and all(
        s.every and not s.lag and not s.as_known and s.closed in ("right", "both")
        for s in case.specs.values()
    )


def check_case(case: Case, questions: int) -> None:
    made = case.computer()
    users, times = case.users(questions), case.moments(questions)
    cuts = None
    if case.rng.random() < 0.4:
        cuts = [t + case.rng.choice([-SECOND, 0, 0, 1, SECOND, 10**15]) for t in times]
    rows = ask(made, users, times, cuts)
    for n, (user, now) in enumerate(zip(users, times)):
        status, newest, values = case.expected(user, now, None if cuts is None else cuts[n])
        assert rows.status[n] == status
        if cuts is not None or not is_ticked(case, made):
            assert rows.meta[n, 2] == newest
        assert cells(made, rows, n) == values, (case.specs, user, now)
        assert rows.meta[n, 0] <= now < rows.meta[n, 1]
