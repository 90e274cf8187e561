"""Versions on trial: which requests a canary answers, and that a key stays with its version."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingRegressor

from penstock import _core
from penstock.models import trees

F = 2
KEYS = 4000


def make_image(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, F)).astype(np.float32)
    model = GradientBoostingRegressor(n_estimators=5, max_leaf_nodes=7, random_state=1)
    return trees.from_sklearn(model.fit(x, x[:, 0] + x[:, 1] ** 2 + seed))


@pytest.fixture(scope="module")
def image() -> bytes:
    return make_image(1)


@pytest.fixture
def core(image: bytes) -> Iterator[Any]:
    core = _core.ServingCore()
    core.publish(core.load("m", "1", image, max_latency_ms=60_000))
    yield core
    core.close()


def vectors(row: np.ndarray) -> bytes:
    return msgpack.packb(["m", row.astype("<f4").tobytes(), 1])


def some_rows(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(KEYS, F)).astype(np.float32)


def versions(core: Any, rows: np.ndarray) -> list[str]:
    return [core.call(True, vectors(row))[1] for row in rows]


@pytest.mark.parametrize("share", [0.01, 0.25, 0.9])
def test_a_canary_answers_its_share_of_the_keys_and_keeps_them(core: Any, image: bytes, share: float) -> None:
    canary = core.load("m", "2", image, max_latency_ms=60_000)
    core.put_on_trial("m", canary, share=share)
    rows = some_rows()
    first = versions(core, rows)
    taken = first.count("2")
    deviation = np.sqrt(KEYS * share * (1 - share))
    assert abs(taken - share * KEYS) < 5 * deviation
    assert versions(core, rows) == first
    assert canary.stats()["requests"]["ok"] == 2 * taken
    core.put_on_trial("m", canary, share=min(1.0, 2 * share))  # who had it before keeps it
    grown = versions(core, rows)
    assert all(now == "2" for was, now in zip(first, grown) if was == "2")
    core.put_on_trial("m", None)
    assert set(versions(core, rows[:50])) == {"1"}


def test_another_trial_draws_other_keys(core: Any, image: bytes) -> None:
    rows = some_rows()
    taken = []
    for version in ("2", "3"):
        core.put_on_trial("m", core.load("m", version, image, max_latency_ms=60_000), share=0.5)
        taken.append(np.array([v != "1" for v in versions(core, rows)]))
    assert 0.4 < np.mean(taken[0] == taken[1]) < 0.6


def test_none_and_all(core: Any, image: bytes) -> None:
    canary = core.load("m", "2", image)
    core.put_on_trial("m", canary, share=0)
    assert set(versions(core, some_rows()[:100])) == {"1"}
    core.put_on_trial("m", canary, share=1)
    assert set(versions(core, some_rows()[:100])) == {"2"}


def test_a_key_is_what_its_values_mean(core: Any, image: bytes) -> None:
    """Neither the order of the columns nor the encoding of an integer moves a key to the other version."""
    canary = core.load("m", "2", image)
    core.put_on_trial("m", canary, share=0.5)
    # Without a plan the version that was chosen refuses the call, and counts it.
    chosen = []
    for user in range(200):
        turns = []
        wide = b"\xd3" + struct.pack(">q", user)  # an int64 where one byte would do
        for entities in (
            msgpack.packb({"user": user, "shop": "a"}),
            msgpack.packb({"shop": "a", "user": user}),
            b"\x82" + msgpack.packb("user") + wide + msgpack.packb("shop") + msgpack.packb("a"),
            msgpack.packb({"user": [user, 5], "shop": ["a", "b"]}),
        ):
            before = canary.stats()["requests"]["submitted"]
            assert core.call(False, b"\x92" + msgpack.packb("m") + entities)[0] == "FAILED_PRECONDITION"
            turns.append(canary.stats()["requests"]["submitted"] - before)
        assert len(set(turns)) == 1, user
        chosen.append(turns[0])
    assert 60 < sum(chosen) < 140


def test_one_read_may_ask_both_versions(core: Any) -> None:
    canary = core.load("m", "2", make_image(2), max_latency_ms=60_000)
    core.put_on_trial("m", canary, share=0.5)
    rows = some_rows(3)[:64]
    connection = core.connection(1 << 20, 16, 256, 1 << 20)
    data = b"".join(
        msgpack.packb([0, i, "predict_vectors", msgpack.unpackb(vectors(row))]) for i, row in enumerate(rows)
    )
    room = connection.get_buffer(len(data))
    assert len(room) >= len(data)
    room[: len(data)] = data
    connection.received(len(data))
    unpacker = msgpack.Unpacker()
    unpacker.feed(connection.take_output())
    answers = {reply[1]: reply[3] for reply in unpacker}
    assert len(answers) == 64
    expected = {
        version: _core.TreeEnsemble(make_image(int(version))).predict(rows)[:, 0].astype(np.float32)
        for version in ("1", "2")
    }
    for i, answer in answers.items():
        assert np.frombuffer(answer["scores"], np.float32)[0] == expected[answer["version"]][i]
    assert {answer["version"] for answer in answers.values()} == {"1", "2"}


def test_what_is_wrong_is_refused_and_changes_nothing(core: Any, image: bytes) -> None:
    canary = core.load("m", "2", image)
    core.put_on_trial("m", canary, share=1)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share"):
            core.put_on_trial("m", canary, share=share)
    with pytest.raises(ValueError, match="'other' is unknown"):
        core.put_on_trial("other", canary, share=1)
    assert set(versions(core, some_rows()[:20])) == {"2"}
