"""Texts that come after a model was trained: it stays right, and is refused only where a code changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from lightgbm import LGBMClassifier
from push_repo import HOUR, columns
from typer.testing import CliRunner

from penstock import Engine, FeatureStore, cli
from penstock.config import load_config
from penstock.errors import BundleError, FailedPreconditionError
from penstock.features import skew
from penstock.features.changes import BundleFacts
from penstock.models.bundle import ModelBundle, load_bundle, save_bundle
from penstock.models.rows import model_rows
from penstock.monitoring.vector_log import VectorSample, read_samples

SCHEMA = {"at": "timestamp", "user_id": "int64", "x": "float64", "city": "string", "tier": "string"}
DEFINITIONS = f"""
from penstock import Entity, FeatureService, FeatureView, PushSource, col, count, last, now, udf

@udf(returns="float64")
def as_number(code):
    return code + 0.5

user = Entity("user", join_keys=["user_id"])
events = PushSource("events", {SCHEMA!r}, timestamp="at")
users = FeatureView("users", entities=[user], source=events, features={{
    "n": count(window="1h"),
    "city": col("city").code() + now().minute() * 0,
    "tier": col("tier").code(),
    "latest": last(col("tier").code(), window="6h"),
    "number": as_number(col("tier").code()),
    "plain": col("x"),
}})
model = FeatureService("model", features=["users:n", "users:city", "users:tier", "users:latest",
                                          "users:number"])
plain = FeatureService("plain", features=["users:n", "users:plain"])
"""
NOW = 5 * HOUR
FIRST = [(HOUR + i, i, float(i), ["Rome", "Oslo"][i % 2], ["gold", "tin", "iron"][i % 3]) for i in range(12)]


def make_repo(path: Path) -> Path:
    path.mkdir()
    (path / "feature_store.yaml").write_text("project: test\n")
    (path / "features.py").write_text(DEFINITIONS)
    return path


def push(store: Any, rows: list[Any]) -> None:
    store.push("events", columns(rows, SCHEMA))


def joined(store: FeatureStore, users: list[int], service: str = "model") -> np.ndarray:
    """The model rows float32[n, F] of the historical join."""
    table = pa.table(
        {"user_id": users, "event_timestamp": pa.array([NOW] * len(users), pa.timestamp("us", "UTC"))}
    )
    found = store.get_historical_features(table, service).to_arrow()
    return model_rows(found, list(store.service_plan(service).output_names))


def train(store: FeatureStore, directory: Path, version: str, service: str = "model") -> ModelBundle:
    plan = store.service_plan(service)
    users = list(range(12)) * 20
    rows = joined(store, users, service)
    label = np.array(users) % 2
    names = list(plan.output_names)
    model = LGBMClassifier(n_estimators=3, random_state=1, verbose=-1).fit(rows, label)
    frame = pa.table({name: rows[:, f].astype(np.float64) for f, name in enumerate(names)})
    return save_bundle(
        model, frame.append_column("label", pa.array(label)), name="buy", version=version,
        directory=directory, label="label", plan=plan,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with pushed events in `data`, and a model of them."""
    home = tmp_path_factory.mktemp("trained")
    with FeatureStore(make_repo(home / "repo"), data_dir=home / "data") as store:
        push(store, FIRST)
        assert train(store, home / "bundles", "1").text_counts == {
            ("events", "city"): 2,
            ("events", "tier"): 3,
        }
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that as the working directory, with a configuration."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    config = {
        "serving": {"max_latency_ms": 2000, "allow_replay": True},
        "feature_store": {"repo_path": "repo"},
        "models": {"buy": {"path": "bundles/buy/1"}},
        "monitoring": {"skew": {"share": 1.0}},
        "data_dir": "data",
    }
    Path("inference-config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "home"


NEW = [(2 * HOUR, 3, 1.0, "Pisa", "lead"), (2 * HOUR, 40, 1.0, "Rome", "lead")]
ASK = {"user_id": [0, 1, 3, 40]}


def served(engine: Engine) -> Any:
    return engine.predict("buy", ASK, now=NOW).scores.tolist()


def test_a_model_is_served_after_new_texts_and_a_restart(home: Path) -> None:
    config = load_config(Path("inference-config.yaml"))
    bundle = load_bundle("bundles/buy/1")
    with Engine(config) as engine:
        before = served(engine)
        push(engine, NEW)
        after = served(engine)
        engine.apply()  # retires the models whose features have changed
        assert served(engine) == after
    assert before[:2] == after[:2]
    with Engine(config) as engine:
        assert engine.models()["buy"]["version"] == "1"
        assert served(engine) == after
        rows = engine.store.get_online_features("model", ASK, now=NOW).to_numpy()
        assert rows[2].tolist() == [0, 2, 3, 3, 3.5]  # the codes behind those that the model knows
        offline = joined(engine.store, ASK["user_id"])
        assert rows.view(np.uint32).tolist() == offline.view(np.uint32).tolist()
        direct = bundle.ensemble().predict(np.ascontiguousarray(offline))
        assert after == np.asarray(direct).ravel().tolist()
    with FeatureStore("repo", data_dir="data") as store:
        (report,) = skew.verify(store, read_samples(Path("data/log")))
        assert (report.other_definitions, report.mismatches) == (0, 0)
        assert report.vectors > len(ASK["user_id"])


def test_the_cli_says_that_it_fits(home: Path) -> None:
    def run(*args: str) -> Any:
        return json.loads(CliRunner().invoke(cli.app, [*args, "--json"]).output)

    with FeatureStore("repo", data_dir="data") as store:
        store.apply()
        push(store, NEW)
    assert run("apply", "--plan")["breaks"] == []
    assert run("apply")["breaks"] == []
    notes = [node["note"] for node in run("features", "lineage")["nodes"] if node["kind"] == "bundle"]
    assert notes == ["fits"]


def facts(bundle: ModelBundle) -> BundleFacts:
    return BundleFacts("buy", "1", bundle.service, bundle.fingerprint, "", bundle.text_counts)


def test_codes_that_are_others_are_refused(home: Path) -> None:
    bundle = load_bundle("bundles/buy/1")
    config = load_config(Path("inference-config.yaml"))
    shutil.rmtree("data")
    with FeatureStore("repo", data_dir="data") as store:
        push(store, FIRST[:2])  # a dictionary that is shorter
        plan = store.service_plan("model")
        assert not plan.fits(bundle.fingerprint, bundle.text_counts)
        assert plan.text_counts == {("events", "city"): 2, ("events", "tier"): 2}
        push(store, [NEW[0]])  # and one that goes on otherwise
        assert store.service_plan("model").text_counts == {("events", "city"): 3, ("events", "tier"): 3}
        assert not store.service_plan("model").fits(bundle.fingerprint, bundle.text_counts)
        push(store, FIRST[2:])
        assert not store.service_plan("model").fits(bundle.fingerprint, bundle.text_counts)
        (found,) = store.plan([facts(bundle)]).breaks
        assert found.name == "buy/1" and "train it again" in found.reason
    with pytest.raises(BundleError, match="trained on other definitions"):
        Engine(config)


def test_a_bundle_that_does_not_say_what_it_knew_fits_until_a_text_comes(home: Path) -> None:
    file = Path("bundles/buy/1/model.yaml")
    plain = yaml.safe_load(file.read_text())
    assert plain.pop("dictionaries")
    file.write_text(yaml.safe_dump(plain, sort_keys=False))
    config = load_config(Path("inference-config.yaml"))
    with Engine(config) as engine:
        served(engine)
        push(engine, NEW)
    with pytest.raises(BundleError, match="trained on other definitions"):
        Engine(config)


def test_a_service_without_codes_knows_no_texts(home: Path) -> None:
    with FeatureStore("repo", data_dir="data") as store:
        made = train(store, home / "bundles", "2", "plain")
        push(store, NEW)
        assert made.text_counts is None
        assert store.service_plan("plain").fits(made.fingerprint, None)


def test_a_shadow_may_know_more_texts_than_the_live_version(home: Path) -> None:
    from penstock.models.registry import ModelRegistry

    registry = ModelRegistry(Path("data/models"), Path("data/registry"))
    registry.add(Path("bundles/buy/1"))
    with FeatureStore("repo", data_dir="data") as store:
        push(store, NEW)
        train(store, home / "bundles", "2")
        train(store, home / "bundles", "3", "plain")
    registry.add(Path("bundles/buy/2"))
    registry.add(Path("bundles/buy/3"))
    text = yaml.safe_load(Path("inference-config.yaml").read_text())
    Path("inference-config.yaml").write_text(yaml.safe_dump({**text, "models": {}}))
    with Engine(load_config(Path("inference-config.yaml"))) as engine:
        assert engine.models()["buy"]["version"] == "1"
        engine.shadow("buy", "2", share=1.0)
        served(engine)
        with pytest.raises(FailedPreconditionError, match="a shadow needs those of the live"):
            engine.shadow("buy", "3", share=1.0)


def test_texts_that_another_store_pushes_are_known_before_a_bundle_is_refused(home: Path) -> None:
    with FeatureStore("repo", data_dir="data") as old, FeatureStore("repo", data_dir="data") as other:
        old.service_plan("model")
        push(other, NEW)
        made = train(other, home / "bundles", "2")
        assert made.text_counts == {("events", "city"): 3, ("events", "tier"): 4}
        assert not old.service_plan("model").fits(made.fingerprint, made.text_counts)
        assert old.fitting_plan("model", made.fingerprint, made.text_counts) is not None


def test_codes_outlive_an_erasure(home: Path) -> None:
    with FeatureStore("repo", data_dir="data") as store:
        before = joined(store, list(range(12)))
        store.erase("users", {"user_id": [0, 3, 6, 9]})  # all that are gold: the first of the tiers
        after = joined(store, list(range(12)))
    kept = [user for user in range(12) if user % 3]
    assert after[kept].tolist() == before[kept].tolist()
    with FeatureStore("repo", data_dir="data") as store:
        bundle = load_bundle("bundles/buy/1")
        assert joined(store, kept).tolist() == before[kept].tolist()
        assert store.service_plan("model").fits(bundle.fingerprint, bundle.text_counts)


def test_samples_of_earlier_builds_are_read(tmp_path: Path) -> None:
    import msgpack

    from penstock.monitoring.record_log import RecordLog

    params = msgpack.packb(["buy", {"user_id": 1}])
    row = np.zeros(2, "<f4").tobytes()
    record = ["buy", "1", "model", "f", 5, 6, params, row]
    log = RecordLog(tmp_path, "vectors-0", segment_bytes=1 << 20, max_segments=2)
    log.append([record, [*record, None], [*record, [["events", "city", 2]]]], durable=True)
    log.close()
    samples: list[VectorSample] = list(read_samples(tmp_path))
    assert [sample.text_counts for sample in samples] == [None, None, {("events", "city"): 2}]
