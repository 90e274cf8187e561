"""The clocks of the process. Everything else takes time as an argument.

Three clocks: *monotonic* (deadlines, memory TTL), *request time* (UTC microseconds: what features, panes and
cohorts mean by now) and *known-at* (which is data, not a clock).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

MICROS_PER_SECOND = 1_000_000


class SystemClock:
    """The clocks of this machine."""

    def now_us(self) -> int:
        """Request time: microseconds since the epoch, UTC."""
        return time.time_ns() // 1000

    def mono_ns(self) -> int:
        """Monotonic nanoseconds, the same clock that the native core reads."""
        return time.monotonic_ns()


@dataclass
class ManualClock(SystemClock):
    """A clock that tests and simulations move by hand."""

    us: int = 0
    ns: int = 0

    def now_us(self) -> int:
        return self.us

    def mono_ns(self) -> int:
        return self.ns

    def advance(self, *, us: int = 0) -> None:
        """Move both clocks forward by `us` microseconds."""
        if us < 0:
            raise ValueError(f"us is {us}; clocks do not go back")
        self.us += us
        self.ns += us * 1000
