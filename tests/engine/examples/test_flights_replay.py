"""The replay against a small server of the test's own, and the demo's figures."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pytest

from penstock.errors import FailedPreconditionError, UnavailableError
from penstock.examples.flights import train
from penstock.examples.flights.data import HOUR_US, MINUTE_US, to_us
from penstock.examples.flights.replay import Replay

START = to_us(datetime(2013, 5, 16, tzinfo=UTC))
SPAN = train.Span.days(5, 16, 5, 17)


def flights(n: int = 400) -> pa.Table:
    """Flights spread over the day; every tenth never lands, every seventh has no tail number."""
    row = np.arange(n)
    now = START + np.sort(np.random.default_rng(1).integers(0, 24 * HOUR_US, n))
    landed = row % 10 != 3
    times = pa.timestamp("us", tz="UTC")
    return pa.table(
        {
            "row": row + 1000,
            "carrier": ["UA"] * n,
            "origin": ["EWR"] * n,
            "dest": ["BOS"] * n,
            "tailnum": [None if i % 7 == 0 else f"N{i % 50}" for i in row],
            "arrival": pa.array(now + 60 * MINUTE_US + row * MINUTE_US, times, mask=~landed),
            "late": pa.array((row % 4 == 0).astype(np.int8), mask=~landed),
            "event_timestamp": pa.array(now, times),
        }
    )


def weather() -> dict[str, pa.Table]:
    """An observation in every hour from the day before on."""
    times = START + np.arange(-24, 30) * HOUR_US + MINUTE_US
    utc = pa.timestamp("us", tz="UTC")
    return {"weather": pa.table({"origin": ["EWR"] * len(times), "observed_at": pa.array(times, utc)})}


class Oracle:
    """Answers like a server and notes every message with its order."""

    def __init__(
        self, *, path: Path = Path(), fail_row: int | None = None, die_after: int | None = None
    ) -> None:
        self.seen: list[tuple[str, list[Any], int]] = []
        self.connections = 0
        self.tasks: list[Any] = []
        self.path, self._fail_row, self._die_after = path, fail_row, die_after

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.append(asyncio.current_task())
        number, self.connections = self.connections, self.connections + 1
        unpacker = msgpack.Unpacker(raw=False)
        while data := await reader.read(1 << 16):
            unpacker.feed(data)
            for _, msgid, method, params in unpacker:
                self.seen.append((method, params, number))
                if self._die_after is not None and len(self.seen) >= self._die_after:
                    self.path.unlink(missing_ok=True)
                    return writer.close()
                error, result = None, None
                if method == "predict":
                    row = params[3]["request_id"]
                    result = {"scores": [row / 2000], "version": "1", "request_ids": [row]}
                    if row == self._fail_row:
                        error, result = {"code": "DEADLINE_EXCEEDED", "message": "", "retryable": True}, None
                elif method == "health":
                    result = {}
                elif method == "label":
                    result = {"matched": len(params[0])}
                elif method == "push":
                    result = {"accepted": len(params[1]["origin"])}
                writer.write(msgpack.packb([1, msgid, error, result]))
        return writer.close()


async def replay(oracle: Oracle, table: pa.Table, folder: Path, **options: Any) -> Replay:
    path = folder / "s"
    server = await asyncio.start_unix_server(oracle.serve, path)
    try:
        async with Replay(f"unix://{path}", weather(), **options) as run:
            await run.run(table, SPAN)
            return run
    finally:
        server.close()
        await asyncio.gather(*oracle.tasks)


def test_every_flight_is_asked_once_with_its_now_over_every_connection(tmp_path: Path) -> None:
    oracle, table = Oracle(), flights()
    tally = asyncio.run(replay(oracle, table, tmp_path, connections=5)).tally
    asked = [(p, number) for method, p, number in oracle.seen if method == "predict"]
    now = dict(zip(table["row"].to_pylist(), table["event_timestamp"].to_pylist()))
    assert {p[3]["request_id"]: p[3]["now"] for p, _ in asked} == {r: to_us(t) for r, t in now.items()}
    assert len(asked) == tally.requests == tally.ok == 400
    assert {number for _, number in asked} == set(range(5))
    assert any(p[1]["tailnum"] is None for p, _ in asked)
    assert dict(zip(tally.rows, tally.scores)) == {r: r / 2000 for r in now}
    assert len(tally.waits_ms) == 400 and tally.rows_per_s > 0


def test_no_label_goes_out_before_it_is_known_and_none_is_left(tmp_path: Path) -> None:
    oracle, table = Oracle(), flights()
    tally = asyncio.run(replay(oracle, table, tmp_path)).tally
    arrival = dict(zip(table["row"].to_pylist(), table["arrival"].to_pylist()))
    late = dict(zip(table["row"].to_pylist(), table["late"].to_pylist()))
    answered, now, sent = set(), START, {}
    for method, params, _ in oracle.seen:
        if method == "predict":
            assert now <= params[3]["now"] < now + HOUR_US  # asked in the hour that the server has reached
            answered.add(params[3]["request_id"])
        elif method == "push":
            now = pushed_times(params)[-1] // HOUR_US * HOUR_US
        elif method == "label":
            for row, label, known in zip(*params):
                assert row in answered and row not in sent
                assert known == to_us(arrival[row])
                assert known <= now + HOUR_US or now == SPAN.end_us - HOUR_US
                sent[row] = label
    assert sent == {row: label for row, label in late.items() if label is not None}
    assert tally.labels == tally.matched == len(sent)


def pushed_times(params: list[Any]) -> list[int]:
    assert params[0] == "weather"
    return [int(time) for time in params[1]["observed_at"]]


def test_events_are_pushed_once_each_before_the_flights_of_their_hour(tmp_path: Path) -> None:
    oracle = Oracle()
    tally = asyncio.run(replay(oracle, flights(50), tmp_path)).tally
    calls = [pushed_times(params) for method, params, _ in oracle.seen if method == "push"]
    hour = START + MINUTE_US
    assert calls[0] == [hour + h * HOUR_US for h in range(-24, 0)]  # what was missed before the span
    assert calls[1:] == [[hour + h * HOUR_US] for h in range(24)]
    assert tally.pushed == 48


def test_an_error_reply_is_counted_by_its_code(tmp_path: Path) -> None:
    tally = asyncio.run(replay(Oracle(fail_row=1007), flights(50), tmp_path)).tally
    assert dict(tally.errors) == {"DEADLINE_EXCEEDED": 1}
    assert (tally.requests, tally.ok) == (50, 49)


def test_a_server_that_is_gone_ends_the_replay(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="connect"):
        asyncio.run(replay(Oracle(path=tmp_path / "s", die_after=40), flights(), tmp_path))


def test_auc_is_the_share_of_ordered_pairs() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 80), rng.integers(0, 9, 80) / 9
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a in scores[labels == 1]
        for b in scores[labels == 0]
    ]  # fmt: skip
    assert train.auc(labels, scores) == pytest.approx(np.mean(pairs))
    assert np.isnan(train.auc(np.ones(3), np.ones(3)))


def test_an_auc_that_only_a_leak_can_give_fails_the_run() -> None:
    train.refuse_leak(0.8)
    with pytest.raises(FailedPreconditionError, match=r"0\.9400, above 0\.9"):
        train.refuse_leak(0.94)


def test_a_span_takes_its_start_and_leaves_its_end() -> None:
    table = flights()
    edges = [SPAN.start_us - 1, SPAN.start_us, SPAN.end_us - 1, SPAN.end_us]
    times = pa.array(edges, pa.timestamp("us", "UTC"))
    four = table.slice(0, 4).drop_columns(["event_timestamp"]).append_column("event_timestamp", times)
    assert SPAN.of(four)["row"].to_pylist() == [1001, 1002]
