"""The feature registry: what is recorded is there again, whole, in every process, or an error says why."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import diskio
from penstock.errors import StoreError
from penstock.features.program import Distribution
from penstock.features.registry import Registry

DIST = Distribution.fit([1.0, 2.0, 2.0, 5.0])


def newest(path: Path) -> Path:
    return max(path.glob("0*.json"))


def test_the_seed_is_made_once_and_kept(tmp_path: Path) -> None:
    seed = Registry(tmp_path / "r").seed
    assert len(seed) == 16
    assert Registry(tmp_path / "r").seed == seed
    assert Registry(tmp_path / "other").seed != seed


def test_everything_is_there_again_after_reopening(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    assert registry.extend_dictionaries("t.parquet", {"city": ["Rome", "Oslo"]})
    registry.record_fits({"k": DIST}, 7, refit=True)
    number = registry.view_id("a")
    registry.record_applied({"views": {"v": "1"}, "services": {"s": "2"}})
    again = Registry(tmp_path)
    assert again.state == registry.state
    assert again.state.dictionaries == {"t.parquet": {"city": ["Rome", "Oslo"]}}
    assert again.distribution("k") == DIST
    assert (again.state.fits["k"].version, again.state.fits["k"].fit_until_us) == (1, 7)
    assert again.view_id("a") == number
    assert again.state.applied == {"views": {"v": "1"}, "services": {"s": "2"}}


def test_a_large_distribution_comes_back_bit_for_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=10_000)
    fitted = Distribution.fit(values)  # type: ignore[arg-type]
    Registry(tmp_path).record_fits({"k": fitted}, None, refit=True)
    assert Registry(tmp_path).distribution("k") == fitted


def test_a_dictionary_only_grows(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    assert registry.extend_dictionaries("t", {"c": ["a", "b"]})
    assert registry.extend_dictionaries("t", {"c": ["a", "b", "x"], "d": ["y"]})
    before = registry.state
    assert not registry.extend_dictionaries("t", {"c": ["a", "x"]})
    assert not registry.extend_dictionaries("t", {"c": ["a"]})
    assert registry.state == before == Registry(tmp_path).state


def test_two_handles_that_give_one_code_to_two_texts(tmp_path: Path) -> None:
    one, two = Registry(tmp_path), Registry(tmp_path)
    assert one.extend_dictionaries("t", {"c": ["a", "b"]})
    assert not two.extend_dictionaries("t", {"c": ["a", "x"]})
    assert two.state.dictionaries["t"]["c"] == ["a", "b"]  # known now, so reading again continues them


def test_view_numbers_are_distinct_over_threads_and_handles(tmp_path: Path) -> None:
    handles = [Registry(tmp_path) for _ in range(3)]
    found: list[dict[str, int]] = [{} for _ in handles]

    def work(i: int) -> None:
        for name in "abcdef":
            found[i][name] = handles[i].view_id(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(handles))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert sorted(found[0].values()) == [1, 2, 3, 4, 5, 6]


def test_a_fit_gets_a_new_version_only_where_it_differs(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.record_fits({"k": DIST}, None, refit=True)
    number = registry.version
    registry.record_fits({"k": DIST}, None, refit=True)
    assert registry.version == number
    other = Distribution.fit([3.0])
    registry.record_fits({"k": other}, None, refit=False)
    assert registry.distribution("k") == DIST  # another process was first
    registry.record_fits({"k": other}, None, refit=True)
    assert registry.state.fits["k"].version == 2
    assert Registry(tmp_path).distribution("k") == other


def test_few_old_versions_are_kept(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for i in range(10):
        registry.view_id(str(i))
    assert len(list(tmp_path.glob("0*.json"))) == 3
    assert Registry(tmp_path).state == registry.state


def test_unknown_distribution_is_none(tmp_path: Path) -> None:
    assert Registry(tmp_path).distribution("k") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: text.replace(b'"view_ids": {}', b'"view_ids": {"a": 1}'),
        lambda text: text.replace(b'"sha256"', b'"sha255"'),
        lambda text: b"[1, 2]",
        lambda text: b"\xff" + text,
    ],
)
def test_a_corrupt_version_file(tmp_path: Path, damage: Any) -> None:
    Registry(tmp_path)
    file = newest(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(StoreError, match=rf"{file.name}' is corrupt"):
        Registry(tmp_path)


def test_a_version_of_another_format(tmp_path: Path) -> None:
    Registry(tmp_path)
    file = newest(tmp_path)
    file.write_bytes(file.read_bytes().replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(StoreError, match="format 2; expected 1"):
        Registry(tmp_path)


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])])
def test_a_missing_or_corrupt_distribution_file(tmp_path: Path, damage: Any) -> None:
    Registry(tmp_path).record_fits({"k": DIST}, None, refit=True)
    damage(next(tmp_path.glob("distribution-*")))
    with pytest.raises(StoreError, match=r"distribution-.* (cannot be read|is corrupt)"):
        Registry(tmp_path).distribution("k")


def test_a_full_disk_leaves_the_state_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path)
    registry.view_id("a")
    before, files = registry.state, sorted(tmp_path.iterdir())

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(diskio, "write_file", full)
    with pytest.raises(StoreError, match="No space left"):
        registry.view_id("b")
    with pytest.raises(StoreError, match="No space left"):
        registry.record_fits({"k": DIST}, None, refit=True)
    monkeypatch.undo()
    assert registry.state == before == Registry(tmp_path).state
    assert sorted(tmp_path.iterdir()) == files
    assert registry.view_id("b") == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        Registry(tmp_path / "file" / "registry")


def test_a_folder_that_lost_its_versions_while_open(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    newest(tmp_path).unlink()
    with pytest.raises(StoreError, match="holds no version"):
        registry.reload()


def test_version_files_are_json_for_people(tmp_path: Path) -> None:
    Registry(tmp_path).view_id("a")
    assert json.loads(newest(tmp_path).read_text())["state"]["view_ids"] == {"a": 1}
