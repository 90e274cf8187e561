"""One writer for each data folder: the server that holds it, reached over its socket, or else the command."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import FailedPreconditionError

if TYPE_CHECKING:
    from penstock.serving.client import Client


def holder(data_dir: Path) -> dict[str, Any] | None:
    """Who holds the data folder ({"pid", "listen"}); None if nobody does."""
    from penstock.data_lock import lock_holder

    return lock_holder(data_dir)


@contextmanager
def alone(data_dir: Path) -> Iterator[None]:
    """Hold the data folder, if there is one; FailedPreconditionError if somebody came first."""
    from penstock.data_lock import DataDirLock

    if not data_dir.is_dir():
        yield
        return
    lock = DataDirLock(data_dir)
    try:
        yield
    finally:
        lock.release()


def holder_name(found: dict[str, Any]) -> str:
    """The holder, for a message."""
    return f"process {found.get('pid') or 'unknown'}"


def connect(addresses: str | Sequence[str]) -> Client:
    """A client with the credentials of the environment, where they are set: PENSTOCK_TOKEN; for TLS
    PENSTOCK_CA, PENSTOCK_CERT, PENSTOCK_KEY (paths) and PENSTOCK_SERVER_NAME.
    """
    from penstock.serving.client import Client

    given = os.environ.get
    return Client(
        addresses,
        token=given("PENSTOCK_TOKEN"),
        ca=given("PENSTOCK_CA"),
        cert=given("PENSTOCK_CERT"),
        key=given("PENSTOCK_KEY"),
        server_name=given("PENSTOCK_SERVER_NAME"),
    )


def holder_client(found: dict[str, Any]) -> Client:
    """A client of the holder; FailedPreconditionError if it listens nowhere."""
    if not found.get("listen"):
        raise FailedPreconditionError(
            f"{holder_name(found)} uses the data folder and listens nowhere; stop it, or call its engine"
        )
    return connect(found["listen"])
