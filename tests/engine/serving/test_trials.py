"""Versions on trial in an engine: who answers, what is recorded, what ends it, what a shadow leaves alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from penstock import Engine
from penstock.config import check_text
from penstock.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from penstock.models import save_bundle
from penstock.models.registry import ModelRegistry, Trial

NAMES = ["a", "b"]
KEYS = 400


def rows_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1, 2 and 3 of `m` on vectors of a and b; version 4 takes them the other way round."""
    from lightgbm import LGBMClassifier

    folder = tmp_path_factory.mktemp("bundles")
    table = pd.DataFrame(rows_of(300, 1), columns=NAMES)
    for trees, names in ((3, NAMES), (6, NAMES), (9, NAMES), (9, NAMES[::-1])):
        model = LGBMClassifier(n_estimators=trees, num_leaves=7, verbose=-1, n_jobs=1)
        model.fit(table[names], table["a"] > 0)
        save_bundle(model, table[names], name="m", directory=folder, inputs=names)
    return folder / "m"


@pytest.fixture(params=["off", "on"])
def opened(bundles: Path, tmp_path: Path, request: Any) -> Iterator[Callable[[], Engine]]:
    """Opens the engine, again when it was closed; champion 1, challenger 3."""
    config, faults = check_text(
        f"""
serving: {{max_latency_ms: 10000}}
monitoring: {{pane: 1d, window: 10d}}
caches: {{edge: {{mode: "{request.param}"}}}}
data_dir: {tmp_path}/data
"""
    )
    assert config is not None, faults
    registry = ModelRegistry(tmp_path / "data/models", tmp_path / "data/registry")
    for version in ("1", "2", "4", "3"):
        registry.add(bundles / version)
    made: list[Engine] = []

    def make() -> Engine:
        made.append(Engine(config))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def versions(engine: Engine, rows: np.ndarray) -> list[str]:
    return [engine.predict_vectors("m", row[None]).version for row in rows]


def trial_of(engine: Engine) -> dict[str, Any] | None:
    return engine.stats()["models"]["m"].get("trial")


def settled(engine: Engine) -> dict[str, Any]:
    """The counters of the version on trial once it has scored all that it was given."""
    limit = time.monotonic() + 60
    while True:
        found = trial_of(engine)
        assert found is not None and time.monotonic() < limit
        for counts in (found["requests"], found["rows"]):
            assert counts["submitted"] == sum(counts.values()) - counts["submitted"]
        if found["requests"]["in_flight"] == 0:
            return found
        time.sleep(0.002)


def test_a_canary_answers_its_share_of_the_keys_also_after_a_restart(opened: Callable[[], Engine]) -> None:
    rows = rows_of(KEYS)
    with opened() as engine:
        assert engine.canary("m", share=0.3) == {"model": "m", "version": "3", "mode": "canary", "share": 0.3}
        first = versions(engine, rows)
        assert 60 < first.count("3") < 180 and set(first) == {"1", "3"}
        assert versions(engine, rows) == first
        trial = trial_of(engine)
        assert trial is not None and trial["requests"]["ok"] == 2 * first.count("3")
        assert (trial["version"], trial["mode"], trial["share"]) == ("3", "canary", 0.3)
        described = engine.models()["m"]["trial"]
        assert (described["version"], described["mode"], described["share"]) == ("3", "canary", 0.3)
        assert "m/3" in engine.stats()["models_memory"]["versions"]
    with opened() as engine:
        assert versions(engine, rows) == first
        engine.canary("m", "3", share=0.6)  # who had it keeps it
        grown = versions(engine, rows)
        assert all(now == "3" for was, now in zip(first, grown) if was == "3") and grown != first
        assert engine.canary("m", share=0)["version"] is None
        assert set(versions(engine, rows[:50])) == {"1"} and trial_of(engine) is None
    with opened() as engine:
        assert set(versions(engine, rows[:50])) == {"1"} and "trial" not in engine.models()["m"]


@pytest.mark.parametrize("mode", ["canary", "shadow"])
def test_another_champion_ends_a_trial(opened: Callable[[], Engine], mode: str) -> None:
    with opened() as engine:
        start = getattr(engine, mode)
        start("m", "2", share=1)
        tried = engine.live.trials["m"].model
        engine.promote("m", "2")
        assert engine.live.get("m") is tried  # it was warm
        assert trial_of(engine) is None and engine.registry.trial("m") is None
        assert set(versions(engine, rows_of(20))) == {"2"}
        start("m", "3", share=1)
        engine.rollback("m")
        assert trial_of(engine) is None and engine.registry.trial("m") is None
        assert set(versions(engine, rows_of(20))) == {"1"}
        start("m", "3", share=1)
        engine.promote("m", "2")  # neither is the one on trial
        assert trial_of(engine) is None and set(versions(engine, rows_of(20))) == {"2"}
        start("m", "1", share=1)  # the version before, which was kept warm
        assert engine.rollback("m")["version"] == "1"
        assert set(versions(engine, rows_of(20))) == {"1"}
    with opened() as engine:
        assert trial_of(engine) is None


def test_a_shadow_scores_the_same_rows_unseen(opened: Callable[[], Engine], bundles: Path) -> None:
    rows = rows_of(KEYS, 5)
    labels = (rows[:, 0] > 0).astype(int)
    with opened() as engine:
        engine.shadow("m", "2", share=0.5)
        served = [engine.predict_vectors("m", row[None]) for row in rows]
        assert {made.version for made in served} == {"1"}
        ids = [int(made.request_ids[0]) for made in served]
        trial = settled(engine)
        n = trial["rows"]["ok"]
        assert 120 < n < 280 and trial["rows"]["submitted"] == n
        assert engine.stats()["models"]["m"]["rows"]["ok"] == KEYS
        log = engine.served_log.read("m").to_pandas()
        unseen = log[log["version"] == "2"]
        assert (unseen["status"] & 0x80).all() and not (log[log["version"] == "1"]["status"] & 0x80).any()
        index = {rid: i for i, rid in enumerate(ids)}
        at = [index[rid] for rid in unseen["rid"]]
        np.testing.assert_array_equal(unseen[NAMES].to_numpy(np.float32), rows[at])
        ensemble = engine.live.trials["m"].model.bundle.ensemble()
        np.testing.assert_array_equal(unseen["score"], ensemble.predict(rows[at])[:, 0])
        report = engine.drift("m")["m"]
        assert report["drift"]["n"] == KEYS and report["trial"]["drift"]["n"] == n
        assert report["trial"]["version"] == "2"
        counts = engine.label(ids, labels.tolist())
        assert counts["matched"] == KEYS and sum(counts.values()) == KEYS
        before = engine.stats()["models"]["m"]
        assert before["performance"]["n"] == before["performance"]["labelled"] == KEYS
        assert before["trial"]["performance"]["n"] == before["trial"]["performance"]["labelled"] == n
        assert before["trial"]["live_performance"] == before["performance"]
        assert before["trial"]["performance"]["logloss"] != before["performance"]["logloss"]
    with opened() as engine:  # the join finds both apart again
        after = engine.stats()["models"]["m"]
        assert after["performance"] == before["performance"]
        assert after["trial"]["performance"] == before["trial"]["performance"]
        engine.promote("m", "2")
        assert engine.stats()["models"]["m"]["performance"]["n"] == KEYS


def test_a_canary_counts_as_what_was_answered(opened: Callable[[], Engine]) -> None:
    rows = rows_of(100, 6)
    with opened() as engine:
        engine.canary("m", share=0.5)
        served = [engine.predict_vectors("m", row[None]) for row in rows]
        counts = engine.label([int(made.request_ids[0]) for made in served], [1] * 100)
        assert counts["matched"] == 100 and sum(counts.values()) == 100
        model = engine.stats()["models"]["m"]
        tried = [made.version for made in served].count("3")
        assert model["performance"]["n"] == 100
        assert model["trial"]["performance"]["labelled"] == tried
        assert model["trial"]["live_performance"]["labelled"] == 100 - tried


def test_a_hung_shadow_changes_no_answer(opened: Callable[[], Engine]) -> None:
    rows = rows_of(50, 7)
    with opened() as engine:
        want = [engine.predict_vectors("m", row[None]).scores[0] for row in rows]
        engine.shadow("m", share=1)
        held = engine.live.trials["m"].model.served
        held._hold(True)
        for _ in range(4):
            assert [engine.predict_vectors("m", row[None]).scores[0] for row in rows] == want
        found = trial_of(engine)
        assert found is not None and found["requests"]["submitted"] == 200
        assert found["requests"]["in_flight"] > 0 and found["requests"]["ok"] == 0
        held._hold(False)
        assert settled(engine)["requests"]["ok"] > 0


def test_a_trial_that_cannot_be_loaded_keeps_nobody_from_serving(
    opened: Callable[[], Engine], tmp_path: Path
) -> None:
    with opened() as engine:
        engine.shadow("m", "2", share=1)
    (tmp_path / "data/models/m/2/trees.bin").write_bytes(b"")
    with opened() as engine:
        assert set(versions(engine, rows_of(5))) == {"1"} and trial_of(engine) is None
        assert "trees.bin" in engine.models()["m"]["trial"]["fault"]
        engine.shadow("m", share=0)
        assert "trial" not in engine.models()["m"]


def test_what_is_wrong_is_refused_and_changes_nothing(opened: Callable[[], Engine]) -> None:
    with opened() as engine:
        engine.canary("m", "2", share=1)
        for share in (-0.1, 1.1, float("nan"), True, "1", None):
            with pytest.raises(InvalidArgumentError, match=r"share is .* expected"):
                engine.call("canary", ["m", share])
        for faulty, error, words in (
            (("m", "1"), FailedPreconditionError, "is live"),
            (("m", "9"), NotFoundError, "no version '9'"),
            (("n", "1"), NotFoundError, "'n' is unknown"),
            (("m", "4"), FailedPreconditionError, "same ones in order"),
        ):
            with pytest.raises(error, match=words):
                engine.shadow(*faulty, share=0.5)
        assert engine.registry.trial("m") == Trial("2", "canary", 1.0)
        assert set(versions(engine, rows_of(20))) == {"2"}
        engine.canary("m", "4", share=1)  # as a canary it may take other inputs
        assert set(versions(engine, rows_of(5))) == {"4"}
