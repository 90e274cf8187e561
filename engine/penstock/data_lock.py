"""`data_dir/LOCK`: one engine per data folder, and where others find it.

The lock is the kernel's (flock), so a process that dies leaves none behind; the file's text only tells who
holds it and where it listens.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from penstock.errors import FailedPreconditionError

LOCK_NAME = "LOCK"


class DataDirLock:
    """Holds `data_dir` for this process until `release`.

    Raises:
        FailedPreconditionError: another process (or another engine of this one) holds it.
    """

    def __init__(self, data_dir: Path) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        self._file = (data_dir / LOCK_NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            found = _read(self._file.fileno())
            self._file.close()
            who = f"process {found['pid']}" if found.get("pid") else "another process"
            raise FailedPreconditionError(
                f"data_dir {data_dir} is in use by {who}; stop it, or set another data_dir"
            ) from None
        self.announce([])

    def announce(self, listen: list[str]) -> None:
        """Write who holds the lock and the addresses on which it listens."""
        text = json.dumps({"pid": os.getpid(), "listen": listen})
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()

    def fileno(self) -> int:
        """The descriptor; a process that inherits it holds the lock too, until it ends."""
        return self._file.fileno()

    def release(self) -> None:
        if not self._file.closed:
            self._file.seek(0)
            self._file.truncate()
            self._file.close()


def lock_holder(data_dir: Path) -> dict[str, Any] | None:
    """Who holds `data_dir`: {"pid", "listen"}, or None when nobody does."""
    path = f"{data_dir}/{LOCK_NAME}"
    if not os.access(path, os.F_OK):  # asked before each push, so without an exception
        return None
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _read(file)
    finally:
        os.close(file)
    return None


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"pid": None, "listen": []}
