"""kill -9 while the registry is written and while `apply` runs: nothing acknowledged is lost or half done."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_repo import DEFINITIONS, HOUR, assert_online_is_offline, make_repo, some_rows

from penstock.features.changes import declared
from penstock.features.registry import Registry
from penstock.features.repo import load_repo
from penstock.features.store import FeatureStore

WRITER = """
import sys
from pathlib import Path
from penstock.features.program import Distribution
from penstock.features.registry import Registry
registry, n = Registry(Path(sys.argv[1])), int(sys.argv[2])
print(0, flush=True)
while True:
    n += 1
    registry.record_applied({"views": {"v": str(n)}, "services": {}, "sources": {"s": {"c" * n: "int64"}}})
    registry.extend_dictionaries("s", {"c": [str(i) for i in range(n)]})
    fitted = Distribution(tuple(map(float, range(n))), tuple(range(1, n + 1)))
    registry.record_fits({"k": fitted}, None, refit=True)
    print(n, flush=True)
"""
APPLIER = """
import sys
from pathlib import Path
from penstock import FeatureStore
repo, texts = Path(sys.argv[1]), sys.argv[2:]
print("-", flush=True)
for i in range(10**6):
    (repo / "features.py").write_text(texts[i % 2])
    with FeatureStore(repo) as store:
        store.apply()
        store.materialize_incremental(5 * 3_600_000_000)
    print(i % 2, flush=True)
"""
OTHER = DEFINITIONS.replace('window="90m"', 'window="2h"').replace('"model"', '"model2"')


def killed(script: str, *arguments: str, lines: int, seconds: float) -> list[str]:
    """The lines that a program wrote until it was killed, some time after so many of them."""
    child = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    found = [child.stdout.readline() for _ in range(lines)]
    assert found[-1], "it ended by itself"
    time.sleep(seconds)  # not to wait for something: to hit it anywhere
    child.send_signal(signal.SIGKILL)
    found += child.stdout
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    return [line.strip() for line in found if line.endswith("\n")]


def kill_registry(path: Path, times: int) -> None:
    rng, n, acknowledged = random.Random(5), 0, 0
    for _ in range(times):
        lines = killed(WRITER, str(path), str(n), lines=rng.randint(1, 4), seconds=rng.uniform(0, 0.05))
        acknowledged = max(acknowledged, int(lines[-1]))
        registry = Registry(path)
        state = registry.state
        found = [int(state.recorded("views").get("v", 0)), len(state.dictionaries.get("s", {}).get("c", []))]
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
    rng = random.Random(6)
    seen = set()
    for _ in range(times):
        lines = killed(APPLIER, str(repo), *texts, lines=rng.randint(1, 3), seconds=rng.uniform(0, 0.4))
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
