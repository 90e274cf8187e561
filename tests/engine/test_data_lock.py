"""data_dir/LOCK: one holder, whatever becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.data_lock import DataDirLock, lock_holder
from penstock.errors import FailedPreconditionError

HOLD = """
import sys, time
from pathlib import Path
from penstock.data_lock import DataDirLock
lock = DataDirLock(Path(sys.argv[1]))
lock.announce(["tcp://127.0.0.1:7064"])
print("held", flush=True)
time.sleep(600)
"""


def test_two_holders_of_one_data_dir(tmp_path: Path) -> None:
    lock = DataDirLock(tmp_path / "made" / "here")
    with pytest.raises(FailedPreconditionError, match=f"in use by process {os.getpid()}"):
        DataDirLock(tmp_path / "made" / "here")
    lock.release()
    DataDirLock(tmp_path / "made" / "here").release()


def test_a_holder_that_was_killed_leaves_no_lock(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "held\n"
        assert lock_holder(tmp_path) == {"pid": child.pid, "listen": ["tcp://127.0.0.1:7064"]}
        with pytest.raises(FailedPreconditionError, match=str(child.pid)):
            DataDirLock(tmp_path)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert lock_holder(tmp_path) is None
    DataDirLock(tmp_path).release()


def test_nobody_holds_a_folder_without_lock(tmp_path: Path) -> None:
    assert lock_holder(tmp_path) is None
