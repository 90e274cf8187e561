"""Who a peer is: tokens compared in constant time, each with a role and an expiry.

A candidate is compared with every known token, so that the time taken tells nothing about which it resembles.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterable
from typing import Any

from penstock.credentials import Grant, digest_of


def wall_us() -> int:
    """Return the wall clock in microseconds UTC."""
    return time.time_ns() // 1000


class Authenticator:
    """Knows the grants. Immutable; any thread."""

    def __init__(self, grants: Iterable[Grant], clock: Callable[[], int] = wall_us) -> None:
        """`clock`: the wall clock, microseconds UTC."""
        self._grants = tuple(grants)
        self.clock = clock

    def check(self, token: Any) -> Grant | None:
        """Return the grant of `token` that lasts longest, or None where there is none that holds now."""
        if not isinstance(token, str | bytes):
            return None
        digest = digest_of(token.encode() if isinstance(token, str) else token)
        found: Grant | None = None
        for known in self._grants:  # all of them, whichever match
            same = hmac.compare_digest(known.digest, digest)
            if same and (found is None or _rank(known) > _rank(found)):
                found = known
        return found if found is not None and self.holds(found) else None

    def holds(self, given: Grant | None) -> bool:
        """Whether `given` still allows anything."""
        return given is not None and self.clock() < given.expires_us

    def knows(self, given: Grant) -> bool:
        """Whether `given` is one of these grants, as one is no more after a reload without it."""
        return given in self._grants


def _rank(given: Grant) -> tuple[bool, int]:
    return given.role == "admin", given.expires_us
