"""kill -9 at any moment: what was acknowledged is there, once, and nothing is half-written."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Forked
from push_repo import HOUR, columns, make_push_repo
from store_repo import assert_online_is_offline

from penstock.errors import InvalidArgumentError
from penstock.features import event_log
from penstock.features.store import FeatureStore
from penstock.features.streams import MemoryStream

FEATURES = ["users:n", "users:spend", "pairs:seen", "pairs:last"]
# Event i of a user has the value i. What is said was acknowledged before.
PUSHER = """
import threading
from penstock import FeatureStore
import penstock.features.compute, pyarrow.parquet
def child(repo, start, what):
    store = FeatureStore(repo)
    lock, acknowledged = threading.Lock(), threading.Event()
    def push(user):
        for i in range(start, start + 100_000):
            store.push("events", {"at": [i * 1000] * 2, "user_id": [user] * 2, "shop": ["a", "b"],
                                  "x": [float(i)] * 2, "city": [f"c{i % 7}"] * 2})
            with lock:
                say(user, i)
            acknowledged.set()
    def other():  # in turn with the pushes: without a pause it would keep the store's locks to itself
        i = 0
        while what != "push":
            i += 1
            acknowledged.wait()
            acknowledged.clear()
            if what == "materialize":
                store.materialize(0, 3_600_000_000 + i)
            elif what == "apply":
                store.apply()
            else:
                store._pushes.compact("events")
    threads = [threading.Thread(target=push, args=(user,)) for user in (1, 2)]
    threads.append(threading.Thread(target=other))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


@pytest.fixture(scope="module")
def killed() -> Iterator[Forked]:
    with Forked(PUSHER) as made:
        yield made


def acknowledged(
    killed: Forked, repo: Path, start: int, what: str, lines: int, seconds: float
) -> dict[int, int]:
    """The greatest acknowledged event of each user, of those until a kill `seconds` after some `lines`."""
    said = killed.killed(str(repo), start, what, lines=lines, seconds=seconds)
    return {int(user): int(i) for user, i in map(str.split, said)}


def check(repo: Path, told: dict[int, int]) -> int:
    """Every acknowledged event is there, the log is whole, online is offline. Returns the next event."""
    with FeatureStore(repo) as store:
        found: dict[int, list[float]] = {}
        logged, head = store._log.read("events")
        for part in logged:
            assert part.table.num_rows % 2 == 0  # a push is whole or absent
            for row in part.table.to_pylist():
                if row["shop"] == "a":
                    found.setdefault(row["user_id"], []).append(row["x"])
        for user, last in told.items():
            assert found[user][-1] in (last, last + 1)  # the last one may be durable and not acknowledged
        for values in found.values():
            assert len(set(values)) == len(values)  # none twice
        assert sum(len(values) for values in found.values()) == head
        for now in (HOUR, HOUR // 2):
            assert_online_is_offline(store, now, [1, 2, 1, 3], ["a", "b", "b", "a"], FEATURES)
        for name in ("users", "pairs"):  # what is in the store is right for its interval
            live = store._live.view(name)
            header = store._online.header(live.number)
            if header is None or header.tag != live.tag:
                continue
            for keys, meta in store._online.scan(live.number):
                rows, _, there = store._online.get_many(live.number, live.tag, keys, live.row_words, head)
                expected = live.computer.rows_at(keys, np.maximum(meta[:, 0], 0))
                assert (rows[there] == expected.words()[there]).all()
        return int(max((max(values) for values in found.values()), default=0)) + 1


def kill_times(killed: Forked, tmp_path: Path, what: str, times: int) -> None:
    repo = make_push_repo(tmp_path / "r", config="push: {compact_after: 7}\n")
    rng, start = random.Random(what), 1
    for _ in range(times):
        lines, seconds = rng.randrange(1, 16), rng.uniform(0, 0.02)  # as long as what is to be hit
        start = check(repo, acknowledged(killed, repo, start, what, lines, seconds))
    with FeatureStore(repo) as store:
        named = {segment.file for segment in segments(store)}
        assert named <= {file.name for file in (store.data_dir / "events" / "events").glob("*")}


def segments(store: FeatureStore) -> list[event_log.Segment]:
    with store._online.transaction() as txn:
        return event_log.segments_in(txn, "events")


@pytest.mark.parametrize("what", ["push", "materialize", "apply", "compact"])
def test_kill_9(killed: Forked, tmp_path: Path, what: str) -> None:
    kill_times(killed, tmp_path, what, 5)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("what", ["push", "materialize", "apply", "compact"])
def test_kill_9_many_times(killed: Forked, tmp_path: Path, what: str) -> None:
    kill_times(killed, tmp_path, what, 200)


# Streams

INGEST = """
import sys
from penstock import FeatureStore
from penstock.features.streams import MemoryStream
stream = MemoryStream(3)  # what Kafka would keep: the same events at each start
for i in range(300):
    stream.send({"at": i, "user_id": i % 5, "shop": "a", "x": float(i), "city": None}, i % 3)
with FeatureStore(sys.argv[1]) as store, store.ingest("events", stream, most=7) as loop:
    while loop.step():
        print(loop.accepted, flush=True)
"""


def test_a_stream_is_taken_in_once_whatever_is_killed(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r")
    for lines in (3, 9, 400):
        child = subprocess.Popen([sys.executable, "-c", INGEST, str(repo)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(lines):
            if not child.stdout.readline():
                break
        child.kill()
        child.communicate()
        with FeatureStore(repo) as store:
            values = [x for part in store._log.read("events")[0] for x in part.table["x"].to_pylist()]
            assert len(set(values)) == len(values)
            offsets = store._log.offsets("events")
            assert sum(offsets.values()) == len(values)
            for partition, offset in offsets.items():  # each partition's events in its order
                mine = [x for x in values if x % 3 == partition]
                assert mine == [float(partition + 3 * i) for i in range(offset)]
    assert len(values) == 300


def test_a_stream_on_a_thread_and_two_consumers(tmp_path: Path) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r")) as store:
        one, two = MemoryStream(2), MemoryStream()
        with (
            store.ingest("events", one, consumer="one", most=4, idle_s=0.001).start() as first,
            store.ingest("events", two, consumer="two", idle_s=0.001).start() as second,
        ):
            for i in range(20):
                row = {"at": i, "user_id": 1, "shop": "a", "x": float(i), "city": "Rome"}
                one.send(row, i % 2)
                two.send({**row, "user_id": 2})
            while first.accepted + second.accepted < 40:
                assert first.error is None
                assert second.error is None
        assert (store._log.offsets("one"), store._log.offsets("two")) == ({0: 10, 1: 10}, {0: 20})
        assert (one.committed, two.committed) == ({0: 10, 1: 10}, {0: 20})
        got = store.get_online_features(["pairs:seen"], {"user_id": [1, 2], "shop": ["a", "a"]}, now=HOUR)
        assert got.to_dict()["seen"] == [20, 20]
        one.send({"at": 1, "user_id": None, "shop": "a", "x": 1.0, "city": None})
        loop = store.ingest("events", one, consumer="one", idle_s=0.001)
        with pytest.raises(InvalidArgumentError, match="column 'user_id' is null"):
            loop.step()
        assert store._log.offsets("one") == {0: 10, 1: 10}  # it is not skipped
        loop = store.ingest("events", one, consumer="one", idle_s=0.001).start()
        loop._thread.join(60)
        with pytest.raises(InvalidArgumentError, match="column 'user_id' is null"):
            loop.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"most": 0}, "most is 0"), ({"idle_s": -1}, "idle_s is -1"), ({"consumer": "a\0b"}, "consumer is")],
)
def test_wrong_streams(tmp_path: Path, options: Any, message: str) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r")) as store:
        with pytest.raises(InvalidArgumentError, match=message):
            store.ingest("events", MemoryStream(), **options)
        with pytest.raises(InvalidArgumentError, match="partitions is 0"):
            MemoryStream(0)
        with pytest.raises(InvalidArgumentError, match="partition is 4; expected 0 to 1"):
            MemoryStream(2).send({}, 4)
    assert columns([])["at"] == []
