"""`penstock init`, `apply` and `materialize`, and the shop example against pandas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from penstock import cli, cli_features
from penstock.data_lock import DataDirLock

SHOP_FILES = [
    "feature_repo/data/prices.parquet",
    "feature_repo/data/transactions.parquet",
    "feature_repo/data/visits.parquet",
    "feature_repo/feature_store.yaml",
    "feature_repo/features.py",
]


@pytest.fixture
def run() -> Any:
    return lambda *args: CliRunner().invoke(cli.app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shop") / "new"
    cli_features.write_example("shop", path)
    return path


@pytest.fixture
def shop(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the example, with a data folder of its own, as working directory."""
    (made / "feature_repo" / "feature_store.yaml").write_text(
        f"project: shop\nfit_until: 2026-03-01T00:00:00Z\ndata_dir: {tmp_path / 'data'}\n"
    )
    monkeypatch.chdir(made)
    return made


def test_init_writes_the_shop(run: Any, tmp_path: Path) -> None:
    done = run("init", "--example", "shop", tmp_path / "a")
    assert done.exit_code == 0, done.output
    assert f"shop is in {tmp_path / 'a'}. Next:" in done.output
    assert "get_historical_features" in done.output
    assert sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*.*")) == SHOP_FILES
    (tmp_path / "b").mkdir()
    done = run("init", tmp_path / "b", "--json")
    assert json.loads(done.output) == {"example": "shop", "path": str(tmp_path / "b"), "files": SHOP_FILES}
    for name in SHOP_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_init_into_a_folder_that_holds_something(run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for path in (tmp_path, tmp_path / "mine.txt"):
        done = run("init", "--example", "shop", path)
        assert done.exit_code == 1
        assert f"DIR is '{path}', which holds something; expected a new folder" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_init_of_an_unknown_example(run: Any, tmp_path: Path) -> None:
    done = run("init", "--example", "shopp", tmp_path / "a")
    assert done.exit_code == 2
    assert "'shopp' is no example" in done.output
    assert not (tmp_path / "a").exists()


def test_init_that_fails_leaves_nothing(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import penstock.examples.shop.data as data

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "build", full)
    done = run("init", tmp_path / "a")
    assert done.exit_code == 1
    assert "No space left" in done.output
    assert list(tmp_path.iterdir()) == []


def test_the_specifications_call_on_the_shop(shop: Path) -> None:
    entity_df = pd.read_parquet("feature_repo/data/visits.parquet")

    from penstock import FeatureStore

    store = FeatureStore(repo_path="feature_repo/")
    training_df = store.get_historical_features(
        entity_df=entity_df,
        features=[
            "user_features:daily_transactions",
            "user_features:account_age_days",
            "item_features:price_percentile",
        ],
    ).to_df()
    store.close()

    bought = pd.read_parquet("feature_repo/data/transactions.parquet")
    prices = pd.read_parquet("feature_repo/data/prices.parquet").sort_values("event_timestamp")
    fitted = prices.price[prices.event_timestamp < pd.Timestamp("2026-03-01", tz="UTC")].to_numpy()
    counts, ages, ranks = [], [], []
    for row in entity_df.itertuples():
        t = row.event_timestamp
        mine = bought[(bought.user_id == row.user_id) & (bought.event_timestamp <= t)]
        live = len(mine) > 0 and mine.event_timestamp.max() >= t - pd.Timedelta(days=90)
        window = mine[mine.event_timestamp > t - pd.Timedelta(days=1)]
        counts.append(len(window) if live else None)
        age = t - mine.signup_time.iloc[0] if live else None
        ages.append(np.nan if age is None else age / pd.Timedelta(microseconds=1) / 86.4e9)
        price = prices[(prices.item_id == row.item_id) & (prices.event_timestamp <= t)].price.iloc[-1]
        ranks.append(((fitted < price).sum() + 0.5 * (fitted == price).sum()) / len(fitted))
    assert list(training_df.columns) == [
        "event_timestamp", "user_id", "item_id", "daily_transactions", "account_age_days", "price_percentile"
    ]  # fmt: skip
    pd.testing.assert_frame_equal(training_df[entity_df.columns], entity_df)
    assert training_df.daily_transactions.astype(object).where(lambda s: s.notna(), None).tolist() == counts
    np.testing.assert_array_equal(training_df.account_age_days.to_numpy(), np.array(ages))
    np.testing.assert_array_equal(training_df.price_percentile.to_numpy(), np.array(ranks))
    assert 0 < training_df.daily_transactions.isna().sum() < len(training_df)
    assert (training_df.daily_transactions > 1).any()


def test_apply_and_materialize(run: Any, shop: Path) -> None:
    planned = run("apply", "--dry-run")
    assert planned.output.splitlines() == [
        "   added  view item_features", "   added  view user_features", "   added  service purchase"
    ]  # fmt: skip
    assert run("apply").output == planned.output
    assert run("apply").output == "nothing has changed\n"
    assert not any(json.loads(run("apply", "--json").output).values())
    first = json.loads(run("materialize", "--end", "2026-03-01", "--json").output)
    assert first["end"] == "2026-03-01T00:00:00+00:00"
    assert first["rows"]["item_features"] == 200
    done = run("materialize", "--end", "2026-03-01", "--view", "item_features")
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == "materialised up to 2026-03-01T00:00:00+00:00"
    assert [line.split() for line in done.output.splitlines()[:-1]] == [["0", "rows", "of", "item_features"]]
    again = run("materialize", "--start", "2026-01-01", "--end", "2026-03-01T00:00:00Z", "--json")
    assert json.loads(again.output)["rows"] == first["rows"]


def test_the_repository_in_the_working_directory_or_named(
    run: Any, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shop / "feature_repo")
    assert run("apply", "--data-dir", tmp_path / "d1").exit_code == 0
    assert (tmp_path / "d1" / "registry").exists()
    monkeypatch.chdir(tmp_path)
    assert run("apply", "--repo", shop / "feature_repo", "--data-dir", "d2").exit_code == 0
    config = tmp_path / "inference-config.yaml"
    config.write_text(f"data_dir: d3\nfeature_store:\n  repo_path: {shop / 'feature_repo'}\n")
    assert run("apply").exit_code == 0
    assert (tmp_path / "d3" / "registry").exists()
    config.rename(tmp_path / "other.yaml")
    assert run("materialize", "--config", "other.yaml", "--end", "2026-02-01").exit_code == 0
    (tmp_path / "empty.yaml").write_text("{}")
    done = run("apply", "--config", "empty.yaml")
    assert (done.exit_code, "sets no feature_store.repo_path" in done.output) == (1, True)


def test_no_repository(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("apply", "materialize"):
        done = run(command)
        assert done.exit_code == 1
        assert "feature_store.yaml: no such file" in done.output


def test_a_time_that_is_none(run: Any, shop: Path) -> None:
    done = run("materialize", "--end", "tomorrow")
    assert done.exit_code == 1
    assert "--end is 'tomorrow'; expected a time" in done.output
    done = run("materialize", "--start", "2027-01-01", "--end", "2026-01-01")
    assert done.exit_code == 1
    assert "start is 2027-01-01T00:00:00+00:00, after end 2026-01-01T00:00:00+00:00" in done.output


class Peer:
    """Stands for the client of a server that holds the data folder."""

    calls: ClassVar[list[Any]] = []

    def __init__(self, listen: list[str], **credentials: Any) -> None:
        self.calls.append(listen)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None: ...

    def apply(self) -> Any:
        return {"views": {"v": "changed"}, "services": {}, "retired": ["m"]}

    def materialize(self, end: int, views: list[str] | None) -> Any:
        self.calls.append((end, views))
        return {"end_us": end, "rows": {"v": 3}}


def test_a_server_that_holds_the_data_folder_does_the_work(
    run: Any, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import penstock.serving.client as client

    monkeypatch.setattr(client, "Client", Peer)
    monkeypatch.setattr(Peer, "calls", [])
    lock = DataDirLock(tmp_path / "data")
    try:
        done = run("apply")
        assert (done.exit_code, "listens nowhere" in done.output) == (1, True)
        lock.announce(["tcp://127.0.0.1:9"])
        assert run("apply").output.splitlines() == [" changed  view v", " retired  m"]
        done = run("materialize", "--end", "1970-01-01T00:00:01Z", "--view", "v", "--json")
        assert json.loads(done.output)["rows"] == {"v": 3}
        assert Peer.calls[-2:] == [["tcp://127.0.0.1:9"], (1_000_000, ["v"])]
        done = run("materialize", "--start", "2026-01-01")
        assert done.exit_code == 1
        assert "--start: process" in done.output
    finally:
        lock.release()
    assert not (tmp_path / "data" / "registry").exists()


def test_progress_on_a_terminal(run: Any, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_features, "_on_terminal", lambda: True)
    done = run("materialize", "--end", "2026-02-01")
    assert done.exit_code == 0
    assert "user_features" in done.stderr
    assert "100%" in done.stderr
    assert run("apply").exit_code == 0
