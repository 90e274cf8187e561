"""Feast repositories as the real Feast left them, and a Redis server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from feast_repo import write_feast_repo
from redis_process import redis_server

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with redis_server(tmp_path_factory.mktemp("redis")) as port:
        yield port


@pytest.fixture(scope="session")
def golden_hashes() -> dict[bytes, dict[bytes, bytes]]:
    """What Feast materialised into Redis, by key and field."""
    found: Any = json.loads((GOLDEN / "feast_redis.json").read_text())
    unhex = bytes.fromhex
    return {unhex(k): {unhex(f): unhex(v) for f, v in fields.items()} for k, fields in found.items()}


@pytest.fixture
def feast_repo(tmp_path: Path) -> Path:
    """An applied repository with an SQLite online store that nobody has written."""
    repo = write_feast_repo(tmp_path / "repo")
    shutil.copy(GOLDEN / "feast_registry.db", repo / "data" / "registry.db")
    return repo


@pytest.fixture
def redis_repo(
    tmp_path: Path, redis_port: int, golden_hashes: dict[bytes, dict[bytes, bytes]]
) -> Iterator[Path]:
    """An applied repository whose Redis holds what Feast materialised there."""
    import redis

    client = redis.Redis(port=redis_port)
    client.flushall()
    for key, fields in golden_hashes.items():
        client.hset(key, mapping=fields)
    store = f'{{type: redis, connection_string: "127.0.0.1:{redis_port},db=0"}}'
    repo = write_feast_repo(tmp_path / "repo", store)
    shutil.copy(GOLDEN / "feast_registry.db", repo / "data" / "registry.db")
    yield repo
    client.close()
