"""Commands that write a data folder hold it meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli_holder import alone, holder
from penstock.data_lock import DataDirLock
from penstock.errors import FailedPreconditionError


def test_a_command_holds_the_folder_that_it_writes(tmp_path: Path) -> None:
    with alone(tmp_path):
        assert holder(tmp_path) is not None
        with pytest.raises(FailedPreconditionError, match="in use"):
            DataDirLock(tmp_path)
    assert holder(tmp_path) is None


def test_a_command_beside_another_writer_is_refused(tmp_path: Path) -> None:
    lock = DataDirLock(tmp_path)
    with pytest.raises(FailedPreconditionError, match="in use"), alone(tmp_path):
        raise AssertionError("it did not wait for its turn")
    lock.release()


def test_a_folder_that_is_missing_stays_missing(tmp_path: Path) -> None:
    with alone(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()
