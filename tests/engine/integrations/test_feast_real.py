"""The real Feast beside Penstock: what one writes the other reads, and the joins of both.

Feast runs in an environment of its own, because it needs an older pandas than Penstock's tests may have. The
tests name where Feast differs from its own SQL engines' rules, which are Penstock's; DuckDB's or BigQuery's
engines are not run here.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast_repo import FEATURES, HOUR, T, entity_table, write_feast_repo
from feast_twin import FEATURES as SHOP_FEATURES
from feast_twin import visits, write_shop, write_twin
from native_builds import alone

from penstock.integrations.feast import FeastRepository
from penstock.integrations.feast_registry import read_definitions

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
PACKAGE = "feast[redis]==0.67.0"
KEYS = ((1, "ä"), (1, "b"), (2, "ä"), (3, "b"), (4, "ä"), (5, "b"), (-6, "?"), (99, "ä"), (12, "3"))
ROWS = [{"driver_id": driver, "customer_id": customer} for driver, customer in KEYS]
Peer = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def feast_python() -> Path:
    """An interpreter that has Feast; made once in build/, with packages from the index."""
    home = ROOT / "build" / "peers" / "feast"
    python = home / "bin" / "python"
    home.parent.mkdir(parents=True, exist_ok=True)
    with alone(home.with_name("feast.lock")):
        if (home / ".ready").exists():
            return python
        shutil.rmtree(home, ignore_errors=True)
        made = [[sys.executable, "-m", "venv", str(home)]]
        made.append([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE])
        for command in made:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{PACKAGE} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        (home / ".ready").touch()
    return python


@pytest.fixture(scope="session")
def peer(feast_python: Path) -> Peer:
    """Ask the real Feast: requests in, answers out."""

    def run(*requests: dict[str, Any]) -> list[Any]:
        text = json.dumps([{**request, "repo": str(request["repo"])} for request in requests])
        script = str(HERE / "feast_peer.py")
        done = subprocess.run([str(feast_python), script], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        found: list[Any] = json.loads(done.stdout)
        return found

    return run


def online(repo: Path, **more: Any) -> dict[str, Any]:
    return {"op": "online", "repo": repo, "features": FEATURES, "rows": ROWS, "full": True, **more}


def same(ours: Any, theirs: Any) -> bool:
    """Equal as values; Feast's answers have been through JSON and know no null but NaN in some columns."""
    if ours is None or theirs is None:
        return ours is theirs or any(isinstance(v, float) and math.isnan(v) for v in (ours, theirs))
    if isinstance(ours, float) and math.isnan(ours):
        return isinstance(theirs, float) and math.isnan(theirs)
    if isinstance(ours, int) and isinstance(
        theirs, float
    ):  # Feast's frames hold integers beside nulls as floats
        return float(ours) == theirs
    return bool(ours == theirs) if not hasattr(ours, "isoformat") else str(ours) == str(theirs)


@pytest.fixture(scope="session", params=["redis", "sqlite"])
def materialised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, peer: Peer
) -> tuple[Path, dict[str, Any]]:
    """A repository that Feast has applied and materialised, and Feast's own online answer."""
    store = "{type: sqlite, path: data/online.db}"
    if request.param == "redis":
        port = request.getfixturevalue("redis_port")
        store = f'{{type: redis, connection_string: "127.0.0.1:{port},db=2"}}'
    repo = write_feast_repo(tmp_path_factory.mktemp(request.param) / "repo", store)
    start, end = (T - 100 * HOUR).isoformat(), (T + 2 * HOUR).isoformat()
    answers = peer(
        {"op": "apply", "repo": repo},
        {"op": "materialize", "repo": repo, "start": start, "end": end},
        online(repo),
    )
    return repo, answers[-1]


def test_penstock_reads_what_feast_wrote(materialised: tuple[Path, dict[str, Any]]) -> None:
    repo_path, theirs = materialised
    with FeastRepository.open(repo_path) as repo:
        got = repo.get_online_features(
            FEATURES, ROWS, origin="feast", now=T + 2 * HOUR, full_feature_names=True
        )
        columns, statuses = got.to_dict(), got.statuses()
        for name in statuses:
            for i, (ours, status) in enumerate(zip(columns[name], statuses[name])):
                if status == 3:
                    # Driver 3's row is past its ttl: Feast serves it all the same.
                    assert KEYS[i][0] in (3, 4) and name.startswith("driver_stats__")
                    continue
                assert same(ours, theirs["values"][name][i]), (name, KEYS[i])
        expired = {KEYS[i][0] for i, s in enumerate(statuses["driver_stats__trips"]) if s == 3}
        assert expired == {3, 4}
        # Never written: Feast on Redis says PRESENT with nulls, on SQLite NOT_FOUND also for nulls.
        at = KEYS.index((99, "ä"))
        assert statuses["driver_stats__trips"][at] == 2
        redis = "redis" in str(repo.definitions.config.online_store["type"])
        assert theirs["statuses"]["driver_stats__trips"][at] == (1 if redis else 3)


def test_feast_reads_what_penstock_wrote(
    materialised: tuple[Path, dict[str, Any]], tmp_path: Path, peer: Peer, request: pytest.FixtureRequest
) -> None:
    source, _ = materialised
    repo_path = tmp_path / "repo"
    shutil.copytree(source, repo_path)
    (repo_path / "data" / "online.db").unlink(missing_ok=True)
    if "redis" in (repo_path / "feature_store.yaml").read_text():
        import redis

        with redis.Redis(port=request.getfixturevalue("redis_port"), db=2) as client:
            client.flushdb()
    with FeastRepository.open(repo_path) as repo:
        written = repo.write_online(T)
        assert written == {"driver_stats": 4, "trips_between": 4, "market": 1}
        ours = repo.get_online_features(FEATURES, ROWS, now=T, full_feature_names=True)
    [theirs] = peer(online(repo_path))
    for name, column in ours.to_dict().items():
        for i, value in enumerate(column):
            assert same(value, theirs["values"][name][i]), (name, KEYS[i])
    assert theirs["values"]["driver_stats__trips"][0] == 2**53 + 1  # which Feast's own materialise rounds


def test_definitions_from_the_files_are_those_of_the_registry(
    materialised: tuple[Path, dict[str, Any]], feast_python: Path, tmp_path: Path
) -> None:
    repo_path, _ = materialised
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from penstock.integrations.feast_registry import read_definitions\n"
        "found = read_definitions(Path(sys.argv[2]), Path(sys.argv[3]), 'files')\n"
        "print({n: v.fingerprint() for n, v in sorted(found.repo.views.items())})\n"
        "print({n: (s.refs, sorted(s.aliases)) for n, s in sorted(found.services.items())})\n"
        "print(sorted(found.on_demand), dict(found.refused))\n"
        "print(sorted(name for name in sys.modules if 'definitions' == name))\n"
    )
    command = [str(feast_python), "-c", code, str(ROOT / "engine"), str(repo_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = read_definitions(repo_path, tmp_path, "registry")
    assert done.stdout.splitlines() == [
        str({n: v.fingerprint() for n, v in sorted(found.repo.views.items())}),
        str({n: (s.refs, sorted(s.aliases)) for n, s in sorted(found.services.items())}),
        f"{sorted(found.on_demand)} {dict(found.refused)}",
        "[]",  # nothing of the repository stays loaded
    ]


def test_the_historical_joins_agree_where_feast_keeps_the_row(
    materialised: tuple[Path, dict[str, Any]], tmp_path: Path, peer: Peer
) -> None:
    repo_path, _ = materialised
    entities = entity_table()
    entities = entities.filter(
        entities["driver_id"].is_valid()
    )  # Feast's engine casts keys, and fails on null
    entities = entities.append_column("bonus", pa.array([1.0] * entities.num_rows))
    pq.write_table(entities, tmp_path / "entities.parquet")
    asked = [*FEATURES, "adjusted:with_bonus", "twice:doubled"]
    out = tmp_path / "out.parquet"
    peer({"op": "historical", "repo": repo_path, "features": asked, "full": True, "out": str(out),
          "entities": str(tmp_path / "entities.parquet")})  # fmt: skip
    theirs = {row["label"]: row for row in pq.read_table(out).to_pylist()}
    with FeastRepository.open(repo_path) as repo:
        ours = repo.get_historical_features(entities, asked, True, with_status=True).to_arrow()
    statuses = [name for name in ours.column_names if name.endswith("__status")]
    lost = set()
    for row in ours.to_pylist():
        if row["label"] not in theirs:
            lost.add(row["label"])
            # Feast's default engine drops a row whose key is known but has no row in time.
            assert {"EXPIRED", "FUTURE"} & {row[name] for name in statuses}, row
            continue
        for name, value in row.items():
            if name in statuses or name == "event_timestamp":
                continue
            assert same(value, theirs[row["label"]][name]), (row["label"], name)
    assert lost == {3, 5, 8, 9}


def test_the_shops_twin(tmp_path: Path, peer: Peer) -> None:
    """The specification's call on the twin of the shop: opened by Feast and by Penstock."""
    shop = write_shop(tmp_path / "shop")
    twin = write_twin(tmp_path / "twin", shop)
    peer({"op": "apply", "repo": twin})
    names = [feature.split(":")[1] for feature in SHOP_FEATURES]
    states = [f"{name}__status" for name in names]
    with FeastRepository.open(twin) as repo:
        first = repo.get_historical_features(visits(shop), SHOP_FEATURES, with_status=True).to_df()
        whole = first[(first[states] == "PRESENT").all(axis=1)].sort_values("event_timestamp")
    entities = visits(shop, at_once=int(whole["row"].iloc[-1]))
    pq.write_table(entities, tmp_path / "entities.parquet")
    out = tmp_path / "out.parquet"
    peer(
        {"op": "historical", "repo": twin, "features": SHOP_FEATURES, "full": False, "out": str(out),
         "entities": str(tmp_path / "entities.parquet")},
    )  # fmt: skip
    theirs = pd.read_parquet(out).set_index("row")
    with FeastRepository.open(twin) as repo:
        job = repo.get_historical_features(entities, SHOP_FEATURES, with_status=True)
        ours = job.to_df().set_index("row")
        assert len(ours) == entities.num_rows
    assert theirs.index.is_unique
    kept = ours.loc[theirs.index]
    for name in names:
        expected = theirs[name].astype("float64")
        pd.testing.assert_series_equal(kept[name].astype("float64"), expected, check_exact=True)
    # What Feast loses: rows of a known key whose events are expired or in the future, and all but one of the
    # rows of one user at one time.
    missing = ours.drop(index=theirs.index)
    dropped = missing[states].isin(["EXPIRED", "FUTURE"]).any(axis=1)
    basket = missing[~dropped]
    assert dropped.sum() > 100
    twice = ours.groupby(["user_id", "event_timestamp"]).size()
    assert (twice > 1).sum() == 1 and twice.max() == 4
    assert len(basket) == 3 and basket["event_timestamp"].nunique() == 1
    assert basket["user_id"].nunique() == 1
    present = ours[~ours[states].isin(["EXPIRED", "FUTURE"]).any(axis=1)]
    assert set(theirs.index) | set(basket.index) == set(present.index)
    assert timedelta(days=2) == repo.store.views["user_features"].ttl
