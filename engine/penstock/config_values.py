"""Values as settings are written, and the base of their sections.

A duration is a string with a unit ("200us", "50ms", "10s", "5m", "1h", "7d") or a plain number in the unit
that the field states. A size is bytes or a string ("512MB", "2GiB"). Relative paths start at the folder of
the file.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, model_validator

_UNIT_US = {"us": 1, "ms": 1000, "s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86400 * 10**6}
_UNIT_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")


def _duration(unit: str) -> BeforeValidator:
    """A validator that gives a whole or fractional number of `unit`; a plain number already is one."""

    def parse(value: object) -> object:
        if not isinstance(value, str):
            return value
        match = _QUANTITY.fullmatch(value)
        if match is None or match[2] not in _UNIT_US:
            raise ValueError(f'expected a duration such as "50ms" or "1h", or a number in {unit}')
        scaled = float(match[1]) * _UNIT_US[match[2]] / _UNIT_US[unit]
        return int(scaled) if scaled.is_integer() else scaled

    return BeforeValidator(parse)


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value)
    if match is None or match[2] not in _UNIT_BYTES:
        raise ValueError('expected a size such as "512MB" or "2GiB", or a number of bytes')
    size = float(match[1]) * _UNIT_BYTES[match[2]]
    return math.floor(size) if math.isfinite(size) else size


def _path(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("expected a path")
    base = (info.context or {}).get("base", Path())
    return Path(base) / value


Milliseconds = Annotated[float, _duration("ms")]
Microseconds = Annotated[int, _duration("us")]
Seconds = Annotated[float, _duration("s")]
Size = Annotated[int, BeforeValidator(_size)]
FilePath = Annotated[Path, BeforeValidator(_path)]


class Section(BaseModel):
    """Base of all sections: closed, immutable, without coercion; an empty section is all defaults."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value is None else value
