"""Feast's online stores in Feast's own layout: Redis and SQLite, read and written.

A row of a view is its event time and one serialized Value for each feature. A write never replaces a newer
row,
and replaces one of the same event time: a correction. Feast's own Redis adapter keeps the older of two rows
of one event time, its SQLite adapter the last one written, and its times in whole seconds. Redis is asked
once for a batch of keys, whatever the number of views; a write reads the times first, as Feast does, so two
writers at once may race as Feast's do. Stores are for one thread at a time.
"""

from __future__ import annotations

import calendar
import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from penstock.errors import ConfigError, UnavailableError
from penstock.integrations.feast_registry import FeastConfig
from penstock.integrations.feast_wire import (
    encode_timestamp,
    redis_field,
    redis_time_field,
    timestamp_us,
)

_REDIS_OPTIONS = ("db", "password", "username", "ssl", "socket_timeout", "socket_connect_timeout")
_TIMEOUT_S = 5.0
_CHUNK = 500  # keys of one statement: SQLite bounds its variables


@dataclass(frozen=True)
class ViewRead:
    """What to read of one view: its name, the features, and the serialized entity key of each row."""

    view: str
    features: Sequence[str]
    keys: Sequence[bytes | None]


@dataclass(frozen=True)
class StoredRow:
    """A row: its event time, microseconds, and the serialized Value of each feature that it has."""

    event_us: int
    values: Mapping[str, bytes]


@dataclass(frozen=True)
class RowWrite:
    """A row to write under a serialized entity key."""

    key: bytes
    event_us: int
    values: Mapping[str, bytes]


class FeastOnlineStore(Protocol):
    """An online store of Feast."""

    def read(self, reads: Sequence[ViewRead]) -> list[list[StoredRow | None]]:
        """Rows of each read, None where there is none.

        Raises:
            UnavailableError: the store does not answer, or holds something else.
        """

    def write(self, view: str, rows: Sequence[RowWrite]) -> int:
        """Write rows of a view; returns how many were newer than, or as new as, what was there.

        Raises:
            UnavailableError: the store does not answer.
        """

    def close(self) -> None:
        """Let go of the connection."""


def open_online_store(config: FeastConfig, base: Path) -> FeastOnlineStore:
    """The online store that `feature_store.yaml` names.

    Raises:
        ConfigError: a store of another kind, or Redis without the package.
    """
    section = config.online_store
    kind = str(section.get("type"))
    if kind in ("redis", "feast.infra.online_stores.redis.RedisOnlineStore"):
        if section.get("redis_type", "redis") != "redis":
            raise ConfigError(f"online_store.redis_type is '{section['redis_type']}'; expected 'redis'")
        return RedisLayout(
            config.project,
            str(section.get("connection_string", "localhost:6379")),
            section.get("key_ttl_seconds"),
        )
    if kind in ("sqlite", "feast.infra.online_stores.sqlite.SqliteOnlineStore"):
        return SqliteLayout(config.project, base / str(section.get("path", "data/online.db")))
    raise ConfigError(f"online_store.type is '{kind}'; expected 'redis' or 'sqlite'")


class RedisLayout:
    """Feast's Redis layout: one hash for all views of an entity key."""

    def __init__(self, project: str, connection: str, key_ttl_seconds: int | None = None) -> None:
        """Connect when first used.

        Args:
            project: ends every key.
            connection: "host:port,option=value,...", as Feast writes it.
            key_ttl_seconds: lifetime of a written key, or None.
        """
        try:
            import redis
        except ImportError as error:
            raise ConfigError("online_store.type is 'redis': pip install 'penstock[redis]'") from error
        self._error = redis.exceptions.RedisError
        self._project = project.encode()
        self._key_ttl = key_ttl_seconds
        host, port, options = _connection(connection)
        options = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S, **options}
        self._client: Any = redis.Redis(host=host, port=port, **options)

    def read(self, reads: Sequence[ViewRead]) -> list[list[StoredRow | None]]:
        names = [
            [redis_time_field(read.view), *(redis_field(read.view, feature) for feature in read.features)]
            for read in reads
        ]
        users: dict[bytes, list[int]] = {}  # reads of each key
        for at, read in enumerate(reads):
            for key in dict.fromkeys(read.keys):
                if key is not None:
                    users.setdefault(key, []).append(at)
        commands = [
            (b"HMGET", key + self._project, *(name for at in ats for name in names[at]))
            for key, ats in users.items()
        ]
        rows: list[dict[bytes | None, StoredRow | None]] = [{None: None} for _ in reads]
        for (key, ats), answer in zip(users.items(), self._ask(commands)):
            start = 0
            for at in ats:
                stop = start + len(names[at])
                rows[at][key] = _redis_row(reads[at], answer[start:stop])
                start = stop
        return [[found[key] for key in read.keys] for read, found in zip(reads, rows)]

    def _ask(self, commands: Sequence[tuple[bytes, ...]]) -> list[Any]:
        if len(commands) == 1:
            try:
                return [self._client.execute_command(*commands[0])]
            except self._error as error:
                raise UnavailableError(f"Feast's Redis store failed: {error}") from error
        with self._client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            return self._run(pipe)

    def write(self, view: str, rows: Sequence[RowWrite]) -> int:
        time_field = redis_time_field(view)
        with self._client.pipeline(transaction=False) as pipe:
            for row in rows:
                pipe.hget(row.key + self._project, time_field)
            before = self._run(pipe)
        written = 0
        newest: dict[bytes, int] = {}
        with self._client.pipeline(transaction=False) as pipe:
            for row, stored in zip(rows, before):
                known = newest.get(row.key, _time(view, stored) if stored else row.event_us)
                if known > row.event_us:
                    continue
                newest[row.key] = row.event_us
                values = {redis_field(view, f): value for f, value in row.values.items()}
                name = row.key + self._project
                pipe.hset(name, mapping={time_field: encode_timestamp(row.event_us), **values})
                if self._key_ttl:
                    pipe.expire(name, self._key_ttl)
                written += 1
            self._run(pipe)
        return written

    def _run(self, pipe: Any) -> list[Any]:
        try:
            answers: list[Any] = pipe.execute()
        except self._error as error:
            raise UnavailableError(f"Feast's Redis store failed: {error}") from error
        return answers

    def close(self) -> None:
        self._client.close()


def _connection(text: str) -> tuple[str, int, dict[str, Any]]:
    parts = text.split(",")
    places = [part for part in parts if "=" not in part]
    host, _, port = places[0].rpartition(":") if places else ("", "", "")
    if len(places) != 1 or not host or not port.isdigit():
        raise ConfigError(f"online_store.connection_string is '{places}'; expected one 'host:port'")
    options: dict[str, Any] = {}
    for part in parts:
        name, given, value = part.partition("=")
        if not given:
            continue
        if name not in _REDIS_OPTIONS:
            known = ", ".join(_REDIS_OPTIONS)
            raise ConfigError(f"online_store.connection_string has '{name}'; expected one of {known}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return host, int(port), options


def _redis_row(read: ViewRead, stored: Sequence[bytes | None]) -> StoredRow | None:
    """The row of a view; without a time its entity was never written, whatever other views wrote."""
    at, *values = stored
    if at is None:
        return None
    present = {f: value for f, value in zip(read.features, values) if value is not None}
    return StoredRow(_time(read.view, at), present)


def _time(view: str, data: bytes) -> int:
    try:
        return timestamp_us(data)
    except ValueError as error:
        raise UnavailableError(f"Feast's Redis store has no time at '_ts:{view}': {error}") from error


class SqliteLayout:
    """Feast's SQLite layout: a table for each view, a line for each feature of an entity key."""

    def __init__(self, project: str, path: Path) -> None:
        self._project, self._path = project, path

    def read(self, reads: Sequence[ViewRead]) -> list[list[StoredRow | None]]:
        if not self._path.is_file():
            return [[None] * len(read.keys) for read in reads]
        try:
            with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as db:
                return [self._read(db, read) for read in reads]
        except (sqlite3.Error, ValueError) as error:
            raise UnavailableError(f"Feast's SQLite store '{self._path}' cannot be read: {error}") from error

    def _read(self, db: sqlite3.Connection, read: ViewRead) -> list[StoredRow | None]:
        table = self._table(read.view)
        there = db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,))
        if there.fetchone() is None:
            return [None] * len(read.keys)
        times: dict[bytes, int] = {}
        values: dict[bytes, dict[str, bytes]] = {}
        asked = sorted({key for key in read.keys if key is not None})
        for at in range(0, len(asked), _CHUNK):
            part = asked[at : at + _CHUNK]
            marks = ",".join("?" * len(part))
            query = (
                f"SELECT entity_key, feature_name, value, event_ts FROM {_quoted(table)} WHERE entity_key IN"
            )
            for key, feature, value, stored in db.execute(f"{query} ({marks})", part):
                if feature in read.features:
                    values.setdefault(key, {})[feature] = value
                times[key] = max(times.get(key, _sqlite_time(stored)), _sqlite_time(stored))
        return [None if k not in times else StoredRow(times[k], values.get(k, {})) for k in read.keys]

    def write(self, view: str, rows: Sequence[RowWrite]) -> int:
        table = _quoted(self._table(view))
        written = 0
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path)) as db, db:
                db.execute(
                    f"CREATE TABLE IF NOT EXISTS {table} (entity_key BLOB, feature_name TEXT, value BLOB, "
                    "value_text TEXT, vector_value BLOB, event_ts timestamp, created_ts timestamp, "
                    "PRIMARY KEY(entity_key, feature_name))"
                )
                for row in rows:
                    at = _to_sqlite_time(row.event_us)
                    found = db.execute(f"SELECT event_ts FROM {table} WHERE entity_key = ?", (row.key,))
                    if any(_sqlite_time(stored) > _sqlite_time(at) for (stored,) in found.fetchall()):
                        continue
                    db.executemany(
                        f"INSERT OR REPLACE INTO {table} (entity_key, feature_name, value, event_ts) "
                        "VALUES (?, ?, ?, ?)",
                        [(row.key, f, value, at) for f, value in row.values.items()],
                    )
                    written += 1
        except (sqlite3.Error, OSError) as error:
            raise UnavailableError(
                f"Feast's SQLite store '{self._path}' cannot be written: {error}"
            ) from error
        return written

    def _table(self, view: str) -> str:
        return f"{self._project}_{view}"

    def close(self) -> None:
        """Nothing is kept open."""


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _sqlite_time(seconds: Any) -> int:
    """Microseconds of a stored time. Feast stores UTC as if it were the local time, in whole seconds."""
    if not isinstance(seconds, int):
        raise ValueError(f"a time is {seconds!r}; expected whole seconds")
    return calendar.timegm(time.localtime(seconds)) * 1_000_000


def _to_sqlite_time(us: int) -> int:
    found = time.gmtime(us // 1_000_000)
    return int(time.mktime((*found[:8], -1)))
