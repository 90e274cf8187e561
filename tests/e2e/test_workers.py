"""`penstock serve --workers N`: one server of several processes, over its sockets, also while some die."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from penstock import Engine
from penstock.monitoring.served_log import read_served

ROWS = 8  # of a request of `Load`
QUICK_RESTARTS = {"workers": 2, "max_restarts": 1_000_000, "restart_window": 0.01}


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true answer of `what`; a server that is being restarted may refuse it meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, AssertionError, KeyError, TypeError):
            if found := what():
                return found
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def callers(served, wanted: int) -> dict[int, Any]:
    """A connection to each of `wanted` workers, by index."""
    found: dict[int, Any] = {}
    deadline = time.monotonic() + 60  # one that is started again listens some time after it is counted
    while time.monotonic() < deadline:
        caller = served.raw()
        index = caller.call("health")["worker"]
        if index in found:
            caller.close()
        else:
            found[index] = caller
        if len(found) == wanted:
            return found
    raise AssertionError(f"only workers {sorted(found)} answered")


def pids(served) -> dict[int, int]:
    caller = served.raw()
    try:
        stats = caller.call("stats")
    finally:
        caller.close()
    assert "workers" in stats, stats
    return {int(index): worker["pid"] for index, worker in stats["workers"].items()}


@pytest.fixture(scope="module")
def now(shop) -> int:
    return int(shop.columns["now_us"].max())


@pytest.fixture(scope="module")
def expected(shop, now, tmp_path_factory) -> Iterator[np.ndarray]:
    """Scores of all rows, by one engine in one process."""
    with Engine.from_config(shop.config(tmp_path_factory.mktemp("engine"))) as engine:
        yield engine.predict("buy", shop.entities(), shop.inputs(), now=now).scores


def test_every_worker_gives_the_scores_of_one_engine_and_shares_the_cache(
    shop, serve, tmp_path, now, expected
):
    served = serve(shop.config(tmp_path, server={"workers": 3}))
    entities, inputs = shop.entities(), shop.inputs()
    at = callers(served, 3)
    for caller in at.values():
        made = caller.call("predict", "buy", entities, inputs, {"now": now})
        assert made["scores"] == expected.tolist()
    stats = at[2].call("stats")
    assert sorted(stats["workers"]) == ["0", "1", "2"]
    # Rows that the first worker loaded are hits to the others.
    parked = [worker["models"]["buy"]["missed_rows"] for worker in stats["workers"].values()]
    assert sorted(count > 0 for count in parked) == [False, False, True]
    sums = stats["models"]["buy"]
    assert sums["rows"]["ok"] == 3 * len(shop.rows)
    for what in ("requests", "rows"):
        assert sums[what]["submitted"] == sum(sums[what].values()) - sums[what]["submitted"]
        for end, count in sums[what].items():
            parts = [worker["models"]["buy"][what][end] for worker in stats["workers"].values()]
            assert count == sum(parts)
    assert stats["server"]["accepted"] == sum(w["server"]["accepted"] for w in stats["workers"].values())
    assert served.stop() == 0
    assert not (tmp_path / "data/arena").exists()


def test_drift_labels_and_the_log_cover_all_workers(shop, serve, tmp_path, now):
    served = serve(shop.config(tmp_path, server={"workers": 2}))
    at = callers(served, 2)
    ids: dict[int, list[int]] = {}
    for index, caller in at.items():
        made = caller.call("predict", "buy", shop.entities(), shop.inputs(), {"now": now})
        ids[index] = made["request_ids"]
    assert not set(ids[0]) & set(ids[1])
    for index, caller in at.items():  # each labels what the other served, at once
        given = ids[1 - index]
        assert caller.call("label", given, [0, 1] * (len(given) // 2), [now] * len(given))["matched"] == len(
            given
        )
    report = at[1].call("drift")["buy"]
    assert report["drift"]["n"] == 2 * len(shop.rows)
    assert at[1].call("stats")["models"]["buy"]["performance"]["n"] == 2 * len(shop.rows)
    for index, caller in at.items():  # served just before the end
        made = caller.call("predict", "buy", shop.entities(), shop.inputs(), {"now": now})
        ids[index] += made["request_ids"]
    assert served.stop() == 0
    logged = read_served(tmp_path / "data/log", "buy")
    assert sorted(logged["rid"].to_pylist()) == sorted(ids[0] + ids[1])


def test_a_promotion_reaches_every_worker_before_it_is_acknowledged(shop, serve, tmp_path):
    served = serve(shop.registry(tmp_path), "--workers=3")
    at = callers(served, 3)
    for by, version in ((2, "2"), (0, "1"), (1, "2")):
        assert at[by].call("promote", "buy", version)["workers"] == {"changed": [0, 1, 2], "late": []}
        for caller in at.values():
            made = caller.call("predict", "buy", shop.entities(slice(0, 3)), shop.inputs(slice(0, 3)))
            assert made["version"] == version
    assert at[1].call("rollback", "buy")["version"] == "1"
    assert {caller.call("health")["models"]["buy"] for caller in at.values()} == {"1"}
    code, message = at[2].fault("promote", "buy", "9")
    assert code == "NOT_FOUND" and "'9'" in message
    assert {caller.call("health")["models"]["buy"] for caller in at.values()} == {"1"}


@pytest.mark.long
def test_a_source_that_changed_is_read_again_by_every_worker(shop, serve, tmp_path, now):
    import pyarrow.parquet as pq

    repo = shop.copy_repo(tmp_path)
    served = serve(shop.config(tmp_path, feature_store={"repo_path": str(repo)}, server={"workers": 2}))
    at = callers(served, 2)
    ask = ["buy", shop.entities(), shop.inputs(), {"now": now}]
    before = at[0].call("predict", *ask)["scores"]
    assert at[1].call("predict", *ask)["scores"] == before
    source = next(path for path in sorted(repo.rglob("*.parquet")) if "user_id" in pq.read_schema(path).names)
    table = pq.read_table(source)
    pq.write_table(table.slice(0, len(table) // 3), source)
    at[1].call("materialize", now)
    no_cache = [*ask[:3], {"now": now, "no_cache": True}]
    after = at[1].call("predict", *no_cache)["scores"]  # its own reading of the source
    assert after != before
    for caller in at.values():
        assert caller.call("predict", *ask)["scores"] == after


@pytest.mark.long
def test_a_worker_that_is_killed_is_replaced_and_the_others_serve_on(shop, serve, tmp_path, now, expected):
    served = serve(shop.config(tmp_path, server=QUICK_RESTARTS))
    at = callers(served, 2)
    victim = pids(served)[1]
    os.kill(victim, signal.SIGKILL)
    ask = ["buy", shop.entities(), shop.inputs(), {"now": now}]
    assert at[0].call("predict", *ask)["scores"] == expected.tolist()
    assert at[1].read() is None  # its connections are reset
    wait_for(lambda: pids(served)[1] != victim)
    at = callers(served, 2)
    assert at[1].call("predict", *ask)["scores"] == expected.tolist()
    assert at[1].call("stats")["workers"]["1"]["generation"] == 2


@pytest.mark.long
def test_worker_0_that_is_killed_is_replaced_and_finds_the_others(shop, serve, tmp_path, now, expected):
    served = serve(shop.config(tmp_path, server=QUICK_RESTARTS))
    at = callers(served, 2)
    ask = ["buy", shop.entities(), shop.inputs(), {"now": now}]
    at[0].call("predict", *ask)
    victim = pids(served)[0]
    os.kill(victim, signal.SIGKILL)
    assert at[1].call("predict", *ask)["scores"] == expected.tolist()  # meanwhile
    wait_for(lambda: at[1].call("stats").get("workers", {})["0"]["pid"] != victim)
    assert at[1].call("label", [1], [1], [now])["orphan"] == 1
    assert at[1].call("predict", *ask)["scores"] == expected.tolist()
    # What the follower served waited for worker 0, or is counted: it was on its way when worker 0 died.
    lost = at[1].call("stats")["workers"]["1"]["lost_rows"]
    assert lost in (0, len(shop.rows))
    assert at[1].call("drift")["buy"]["drift"]["n"] + lost == 2 * len(shop.rows)


class Load(threading.Thread):
    """Asks for predictions over connections that it makes anew whenever one is reset."""

    def __init__(self, served, shop, now: int, expected: np.ndarray) -> None:
        super().__init__(daemon=True)
        self.served, self.shop, self.now, self.expected = served, shop, now, expected
        self.answered = self.reset = 0
        self.wrong: list[Any] = []
        self.stop = False

    def run(self) -> None:
        from raw_peer import Raw

        peer, i = None, 0
        while not self.stop and not self.wrong:
            rows = slice(i % 390, i % 390 + ROWS)
            i += ROWS
            try:
                peer = peer or Raw(self.served.address)
                params = ["buy", self.shop.entities(rows), self.shop.inputs(rows), {"now": self.now}]
                peer.send([0, i, "predict", params])
                reply = peer.read()
                if reply is None:
                    raise ConnectionResetError
            except OSError:
                self.reset += 1
                if peer is not None:
                    peer.close()
                peer = None
                continue
            if reply[2] is not None or reply[3]["scores"] != self.expected[rows].tolist():
                self.wrong.append(reply)
            self.answered += 1
        if peer is not None:
            peer.close()


def kill_under_load(shop, serve, folder, now, expected, kills: int, seconds: float) -> int:
    served = serve(shop.config(folder, server=QUICK_RESTARTS))
    loads = [Load(served, shop, now, expected) for _ in range(3)]
    for load in loads:
        load.start()
    started = time.monotonic()
    done = 0
    known = pids(served)
    while done < kills and time.monotonic() - started < seconds:
        known = kill_one(served, loads, known, done % 2)
        done += 1
    for load in loads:
        load.stop = True
    for load in loads:
        load.join(60)
        assert not load.is_alive() and not load.wrong, load.wrong
    ask = ["buy", shop.entities(), shop.inputs(), {"now": now}]
    for caller in callers(served, 2).values():
        assert caller.call("predict", *ask)["scores"] == expected.tolist()
    assert served.stop() == 0
    return done


def kill_one(served, loads: list[Load], known: dict[int, int], index: int) -> dict[int, int]:
    """Kill worker `index` and wait until both serve again; their process ids."""
    answered = sum(load.answered for load in loads)
    os.kill(known[index], signal.SIGKILL)
    wait_for(lambda: sum(load.answered for load in loads) > answered + 3)

    def both_serve() -> dict[int, int] | None:
        found = pids(served)
        return found if len(found) == 2 and found[index] != known[index] else None

    return wait_for(both_serve)


def test_kills_under_load_give_no_wrong_answer(shop, serve, tmp_path, now, expected):
    assert kill_under_load(shop, serve, tmp_path, now, expected, 4, 600) == 4


def test_the_rows_that_a_killed_worker_takes_with_it_are_counted(shop, serve, tmp_path, now, expected):
    served = serve(shop.config(tmp_path, server=QUICK_RESTARTS))
    loads = [Load(served, shop, now, expected) for _ in range(2)]
    for load in loads:
        load.start()
    known = pids(served)
    for _ in range(2):
        known = kill_one(served, loads, known, 1)
    for load in loads:
        load.stop = True
    for load in loads:
        load.join(60)
        assert not load.is_alive() and not load.wrong, load.wrong
    caller = served.raw()
    watched = caller.call("drift")["buy"]["drift"]["n"]
    stats = caller.call("stats")
    # What worker 0 itself served is in the drift counts, also where its ring was full for the log.
    assert stats["workers"]["1"]["models"].get("buy", {"served_dropped": 0})["served_dropped"] == 0
    assert stats["strange_rows"] == stats["lost_rows"] == 0
    rows = watched + stats["killed_rows"]
    answered = ROWS * sum(load.answered for load in loads)
    assert answered <= rows <= answered + ROWS * sum(load.reset for load in loads)


@pytest.mark.long
def test_many_kills_under_load_give_no_wrong_answer(shop, serve, tmp_path, now, expected):
    assert kill_under_load(shop, serve, tmp_path, now, expected, 1000, 180) >= 20


@pytest.mark.long
def test_workers_that_keep_dying_end_the_server_with_the_reason(shop, serve, tmp_path):
    served = serve(shop.config(tmp_path, server={"workers": 2, "max_restarts": 1}))
    for pid in pids(served).values():
        os.kill(pid, signal.SIGKILL)
    assert served.process.wait(60) == 1
    assert "more than server.max_restarts; the server ends" in served.log.read_text()


def test_a_server_whose_worker_cannot_start_ends_with_the_reason(shop, serve, tmp_path):
    config = shop.config(tmp_path, models={"buy": {"path": str(tmp_path / "nowhere")}}, server={"workers": 2})
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1.*nowhere.*worker 0 ended with status 1 before"):
        serve(config)


@pytest.mark.long
def test_a_unix_socket_is_shared_and_removed(shop, serve, tmp_path, now, expected):
    address = f"unix://{tmp_path}/s"
    served = serve(shop.config(tmp_path, server=QUICK_RESTARTS), address)
    at = callers(served, 2)
    ask = ["buy", shop.entities(), shop.inputs(), {"now": now}]
    for caller in at.values():
        assert caller.call("predict", *ask)["scores"] == expected.tolist()
    victim = pids(served)[1]
    os.kill(victim, signal.SIGKILL)
    assert served.raw().call("predict", *ask)["scores"] == expected.tolist()
    wait_for(lambda: pids(served)[1] != victim)
    callers(served, 2)
    assert served.stop() == 0
    assert not (tmp_path / "s").exists()


@pytest.mark.long
def test_two_servers_do_not_share_a_port_or_a_data_folder(shop, serve, tmp_path):
    first = serve(shop.config(tmp_path / "a", server={"workers": 2}))
    with pytest.raises(RuntimeError, match="the port is in use"):
        serve(shop.config(tmp_path / "b", server={"workers": 2}), first.address)
    with pytest.raises(RuntimeError, match="the port is in use"):
        serve(shop.config(tmp_path / "c"), first.address)
    with pytest.raises(RuntimeError, match=f"is in use by process {first.process.pid}"):
        serve(first.config)


@pytest.mark.long
def test_workers_whose_supervisor_is_killed_end_and_free_the_data_folder(shop, serve, tmp_path):
    served = serve(shop.config(tmp_path, server={"workers": 2}))
    found = pids(served)
    served.process.kill()
    served.process.wait(60)

    def gone() -> bool:
        for pid in found.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 0)
                return False
        return True

    wait_for(gone)
    assert serve(served.config).stop() == 0


@pytest.mark.long
def test_requests_in_flight_at_a_signal_are_answered(shop, serve, tmp_path, now, expected):
    served = serve(shop.config(tmp_path, server={"workers": 2}))
    at = callers(served, 2)
    ask = ["buy", shop.entities(), shop.inputs(), {"now": now, "no_cache": True}]
    for caller in at.values():
        caller.send(*([0, i, "predict", ask] for i in range(5)))
    served.process.send_signal(signal.SIGTERM)
    for caller in at.values():
        replies = {}
        while (message := caller.read()) is not None:
            if message[0] == 1:
                assert message[1] not in replies
                replies[message[1]] = message
        assert sorted(replies) == list(range(5))
        for reply in replies.values():  # answered, or refused as the server was already going
            assert (reply[2] or {}).get("code", "UNAVAILABLE") == "UNAVAILABLE"
            assert reply[2] is not None or reply[3]["scores"] == expected.tolist()
    served.process.communicate(timeout=60)
    assert served.process.returncode == 0


def test_a_hangup_has_every_worker_read_the_tokens_again(shop, serve, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("first-token-of-all\n")
    server = {"workers": 2, "auth": {"token_file": str(tokens)}}
    served = serve(shop.config(tmp_path, server=server))

    def accepted(token: str) -> set[int]:
        """Workers that take the token, of some connections."""
        found = set()
        for _ in range(24):
            caller = served.raw()
            if "error" not in caller.call("auth", token):
                found.add(caller.call("health")["worker"])
            caller.close()
        return found

    wait_for(lambda: accepted("first-token-of-all") == {0, 1})
    tokens.write_text("second-token-of-all\n")
    served.process.send_signal(signal.SIGHUP)
    wait_for(lambda: accepted("second-token-of-all") == {0, 1} and not accepted("first-token-of-all"))
    assert served.stop() == 0
