"""Atomic writes: whole or absent, whatever step fails or is killed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock import diskio

STEPS = ("open", "write", "fsync", "close", "replace", "rename", "mkdir", "unlink")


class Killed(BaseException):
    """Stands for kill -9: no step after it takes effect."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException, *, dead: bool) -> list[str]:
    """Make the os call number `step` of this process fail (and, if dead, each one after it)."""
    calls: list[str] = []

    def wrap(name: str) -> Callable:
        real = getattr(os, name)

        def call(*args, **kwargs):
            if name == "close":
                return real(*args, **kwargs)  # the kernel closes descriptors of a dead process
            calls.append(name)
            if len(calls) - 1 == step or (dead and len(calls) > step):
                raise error
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, wrap(name))
    return calls


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def write_two(folder: Path) -> None:
    with diskio.new_folder(folder / "made") as temporary:
        diskio.write_synced(temporary / "a", b"A" * 1000)
        diskio.write_synced(temporary / "b", b"B")


@pytest.mark.parametrize("step", range(12))
@pytest.mark.parametrize("dead", [False, True])
def test_file_is_old_or_new_after_any_failed_step(monkeypatch, tmp_path, step, dead):
    target = tmp_path / "f"
    diskio.write_file(target, b"old")
    error = Killed() if dead else OSError(errno.ENOSPC, "No space left on device")
    failed = None
    with monkeypatch.context() as patch:
        stop_at(patch, step, error, dead=dead)
        try:
            diskio.write_file(target, b"new" * 100)
        except (OSError, Killed) as caught:
            failed = caught
    assert target.read_bytes() in (b"old", b"new" * 100)
    if failed is None:
        assert target.read_bytes() == b"new" * 100
    if not dead:
        assert names_in(tmp_path) == ["f"]
    diskio.sweep(tmp_path)
    assert names_in(tmp_path) == ["f"]


@pytest.mark.parametrize("step", range(16))
@pytest.mark.parametrize("dead", [False, True])
def test_folder_is_whole_or_absent_after_any_failed_step(monkeypatch, tmp_path, step, dead):
    error = Killed() if dead else OSError(errno.ENOSPC, "No space left on device")
    failed = False
    with monkeypatch.context() as patch:
        stop_at(patch, step, error, dead=dead)
        try:
            write_two(tmp_path)
        except (OSError, Killed):
            failed = True
    made = tmp_path / "made"
    assert made.exists() or failed
    if made.exists():
        assert names_in(made) == ["a", "b"]
        assert (made / "a").read_bytes() == b"A" * 1000
    diskio.sweep(tmp_path)
    assert names_in(tmp_path) in ([], ["made"])


def test_full_disk_error_names_the_file(monkeypatch, tmp_path):
    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device.*x") as caught:
        diskio.write_synced(tmp_path / "x", b"1")
    assert caught.value.errno == errno.ENOSPC


def test_short_writes_are_continued(monkeypatch, tmp_path):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:3]))
    diskio.write_file(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_existing_folder_is_not_replaced(tmp_path):
    write_two(tmp_path)
    with pytest.raises(OSError), diskio.new_folder(tmp_path / "made") as temporary:
        diskio.write_synced(temporary / "c", b"C")
    assert names_in(tmp_path / "made") == ["a", "b"]
    assert names_in(tmp_path) == ["made"]


def test_make_folders_is_idempotent(tmp_path):
    diskio.make_folders(tmp_path / "a" / "b")
    diskio.make_folders(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_make_folders_over_a_file_is_an_error(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(OSError):
        diskio.make_folders(tmp_path / "a" / "b")
