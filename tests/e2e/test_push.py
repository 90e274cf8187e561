"""Pushes over sockets: what was acknowledged is served by every worker and outlives them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from push_repo import HOUR, MINUTE, columns, make_push_repo, some_events

from penstock import FeatureStore
from penstock.errors import FailedPreconditionError, InvalidArgumentError, PenstockError
from penstock.serving.async_client import AsyncClient
from penstock.serving.client import Client

NOW = 20 * HOUR
USERS = list(range(8))


@dataclass(frozen=True)
class Shop:
    """A repository on a push source, and a model of its service."""

    folder: Path

    def config(self, folder: Path, **sections: Any) -> Path:
        found: dict[str, Any] = {
            "serving": {"max_latency_ms": 2000, "allow_replay": True},
            "feature_store": {"repo_path": str(self.folder / "repo")},
            "models": {"buy": {"path": str(self.folder / "bundles/buy/1")}},
            "caches": {"features": {"capacity": 4096}},
            "server": {"goaway_grace": 0.02},
            "data_dir": str(folder / "data"),
        }
        for name, section in sections.items():
            found[name] = {**found.get(name, {}), **section}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "inference-config.yaml"
        path.write_text(yaml.safe_dump(found), encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    import lightgbm

    from penstock.models.bundle import save_bundle
    from penstock.models.rows import model_rows

    folder = tmp_path_factory.mktemp("pushed")
    repo = make_push_repo(folder / "repo", batch=some_events(300, users=6, until=NOW))
    rng = np.random.default_rng(5)
    n = 300
    asked = pa.table(
        {
            "user_id": rng.integers(0, 8, n),
            "shop": pa.array(rng.choice(["a", "b"], n)),
            "value": rng.random(n),
            "event_timestamp": pa.array(rng.integers(HOUR, NOW, n), pa.timestamp("us", "UTC")),
        }
    )
    with FeatureStore(repo, data_dir=folder / "training") as store:
        joined = store.get_historical_features(asked, features="model").to_arrow()
        plan = store.service_plan("model")
        rows = model_rows(joined, list(plan.output_names))
        label = (np.nan_to_num(rows[:, 0]) + rng.random(n) > 1).astype(np.int64)
        settings = {"objective": "binary", "num_leaves": 15, "min_data_in_leaf": 2, "verbosity": -1,
                    "num_threads": 1}  # fmt: skip
        data = lightgbm.Dataset(rows, label=label, feature_name=list(plan.output_names))
        model = lightgbm.train(settings, data, num_boost_round=20)
        table = joined.append_column("label", pa.array(label))
        save_bundle(
            model, table, name="buy", version="1", directory=folder / "bundles", label="label", plan=plan
        )
    return Shop(folder)


@pytest.fixture
def expected(shop: Shop, tmp_path: Path) -> Iterator[Callable[[list[Any], int], dict[str, Any]]]:
    """What the service's stored features must be once some rows are pushed."""

    def ask(pushed: list[Any], now: int) -> dict[str, Any]:
        with FeatureStore(shop.folder / "repo", data_dir=tmp_path / f"plain{len(pushed)}-{now}") as store:
            if pushed:
                store.push("events", columns(pushed))
            names = {"user_id": USERS, "shop": ["a"] * 8}
            return store.get_online_features(["users:n", "pairs:top", "pairs:last"], names, now=now).to_dict()

    yield ask


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true answer; a server that is being restarted may refuse meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(PenstockError, RuntimeError):
            if found := what():
                return found
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def connect(served: Any) -> dict[int, Client]:
    """A connection to each of two workers, by index."""
    peers: dict[int, Client] = {}

    def both() -> bool:
        client = Client(served.address, pool_size=1)
        peers.setdefault(client.health()["worker"], client)
        return len(peers) == 2

    wait_for(both)
    return peers


def pids(client: Client) -> dict[int, int]:
    return {int(index): worker["pid"] for index, worker in client.stats()["workers"].items()}


def kill_leader(client: Client) -> None:
    """Kill worker 0 and wait for another one; `client` talks to a worker that stays."""
    pid = pids(client)[0]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pids(client)[0] != pid)


def features(client: Client, now: int) -> dict[str, Any]:
    names = {"user_id": USERS, "shop": ["a"] * 8}
    got = client.features(["users:n", "pairs:top", "pairs:last"], names, now=now)
    return {name: got["columns"][name] for name in ("n", "top", "last")}


def scores(client: Any, now: int) -> list[float]:
    names = {"user_id": USERS, "shop": ["a"] * 8}
    return client.predict("buy", names, {"value": [0.5] * 8}, now=now).scores.tolist()


def test_pushed_events_are_served_by_every_worker_and_after_a_kill(
    shop: Shop, serve: Any, tmp_path: Path, expected: Any
) -> None:
    config = shop.config(tmp_path, server={"workers": 2})
    pushed: list[Any] = []
    served = serve(config)
    with Client(served.address) as client:
        client.materialize(NOW)
    for i in range(6):
        peers = connect(served)
        if i == 3:  # worker 0, which has the log
            kill_leader(peers[1])
            peers = connect(served)
        if i == 4:  # all of them
            served.kill()
            served = wait_for(lambda: serve(config))  # its workers may hold the folder a moment
            continue
        before = [scores(peer, NOW) for peer in peers.values()]  # every worker's cache has the rows
        assert before[0] == before[1]
        rows = [(NOW - user * MINUTE, user, "a", 10.0 * i + user, "Rome") for user in USERS]
        assert peers[i % 2].push("events", columns(rows)) == len(rows)
        pushed += rows
        want = {name: expected(pushed, NOW)[name] for name in ("n", "top", "last")}
        after = []
        for peer in peers.values():
            after.append(scores(peer, NOW))
            assert features(peer, NOW) == want
        assert after[0] == after[1]
        fresh = peers[0].call(
            "predict", "buy", {"user_id": USERS, "shop": ["a"] * 8}, {"value": [0.5] * 8},
            {"now": NOW, "no_cache": True},
        )  # fmt: skip
        assert after[0] == fresh["scores"]
        if i == 0:
            assert after != before
        for peer in peers.values():
            peer.close()
    assert served.stop() == 0


def test_concurrent_pushers_and_readers_over_the_socket(shop: Shop, serve: Any, tmp_path: Path) -> None:
    served = serve(shop.config(tmp_path, server={"workers": 2}))
    faults: list[BaseException] = []

    def pusher(user: int) -> None:
        try:
            with Client(served.address) as client:
                for i in range(15):
                    client.push("events", columns([(NOW + i, 100 + user, "b", float(i), "Oslo")]))
                    got = client.features(["pairs:last", "pairs:seen"], {"user_id": 100 + user, "shop": "b"},
                                          now=NOW + HOUR)["columns"]  # fmt: skip
                    assert (got["last"], got["seen"]) == ([float(i)], [i + 1])
                    client.predict(
                        "buy", {"user_id": 100 + user, "shop": "b"}, {"value": 1.0}, now=NOW + HOUR
                    )
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=pusher, args=(user,)) for user in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert served.stop() == 0


def test_what_is_wrong_is_refused_over_the_wire(shop: Shop, serve: Any, tmp_path: Path) -> None:
    served = serve(shop.config(tmp_path))
    peer = served.raw()
    good = columns([(NOW, 1, "a", 1.0, "Rome")])
    assert peer.call("push", "events", good) == {"accepted": 1}
    scalar = {name: values[0] for name, values in good.items()}
    assert peer.call("push", "events", scalar) == {"accepted": 1}
    for params, code, message in (
        (["evnts", good], "NOT_FOUND", "push source 'evnts' is unknown"),
        (["events"], "INVALID_ARGUMENT", "push has 1 params; expected 2"),
        (["events", {**good, "user_id": [None]}], "INVALID_ARGUMENT", "column 'user_id' is null in row 0"),
        (["events", {**good, "user_id": [1.5]}], "INVALID_ARGUMENT", "column 'user_id' has type double"),
        (["events", {**good, "y": [1]}], "INVALID_ARGUMENT", "column 'y' is unknown"),
        (["events", 7], "INVALID_ARGUMENT", "rows is a int"),
        ([7, good], "INVALID_ARGUMENT", "source is 7"),
    ):
        found = peer.fault("push", *params)
        assert found[0] == code
        assert message in found[1]
    with served.client() as client, pytest.raises(InvalidArgumentError, match=r"rows\[1\] is"):
        client.push("events", [scalar, {"at": 1}])
    with served.client() as client:
        assert client.push("events", [scalar, scalar]) == 2
        assert (
            client.push("events", pa.table({**good, "at": pa.array([NOW], pa.timestamp("us", "UTC"))})) == 1
        )

    async def push_and_erase() -> tuple[int, dict[str, Any]]:
        async with AsyncClient(served.address) as client:
            return await client.push("events", [scalar]), await client.erase("users", {"user_id": 1})

    accepted, receipt = asyncio.run(push_and_erase())
    assert accepted == 1
    assert receipt["removed"]["log_rows"] == 6


def test_the_command_pushes_files_with_and_without_a_server(
    shop: Shop, serve: Any, tmp_path: Path, penstock: Any
) -> None:
    config = shop.config(tmp_path)
    rows = [(NOW + i, 200, "007", float(i), None if i else "x") for i in range(5)]
    made = columns(rows)
    table = pa.table(
        {**made, "at": pa.array(made["at"], pa.timestamp("us", "UTC")), "city": pa.array(made["city"])}
    )
    pq.write_table(table, tmp_path / "e.parquet")
    (tmp_path / "e.csv").write_text(
        "at,user_id,shop,x,city\n" + "".join(f"{r[0]},{r[1]},{r[2]},{r[3]},{r[4] or ''}\n" for r in rows)
    )
    (tmp_path / "e.jsonl").write_text(
        "\n".join(json.dumps({name: made[name][i] for name in made}) for i in range(5)) + "\n\n"
    )

    def seen(store: Any) -> list[Any]:
        got = store(["pairs:seen"], {"user_id": [200], "shop": ["007"]}, now=NOW + HOUR)
        return (got["columns"] if isinstance(got, dict) else got.to_dict())["seen"]

    for i, name in enumerate(("e.parquet", "e.csv", "e.jsonl"), 1):
        done = penstock("push", "events", tmp_path / name, "--config", config, "--json", "--rows", 2)
        assert (done.returncode, json.loads(done.stdout)) == (0, {"accepted": 5}), done.stderr
        with FeatureStore(shop.folder / "repo", data_dir=tmp_path / "data") as store:
            assert seen(store.get_online_features) == [5 * i]
    served = serve(config)
    done = penstock("push", "events", tmp_path / "e.csv", "--config", config)
    assert (done.returncode, done.stdout) == (0, "5 events of events\n"), done.stderr
    with served.client() as client:
        assert seen(client.features) == [20]
    for arguments, message in (
        (["nothing", tmp_path / "e.csv"], "push source 'nothing' is unknown; the push sources are events"),
        (["events", tmp_path / "e.txt"], "expected one of .parquet"),
        (["events", tmp_path / "none.csv"], "cannot be read"),
    ):
        done = penstock("push", *arguments, "--config", config)
        assert done.returncode == 1
        assert message in done.stderr
    (tmp_path / "bad.jsonl").write_text('{"at": 1, "user_id": "x"}\n')
    done = penstock("push", "events", tmp_path / "bad.jsonl", "--config", config)
    assert done.returncode == 1
    assert "column 'user_id'" in done.stderr


def test_an_entity_is_erased_over_the_wire_and_by_the_command(
    shop: Shop, serve: Any, tmp_path: Path, penstock: Any
) -> None:
    config = shop.config(tmp_path, server={"workers": 2})
    served = serve(config)
    rows = [(NOW + i, 300 + i % 3, "a", float(i), "Rome") for i in range(9)]
    names = {"user_id": [300, 301, 302], "shop": ["a"] * 3}
    later = NOW + HOUR

    def seen(client: Client) -> list[Any]:
        client.predict("buy", names, {"value": [0.5] * 3}, now=later)  # the cache of its worker has the rows
        return list(client.features(["pairs:seen"], names, now=later)["columns"]["seen"])

    peers = connect(served)
    peers[1].push("events", columns(rows))
    assert [seen(peer) for peer in peers.values()] == [[3, 3, 3]] * 2
    before = [peer.predict("buy", names, {"value": [0.5] * 3}, now=later).status for peer in peers.values()]
    receipt = peers[1].erase("users", {"user_id": [301]})
    assert receipt["removed"]["log_rows"] == 3
    assert receipt["views"] == ["pairs", "users"]
    assert len(receipt["digest"]) == 64
    assert any("served log" in text for text in receipt["kept"])
    assert [seen(peer) for peer in peers.values()] == [[3, None, 3]] * 2
    for peer, was in zip(peers.values(), before):
        status = peer.predict("buy", names, {"value": [0.5] * 3}, now=later).status
        assert status is None or was is None or (status[1] > was[1]).any()
    found = served.raw().fault("erase", "users", {"user": 1})
    assert found[0] == "INVALID_ARGUMENT"
    assert "user_id" in found[1]
    done = penstock("erase", "users", "--key", "user_id=302", "--config", config, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["removed"]["log_rows"] == 3
    assert [seen(peer) for peer in peers.values()] == [[3, None, None]] * 2
    for peer in peers.values():
        peer.close()
    assert served.stop() == 0
    done = penstock("erase", "users", "--key", "user_id=x", "--config", config)
    assert done.returncode == 1
    assert "expected an integer" in done.stderr


def test_a_store_beside_a_server_does_not_materialize(
    shop: Shop, serve: Any, penstock: Any, tmp_path: Path
) -> None:
    """In a process of its own it is refused, and says where to; the command goes through the server."""
    config = shop.config(tmp_path / "run")
    served = serve(config)
    data = tmp_path / "run" / "data"
    with FeatureStore(shop.folder / "repo", data_dir=data) as store:
        for write in (lambda: store.materialize(0, NOW), lambda: store.materialize_incremental(NOW)):
            with pytest.raises(
                FailedPreconditionError, match=f"is served at {served.address}; push, erase and"
            ):
                write()
        assert store.cursor("users") is None
        done = penstock("materialize", "--config", config, "--end", "1970-01-01T20:00:00Z")
        assert done.returncode == 0, done.stderr
        assert store.cursor("users") == NOW
    assert served.stop() == 0
    with FeatureStore(shop.folder / "repo", data_dir=data) as store:
        store.materialize_incremental(NOW)
