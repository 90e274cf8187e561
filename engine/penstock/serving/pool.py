"""Which connection takes a call, and whether a call that failed is made again: shared by both clients.

Pure state without sockets; the owner serialises access and passes the monotonic clock in (seconds).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from penstock.errors import DeadlineExceededError, InvalidArgumentError, PenstockError, UnavailableError
from penstock.serving.protocol import Address, parse_address

_FIRST_PAUSE = 0.01  # seconds; doubles by attempt, with full jitter
_LONGEST_PAUSE = 1.0
_LONGEST_DOWN = 2.0
_EJECT_AFTER = 5  # calls in a row that an endpoint could not answer
_BUDGET_SHARE = 0.1  # of the calls may be made once more
_BUDGET_RATE = 10.0  # and so many a second besides
_BUDGET_MOST = 100.0  # that can be saved up


class Link(Protocol):
    """A connection, as far as the choice of one needs to know it."""

    endpoint: Any  # the Endpoint that it belongs to, once the pool has it

    @property
    def in_flight(self) -> int: ...
    @property
    def usable(self) -> bool: ...


L = TypeVar("L", bound=Link)


class LinkError(Exception):
    """The transport failed. `sent`: bytes of the request left, so the server may have done the work."""

    def __init__(self, error: PenstockError, *, sent: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.sent = sent


def lost(address: Address, reason: str) -> UnavailableError:
    """Return the error of a connection that ended."""
    return UnavailableError(f"the connection to {address} was lost: {reason}")


def refused(address: Address, reason: object) -> UnavailableError:
    """Return the error of a connection that could not be made."""
    return UnavailableError(f"cannot connect to {address}: {reason}")


def given_up(cause: PenstockError, now: float, deadline: float | None) -> PenstockError:
    """Return the error to raise when a call is not made again: its last one, or that its time is up."""
    if deadline is None or now < deadline or isinstance(cause, DeadlineExceededError):
        return cause
    return DeadlineExceededError(f"no answer within the deadline; the last error: {cause}")


@dataclass
class Endpoint(Generic[L]):
    """One address and its open connections. Avoided until `down_until` while another can be had.

    `failures`: connections in a row that could not be made, or ejections; `failed_at`: the last of them;
    `errors`: calls in a row that it could not answer.
    """

    address: Address
    links: list[L] = field(default_factory=list)
    failures: int = 0
    failed_at: float = -1.0
    reason: PenstockError | None = None
    errors: int = 0
    down_until: float = 0.0

    @property
    def in_flight(self) -> int:
        return sum(link.in_flight for link in self.links)


class Pool(Generic[L]):
    """Least in flight over the endpoints that are up, then over the connections of the one chosen."""

    def __init__(self, addresses: str | Sequence[str], size: int) -> None:
        given = [addresses] if isinstance(addresses, str) else list(addresses)
        if not given:
            raise InvalidArgumentError("addresses is empty; expected at least one address")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidArgumentError(f"pool_size is {size!r}; expected a whole number of at least 1")
        self._size = size
        self.endpoints: list[Endpoint[L]] = [Endpoint(parse_address(text)) for text in dict.fromkeys(given)]
        self._turn = 0
        self.tls = any(endpoint.address.tls for endpoint in self.endpoints)

    def endpoint(self, now: float) -> Endpoint[L]:
        """Return the endpoint for the next call; if all are down, the one that is up again first."""
        if len(self.endpoints) == 1:
            return self.endpoints[0]
        for endpoint in self.endpoints:
            endpoint.links = [link for link in endpoint.links if link.usable]
        up = [endpoint for endpoint in self.endpoints if endpoint.down_until <= now]
        if not up:
            return min(self.endpoints, key=lambda endpoint: endpoint.down_until)
        self._turn += 1  # ties go round
        first = self._turn % len(up)
        return min(up[first:] + up[:first], key=lambda endpoint: endpoint.in_flight)

    def link(self, endpoint: Endpoint[L]) -> L | None:
        """Return the connection of `endpoint` to use, or None where one should be opened."""
        usable = endpoint.links = [link for link in endpoint.links if link.usable]
        best = min(usable, key=lambda link: link.in_flight, default=None)
        if best is not None and (best.in_flight == 0 or len(usable) >= self._size):
            return best
        return None

    def opened(self, endpoint: Endpoint[L], link: L) -> None:
        """A connection was made. What was ejected for its answers has to give one first."""
        link.endpoint = endpoint
        endpoint.links.append(link)
        if endpoint.errors == 0:
            endpoint.failures = 0
            endpoint.down_until = 0.0

    def outcome(self, endpoint: Endpoint[L] | None, error: PenstockError | None, now: float) -> None:
        """A call on a connection of `endpoint` ended so: one that is unavailable a few times in a row is
        ejected, as if it could not be connected to, until it has answered something.
        """
        if endpoint is None or isinstance(error, DeadlineExceededError):  # which may be the caller's fault
            return
        if isinstance(error, UnavailableError):
            endpoint.errors += 1
            if endpoint.errors >= _EJECT_AFTER and endpoint.down_until <= now:
                self.failed(endpoint, now, error)
        elif endpoint.errors:
            endpoint.errors = endpoint.failures = 0
            endpoint.down_until = 0.0

    def failed(self, endpoint: Endpoint[L], now: float, reason: PenstockError | None = None) -> None:
        """A connection could not be made: avoid the endpoint, longer each time."""
        endpoint.failed_at, endpoint.reason = now, reason
        endpoint.failures = min(endpoint.failures + 1, 16)
        endpoint.down_until = now + min(_LONGEST_DOWN, 0.05 * 2**endpoint.failures) * random.uniform(0.5, 1)

    def leaving(self, link: L, now: float) -> None:
        """The server of `link` says that it goes away: prefer others for new calls."""
        for endpoint in self.endpoints:
            if link in endpoint.links:
                endpoint.down_until = now + 1.0


class RetryBudget:
    """A token bucket of all of a client's calls: when a server struggles, few of them come twice.

    Each call adds `_BUDGET_SHARE`, each second `_BUDGET_RATE`; a retry takes 1.
    """

    def __init__(self, share: float = _BUDGET_SHARE, rate: float = _BUDGET_RATE) -> None:
        for name, value in (("retry_share", share), ("retry_rate", rate)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
                raise InvalidArgumentError(f"{name} is {value!r}; expected a number of at least 0")
        self._share = share
        self._rate = rate
        self._saved = min(rate, _BUDGET_MOST)
        self._at: float | None = None

    def called(self) -> None:
        """A call begins."""
        self._saved = min(self._saved + self._share, _BUDGET_MOST)

    def spend(self, now: float) -> bool:
        """Take a retry; False where none is left."""
        if self._at is not None:
            self._saved = min(self._saved + max(0.0, now - self._at) * self._rate, _BUDGET_MOST)
        self._at = now
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


class Retry:
    """Decides, for one call, whether and when it is made again.

    Only errors that are retryable; a call that is not idempotent only while none of its bytes were sent; not
    more than `retries` times; never a pause that would outlast `deadline` (monotonic seconds, or None); and
    only within the `budget` of the client, but where no server was reached. A call that `persists` (bulk
    work, that may be late) is repeated up to its deadline, and also when the server had no time for it; where
    the budget is spent it pauses longer.
    """

    def __init__(
        self,
        *,
        idempotent: bool,
        retries: int,
        deadline: float | None,
        persists: bool = False,
        budget: RetryBudget | None = None,
    ) -> None:
        self._budget = budget
        if budget is not None:
            budget.called()
        self._idempotent = idempotent
        self._persists = persists
        self._left = retries
        self._deadline = deadline
        self._step = _FIRST_PAUSE

    def pause(self, error: PenstockError, now: float, *, sent: bool) -> float | None:
        """Return the seconds to wait before the next attempt, or None to give up."""
        retryable = error.retryable or (self._persists and isinstance(error, DeadlineExceededError))
        if not retryable or (sent and not self._idempotent) or (self._left <= 0 and not self._persists):
            return None
        self._left -= 1
        within = not sent or self._budget is None or self._budget.spend(now)
        if not within and not self._persists:
            return None
        if error.retry_after_ms is None:
            pause = random.uniform(0, self._step)
        else:  # the server knows better how long; the jitter keeps its clients apart
            hint = error.retry_after_ms / 1000
            pause = hint + random.uniform(0, min(self._step, max(hint, _FIRST_PAUSE)))
        self._step = min(2 * self._step, _LONGEST_PAUSE)
        if not within:
            pause += self._step
        if self._deadline is not None and now + pause >= self._deadline:
            return None
        return pause
