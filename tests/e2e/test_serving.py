"""The whole over its socket: a served shop, asked in every way, killed, promoted, drained."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import socket
import threading
from collections.abc import Iterator

import msgpack
import numpy as np
import pyarrow as pa
import pytest

from penstock import AsyncClient, Client, Engine
from penstock.models.bundle import load_bundle, score
from penstock.models.rows import model_rows
from penstock.monitoring.served_log import read_served

HOUR_US = 3_600_000_000
STATUS = {"PRESENT": 0, "NULL": 1, "NOT_FOUND": 2, "EXPIRED": 3}


def conserved(counts: dict[str, int]) -> bool:
    """Whether each of the submitted has exactly one end, or is in flight."""
    ends = ("in_flight", "ok", "rejected", "expired", "cancelled", "failed")
    return counts["submitted"] == sum(counts[end] for end in ends)


@pytest.fixture(scope="module")
def engine(shop, tmp_path_factory) -> Iterator[Engine]:
    with Engine.from_config(shop.config(tmp_path_factory.mktemp("engine"))) as made:
        yield made


@pytest.fixture(scope="module")
def now(shop) -> int:
    return int(shop.columns["now_us"].max())


# Predictions


def test_ten_lines_of_python_with_a_raw_socket_get_a_prediction(shop, server, engine, now):
    address = ("127.0.0.1", int(server.addresses[0].rsplit(":", 1)[1]))
    user_id, item_id, basket_value = [7, 8], [1, 2], [10.0, 250.0]

    sock = socket.create_connection(address)
    columns = {"user_id": user_id, "item_id": item_id}
    params = ["buy", columns, {"basket_value": basket_value}, {"now": now}]
    sock.sendall(msgpack.packb([0, 1, "predict", params]))
    unpacker = msgpack.Unpacker()
    while not (replies := list(unpacker)):
        unpacker.feed(sock.recv(65536))
    [[_, msgid, error, result]] = replies
    sock.close()

    assert (msgid, error) == (1, None)
    here = engine.predict("buy", columns, {"basket_value": basket_value}, now=now)
    assert result["scores"] == here.scores.tolist()
    assert result["version"] == "1" and len(result["request_ids"]) == 2


def test_every_way_in_gives_the_same_scores_bit_for_bit(shop, server, engine, penstock, now):
    rows = slice(0, 100)
    entities, inputs = shop.entities(rows), shop.inputs(rows)
    here = engine.predict("buy", entities, inputs, now=now).scores
    assert len(set(here.tolist())) > 10

    raw = server.raw().call("predict", "buy", entities, inputs, {"now": now})
    assert raw["scores"] == here.tolist()
    for address in server.addresses:  # TCP and the Unix socket
        with Client(address) as client:
            np.testing.assert_array_equal(client.predict("buy", entities, inputs, now=now).scores, here)
            table = {**entities, **inputs}
            many = client.predict_many("buy", table, now=now, chunk_rows=32)
            np.testing.assert_array_equal(many.scores, here)

    async def ask() -> np.ndarray:
        async with AsyncClient(server.address) as client:
            calls = (
                client.predict("buy", shop.entities(slice(i, i + 1)), shop.inputs(slice(i, i + 1)), now=now)
                for i in range(100)
            )
            return np.concatenate([made.scores for made in await asyncio.gather(*calls)])

    np.testing.assert_array_equal(asyncio.run(ask()), here)
    np.testing.assert_array_equal(engine.predict_many("buy", {**entities, **inputs}, now=now).scores, here)

    current = engine.predict("buy", entities, inputs).scores  # the command has no --now
    done = penstock(
        "predict", "buy", json.dumps(entities), "--inputs", json.dumps(inputs), "--to", server.address,
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"] == current.tolist()


def test_vectors_get_the_scores_of_scikit_learn(shop, server, engine):
    library = shop.forest.predict_proba(shop.vectors)[:, 1]
    with server.client() as client:
        made = client.predict_vectors("bare", shop.vectors)
    np.testing.assert_allclose(made.scores, library, rtol=0, atol=1e-6)
    here = engine.predict_vectors("bare", shop.vectors).scores
    np.testing.assert_array_equal(made.scores.astype(np.float32), here.astype(np.float32))
    raw = server.raw().call("predict_vectors", "bare", shop.vectors.tobytes(), len(shop.vectors))
    np.testing.assert_array_equal(np.frombuffer(raw["scores"], "<f4"), here.astype(np.float32))


def test_a_replay_serves_the_rows_of_the_historical_join(shop, serve, tmp_path):
    config = shop.config(tmp_path)
    served = serve(config)
    n = len(shop.rows)

    async def ask() -> list:
        async with AsyncClient(served.address) as client:
            calls = [
                client.predict(
                    "buy", shop.entities(slice(i, i + 1)), shop.inputs(slice(i, i + 1)),
                    now=int(shop.columns["now_us"][i]), request_id=[i],
                )
                for i in range(n)
            ]  # fmt: skip
            return await asyncio.gather(*calls)

    scores = np.concatenate([made.scores for made in asyncio.run(ask())])
    with served.client() as client:
        stats = client.stats()
    assert served.stop() == 0

    np.testing.assert_allclose(scores, shop.boosters["1"].predict(shop.rows), rtol=0, atol=1e-6)
    bundle = load_bundle(shop.folder / "bundles/buy/1")
    np.testing.assert_array_equal(scores, bundle.ensemble().predict(shop.rows)[:, 0])
    log = read_served(tmp_path / "data/log", "buy").sort_by("rid")
    assert log["rid"].to_pylist() == list(range(n))
    names = [name for name, _ in bundle.inputs]
    np.testing.assert_array_equal(model_rows(log, names), shop.rows)
    np.testing.assert_array_equal(log["score"].to_numpy(), scores)
    assert stats["models"]["buy"]["rows"]["ok"] == n


def test_offline_scores_are_those_that_are_served(shop, server, now):
    bundle = load_bundle(shop.folder / "bundles/bare/1")
    names = [name for name, _ in bundle.inputs]
    offline = score(bundle, pa.table({name: shop.vectors[:, i] for i, name in enumerate(names)}))
    with server.client() as client:
        online = client.predict_vectors("bare", shop.vectors).scores
    np.testing.assert_array_equal(online.astype(np.float32), offline.astype(np.float32))


def test_an_unknown_entity_is_not_found_and_scored_as_missing(shop, server, now):
    entities = {"user_id": [10**15, -1], "item_id": [10**15, -1]}
    made = server.raw().call("predict", "buy", entities, {"basket_value": [5.0, 5.0]}, {"now": now})
    assert made["status"] == [STATUS["NOT_FOUND"]] * 2
    missing = np.full((1, shop.rows.shape[1]), np.nan, np.float32)
    missing[0, -1] = 5.0
    expected = shop.boosters["1"].predict(missing)[0]
    assert made["scores"] == pytest.approx([expected, expected], abs=1e-6)
    found = server.raw().call("features", ["user_features:weekly_spend"], {"user_id": [10**15]}, now)
    assert found["columns"]["weekly_spend"] == [None]
    assert found["status"] == {"weekly_spend": [STATUS["NOT_FOUND"]]}


# Labels


def test_labels_join_the_rows_that_were_served(shop, serve, tmp_path, now):
    served = serve(shop.config(tmp_path))
    with served.client() as client:
        made = client.predict("buy", shop.entities(slice(0, 50)), shop.inputs(slice(0, 50)), now=now)
        labels = [i % 2 for i in range(50)]
        joined = client.label(made.request_ids, labels, [now + HOUR_US] * 50)
        assert (joined["matched"], joined["orphan"]) == (50, 0)
        assert client.label([3], [1])["orphan"] == 1
        again = client.label(made.request_ids[:5], labels[:5], [now + HOUR_US] * 5)
        assert (again["matched"], again["duplicate"]) == (0, 5)
        performance = client.stats()["models"]["buy"]["performance"]
    assert (performance["n"], performance["labelled"]) == (50, 50)
    right = np.mean((made.scores >= 0.5) == np.array(labels))
    assert performance["accuracy"] == pytest.approx(right)
    assert performance["brier"] == pytest.approx(np.mean((made.scores - labels) ** 2))


def test_an_acknowledged_label_survives_kill_9(shop, serve, tmp_path, now):
    config = shop.config(tmp_path, monitoring={"log_flush": 0.01})
    served = serve(config)
    with served.client() as client:
        made = client.predict("buy", shop.entities(slice(0, 20)), shop.inputs(slice(0, 20)), now=now)
        served.wait_logged()
        assert client.label(made.request_ids, [1] * 20)["matched"] == 20
        before = client.stats()["models"]["buy"]["performance"]
    served.kill()
    again = serve(config)
    with again.client() as client:
        assert client.label(made.request_ids, [1] * 20)["matched"] == 0
        after = client.stats()["models"]["buy"]["performance"]
    assert after["labelled"] == before["labelled"] == 20
    assert after["brier"] == pytest.approx(before["brier"])


# Versions


def test_promote_and_rollback_while_requests_flow(shop, serve, tmp_path, now):
    served = serve(shop.registry(tmp_path))
    entities, inputs = shop.entities(slice(0, 8)), shop.inputs(slice(0, 8))
    told = threading.Condition()
    seen: list[str] = []
    faults: list[BaseException] = []
    over = threading.Event()
    by_version: dict[str, list[float]] = {}

    def ask() -> None:
        try:
            with served.client() as client:
                while not over.is_set():
                    made = client.predict("buy", entities, inputs, now=now)
                    with told:
                        if by_version.setdefault(made.version, made.scores.tolist()) != made.scores.tolist():
                            raise AssertionError("a version has two scores for one row")
                        seen.append(made.version)
                        told.notify_all()
        except BaseException as error:
            faults.append(error)
            with told:
                told.notify_all()

    workers = [threading.Thread(target=ask) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        with served.client() as client:
            for step in range(6):
                version = "2" if step % 2 == 0 else "1"
                did = client.promote("buy", "2") if version == "2" else client.rollback("buy")
                assert did == {"model": "buy", "version": version}
                assert client.predict("buy", entities, inputs, now=now).version == version
                with told:
                    start = len(seen)
                    assert told.wait_for(lambda: faults or version in seen[start:], 30)  # noqa: B023
            stats = client.stats()
    finally:
        over.set()
        for worker in workers:
            worker.join(30)
    assert not faults
    assert set(seen) == {"1", "2"} and by_version["1"] != by_version["2"]
    for version, scores in by_version.items():
        assert shop.boosters[version].num_trees() == 20
        assert len(set(scores)) > 1
    assert stats["models"]["buy"]["version"] == "1"


def test_an_acknowledged_promotion_survives_kill_9(shop, serve, tmp_path, now):
    config = shop.registry(tmp_path)
    served = serve(config)
    with served.client() as client:
        client.promote("buy", "2")
        before = client.predict("buy", shop.entities(), shop.inputs(), now=now)
    served.kill()
    again = serve(config)
    with again.client() as client:
        after = client.predict("buy", shop.entities(), shop.inputs(), now=now)
        assert client.models()["buy"]["aliases"] == {"champion": "2", "previous": "1"}
        assert client.rollback("buy")["version"] == "1"
    assert before.version == after.version == "2"
    np.testing.assert_array_equal(before.scores, after.scores)


def test_the_models_commands_change_what_a_running_server_serves(shop, serve, penstock, tmp_path, now):
    config = shop.config(tmp_path)
    served = serve(config)

    def models(*args: object) -> dict:
        done = penstock("models", *args, "--config", config, "--json")
        assert done.returncode == 0, done.stdout
        return json.loads(done.stdout)

    with served.client() as client:
        assert models("add", shop.folder / "bundles/buy/2")["aliases"] == ["challenger"]
        assert models("promote", "buy") == {"model": "buy", "version": "2"}
        assert client.predict("buy", shop.entities(), shop.inputs(), now=now).version == "2"
        assert models("rollback", "buy") == {"model": "buy", "version": "1"}
        assert client.predict("buy", shop.entities(), shop.inputs(), now=now).version == "1"
    done = penstock("models", "promote", "buy", "9", "--config", config)
    assert done.returncode == 1 and "has no version '9'" in done.stderr


# Life


def test_sigterm_answers_what_was_asked_and_ends_with_0(shop, serve, tmp_path, now):
    room = {"max_queued_rows": 1 << 18, "max_latency_ms": 20_000}  # however slow the machine is
    served = serve(shop.config(tmp_path, serving=room))
    idle, busy = served.raw(), served.raw()
    assert idle.call("health")["ready"]
    rows = slice(0, 40)
    params = ["buy", shop.entities(rows), shop.inputs(rows), {"now": now}]
    asked = 200
    stream = b"".join(msgpack.packb([0, i, "predict", params]) for i in range(asked))
    sender = threading.Thread(target=busy.socket.sendall, args=(stream,))
    sender.start()
    replies = [busy.read()]
    served.process.send_signal(signal.SIGTERM)
    said_goodbye = False
    while (message := busy.read()) is not None:
        if message[0] == 2:
            said_goodbye = message[1] == "goaway"
        else:
            replies.append(message)
    sender.join(30)
    assert said_goodbye and idle.read()[1] == "goaway" and idle.read() is None
    busy.close()
    idle.close()
    assert served.process.wait(60) == 0
    ids = [msgid for _, msgid, _, _ in replies]
    assert len(ids) == len(set(ids))
    refused = [error["code"] for _, _, error, _ in replies if error is not None]
    assert set(refused) <= {"UNAVAILABLE"} and len(refused) < len(replies)
    assert all(len(result["scores"]) == 40 for _, _, error, result in replies if error is None)


def test_a_restart_after_kill_9_takes_over_the_socket_and_the_data(shop, serve, tmp_path, now):
    config, path = shop.config(tmp_path), f"unix://{tmp_path}/s"
    served = serve(config, path)
    with served.client() as client:
        client.materialize(now)
        before = client.predict("buy", shop.entities(), shop.inputs(), now=now).scores
    served.kill()
    again = serve(config, path)
    with again.client() as client:
        np.testing.assert_array_equal(
            client.predict("buy", shop.entities(), shop.inputs(), now=now).scores, before
        )
    assert again.stop() == 0
    assert not (tmp_path / "s").exists()


# The other methods


def test_every_method_answers_over_the_socket(shop, serve, tmp_path, penstock, now):
    served = serve(shop.config(tmp_path))
    raw = served.raw()
    for _ in range(3):
        assert "error" not in raw.call("predict", "buy", shop.entities(), shop.inputs(), {"now": now})
    health = raw.call("health")
    assert health["ready"] and health["state"] == "serving" and health["models"]["buy"] == "1"
    models = raw.call("models")
    assert models["buy"]["entities"] == ["user_id", "item_id"]
    assert models["buy"]["inputs"] == [["basket_value", "float64"]]
    assert [name for name, _ in models["bare"]["features"]] == ["amount", "hour", "distance"]
    found = raw.call("features", ["user_features:daily_transactions"], {"user_id": [1, 2]}, now)
    assert set(found["columns"]) == {"user_id", "daily_transactions"}
    drift = raw.call("drift")
    shown = {feature["name"]: feature for feature in drift["buy"]["drift"]["features"]}
    assert shown["basket_value"]["n"] == 3 * len(shop.rows)
    assert set(raw.call("drift", "bare")) == {"bare"}
    done = raw.call("materialize", now)
    assert done["end_us"] == now and set(done["rows"]) == {"user_features", "item_features"}
    assert min(done["rows"].values()) > 0
    assert raw.call("apply")["services"] == {"purchase": "added"}
    again = raw.call("apply")
    known = again.pop("fingerprints")
    assert set(known["views"]) == {"user_features", "item_features"}
    assert set(known["services"]) == {"purchase"}
    assert again == {"views": {}, "services": {}, "retired": []}
    later = penstock("materialize", "--config", served.config, "--json")  # finds the server by the lock
    assert later.returncode == 0, later.stderr
    stats = raw.call("stats")
    assert stats["models"]["buy"]["rows"]["ok"] == 3 * len(shop.rows)
    assert sum(int(size) * runs for size, runs in stats["models"]["buy"]["batches"].items()) == 1200
    assert max(map(int, stats["models"]["buy"]["batches"])) <= 64
    assert stats["server"]["connections"] == 1 and stats["monitor_errors"] == 0


def test_times_may_be_the_timestamp_extension(shop, serve, tmp_path, now):
    raw = serve(shop.config(tmp_path)).raw()
    stamp = msgpack.Timestamp(now // 10**6, now % 10**6 * 1000)
    columns = shop.entities(), shop.inputs()
    made = raw.call("predict", "buy", *columns, {"now": stamp})
    assert made["scores"] == raw.call("predict", "buy", *columns, {"now": now})["scores"]
    weekly = ["user_features:weekly_spend"]
    users = {"user_id": shop.entities()["user_id"]}
    assert raw.call("features", weekly, users, stamp) == raw.call("features", weekly, users, now)
    assert raw.call("label", made["request_ids"][:1], [1], [stamp])["matched"] == 1
    assert raw.call("materialize", stamp)["end_us"] == now
    assert raw.call("drift", None, None, stamp) == raw.call("drift", None, None, now)


def test_materialize_keeps_the_scores_of_the_same_moment(shop, serve, tmp_path, now):
    served = serve(shop.config(tmp_path))
    with served.client() as client:

        def ask(**options: bool) -> list[float]:
            return client.predict("buy", shop.entities(), shop.inputs(), now=now, **options).scores.tolist()

        computed, cached = ask(no_cache=True), ask()
        client.materialize(now)
        assert cached == computed == ask(no_cache=True) == ask()


def test_the_counters_conserve_every_request_whatever_its_end(shop, serve, tmp_path, now):
    served = serve(shop.config(tmp_path))
    entities, inputs = shop.entities(slice(0, 70)), shop.inputs(slice(0, 70))
    raw, gone = served.raw(), served.raw()
    kinds = itertools.cycle([{"now": now}, {"now": now, "deadline_ms": 0.001}, {"deadline_ms": -1}])
    asked = [next(kinds) for _ in range(60)]
    for i, options in enumerate(asked):
        raw.socket.sendall(msgpack.packb([0, i, "predict", ["buy", entities, inputs, options]]))
    gone.socket.sendall(msgpack.packb([0, 1, "predict", ["buy", entities, inputs, {"now": now}]]))
    gone.close()
    replies = [raw.read() for _ in asked]
    ok = sum(error is None for _, _, error, _ in replies)
    codes = {error["code"] for _, _, error, _ in replies if error is not None}
    assert "INVALID_ARGUMENT" in codes and ok >= 20
    stats = raw.call("stats")
    for model in stats["models"].values():
        assert conserved(model["requests"]) and conserved(model["rows"])
    requests = stats["models"]["buy"]["requests"]
    assert ok <= requests["ok"] <= ok + 1
