"""What a peer must do to stay: show a token, finish its messages, ask now and then, move on when old.

The server asks it about every request that is no prediction; for predictions the native connection knows
until when they are allowed. One sweep finds those whose time is up, a fraction of the shortest limit late at
most. Loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import Counter
from typing import TYPE_CHECKING

from penstock.credentials import FOREVER_US, Grant
from penstock.errors import (
    InvalidArgumentError,
    PenstockError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    to_wire,
)
from penstock.serving.auth import Authenticator
from penstock.serving.protocol import ADMIN_METHODS, pack_result, unpack_params

if TYPE_CHECKING:
    from penstock.serving.peer import Peer
    from penstock.serving.server import Server

_LONGEST_SWEEP = 5.0  # seconds
_AGE_JITTER = 0.1  # of the age, so that connections made together do not end together

_log = logging.getLogger("penstock.serving")


class Gate:
    """The state of every peer that is not about bytes."""

    def __init__(self, server: Server, authenticator: Authenticator | None) -> None:
        self._server = server
        self._settings = server.settings
        self._authenticator = authenticator
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Peer, float] = {}  # that showed no token yet: until when
        self._ages: dict[Peer, asyncio.TimerHandle] = {}
        self._by_address: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self.auth_failures = self.unauthenticated = self.denied = 0
        self.auth_timeouts = self.idle_closed = self.stuck_closed = self.aged = self.address_refused = 0
        settings = self._settings
        limits = [settings.read_timeout, settings.idle_timeout]
        if authenticator is not None:
            limits.append(settings.auth_timeout)
        self._interval = min(_LONGEST_SWEEP, min(limits) / 4)
        self._timer = self._loop.call_later(self._interval, self._sweep)

    def close(self) -> None:
        """Stop every timer."""
        for timer in (self._timer, *self._ages.values()):
            if timer is not None:
                timer.cancel()

    def stats(self) -> dict[str, int]:
        """Return the counters."""
        return {
            "auth_failures": self.auth_failures,
            "auth_timeouts": self.auth_timeouts,
            "unauthenticated": self.unauthenticated + self._server.core.unauthenticated,
            "denied": self.denied,
            "idle_closed": self.idle_closed,
            "stuck_closed": self.stuck_closed,
            "aged": self.aged,
            "address_refused": self.address_refused,
        }

    def full(self, address: str) -> bool:
        """Whether `address` has as many connections as one may have."""
        most = self._settings.max_connections_per_address
        return most is not None and self._by_address[address] >= most

    def add(self, peer: Peer) -> None:
        """`peer` is connected."""
        settings = self._settings
        if peer.address is not None:
            full = self.full(peer.address)
            self._by_address[peer.address] += 1
            if full:
                self.address_refused += 1
                message = f"the address has {settings.max_connections_per_address} connections, the limit"
                self._end(peer, ResourceExhaustedError(message))
                return
        if self._authenticator is not None:
            peer.connection.authorize(0)
            self._waiting[peer] = self._loop.time() + settings.auth_timeout
        if settings.max_connection_age < math.inf:
            age = settings.max_connection_age * random.uniform(1 - _AGE_JITTER, 1 + _AGE_JITTER)
            self._ages[peer] = self._loop.call_later(age, self._grow_old, peer)

    def remove(self, peer: Peer) -> None:
        """`peer` is gone."""
        self._waiting.pop(peer, None)
        timer = self._ages.pop(peer, None)
        if timer is not None:
            timer.cancel()
        if peer.address is not None:
            self._by_address[peer.address] -= 1
            if not self._by_address[peer.address]:
                del self._by_address[peer.address]

    # Tokens

    def refusal(self, peer: Peer, method: str) -> PenstockError | None:
        """Return why `peer` may not call `method`; None if it may."""
        if self._authenticator is None:
            return None
        if peer.grant is None:
            self.unauthenticated += 1
            return UnauthenticatedError("no valid token was given; expected auth first on the connection")
        if not self._authenticator.holds(peer.grant):
            self.unauthenticated += 1
            return UnauthenticatedError("the token of the connection has expired")
        if method in ADMIN_METHODS and peer.grant.role != "admin":
            self.denied += 1
            return PermissionDeniedError(f'{method} needs the role "admin"; the token has another')
        return None

    def authenticate(self, peer: Peer, msgid: int, params: bytes) -> None:
        """Answer `auth`. A peer with too many wrong tokens is ended."""
        try:
            given = unpack_params(params)
            if len(given) != 1:
                raise InvalidArgumentError(f"auth has {len(given)} params; expected the token")
            if self._authenticator is None:  # any token will do, so that a client may have one
                peer.connection.reply(msgid, pack_result("admin"))
                return
            grant = self._authenticator.check(given[0])
            if grant is None:
                raise UnauthenticatedError("the token is unknown or has expired")
        except PenstockError as error:
            wire = to_wire(error)
            peer.connection.reply_error(msgid, wire["code"], wire["message"], wire["retryable"])
            self.auth_failures += 1
            peer.auth_failures += 1
            if peer.auth_failures >= self._settings.max_auth_failures:
                self._server.finish(peer)
            return
        self._allow(peer, grant)
        peer.connection.reply(msgid, pack_result(grant.role))

    def reload(self, authenticator: Authenticator | None) -> None:
        """From now on `authenticator` decides; who showed a token that it does not know must show another."""
        self._authenticator = authenticator
        for peer in self._server.peers():
            if authenticator is None:
                peer.connection.authorize(FOREVER_US)
            elif peer.grant is None or not authenticator.knows(peer.grant):
                peer.grant = None
                peer.connection.authorize(0)
                self._waiting[peer] = self._loop.time() + self._settings.auth_timeout

    def _allow(self, peer: Peer, grant: Grant) -> None:
        peer.grant = grant
        peer.connection.authorize(grant.expires_us)
        self._waiting.pop(peer, None)

    # Time

    def _sweep(self) -> None:
        self._timer = self._loop.call_later(self._interval, self._sweep)
        settings = self._settings
        idle, stuck = self._server.core.overdue(settings.idle_timeout, settings.read_timeout)
        for peer in self._server.peers(stuck):
            if not peer.paused and not peer.over:  # one that is not read from cannot go on
                self.stuck_closed += 1
                message = f"a message was not finished within {settings.read_timeout:g} s"
                self._end(peer, InvalidArgumentError(message))
        for peer in self._server.peers(idle):
            if peer.idle and not peer.over:
                self.idle_closed += 1
                peer.connection.goaway(0)
                self._end(peer)
        now = self._loop.time()
        for peer in [peer for peer, until in self._waiting.items() if until <= now]:
            del self._waiting[peer]
            self.auth_timeouts += 1
            self._end(peer, UnauthenticatedError(f"no token was given within {settings.auth_timeout:g} s"))

    def _grow_old(self, peer: Peer) -> None:
        self.aged += 1
        grace = self._settings.connection_age_grace
        self._ages[peer] = self._loop.call_later(grace, self._end, peer)
        peer.connection.goaway(int(grace * 1000))
        peer.flush()

    def _end(self, peer: Peer, error: PenstockError | None = None) -> None:
        """Say `error` about the connection, take no more requests, hang up when all is answered."""
        if error is not None:
            peer.connection.refuse(error.code, str(error))
        self._server.finish(peer)
        peer.flush()
