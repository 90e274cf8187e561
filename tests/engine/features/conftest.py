"""Fixtures of the acceptance cases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance import World
from redis_server import BINARY, RedisServer

from penstock.features.store_settings import OnlineStoreSettings


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server.url
    server.stop()


@pytest.fixture(
    params=["lmdb", pytest.param("redis", marks=pytest.mark.skipif(BINARY is None, reason="no redis-server"))]
)
def online(request: pytest.FixtureRequest) -> OnlineStoreSettings:
    """The online store that a case runs on."""
    if request.param == "lmdb":
        return OnlineStoreSettings()
    return OnlineStoreSettings("redis", request.getfixturevalue("redis_url"), timeout_ms=20_000)
