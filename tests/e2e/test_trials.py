"""Trials over sockets and the command line: durable, in every worker, ended by a promotion."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

N = 120


def versions(served: Any, shop: Any) -> list[str]:
    with served.client() as client:
        return [
            client.predict("buy", shop.entities(slice(i, i + 1)), shop.inputs(slice(i, i + 1))).version
            for i in range(N)
        ]


def test_a_trial_outlives_a_kill_and_ends_with_a_promotion(shop, serve, penstock, tmp_path):
    config = shop.registry(tmp_path)
    served = serve(config)
    done = penstock("models", "canary", "buy", "2", "--share", "0.4", "--config", config)
    assert done.stdout == "canary of buy is 2, share 0.4\n", done.stderr
    served.kill()
    served = serve(config)
    first = versions(served, shop)
    assert 15 < first.count("2") < 85
    assert versions(served, shop) == first
    listed = json.loads(penstock("models", "list", "--json", "--config", config).stdout)["models"]
    assert [info["trial"] for info in listed if info["name"] == "buy"] == [
        None,
        {"version": "2", "mode": "canary", "share": 0.4},
    ]
    assert "challenger,canary 0.4" in penstock("models", "list", "--config", config).stdout
    with served.client() as client:
        assert client.canary("buy", 0)["version"] is None
        assert set(versions(served, shop)) == {"1"}
        client.shadow("buy", 1.0, 2)
        trial = client.stats()["models"]["buy"]["trial"]
        assert (trial["version"], trial["mode"], trial["share"]) == ("2", "shadow", 1.0)
        rows = client.predict("buy", shop.entities(), shop.inputs(), now=int(shop.columns["now_us"].max()))
        assert rows.version == "1"
        limit = time.monotonic() + 60
        while (trial := client.stats()["models"]["buy"]["trial"])["rows"]["ok"] < len(shop.rows):
            assert time.monotonic() < limit
        assert trial["rows"]["submitted"] == len(shop.rows)
        assert client.drift("buy")["buy"]["trial"]["drift"]["n"] == len(shop.rows)
        client.promote("buy", 2)
        assert "trial" not in client.stats()["models"]["buy"]
    served.kill()
    served = serve(config)
    assert set(versions(served, shop)) == {"2"}
    assert "trial" not in served.raw().call("stats")["models"]["buy"]
    assert served.stop() == 0
    done = penstock("models", "shadow", "buy", "1", "--share", "0.5", "--config", config)  # nobody serves
    assert done.stdout == "shadow of buy is 1, share 0.5\n", done.stderr
    served = serve(config)
    assert served.raw().call("models")["buy"]["trial"]["mode"] == "shadow"


@pytest.mark.parametrize("mode", ["canary", "shadow"])
def test_all_workers_take_part(shop, serve, tmp_path, mode):
    shop.registry(tmp_path)
    served = serve(shop.config(tmp_path, models=None, server={"workers": 2}))
    at: dict[int, Any] = {}
    limit = time.monotonic() + 60
    while len(at) < 2:
        assert time.monotonic() < limit
        caller = served.raw()
        at.setdefault(caller.call("health")["worker"], caller)
    made = at[1].call(mode, "buy", 0.5, "2")
    assert made["workers"]["late"] == [] and made["workers"]["changed"] == [0, 1]
    asked = [(shop.entities(slice(i, i + 1)), shop.inputs(slice(i, i + 1))) for i in range(N)]
    answers = {
        w: [caller.call("predict", "buy", *each)["version"] for each in asked] for w, caller in at.items()
    }
    assert answers[0] == answers[1]  # a key has one version, whoever is asked
    assert set(answers[0]) == ({"1", "2"} if mode == "canary" else {"1"})
    while (trial := at[0].call("stats")["models"]["buy"]["trial"])["requests"]["in_flight"]:
        assert time.monotonic() < limit
    assert trial["share"] == 0.5
    taken = trial["rows"]["ok"]
    assert taken == 2 * answers[0].count("2") if mode == "canary" else 30 < taken < 210
    limit = time.monotonic() + 60
    while at[0].call("drift", "buy")["buy"]["trial"]["drift"]["n"] < taken:
        assert time.monotonic() < limit
    assert np.isfinite(at[0].call("stats")["models"]["buy"]["trial"]["performance"]["n"])
    at[0].call("promote", "buy", "2")
    for caller in at.values():
        assert {caller.call("predict", "buy", *each)["version"] for each in asked} == {"2"}
    assert "trial" not in at[0].call("stats")["models"]["buy"]
