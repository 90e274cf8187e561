"""The registry: aliases, idempotent adds, and a whole state after any failed or killed step."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from penstock.errors import BundleError, FailedPreconditionError, NotFoundError
from penstock.models.bundle import save_bundle
from penstock.models.registry import ModelRegistry, Trial


class Killed(BaseException):
    """Stands for kill -9: no step after it takes effect."""


def make_bundles(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=100), "b": rng.normal(size=100)})
    frame["y"] = (frame["a"] > 0).astype(int)
    model = lgb.LGBMClassifier(n_estimators=2, verbose=-1, n_jobs=1).fit(frame[["a", "b"]], frame["y"])
    for version in ("1", "2", "3"):
        save_bundle(
            model, frame, name="m", directory=folder, label="y", metrics={"auc": 0.5}, created_us=int(version)
        )
    save_bundle(model, frame, name="m", directory=folder / "other", label="y", metrics={"auc": 0.9})
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models", tmp_path / "registry")


def reopened(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models", tmp_path / "registry")


def test_opening_writes_nothing(registry, tmp_path):
    assert registry.list() == []
    assert list(tmp_path.iterdir()) == []


def test_first_version_is_champion_and_later_ones_challenge(registry, bundles, tmp_path):
    info = registry.add(bundles / "m" / "1")
    assert (info.name, info.version, info.aliases) == ("m", "1", ("champion",))
    assert (info.output_kind, info.n_inputs, info.metrics, info.created_us) == (
        "probability",
        2,
        {"auc": 0.5},
        1,
    )
    assert registry.add(bundles / "m" / "2").aliases == ("challenger",)
    assert reopened(tmp_path).aliases("m") == {"champion": "1", "challenger": "2"}
    assert [(i.version, i.aliases) for i in registry.list()] == [("1", ("champion",)), ("2", ("challenger",))]


def test_copy_is_independent_of_its_source(registry, bundles, tmp_path):
    source = Path(shutil.copytree(bundles / "m" / "1", tmp_path / "source"))
    (source / "stray").write_text("not ours")
    registry.add(source)
    shutil.rmtree(source)
    bundle = registry.get("m")
    assert bundle.path == tmp_path / "models" / "m" / "1"
    assert sorted(p.name for p in bundle.path.iterdir()) == ["model.yaml", "reference.arrow", "trees.bin"]


def test_same_bundle_again_changes_nothing(registry, bundles, tmp_path):
    registry.add(bundles / "m" / "1")
    registry.add(bundles / "m" / "2")
    registry.promote("m")
    before = (tmp_path / "registry" / "models.json").read_bytes()
    registry.add(bundles / "m" / "1")
    registry.add(tmp_path / "models" / "m" / "2")
    assert (tmp_path / "registry" / "models.json").read_bytes() == before


def test_other_bundle_under_the_same_version_is_refused(registry, bundles, tmp_path):
    registry.add(bundles / "m" / "1")
    with pytest.raises(FailedPreconditionError, match="version '1' of model 'm'") as refused:
        registry.add(bundles / "other" / "m" / "1")
    assert f"is in {tmp_path / 'models/m/1'} with other content than {bundles / 'other/m/1'}" in str(
        refused.value
    )
    assert registry.get("m").metrics == {"auc": 0.5}


def test_promote_keeps_the_previous_and_rollback_swaps(registry, bundles, tmp_path):
    for version in ("1", "2", "3"):
        registry.add(bundles / "m" / version)
    assert registry.promote("m") == "3"
    assert registry.aliases("m") == {"champion": "3", "previous": "1"}
    assert registry.promote("m", "3") == "3"
    assert registry.aliases("m") == {"champion": "3", "previous": "1"}
    assert registry.rollback("m") == "1"
    assert reopened(tmp_path).aliases("m") == {"champion": "1", "previous": "3"}
    assert registry.rollback("m") == "3"
    assert registry.promote("m", "2") == "2"
    assert registry.aliases("m") == {"champion": "2", "previous": "3"}
    assert [registry.get("m", ref).version for ref in ("champion", "previous", "1")] == ["2", "3", "1"]


def test_unknown_names_are_told_with_the_known_ones(registry, bundles, tmp_path):
    with pytest.raises(NotFoundError, match="'x' is unknown; expected one of: there is none"):
        registry.promote("x")
    assert list(tmp_path.iterdir()) == []
    registry.add(bundles / "m" / "1")
    with pytest.raises(NotFoundError, match=r"'\.\./m' is unknown; expected one of: m"):
        registry.get("../m")
    with pytest.raises(NotFoundError, match=r"no version '\.\./1'; expected one of: 1"):
        registry.get("m", "../1")
    with pytest.raises(FailedPreconditionError, match="'m' has no challenger"):
        registry.promote("m")
    with pytest.raises(FailedPreconditionError, match="'m' has no previous"):
        registry.rollback("m")


def test_corrupt_version_is_not_promoted_but_listed(registry, bundles, tmp_path):
    registry.add(bundles / "m" / "1")
    registry.add(bundles / "m" / "2")
    (tmp_path / "models" / "m" / "2" / "trees.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"trees\.bin"):
        registry.promote("m", "2")
    assert registry.aliases("m")["champion"] == "1"
    shutil.rmtree(tmp_path / "models" / "m" / "2")
    with pytest.raises(BundleError):
        registry.get("m", "2")
    first, second = registry.list()
    assert first.fault is None and "model.yaml: is missing" in str(second.fault)


def test_bundle_in_the_wrong_place_is_refused(registry, bundles, tmp_path):
    registry.add(bundles / "m" / "1")
    registry.add(bundles / "m" / "2")
    shutil.rmtree(tmp_path / "models" / "m" / "1")
    shutil.copytree(bundles / "m" / "2", tmp_path / "models" / "m" / "1")
    with pytest.raises(BundleError, match="is version '2' of model 'm'; expected '1'"):
        registry.get("m")


def test_corrupt_bundle_is_not_added(registry, bundles, tmp_path):
    source = Path(shutil.copytree(bundles / "m" / "1", tmp_path / "source"))
    (source / "trees.bin").write_bytes(b"x")
    with pytest.raises(BundleError):
        registry.add(source)
    assert registry.list() == [] and not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"models": {"m": {"champion": "9"}}}',
        '{"models": {"../m": {}}}',
        '{"schema_version": 2}',
        '{"more": 1}',
    ],
)
def test_corrupt_state_file_is_named_and_kept(registry, bundles, tmp_path, text):
    registry.add(bundles / "m" / "1")
    file = tmp_path / "registry" / "models.json"
    file.write_text(text)
    for call in (
        registry.list,
        lambda: registry.add(bundles / "m" / "2"),
        lambda: registry.promote("m", "1"),
    ):
        with pytest.raises(FailedPreconditionError, match=r"models\.json"):
            call()
    assert file.read_text() == text


# Faults


def stop_at(patch: pytest.MonkeyPatch, step: int, error: BaseException, *, dead: bool) -> list[str]:
    """Make the writing os call number `step` fail (and, if dead, each one after it)."""
    calls: list[str] = []

    def wrap(name: str) -> Callable:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) - 1 == step or (dead and len(calls) > step):
                raise error
            return real(*args, **kwargs)

        return call

    for name in ("write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
        patch.setattr(os, name, wrap(name))
    return calls


ACTIONS: dict[str, Callable[[ModelRegistry, Path], Any]] = {
    "add": lambda registry, bundles: registry.add(bundles / "m" / "3"),
    "promote": lambda registry, bundles: registry.promote("m", "2"),
    "rollback": lambda registry, bundles: registry.rollback("m"),
    "set_trial": lambda registry, bundles: registry.set_trial("m", Trial("2", "shadow", 0.25)),
}


def seen(registry: ModelRegistry) -> Any:
    """All that a reader can see; loads and verifies every version."""
    return [(i, registry.get("m", i.version).trees) for i in registry.list()], registry.aliases("m")


@pytest.mark.parametrize("dead", [False, True], ids=["full", "killed"])
@pytest.mark.parametrize("action", list(ACTIONS))
def test_state_is_old_or_new_after_any_failed_step(bundles, tmp_path, action, dead):
    base = tmp_path / "base"
    start = reopened(base)
    start.add(bundles / "m" / "1")
    start.add(bundles / "m" / "2")
    start.promote("m", "2")
    start.promote("m", "1")
    done = tmp_path / "done"
    shutil.copytree(base, done)
    ACTIONS[action](reopened(done), bundles)
    old, new = seen(start), seen(reopened(done))
    step, outcomes = 0, []
    while True:
        at = tmp_path / f"step{step}"
        shutil.copytree(base, at)
        error = Killed() if dead else OSError(errno.ENOSPC, "No space left on device")
        with pytest.MonkeyPatch.context() as patch:
            calls = stop_at(patch, step, error, dead=dead)
            try:
                ACTIONS[action](reopened(at), bundles)
                raised = False
            except (OSError, Killed):
                raised = True
        after = seen(reopened(at))
        assert after in (old, new), (step, calls)
        if not raised:
            assert after == new
        elif after == old:  # the same call again succeeds and leaves no debris
            ACTIONS[action](reopened(at), bundles)
            assert seen(reopened(at)) == new
        names = {p.name for p in (at / "models" / "m").iterdir()} | {
            p.name for p in (at / "registry").iterdir()
        }
        assert names <= {"1", "2", "3", "models.json", "models.lock"}, (step, calls)
        outcomes.append(after == new)
        if len(calls) <= step:
            break
        step += 1
    assert step >= 4 and outcomes[0] is False and outcomes[-1] is True


def _promote_often(root: str, rounds: int) -> None:
    registry = reopened(Path(root))
    for i in range(rounds):
        registry.promote("m", "12"[i % 2])


def test_second_process_reads_while_one_writes(registry, bundles, tmp_path):
    registry.add(bundles / "m" / "1")
    registry.add(bundles / "m" / "2")
    writer = multiprocessing.get_context("spawn").Process(target=_promote_often, args=(str(tmp_path), 40))
    writer.start()
    reads = 0
    while writer.is_alive() or reads < 20:
        aliases = registry.aliases("m")
        assert aliases["champion"] in ("1", "2") and aliases.get("previous") != aliases["champion"]
        assert registry.get("m").version in ("1", "2")
        reads += 1
    writer.join()
    assert writer.exitcode == 0
    json.loads((tmp_path / "registry" / "models.json").read_text())


class Against(RuleBasedStateMachine):
    """The registry against a plain model of its aliases."""

    source: Path
    root: Path

    def __init__(self) -> None:
        super().__init__()
        shutil.rmtree(self.root, ignore_errors=True)
        self.added: list[str] = []
        self.champion: str | None = None
        self.trial: Trial | None = None
        self.alias: dict[str, str | None] = dict.fromkeys(("champion", "challenger", "previous"))

    @property
    def registry(self) -> ModelRegistry:
        return reopened(self.root)

    def check(self) -> None:
        assert [info.version for info in self.registry.list()] == self.added
        if self.added:
            assert self.registry.aliases("m") == {k: v for k, v in self.alias.items() if v}
            if self.alias["champion"] != self.champion:  # another champion ends a trial
                self.champion, self.trial = self.alias["champion"], None
            assert self.registry.trial("m") == self.trial
            assert [i.trial for i in self.registry.list() if i.trial] == ([self.trial] if self.trial else [])

    @rule(version=st.sampled_from("123"))
    def add(self, version: str) -> None:
        self.registry.add(self.source / "m" / version)
        if version not in self.added:
            self.added.append(version)
            self.alias["challenger" if self.alias["champion"] else "champion"] = version
        self.check()

    @rule(version=st.sampled_from(["1", "2", "3", None]))
    def promote(self, version: str | None) -> None:
        chosen = self.alias["challenger"] if version is None else version
        if chosen not in self.added:
            with pytest.raises((NotFoundError, FailedPreconditionError)):
                self.registry.promote("m", version)
        else:
            assert self.registry.promote("m", version) == chosen
            if chosen != self.alias["champion"]:
                self.alias["previous"], self.alias["champion"] = self.alias["champion"], chosen
            if self.alias["challenger"] == chosen:
                self.alias["challenger"] = None
        self.check()

    @rule(version=st.sampled_from(["1", "2", "3", None]), share=st.sampled_from([0.25, 1.0]))
    def try_out(self, version: str | None, share: float) -> None:
        trial = None if version is None else Trial(version, "canary", share)
        if not self.added or (version is not None and version not in self.added):
            with pytest.raises(NotFoundError):
                self.registry.set_trial("m", trial)
        elif version is not None and version == self.alias["champion"]:
            with pytest.raises(FailedPreconditionError):
                self.registry.set_trial("m", trial)
        else:
            self.registry.set_trial("m", trial)
            self.trial = trial
        self.check()

    @rule()
    def rollback(self) -> None:
        if self.alias["previous"] is None:
            with pytest.raises((NotFoundError, FailedPreconditionError)):
                self.registry.rollback("m")
        else:
            self.registry.rollback("m")
            champion = self.alias["champion"]
            self.alias["champion"], self.alias["previous"] = self.alias["previous"], champion
            if self.alias["challenger"] == self.alias["champion"]:
                self.alias["challenger"] = None
        self.check()


def test_any_order_of_changes_equals_the_plain_model(bundles, tmp_path):
    machine = type("Machine", (Against,), {"source": bundles, "root": tmp_path / "root"})
    case = machine.TestCase
    case.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
    case("runTest").runTest()
