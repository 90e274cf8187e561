"""The feature store when sources change, processes die, disks fill up and definitions are applied."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_repo import (
    DEFINITIONS,
    HOUR,
    MINUTE,
    assert_online_is_offline,
    make_repo,
    some_rows,
    write_events,
)

from penstock.errors import (
    DefinitionError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    StoreError,
)
from penstock.features import materialize as writing
from penstock.features import online
from penstock.features.store import FeatureStore

ROWS = [(HOUR, 1, "a", 2.0, "Rome"), (2 * HOUR, 2, "a", 3.5, None), (9 * HOUR, 3, "b", 1.0, "Oslo")]


def test_readers_on_threads_while_the_source_changes(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", [(HOUR, user, "a", 1.0, "Rome") for user in range(50)])
    with FeatureStore(repo) as store:
        store.materialize_incremental(2 * HOUR)
        done = threading.Event()
        faults: list[BaseException] = []
        names = {"user_id": list(range(50)), "shop": ["a"] * 50}

        def read() -> None:
            try:
                while not done.is_set():
                    got = store.get_online_features(["users:spend", "pairs:last"], names, now=2 * HOUR)
                    for name in ("spend", "last"):  # of one reading of one source each
                        assert len(set(got.to_dict()[name])) == 1
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for i in range(6):
            write_events(repo, [(HOUR, user, "a", float(i), "Oslo") for user in range(50)])
            assert store.refresh()
            store.materialize_incremental(2 * HOUR)
        done.set()
        for thread in threads:
            thread.join()
        assert not faults
        got = store.get_online_features(["pairs:last"], names, now=2 * HOUR)
        assert set(got.to_dict()["last"]) == {5.0}


def test_two_stores_on_one_path(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    one, two = FeatureStore(repo), FeatureStore(repo)
    assert one.key_seed == two.key_seed
    one.materialize_incremental(5 * HOUR)
    assert two.cursor("users") == 5 * HOUR
    one.close()
    one.close()
    assert_online_is_offline(two, 5 * HOUR, [1, 2], ["a", "b"])
    two.close()
    with pytest.raises(StoreError, match="is closed"):
        two.get_online_features(["users:n"], {"user_id": 1})


def test_another_process_materialises(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    with FeatureStore(repo, data_dir=tmp_path / "data") as store:
        program = (
            "import sys\nfrom penstock import FeatureStore\n"
            "with FeatureStore(sys.argv[1], data_dir=sys.argv[2]) as store:\n"
            "    store.materialize_incremental('1970-01-01T05:00')\n"
        )
        subprocess.run([sys.executable, "-c", program, str(repo), str(tmp_path / "data")], check=True)
        assert store.cursor("users") == 5 * HOUR
        assert_online_is_offline(store, 5 * HOUR + MINUTE, list(range(20)), ["a"] * 20)
        assert not (repo / ".penstock").exists()


KILLED = """
import sys
from penstock import FeatureStore
from penstock.features import materialize, online
materialize._CHUNK, online._CHUNK = 40, 13
with FeatureStore(sys.argv[1]) as store:
    for hour in range(int(sys.argv[2]), 10):
        store.materialize_incremental(hour * 3_600_000_000, progress=lambda *at: print(*at, flush=True))
"""


def test_kill_9_while_materialising(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows(4000, users=300))
    users, shops = list(range(300)), ["a", "b"] * 150
    hour = 1
    for kill_at in (1, 6, 14, 26):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(repo), str(hour)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(kill_at):
            assert child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.stdout.read()
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        with FeatureStore(repo) as store:
            cursor = store.cursor("users")
            for now in (hour * HOUR, hour * HOUR + 31 * MINUTE):
                assert_online_is_offline(store, now, users, shops)
            live = store._live.view("users")
            for keys, meta in store._online.scan(live.number):  # what is there is right for its interval
                rows, _, _ = store._online.get_many(live.number, live.tag, keys, live.row_words)
                if cursor is not None:
                    expected = live.computer.rows_at(keys, meta[:, 0].clip(0))
                    assert (rows == expected.words()).all()
            hour = 1 if cursor is None else max(1, cursor // HOUR)


def test_a_full_disk_keeps_the_cursor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FeatureStore(make_repo(tmp_path / "r", some_rows(2000, users=300))) as store:
        store.materialize_incremental(2 * HOUR)
        monkeypatch.setattr(writing, "_CHUNK", 50)
        written = online.OnlineStore.put_many
        calls = [0]

        def full(self: Any, *args: Any, **options: Any) -> None:
            calls[0] += 1
            if calls[0] == 3:
                raise StoreError("online store cannot be written: No space left on device")
            written(self, *args, **options)

        monkeypatch.setattr(online.OnlineStore, "put_many", full)
        with pytest.raises(StoreError, match="No space left"):
            store.materialize_incremental(6 * HOUR)
        assert store.cursor("users") == 2 * HOUR
        assert_online_is_offline(store, 6 * HOUR, list(range(300)), ["a"] * 300)
        store.materialize_incremental(6 * HOUR)
        assert_online_is_offline(store, 6 * HOUR, list(range(300)), ["a"] * 300)


def test_a_run_that_failed_between_two_states_of_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = make_repo(tmp_path / "r", some_rows(2000, users=300))
    source = repo / "events.parquet"
    first, times = source.read_bytes(), (source.stat().st_atime_ns, source.stat().st_mtime_ns)
    with FeatureStore(repo) as store:
        store.materialize_incremental(5 * HOUR)
        write_events(repo, some_rows(2000, users=300, seed=8))
        store.refresh()
        monkeypatch.setattr(writing, "_CHUNK", 50)

        def fail(view: str, done: int, total: int) -> None:
            if done >= 150:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.materialize_incremental(5 * HOUR, progress=fail)
        source.write_bytes(first)
        os.utime(source, ns=times)  # as it was: the same stamp
        assert store.refresh()
        assert_online_is_offline(store, 5 * HOUR, list(range(300)), ["a"] * 300)


def test_an_online_store_cut_short(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    with FeatureStore(repo) as store:
        store.materialize_incremental(5 * HOUR)
    os.truncate(repo / ".penstock" / "online" / "data.mdb", 8192)
    with pytest.raises(StoreError, match=r"data.mdb' is cut short"):
        FeatureStore(repo)


def test_a_corrupt_registry(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    with FeatureStore(repo) as store:
        store.apply()
    file = max((repo / ".penstock" / "registry").glob("0*.json"))
    file.write_text(file.read_text()[:-20])
    with pytest.raises(StoreError, match="is corrupt"):
        FeatureStore(repo)


def test_a_missing_source(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    (repo / "events.parquet").rename(repo / "away")
    with FeatureStore(repo) as store:
        for call in (
            store.apply,
            lambda: store.materialize_incremental(0),
            lambda: store.get_online_features(["users:n"], {"user_id": 1}),
        ):
            with pytest.raises(InvalidArgumentError, match=r"source path is 'events.parquet'"):
                call()
        assert store.plan().views == {"users": "added", "pairs": "added"}  # nothing was recorded
        (repo / "away").rename(repo / "events.parquet")
        assert store.get_online_features(["users:n"], {"user_id": 1}, now=HOUR)


def test_a_source_that_went_away_or_broke_while_open(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    with FeatureStore(repo) as store:
        expected = store.get_online_features(["users:n"], {"user_id": 1}, now=5 * HOUR).to_dict()
        (repo / "events.parquet").write_bytes(b"no parquet")
        with pytest.raises(InvalidArgumentError, match="cannot be read as Parquet"):
            store.refresh()
        (repo / "events.parquet").unlink()
        with pytest.raises(InvalidArgumentError, match="expected an existing file"):
            store.refresh()
        assert store.get_online_features(["users:n"], {"user_id": 1}, now=5 * HOUR).to_dict() == expected


def test_a_source_whose_column_changes_its_type(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", ROWS)
    with FeatureStore(repo) as store:
        store.materialize_incremental(2 * HOUR)
        table = pq.read_table(repo / "events.parquet")
        at = table.column_names.index("x")
        pq.write_table(
            table.set_column(at, "x", table["x"].cast(pa.int64(), safe=False)), repo / "events.parquet"
        )
        with pytest.raises(FailedPreconditionError, match="open the store again"):
            store.refresh()
        assert store.get_online_features(["users:spend"], {"user_id": 1}, now=HOUR).to_dict()["spend"] == [
            2.0
        ]
    with FeatureStore(repo) as store:  # another layout, another number: the old rows are not read
        got = store.get_online_features(["users:spend"], {"user_id": 1}, now=2 * HOUR)
        assert (got.to_dict()["spend"], got.plan.output_dtypes) == ([2], ("int64",))


def test_dictionary_codes_stay_over_changes_of_the_source(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", ROWS)
    ask: Any = (["users:city"], {"user_id": [1, 3]})
    with FeatureStore(repo) as store:
        codes = store.get_online_features(*ask, now=9 * HOUR).to_numpy()[1, 0]
        write_events(repo, [(8 * HOUR, 1, "a", 1.0, "Aarhus"), *ROWS[2:]])
        store.refresh()
        assert store.get_online_features(*ask, now=9 * HOUR).to_dict()["city"] == ["Aarhus", "Oslo"]
    with FeatureStore(repo) as store:
        rows = store.get_online_features(*ask, now=9 * HOUR).to_numpy()
        assert rows[1, 0] == codes
        assert rows[0, 0] == 2  # after Rome and Oslo


def test_plan_and_apply(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", ROWS)
    with FeatureStore(repo) as store:
        assert store.plan().services == {"model": "added"}
        assert store.apply().views == {"pairs": "added", "users": "added"}
        assert not store.plan()
        store.materialize_incremental(2 * HOUR)
    (repo / "features.py").write_text(
        DEFINITIONS.replace('window="90m"', 'window="2h"').replace('"model"', '"model2"')
    )
    with FeatureStore(repo) as store:
        changes = store.plan()
        assert changes.views == {"users": "changed"}
        assert changes.services == {"model": "removed", "model2": "added"}
        assert store.cursor("users") is None  # rows of the old definition are not read
        assert_online_is_offline(store, 2 * HOUR, [1, 2], ["a", "a"])
        assert len(store._online.headers()) == 2
        assert store.apply() == changes
        assert len(store._online.headers()) == 1  # and have been removed
        assert not store.plan()


def test_apply_checks_the_services(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", ROWS)
    (repo / "more.py").write_text("from penstock import *\ns = FeatureService('s', ['users:nn'])\n")
    with FeatureStore(repo) as store:
        with pytest.raises(NotFoundError, match="no such feature 'nn'; did you mean 'n'"):
            store.apply()
        assert "users" in store.plan().views


def test_ranks_are_fitted_once_and_again_by_apply(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", ROWS)

    def rank(store: FeatureStore) -> float:
        return store.get_online_features(["users:rank"], {"user_id": 1}, now=HOUR).to_dict()["rank"][0]

    with FeatureStore(repo) as store:
        assert rank(store) == 1.5 / 3
        fingerprint = store.service_plan(["users:rank"]).fingerprint
        write_events(repo, [*ROWS, (HOUR, 8, "a", 9.0, None)])
        store.refresh()
        assert rank(store) == 1.5 / 3
    with FeatureStore(repo) as store:
        assert rank(store) == 1.5 / 3
        assert store.service_plan(["users:rank"]).fingerprint == fingerprint
        store.materialize_incremental(HOUR)
        store.apply()
        assert store.cursor("users") is None
        assert rank(store) == 1.5 / 4
        assert store.service_plan(["users:rank"]).fingerprint != fingerprint
        assert_online_is_offline(store, HOUR, [1, 2], ["a", "a"])
    with FeatureStore(repo) as store:
        assert rank(store) == 1.5 / 4


def test_ranks_are_fitted_to_what_was_known_by_fit_until(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", ROWS)
    (repo / "feature_store.yaml").write_text("project: test\nfit_until: 1970-01-01T02:00:00Z\n")
    with FeatureStore(repo) as store:
        got = store.get_online_features(["users:rank"], {"user_id": [1, 2]}, now=2 * HOUR)
        assert got.to_dict()["rank"] == [0.5, 1.0]  # among the one row known before
        store.apply()
    (repo / "feature_store.yaml").write_text("project: test\n")
    with FeatureStore(repo) as store:
        assert store.plan().views == {"users": "changed"}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("percentile_rank((now() - col('at')).hours())", "reads now"),
        ("percentile_rank(col('x') * where(col('x') > 99.0, 1.0, lit(0.0) / 0.0))", "has no value"),
    ],
)
def test_a_rank_that_cannot_be_fitted(tmp_path: Path, expression: str, message: str) -> None:
    repo = make_repo(tmp_path / "r", ROWS)
    (repo / "features.py").write_text(
        "from penstock import *\nv = FeatureView('v', [Entity('u', ['user_id'])],\n"
        f"  ParquetSource('events.parquet', 'at'), {{'f': {expression}}})\n"
    )
    with FeatureStore(repo) as store, pytest.raises(DefinitionError, match=message):
        store.service_plan(["v:f"])


def test_a_rank_of_a_rank(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", ROWS)
    (repo / "features.py").write_text(
        "from penstock import *\nv = FeatureView('v', [Entity('u', ['user_id'])],\n"
        "  ParquetSource('events.parquet', 'at'), {'f': percentile_rank(percentile_rank(col('x')) * -1.0)})\n"
    )
    with FeatureStore(repo) as store:
        got = store.get_online_features(["v:f"], {"user_id": [1, 2, 3]}, now=9 * HOUR)
        assert got.to_dict()["f"] == [0.5, 0.5 / 3, 2.5 / 3]
