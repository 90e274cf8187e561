"""kill -9 while the registry is written and while `apply` runs: nothing acknowledged is lost or half done."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from forked import Forked
from store_repo import DEFINITIONS, HOUR, assert_online_is_offline, make_repo, some_rows

from penstock.features.changes import declared
from penstock.features.registry import Registry
from penstock.features.repo import load_repo
from penstock.features.store import FeatureStore

WRITER = """
from pathlib import Path
from penstock.features.program import Distribution
from penstock.features.registry import Registry
def child(path, n):
    registry = Registry(Path(path))
    say(0)
    while True:
        n += 1
        schema = {"s": {"c" * n: "int64"}}
        registry.record_applied({"views": {"v": str(n)}, "services": {}, "sources": schema})
        registry.extend_dictionaries("s", {"c": [str(i) for i in range(n)]})
        fitted = Distribution(tuple(map(float, range(n))), tuple(range(1, n + 1)))
        registry.record_fits({"k": fitted}, None, refit=True)
        say(n)
"""
APPLIER = """
from pathlib import Path
from penstock import FeatureStore
import penstock.features.compute, pyarrow.parquet
def child(path, *texts):
    repo = Path(path)
    say("-")
    for i in range(10**6):
        (repo / "features.py").write_text(texts[i % 2])
        with FeatureStore(repo) as store:
            store.apply()
            store.materialize_incremental(5 * 3_600_000_000)
        say(i % 2)
"""
OTHER = DEFINITIONS.replace('window="90m"', 'window="2h"').replace('"model"', '"model2"')


def kill_registry(path: Path, times: int) -> None:
    rng, n, acknowledged = random.Random(5), 0, 0
    with Forked(WRITER) as writer:
        for _ in range(times):
            lines = writer.killed(str(path), n, lines=rng.randint(1, 4), seconds=rng.uniform(0, 0.05))
            acknowledged = max(acknowledged, int(lines[-1]))
            registry = Registry(path)
            state = registry.state
            found = [
                int(state.recorded("views").get("v", 0)),
                len(state.dictionaries.get("s", {}).get("c", [])),
            ]
            fitted = registry.distribution("k")
            found.append(0 if fitted is None else len(fitted.values))
            assert found == sorted(found, reverse=True), "written in another order than told"
            assert acknowledged <= found[-1]
            assert found[0] <= max(n, acknowledged) + 1
            if found[0]:
                assert state.recorded("sources") == {"s": {"c" * found[0]: "int64"}}
            n = found[0]
    assert acknowledged > 0
    registry.record_applied({"views": {}})
    kept = ("0", "distribution-", "LOCK")
    assert all(p.name.startswith(kept) for p in path.iterdir())


def kill_apply(path: Path, times: int) -> None:
    repo = make_repo(path, some_rows())
    texts = (DEFINITIONS, OTHER)
    whole = []
    for text in texts:
        (repo / "features.py").write_text(text)
        loaded = load_repo(repo)
        whole.append(declared(loaded.views, loaded.services, loaded.fit_until_us))
    rng, seen = random.Random(6), set()
    with Forked(APPLIER) as applier:
        for _ in range(times):
            lines = applier.killed(str(repo), *texts, lines=rng.randint(1, 3), seconds=rng.uniform(0, 0.4))
            with FeatureStore(repo) as store:
                applied = store._registry.state.applied
                if applied is None:
                    assert lines == ["-"]
                    continue
                kinds = ("views", "services", "view_parts", "service_features")
                found = {kind: applied[kind] for kind in kinds}
                assert found in whole, "half of one, half of the other"
                at = whole.index(found)
                seen.add(at)
                if lines[-1] != "-":  # acknowledged, or the one after it
                    assert at in (int(lines[-1]), 1 - int(lines[-1]))
            (repo / "features.py").write_text(texts[at])
            with FeatureStore(repo) as store:
                assert not store.plan()
                assert_online_is_offline(store, 5 * HOUR, [1, 2, 3], ["a", "b", "a"])
    assert seen


def test_a_killed_writer_leaves_the_registry_whole(tmp_path: Path) -> None:
    kill_registry(tmp_path / "registry", 6)


def test_a_killed_apply_leaves_one_set_of_definitions_or_the_other(tmp_path: Path) -> None:
    kill_apply(tmp_path / "repo", 3)


@pytest.mark.long
def test_200_killed_writers(tmp_path: Path) -> None:
    kill_registry(tmp_path / "registry", 200)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_200_killed_applies(tmp_path: Path) -> None:
    kill_apply(tmp_path / "repo", 200)
