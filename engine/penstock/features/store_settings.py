"""Settings of `feature_store.yaml` that are sections of their own: pushes, the online store, and joins."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_ZERO = ("stale_ms",)  # 0 turns it off
_LEAST_JOIN_BYTES = 1 << 20
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class PushSettings:
    """Bounds of the push path.

    Attributes:
        queue: pushes that may wait for the disk; more are refused as RESOURCE_EXHAUSTED.
        queue_bytes: bytes of events that may wait.
        compact_after: batches of a source in the log before they are moved into a segment.
        segment_rows: rows of a segment, about.
    """

    queue: int = 4096
    queue_bytes: int = 256 << 20
    compact_after: int = 4096
    segment_rows: int = 1 << 20


@dataclass(frozen=True)
class OnlineStoreSettings:
    """Where rows are kept: in the data folder ("lmdb"), or in Redis.

    Attributes:
        type: "lmdb" or "redis".
        url: "redis://", "rediss://" or "unix://" address; `${NAME}` is taken from the environment.
        pool_size: most connections; a call waits for one, `timeout_ms` at most.
        timeout_ms: of connecting, and of each answer.
        breaker_failures: failed calls in a row before Redis is left alone.
        breaker_open_ms: for so long; then one call tries it.
        stale_ms: how old a row may be that is served from memory while Redis fails; 0: none is.
        stale_rows: rows kept in memory for that.
    """

    type: str = "lmdb"
    url: str = field(default="", repr=False)
    pool_size: int = 16
    timeout_ms: int = 100
    breaker_failures: int = 5
    breaker_open_ms: int = 1000
    stale_ms: int = 0
    stale_rows: int = 100_000


def machine_memory() -> int:
    """Bytes of memory that this process may have at most: the machine's, or its container's if less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUP_LIMITS:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        found += [int(text)] if text.isdigit() else []
    return min(found)


@dataclass(frozen=True)
class JoinSettings:
    """Bounds of the historical join.

    Attributes:
        memory_bytes: of the columns of one source that a join holds at once; by default a quarter of the
            machine's memory. A source that has more is read in batches, of which only the keys that are
            asked for are kept, and these part by part. The indexes over what is held come on top, and so do
            the entity table, its features, and the texts that are feature values.
        spill_dir: absolute path of a folder for what does not fit, in files without a name, which go with the
            process; by default the system's folder for temporary files.
    """

    memory_bytes: int = field(default_factory=lambda: max(machine_memory() // 4, _LEAST_JOIN_BYTES))
    spill_dir: str = ""


def join_settings(given: Any) -> JoinSettings:
    """The section `join`; a ValueError says what is wrong with it."""
    _check("join", given, asdict(JoinSettings()))
    made = JoinSettings(**given)
    if made.memory_bytes < _LEAST_JOIN_BYTES:
        raise ValueError(
            f"join.memory_bytes is {made.memory_bytes}; expected at least {_LEAST_JOIN_BYTES} (1 MiB)"
        )
    folder = Path(made.spill_dir)
    if made.spill_dir and not (folder.is_absolute() and folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(
            f"join.spill_dir is {made.spill_dir!r}; expected the absolute path of a folder that is writable"
        )
    return made


def push_settings(given: Any) -> PushSettings:
    """The section `push`; a ValueError says what is wrong with it."""
    _check("push", given, asdict(PushSettings()))
    return PushSettings(**given)


def online_store_settings(given: Any) -> OnlineStoreSettings:
    """The section `online_store`; a ValueError says what is wrong with it."""
    _check("online_store", given, asdict(OnlineStoreSettings()))
    made = OnlineStoreSettings(**given)
    if made.type not in ("lmdb", "redis"):
        raise ValueError(f"online_store.type is {made.type!r}; expected lmdb or redis")
    if made.type == "lmdb":
        if len(given) > ("type" in given):
            raise ValueError(
                f"online_store has {', '.join(k for k in given if k != 'type')} without type: redis"
            )
        return made
    url = _VARIABLE.sub(_from_environment, made.url)
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("online_store.url is no address; expected redis://, rediss:// or unix://")
    return OnlineStoreSettings(**{**given, "url": url})


def _from_environment(found: re.Match[str]) -> str:
    name = found.group(1)
    if name not in os.environ:
        raise ValueError(f"online_store.url needs the environment variable {name}, which is not set")
    return os.environ[name]


def _check(section: str, given: Any, defaults: dict[str, Any]) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{section} is {given!r}; expected a mapping")
    for key, value in given.items():
        if key not in defaults:
            near = difflib.get_close_matches(str(key), defaults, 1)
            hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(defaults)}"
            raise ValueError(f"unknown key {section}.{key}; {hint}")
        if isinstance(defaults[key], str):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{section}.{key} is no text")
        elif not isinstance(value, int) or isinstance(value, bool) or value < (key not in _ZERO):
            least = 0 if key in _ZERO else 1
            raise ValueError(f"{section}.{key} is {value!r}; expected a whole number of at least {least}")
