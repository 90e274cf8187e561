"""Durable, atomic writes of small files and folders.

Everything is written under a temporary name in the same folder, synced, renamed, and the folder is synced:
after a crash a name holds the old content or the new, whole. An error (a full disk) leaves the old content
and no temporary; a kill can leave one, which `sweep` removes. Any thread; one writer of a name at once.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".tmp-"


def sync_folder(path: Path) -> None:
    """Make the names in folder `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folders(path: Path) -> None:
    """Create folder `path` and its parents, durably. No error if it is there."""
    if path.is_dir():
        return
    make_folders(path.parent)
    with suppress(FileExistsError):
        os.mkdir(path)  # noqa: PTH102 - steps go through `os`, where tests stop them
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write new file `path` and sync it. Not atomic: for files of a folder that is not published yet.

    Raises OSError with the path, FileExistsError if it is there.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def write_below(folder: Path, name: str, data: bytes) -> None:
    """As `write_synced` of `folder`/`name`, whose folders below `folder` are made as needed."""
    path = folder / name
    make_folders(path.parent)
    write_synced(path, data)
    if path.parent != folder:
        sync_folder(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Replace file `path` by `data`, atomically and durably. Raises OSError, the old content kept."""
    temporary = path.parent / f"{PREFIX}{uuid.uuid4().hex}"
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)  # noqa: PTH105
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path, prefix: str = PREFIX) -> Iterator[Path]:
    """A temporary folder that becomes `path`, whole and durable, when the block ends; removed on an error.

    Write its files with `write_synced`. Raises OSError if `path` is there and not empty.
    """
    make_folders(path.parent)
    temporary = path.parent / f"{prefix}{uuid.uuid4().hex}"
    os.mkdir(temporary)  # noqa: PTH102
    try:
        yield temporary
        sync_folder(temporary)
        os.rename(temporary, path)  # noqa: PTH104
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def sweep(folder: Path, prefix: str = PREFIX) -> None:
    """Remove what killed writers left in `folder`; only while no writer with that prefix is at work there."""
    for entry in folder.glob(f"{prefix}*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
