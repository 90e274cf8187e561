"""Settings of `feature_store.yaml` that are whole numbers in a section of their own."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from typing import Any


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


def settings_of(section: str, given: Any, defaults: Any) -> dict[str, int]:
    """The whole numbers, above 0, of a section whose keys are the fields of `defaults`; a ValueError says
    what is wrong."""
    if not isinstance(given, dict):
        raise ValueError(f"{section} is {given!r}; expected a mapping")
    known = list(asdict(defaults))
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"unknown key {section}.{key}; {hint}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{section}.{key} is {value!r}; expected a whole number above 0")
    return given
