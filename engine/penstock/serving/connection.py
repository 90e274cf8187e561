"""One socket of the synchronous client: pipelined, shared by any number of threads, with none of its own.

A thread that waits for a reply takes the read role if it is free, and hands out whatever arrives until its
own reply is there; then it passes the role to another waiter. So a lone caller has no hand-off, and many
callers share one reader. Writers take turns; one that finds the socket full reads meanwhile, so that a
server that waits for us to read cannot wait for ever.

Locks: `_lock` guards all state and is never held over a system call; `_send_lock` keeps messages whole, and
over TLS their bytes in the order in which they were encrypted.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from penstock.credentials import client_context
from penstock.errors import CancelledError, DeadlineExceededError, PenstockError
from penstock.serving.exchange import Exchange
from penstock.serving.pool import Endpoint, LinkError, lost, refused
from penstock.serving.protocol import Address, Call, pack_notification
from penstock.serving.tls import Channel

_READ_BYTES = 1 << 16
_SILENCE = 15  # seconds without an acknowledgement after which the network or the peer is gone
_CANCEL_SECONDS = 0.05  # to get a cancel out; a peer that takes longer has stopped reading


class Ticket:
    """A request that waits for its reply."""

    __slots__ = ("done", "error", "event", "msgid", "result")

    def __init__(self) -> None:
        self.msgid = 0
        self.done = False
        self.error: PenstockError | LinkError | None = None
        self.result: Any = None
        self.event: threading.Event | None = None  # made when its thread has to wait for another reader


class Connection:
    """A connected socket. All methods may be called from any thread."""

    def __init__(
        self,
        address: Address,
        timeout: float,
        on_goaway: Callable[[Connection], None],
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
    ) -> None:
        """Connect within `timeout` seconds; LinkError if that fails. `on_goaway` is told of a goaway.

        `tls`: for a "tls://" address; `server_name` replaces its host as the name that the certificate has.
        """
        self.endpoint: Endpoint[Connection] | None = None  # the pool's
        self._address = address
        self._on_goaway = on_goaway
        deadline = time.monotonic() + timeout
        self._socket = _connect(address, timeout)
        self._channel: Channel | None = None
        if address.tls:
            try:
                context = tls if tls is not None else client_context()
                self._channel = Channel(context, server_name or address.host or "")
                self._channel.handshake(self._socket, deadline)
            except OSError as error:
                self._socket.close()
                raise LinkError(refused(address, f"TLS: {tls_reason(error)}"), sent=False) from error
        self._arrival = select.poll()  # of whoever has the read role
        self._arrival.register(self._socket, select.POLLIN)
        self._exchange: Exchange[Ticket] = Exchange(address)
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._reading = False
        self._users = 0  # threads inside a call on the socket; the last one out closes it
        self._error: PenstockError | None = None  # set once: the connection has ended

    @property
    def in_flight(self) -> int:
        return len(self._exchange)

    @property
    def usable(self) -> bool:
        return self._error is None and not self._exchange.leaving

    def authenticate(self, call: Call[Any], deadline: float | None) -> None:
        """Show the token that `call` holds; LinkError or the server's error if that fails."""
        self.wait(self.submit(call.message, deadline), deadline)

    def check(self) -> None:
        """Take in what arrived while nobody read: a goaway, or the end of an idle connection."""
        if self._start_reading():
            try:
                self._read_ready()
            finally:
                self._stop_reading()

    def submit(self, message: Callable[[int], bytes], deadline: float | None) -> Ticket:
        """Send the request that `message(msgid)` makes. LinkError, or DeadlineExceededError (unsent)."""
        with self._lock:
            if self._error is not None:
                raise LinkError(self._error, sent=False)
            ticket = Ticket()
            ticket.msgid = self._exchange.open(ticket)
        try:
            self._send(message(ticket.msgid), deadline)
        except BaseException:
            self._forget(ticket)
            raise
        return ticket

    def wait(self, ticket: Ticket, deadline: float | None) -> Any:
        """Return the result of `ticket`, or raise its error; past `deadline`, cancel it and say so."""
        try:
            while True:
                with self._lock:
                    if ticket.done:
                        break
                    lead = not self._reading and self._error is None
                    if lead:
                        self._reading = True
                        self._users += 1
                    elif ticket.event is None:
                        ticket.event = threading.Event()
                if lead:
                    try:
                        self._read_until(ticket, deadline)
                    finally:
                        self._stop_reading()
                elif ticket.event is not None:
                    left = None if deadline is None else deadline - time.monotonic()
                    if not ticket.event.wait(left) and not ticket.done:
                        raise _out_of_time()
                    ticket.event.clear()  # before `done` is looked at again: no wake-up is lost
        except BaseException:
            self.abandon(ticket)
            raise
        if ticket.error is not None:
            raise ticket.error
        return ticket.result

    def abandon(self, ticket: Ticket) -> None:
        """Take the request of `ticket` back: nobody waits for its reply any more."""
        if self._forget(ticket):
            try:
                deadline = time.monotonic() + _CANCEL_SECONDS
                self._send(pack_notification("cancel", ticket.msgid), deadline)
            except (LinkError, DeadlineExceededError):
                return

    def retire(self) -> None:
        """Take no new calls; close when the last reply has come."""
        with self._lock:
            self._exchange.leaving = True
            finished = self._exchange.finished
        if finished:
            self.close()

    def close(self, error: PenstockError | None = None) -> None:
        """End the connection; what waits for a reply gets `error`."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error or CancelledError("the client was closed")
            for ticket in self._exchange.take_all():
                ticket.error = LinkError(self._error, sent=True)
                ticket.done = True
                if ticket.event is not None:
                    ticket.event.set()
            unused = self._users == 0
        if unused:
            self._socket.close()
        else:  # wakes whoever polls it
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

    def _send(self, data: bytes, deadline: float | None) -> None:
        left = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._send_lock.acquire(timeout=min(left, threading.TIMEOUT_MAX)):
            raise _out_of_time()
        sent = 0
        try:
            self._enter()
            try:
                sealed = self._channel is not None  # the other side waits for just these bytes now
                view = memoryview(data if self._channel is None else self._channel.seal(data))
                while sent < len(view):
                    try:
                        sent += self._socket.send(view[sent:])
                    except BlockingIOError:
                        self._wait_writable(deadline)
            except BaseException as error:
                if isinstance(error, OSError) and not isinstance(error, PenstockError):
                    self.close(lost(self._address, error.strerror or str(error)))
                    raise LinkError(lost(self._address, str(error)), sent=sent > 0) from error
                if sent or sealed:  # half a message: the stream cannot be used any more
                    self.close(lost(self._address, "a request was cut off while it was sent"))
                raise
            finally:
                self._leave()
        finally:
            self._send_lock.release()

    def _wait_writable(self, deadline: float | None) -> None:
        """Wait for room to write, reading meanwhile if no other thread does."""
        reads = self._start_reading()
        try:
            poll = select.poll()
            poll.register(self._socket, select.POLLOUT | (select.POLLIN if reads else 0))
            events = poll.poll(_poll_ms(deadline))
            if not events:
                raise _out_of_time()
            if reads and events[0][1] & ~select.POLLOUT:
                self._read_ready()
        finally:
            if reads:
                self._stop_reading()

    def _read_until(self, ticket: Ticket, deadline: float | None) -> None:
        while not ticket.done:
            if not self._arrival.poll(_poll_ms(deadline)):
                if deadline is not None and time.monotonic() >= deadline:
                    raise _out_of_time()
                continue
            self._read_ready()

    def _read_ready(self) -> None:
        """Take in what the socket has now. Only the holder of the read role calls this."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(lost(self._address, error.strerror or str(error)))
            return
        if not data:
            self.close(lost(self._address, "the server closed it"))
            return
        done = False
        try:
            if self._channel is not None:
                data, done = self._channel.open(data)
            for reply in self._exchange.replies(data):
                if reply is None:
                    self._on_goaway(self)
                    self.retire()
                else:
                    self._answer(*reply)
        except PenstockError as error:
            self.close(error)
        except ssl.SSLError as error:
            self.close(lost(self._address, f"TLS: {tls_reason(error)}"))
        if done:
            self.close(lost(self._address, "the server closed it"))

    def _answer(self, msgid: int, error: PenstockError | None, result: Any) -> None:
        with self._lock:
            ticket = self._exchange.take(msgid)
            if ticket is not None:
                ticket.error = error
                ticket.result = result
                ticket.done = True
                if ticket.event is not None:
                    ticket.event.set()
            finished = self._exchange.finished
        if finished:
            self.close()

    def _forget(self, ticket: Ticket) -> bool:
        """Take `ticket` back and pass a wake-up on that it may hold; False if it was answered."""
        with self._lock:
            waiting = self._exchange.take(ticket.msgid) is not None
            if not self._reading:
                self._promote()
            finished = self._exchange.finished
        if finished:
            self.close()
        return waiting

    def _start_reading(self) -> bool:
        with self._lock:
            if self._reading or self._error is not None:
                return False
            self._reading = True
            self._users += 1
            return True

    def _stop_reading(self) -> None:
        with self._lock:
            self._reading = False
            self._promote()
        self._leave()

    def _promote(self) -> None:
        """Wake one waiter, which then takes the read role. `_lock` is held."""
        for ticket in self._exchange.waiters():
            if ticket.event is not None:
                ticket.event.set()
                return

    def _enter(self) -> None:
        with self._lock:
            if self._error is not None:
                raise LinkError(self._error, sent=False)
            self._users += 1

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0 and self._error is not None
        if last:
            self._socket.close()


def tune(sock: socket.socket) -> None:
    """Set the options of a client's TCP socket: no delay, and a peer that fell silent is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE * 1000)


def _connect(address: Address, timeout: float | None) -> socket.socket:
    try:
        if address.path is not None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                made.settimeout(timeout)
                made.connect(address.path)
            except BaseException:
                made.close()
                raise
        else:
            made = socket.create_connection((address.host or "", address.port), timeout)
            tune(made)
    except OSError as error:
        raise LinkError(refused(address, error.strerror or error), sent=False) from error
    made.setblocking(False)
    return made


def tls_reason(error: OSError) -> str:
    """Return what went wrong with TLS, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return getattr(error, "reason", None) or error.strerror or str(error)


def _poll_ms(deadline: float | None) -> int | None:
    if deadline is None:
        return None
    return min(max(0, math.ceil((deadline - time.monotonic()) * 1000)), 1 << 30)


def _out_of_time() -> DeadlineExceededError:
    return DeadlineExceededError("no reply within the deadline")
