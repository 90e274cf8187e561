"""Times as callers give them, as int64 microseconds UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from penstock.errors import InvalidArgumentError
from penstock.features.expressions import INT_MAX, INT_MIN, timestamp_us

Time = datetime | str | int
"""A datetime (without a zone: UTC), an ISO 8601 text, or int microseconds UTC."""


def to_us(value: Any, what: str) -> int:
    """Microseconds since 1970-01-01 UTC of a `Time`; InvalidArgumentError names `what` if it is none."""
    given = value
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            raise InvalidArgumentError(
                f"{what} is {given!r}; expected a time such as '2013-05-01T12:00:00Z'"
            ) from None
    if isinstance(value, datetime) and value == value:  # pandas' NaT is a datetime that equals nothing
        return timestamp_us(value if value.tzinfo is not None else value.replace(tzinfo=UTC))
    if isinstance(value, int) and not isinstance(value, bool):
        if not INT_MIN < value < INT_MAX:
            raise InvalidArgumentError(f"{what} is {value}; expected microseconds since 1970 within int64")
        return value
    raise InvalidArgumentError(
        f"{what} is {given!r}; expected a datetime, an ISO 8601 text or int microseconds UTC"
    )


def iso(us: int) -> str:
    """ISO 8601 text of a time, for people; the number itself where no calendar date exists."""
    try:
        return datetime.fromtimestamp(us // 1_000_000, UTC).replace(microsecond=us % 1_000_000).isoformat()
    except (OverflowError, ValueError, OSError):
        return f"{us} us"
