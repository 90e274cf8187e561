"""Fixtures of the acceptance cases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance import ONLINE_STORES, World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture(params=ONLINE_STORES)
def online(request: pytest.FixtureRequest) -> str:
    """The online store that a case runs on."""
    return str(request.param)
