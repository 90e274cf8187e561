"""Erasures that a crash cuts short: whoever opens the store next ends them."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from push_repo import HOUR, columns, make_push_repo
from store_repo import assert_online_is_offline

from penstock.errors import StoreError
from penstock.features import erase
from penstock.features.event_log import EventLog
from penstock.features.online import OnlineStore
from penstock.features.store import FeatureStore

SECRET = "a shop with a telling name"
ROWS = [(HOUR, 1, SECRET, 1.0, "Rome"), (HOUR, 2, "b", 2.0, "Rome"), (2 * HOUR, 1, SECRET, 3.0, None)]


def fill(store: FeatureStore) -> None:
    """Segments, batches and stored rows, and a file that a killed compaction has left."""
    store.push("events", columns(ROWS[:2]))
    store._pushes.compact("events")
    store.push("events", columns(ROWS[2:]))
    store.materialize_incremental(3 * HOUR)
    store._log.write_segment("events", 1, store._log.read("events")[0])


def crash(repo: str, at: str) -> None:
    """In a child process: erase, and end where `at` says."""

    def die(*args: Any, **options: Any) -> Any:
        os._exit(9)

    with FeatureStore(repo) as store:
        fill(store)
        if at == "after the commit":
            EventLog._remove_left = die  # type: ignore[method-assign]
        elif at == "after some files":
            Path.unlink = die_second(Path.unlink)  # type: ignore[method-assign]
        elif at == "before the stored rows":
            erase._write = die
        else:
            EventLog.finish = die  # type: ignore[method-assign]
        store.erase("pairs", {"user_id": 1, "shop": SECRET})
    os._exit(0)


def die_second(unlink: Any) -> Any:
    calls: list[Path] = []

    def dying(self: Path, *args: Any, **options: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            os._exit(9)
        unlink(self, *args, **options)

    return dying


def segment_shops(store: FeatureStore) -> list[list[Any]]:
    """What the column `shop` holds in each file of the log, temporary ones too."""
    files = [file for file in (store.data_dir / "events").rglob("*") if file.is_file()]
    return [pq.ParquetFile(file).read()["shop"].to_pylist() for file in files]


def stored(store: FeatureStore, view: str) -> set[tuple[int, ...]]:
    number = store._live.view(view).number
    return {tuple(key) for keys, _ in store._online.scan(number) for key in keys.tolist()}


def check_gone(store: FeatureStore) -> None:
    assert segment_shops(store) == [["b"]]
    assert [row["shop"] for p in store._log.read("events")[0] for row in p.table.to_pylist()] == ["b"]
    for view in ("users", "pairs"):
        assert stored(store, view) <= {tuple(key) for key in store.computer(view).keys.tolist()}
    assert store._log.left() == {}
    assert_online_is_offline(store, 3 * HOUR, [1, 2], [SECRET, "b"], ["users:n", "pairs:seen", "pairs:last"])


@pytest.mark.parametrize(
    "at", ["after the commit", "after some files", "before the stored rows", "before it is over"]
)
def test_the_next_one_who_opens_the_store_ends_it(tmp_path: Path, at: str) -> None:
    repo = make_push_repo(tmp_path / "r")
    child = multiprocessing.get_context("spawn").Process(target=crash, args=(str(repo), at))
    child.start()
    child.join(120)
    assert child.exitcode == 9
    with FeatureStore(repo) as store:
        check_gone(store)
        store.push("events", columns(ROWS[:1]))  # who comes back counts
        got = store.get_online_features(["pairs:last"], {"user_id": 1, "shop": SECRET}, now=HOUR).to_dict()
        assert got["last"] == [1.0]
    with FeatureStore(repo) as store:
        assert len(store.computer("pairs").keys) == 2


def test_a_store_that_fails_at_opening_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repo = make_push_repo(tmp_path / "r")
    with FeatureStore(repo) as store:
        fill(store)

        def fail(*args: Any, **options: Any) -> Any:
            raise StoreError("it is away")

        monkeypatch.setattr(erase, "_write", fail)
        with pytest.raises(StoreError, match="it is away"):
            store.erase("pairs", {"user_id": 1, "shop": SECRET})
    with monkeypatch.context() as away:
        away.setattr(OnlineStore, "delete_many", fail)
        with FeatureStore(repo) as store:  # it works all the same, and no row of before counts
            assert "an erasure could not be ended: it is away" in caplog.text
            assert set(store._log.left()) == {"events"}
            assert_online_is_offline(store, 3 * HOUR, [1, 2], [SECRET, "b"], ["pairs:seen", "pairs:last"])
    with FeatureStore(repo) as store:
        check_gone(store)


def test_a_second_erasure_ends_what_the_first_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = make_push_repo(tmp_path / "r")
    with FeatureStore(repo) as store:
        fill(store)
        kept = np.array(store.computer("pairs").keys)
        with monkeypatch.context() as broken:
            broken.setattr(Path, "unlink", lambda *args, **options: (_ for _ in ()).throw(OSError("no")))
            receipt = store.erase("pairs", {"user_id": 1, "shop": SECRET})
        assert set(store._log.left()) == {"events"}
        assert receipt["kept"] == [*erase.KEPT, erase.UNREMOVED]
        receipt = store.erase("pairs", {"user_id": 7, "shop": "nobody"})
        assert receipt["kept"] == list(erase.KEPT)
        check_gone(store)
        assert len(store.computer("pairs").keys) == len(kept) - 1
