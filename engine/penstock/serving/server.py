"""The socket server: an event loop that moves bytes between sockets and the native core.

A read is one Python call into `Connection.received`, whatever the number of requests in it; `predict` and
`predict_vectors` are answered without further Python. Other methods run on small bounded pools, the admin
ones on a pool of their own, so that a long `materialize` does not hold up `stats`; `health` is answered on
the loop. Everything here runs on the loop thread but `_call` and `stats`, which any thread may call.

A connection that does not take its replies is not read from beyond `pause_output_bytes`, and dropped when it
takes less than 64 KiB in `slow_reader_timeout`; `gate` has the other ways to lose one. A shutdown closes the
listeners, says goaway, answers what is in flight, refuses what is new, and ends when the peers have hung up,
at the latest `goaway_grace` after the last reply, or at `drain_timeout`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import resource
import signal
import ssl
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from penstock.config import Config
from penstock.credentials import Grant, ServerTls
from penstock.errors import (
    InvalidArgumentError,
    NotFoundError,
    PenstockError,
    ResourceExhaustedError,
    UnavailableError,
    to_wire,
)
from penstock.serving.acceptor import TlsAcceptor
from penstock.serving.auth import Authenticator, wall_us
from penstock.serving.gate import Gate
from penstock.serving.listeners import Listener, bind_all
from penstock.serving.peer import Farewell, Peer
from penstock.serving.protocol import (
    ADMIN_METHODS,
    AUTH_METHOD,
    METHODS,
    pack_error,
    pack_result,
    unpack_params,
)
from penstock.serving.workers import Workers

_SLOW_PROGRESS = 64 << 10  # bytes that a peer must take within slow_reader_timeout
_LINGER = 1.0  # seconds that a peer has to read the last words of its connection
_MOST_LINGERING = 256
_RESERVED_FILES = 64
_FILES_PER_CONNECTION = 2  # the transport's, and the native core's own
_SWITCH_INTERVAL = 0.0005  # seconds; threads that compute in Python let the loop in this soon
_REFUSED_RETRY_MS = 100

_log = logging.getLogger("penstock.serving")


class ServedEngine(Protocol):
    """What the server needs of `penstock.Engine`."""

    core: Any  # _core.ServingCore
    telemetry: Any  # penstock.serving.telemetry.Telemetry: it shows the server's counters too

    @property
    def ready(self) -> bool: ...

    def call(self, method: str, params: list[Any], *, admin: bool) -> Any:
        """Run a method other than a prediction; blocks; any thread."""

    def health(self) -> dict[str, Any]:
        """Describe the engine without waiting for anything: this runs on the loop."""

    def drain(self) -> None:
        """Turn not ready and refuse new predictions as UNAVAILABLE; returns at once."""


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen, and the bound of everything that a peer can make grow. Times in seconds."""

    listen: tuple[str, ...]
    max_message_bytes: int = 16 << 20
    max_depth: int = 32
    max_connections: int = 1024
    max_in_flight: int = 1024
    max_output_bytes: int = 64 << 20
    pause_output_bytes: int = 1 << 20
    slow_reader_timeout: float = 10.0
    drain_timeout: float = 30.0
    goaway_grace: float = 0.5  # for peers to hang up by themselves, once all is answered
    data_threads: int = 4
    data_queue: int = 256
    admin_queue: int = 16
    calls_per_connection: int = 64
    read_timeout: float = 30.0
    handshake_timeout: float = 10.0
    auth_timeout: float = 10.0
    idle_timeout: float = math.inf
    max_connection_age: float = math.inf
    connection_age_grace: float = 10.0
    max_connections_per_address: int | None = None
    max_auth_failures: int = 3
    tls: ServerTls | None = None
    grants: tuple[Grant, ...] = ()  # none: everyone may do everything

    @classmethod
    def from_config(cls, config: Config) -> ServerSettings:
        limits = config.server.limits
        return cls(
            listen=tuple(config.server.listen),
            max_message_bytes=limits.max_message_bytes,
            max_depth=limits.max_depth,
            max_connections=limits.max_connections,
            max_in_flight=limits.max_in_flight_per_connection,
            max_output_bytes=limits.max_output_bytes,
            pause_output_bytes=limits.pause_output_bytes,
            slow_reader_timeout=limits.slow_reader_timeout,
            drain_timeout=config.server.drain_timeout,
            goaway_grace=config.server.goaway_grace,
            data_threads=config.server.call_threads,
            data_queue=limits.max_calls,
            admin_queue=limits.max_admin_calls,
            calls_per_connection=limits.max_calls_per_connection,
            read_timeout=limits.read_timeout,
            handshake_timeout=limits.handshake_timeout,
            auth_timeout=limits.auth_timeout,
            idle_timeout=limits.idle_timeout or math.inf,
            max_connection_age=limits.max_connection_age or math.inf,
            connection_age_grace=limits.connection_age_grace,
            max_connections_per_address=limits.max_connections_per_address,
            max_auth_failures=config.server.auth.max_failures,
            tls=config.server.tls.files() if config.server.tls is not None else None,
            grants=tuple(config.server.auth.grants()),
        )


class Server:
    """Serves one engine on the running loop: `start`, then `stop`, then await `finished`."""

    def __init__(
        self, engine: ServedEngine, settings: ServerSettings, clock: Callable[[], int] = wall_us
    ) -> None:
        """`clock`: the wall clock that tokens expire by, microseconds UTC."""
        self.core = engine.core
        self.settings = settings
        self.tls: ssl.SSLContext | None = settings.tls.context() if settings.tls is not None else None
        self.handshaking = self.handshakes_failed = 0
        self._clock = clock
        self.draining = False
        self.accepted = self.refused = self.slow_readers = self.slow_dropped = 0
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._peers: dict[int, Peer] = {}
        self._dropped_notifications = 0  # of the connections that are gone
        self._stalled: set[Peer] = set()
        self._farewells: dict[Farewell, asyncio.TimerHandle] = {}
        self._listeners: list[Listener] = []
        self._servers: list[asyncio.AbstractServer | TlsAcceptor] = []
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._drain_timer: asyncio.TimerHandle | None = None
        self._grace_timer: asyncio.TimerHandle | None = None
        self._quiet = False  # shutting down, and everything that was asked is answered
        self._hung_up = False
        self._finished: asyncio.Future[bool] = self._loop.create_future()
        self._data = Workers("data", self._loop, settings.data_threads, settings.data_queue)
        self._admin = Workers("admin", self._loop, 1, settings.admin_queue)
        self._gate = Gate(self, self._authenticator(settings.grants))

    async def start(self) -> list[str]:
        """Listen; return the addresses with their real ports. Raises if any cannot be had."""
        if self.tls is None and any(text.startswith("tls:") for text in self.settings.listen):
            raise InvalidArgumentError("server.tls is not set; expected cert and key for a tls:// address")
        self._listeners = self._bind()
        self._loop.add_reader(self.core.event_fd, self._wake)
        self._loop.add_reader(self.core.timer_fd, self._expire)
        for listener in self._listeners:
            server: asyncio.AbstractServer | TlsAcceptor
            if listener.address.tls:
                server = TlsAcceptor(self, listener, _LINGER)
            elif listener.address.path is not None:
                server = await self._loop.create_unix_server(self._accept, sock=listener.socket)
            else:
                server = await self._loop.create_server(self._accept, sock=listener.socket)
            self._servers.append(server)
        return list(dict.fromkeys(str(listener.address) for listener in self._listeners))

    def _bind(self) -> list[Listener]:
        return bind_all(list(self.settings.listen))

    def stop(self) -> None:
        """Begin the shutdown: not ready, no new connections, goaway, answer what is in flight."""
        if self.draining:
            return
        self.draining = True
        self._engine.drain()
        self.close_listeners()
        self._drain_timer = self._loop.call_later(self.settings.drain_timeout, self._end)
        grace_ms = int(self.settings.drain_timeout * 1000)
        peers = list(self._peers.values())
        for peer in peers:  # all, before any is flushed: an idle peer may be hung up on at once
            peer.connection.goaway(grace_ms)
            peer.connection.watch()
        for peer in peers:
            if peer.connection.id in self._peers:
                peer.flush()
        self._check_drained()

    async def finished(self) -> bool:
        """Wait for the end of the shutdown; False if `drain_timeout` came before the last reply."""
        try:
            return await asyncio.shield(self._finished)
        finally:
            self._loop.remove_reader(self.core.event_fd)
            self._loop.remove_reader(self.core.timer_fd)
            for timer in (self._sweep_timer, self._drain_timer, self._grace_timer):
                if timer is not None:
                    timer.cancel()
            self._gate.close()
            self._data.close()
            self._admin.close()

    def reload(self, settings: ServerSettings) -> None:
        """Take the certificates and tokens of `settings`: for new handshakes, and for every request.

        Raises, and changes nothing, where they cannot be used. Nothing else of `settings` is looked at.
        """
        tls = settings.tls.context() if settings.tls is not None else None
        if (tls is None) != (self.tls is None):
            raise InvalidArgumentError("server.tls came or went; expected a restart for that")
        self.tls = tls
        self._gate.reload(self._authenticator(settings.grants))

    def _authenticator(self, grants: tuple[Grant, ...]) -> Authenticator | None:
        return Authenticator(grants, self._clock) if grants else None

    def close_listeners(self) -> None:
        """Close the listening sockets and remove their files."""
        for server in self._servers:
            server.close()
        for listener in self._listeners:
            listener.close()
        self._servers, self._listeners = [], []

    def stats(self) -> dict[str, int]:
        """Return the server's counters."""
        peers = list(self._peers.values())
        dropped = sum(peer.connection.dropped_notifications for peer in peers)
        return {
            "connections": len(peers),
            "accepted": self.accepted,
            "refused": self.refused,
            "handshaking": self.handshaking,
            "handshakes_failed": self.handshakes_failed,
            **self._gate.stats(),
            "slow_readers": self.slow_readers,
            "slow_readers_dropped": self.slow_dropped,
            "dropped_notifications": self._dropped_notifications + dropped,
            "calls_outstanding": self._data.outstanding,
            "admin_calls_outstanding": self._admin.outstanding,
        }

    def health(self) -> dict[str, Any]:
        """Return the reply of `health`: the engine's, and whether this server takes new work."""
        ready = bool(self._engine.ready) and not self.draining
        state = "draining" if self.draining else "serving" if ready else "starting"
        return {**self._engine.health(), "ready": ready, "state": state}

    # Connections

    def _accept(self) -> asyncio.BufferedProtocol:
        limit = self.settings.max_connections
        if len(self._peers) + self.handshaking < limit:
            return Peer(self)
        self.refused += 1
        message = f"the server has {limit} connections, its limit"
        error = ResourceExhaustedError(message, retry_after_ms=_REFUSED_RETRY_MS)
        return Farewell(self, pack_error(None, error))

    def has_room(self, address: str) -> bool:
        """Whether one more connection, from `address`, is within the limits."""
        within = len(self._peers) + self.handshaking < self.settings.max_connections
        return within and not self._gate.full(address)

    def peers(self, ids: Iterable[int] | None = None) -> list[Peer]:
        """Return the peers, or those of the connections `ids` that are still there."""
        if ids is None:
            return list(self._peers.values())
        return [peer for peer in map(self._peers.get, ids) if peer is not None]

    def add(self, peer: Peer) -> None:
        """`peer` is connected."""
        self.accepted += 1
        self._peers[peer.connection.id] = peer
        self._gate.add(peer)

    def finish(self, peer: Peer) -> None:
        """Take nothing more from `peer`, and hang up (at its next flush) once all is answered."""
        if not peer.eof and not peer.over and not peer.lost:
            peer.over = peer.eof = True
            peer.transport.pause_reading()

    def remove(self, peer: Peer) -> None:
        """`peer` is gone: its requests are cancelled."""
        self._stalled.discard(peer)
        if self._peers.pop(peer.connection.id, None) is not None:
            self._dropped_notifications += peer.connection.dropped_notifications
            self._gate.remove(peer)
            peer.connection.drop()
            self._check_drained()

    def settle(self, peer: Peer) -> None:
        """Nothing of `peer` is blocked: hang up if it is over, and see whether the shutdown is done."""
        if peer.lost:
            return
        if peer.connection.closed or (peer.over and peer.idle):
            self._hang_up(peer)
        elif peer.eof and peer.idle:
            peer.transport.close()
        if self.draining:
            self._check_drained()

    def _hang_up(self, peer: Peer) -> None:
        self.remove(peer)
        if not peer.transport.is_closing():
            farewell = Farewell(self)
            peer.transport.set_protocol(farewell)
            farewell.connection_made(peer.transport)
            if peer.over or not peer.eof:
                peer.transport.resume_reading()

    def linger(self, farewell: Farewell) -> bool:
        """Give `farewell` its time; False when too many linger already."""
        if len(self._farewells) >= _MOST_LINGERING:
            return False
        self._farewells[farewell] = self._loop.call_later(_LINGER, farewell.transport.abort)
        return True

    def gone(self, farewell: Farewell) -> None:
        """`farewell` has hung up."""
        timer = self._farewells.pop(farewell, None)
        if timer is not None:
            timer.cancel()
        if self._hung_up and not self._farewells:
            self._end()

    def stalled(self, peer: Peer) -> None:
        """`peer` did not take a write at once: watch it."""
        peer.stalled_since = self._loop.time()
        peer.stalled_bytes = peer.untaken_bytes()
        self._stalled.add(peer)
        if self._sweep_timer is None:
            self._sweep_timer = self._loop.call_later(self.settings.slow_reader_timeout / 4, self._sweep)

    def _sweep(self) -> None:
        now = self._loop.time()
        self._sweep_timer = None
        for peer in list(self._stalled):
            if not peer.blocked:
                self._stalled.discard(peer)
            elif now - peer.stalled_since >= self.settings.slow_reader_timeout:
                waiting = peer.untaken_bytes()
                if peer.stalled_bytes - waiting < _SLOW_PROGRESS:
                    self.slow_dropped += 1
                    self._stalled.discard(peer)
                    peer.transport.abort()
                else:
                    peer.stalled_since, peer.stalled_bytes = now, waiting
        if self._stalled:
            self._sweep_timer = self._loop.call_later(self.settings.slow_reader_timeout / 4, self._sweep)

    # Completions and deadlines

    def _wake(self) -> None:
        self._flush(self.core.wake())

    def _expire(self) -> None:
        self._flush(self.core.expire())

    def _flush(self, ids: list[int]) -> None:
        for connection_id in ids:
            peer = self._peers.get(connection_id)
            if peer is not None:
                peer.flush()

    # Methods other than predictions

    def dispatch(self, peer: Peer, requests: list[tuple[int, str, bytes]]) -> None:
        """Answer the requests, or hand them to a pool."""
        for msgid, method, params in requests:
            if method == AUTH_METHOD:
                self._gate.authenticate(peer, msgid, params)
                if not peer.over:
                    requests += peer.connection.received(0)  # what came behind it has waited for the answer
                continue
            refusal = self._gate.refusal(peer, method)
            if refusal is not None:
                self._fail(peer, msgid, refusal)
            elif method == "health":
                try:
                    peer.connection.reply(msgid, pack_result(self.health()))
                except Exception as error:
                    self._fail(peer, msgid, error)
            elif method not in METHODS:
                known = ", ".join(sorted(METHODS))
                self._fail(peer, msgid, NotFoundError(f'method is "{method}"; expected one of: {known}'))
            elif self.draining:
                self._fail(peer, msgid, UnavailableError("the server is shutting down"))
            elif peer.calls >= self.settings.calls_per_connection:
                message = f"{peer.calls} calls of the connection are waiting, the limit"
                self._fail(peer, msgid, ResourceExhaustedError(message, retry_after_ms=_REFUSED_RETRY_MS))
            else:
                workers = self._admin if method in ADMIN_METHODS else self._data
                work = partial(self._call, method, params)
                if workers.submit(work, partial(self._answer, peer, msgid, method)):
                    peer.calls += 1
                else:
                    message = f"{workers.outstanding} calls are waiting, the limit"
                    self._fail(peer, msgid, ResourceExhaustedError(message, retry_after_ms=_REFUSED_RETRY_MS))

    def _call(self, method: str, params: bytes) -> bytes:
        result = self._engine.call(method, unpack_params(params), admin=method in ADMIN_METHODS)
        if method == "stats":
            result = {**result, "server": self.stats()}
        return pack_result(result)

    def _answer(self, peer: Peer, msgid: int, method: str, outcome: bytes | BaseException) -> None:
        peer.calls -= 1
        if isinstance(outcome, BaseException) and not isinstance(outcome, PenstockError):
            _log.error("%s failed", method, exc_info=outcome)
        if not peer.lost and peer.connection.id in self._peers:
            if isinstance(outcome, BaseException):
                self._fail(peer, msgid, outcome)
            else:
                peer.connection.reply(msgid, outcome)
            peer.flush()
        self._check_drained()

    def _fail(self, peer: Peer, msgid: int, error: BaseException) -> None:
        wire = to_wire(error)
        peer.connection.reply_error(
            msgid, wire["code"], wire["message"], wire["retryable"], wire.get("retry_after_ms")
        )

    # Shutdown

    def _check_drained(self) -> None:
        if not self.draining or self._hung_up:
            return
        if not self._quiet:
            if self._data.outstanding or self._admin.outstanding:
                return
            if not all(peer.idle for peer in self._peers.values()):
                return
            # Everything is answered. Peers that heed the goaway hang up now; what they sent before they saw
            # it is still refused with an answer.
            self._quiet = True
            self._grace_timer = self._loop.call_later(self.settings.goaway_grace, self._hang_up_all)
        if not self._peers:
            self._hang_up_all()

    def _hang_up_all(self) -> None:
        self._hung_up = True
        for peer in list(self._peers.values()):
            self._hang_up(peer)
        if not self._farewells:
            self._end()

    def _end(self) -> None:
        if self._finished.done():
            return
        if not self._quiet:
            in_flight = sum(peer.connection.in_flight for peer in self._peers.values())
            _log.error("the drain limit was reached with %d requests unanswered", in_flight)
        self._finished.set_result(self._quiet)
        for peer in list(self._peers.values()):
            peer.transport.abort()
        for farewell in list(self._farewells):
            farewell.transport.abort()


def reload_on_hangup(server: Server, reread: Callable[[], ServerSettings]) -> None:
    """Have SIGHUP take the certificates and tokens of the settings that `reread` returns."""

    def on_hangup() -> None:
        try:
            server.reload(reread())
            _log.warning("read the certificates and tokens again")
        except PenstockError as error:
            _log.error("kept the certificates and tokens: %s", error)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)


def run(
    engine: ServedEngine,
    settings: ServerSettings,
    on_listening: Callable[[list[str]], None],
    reread: Callable[[], ServerSettings] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT, in the main thread; return the exit status.

    SIGHUP takes the certificates and tokens of the settings that `reread` returns. Status 0: everything in
    flight was answered; 1: the drain limit came first. A second signal exits at once.
    """
    import uvloop

    settings = replace(settings, max_connections=_fit_files(settings.max_connections))
    sys.setswitchinterval(_SWITCH_INTERVAL)

    async def main() -> bool:
        server = Server(engine, settings)
        engine.telemetry.server_stats = server.stats

        def on_signal() -> None:
            if server.draining:
                os._exit(1)
            server.stop()

        if reread is not None:
            reload_on_hangup(server, reread)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)
        addresses = await server.start()
        gc.collect()
        gc.freeze()
        on_listening(addresses)
        return await server.finished()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return 0 if runner.run(main()) else 1


def _fit_files(max_connections: int) -> int:
    """Raise the limit of open files to what the connections need; return how many fit."""
    in_use = _RESERVED_FILES + _MOST_LINGERING
    with contextlib.suppress(OSError):
        in_use += len(list(Path("/proc/self/fd").iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_PER_CONNECTION * max_connections + in_use
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    fitting = max(1, (soft - in_use) // _FILES_PER_CONNECTION)
    _log.warning("the limit of open files, %d, leaves room for %d connections", soft, fitting)
    return fitting
