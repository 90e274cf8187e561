"""The asyncio client: the methods of `client.Client`, awaitable. One event loop uses one AsyncClient.

Cancelling an awaited call takes it back and tells the server. Works under asyncio's loop and uvloop alike.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from numpy.typing import ArrayLike

from penstock.credentials import client_context
from penstock.errors import (
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    PenstockError,
    UnauthenticatedError,
)
from penstock.serving.connection import tls_reason, tune
from penstock.serving.exchange import Exchange
from penstock.serving.pool import Endpoint, LinkError, Pool, Retry, RetryBudget, given_up, lost, refused
from penstock.serving.protocol import (
    ADMIN_METHODS,
    DEFAULT_ADDRESS,
    Address,
    Call,
    Columns,
    Prediction,
    PredictionBatch,
    Time,
    Token,
    auth_call,
    entity_names,
    join_predictions,
    label_call,
    pack_notification,
    plain_call,
    predict_call,
    predict_vectors_call,
    push_call,
    split_table,
    to_columns,
    to_micros,
)

T = TypeVar("T")
_MANY_WINDOW = 4  # chunks of predict_many on their way at once


class AsyncConnection(asyncio.Protocol):
    """One pipelined connection; its loop's thread alone uses it."""

    def __init__(self, address: Address, on_goaway: Callable[[AsyncConnection], None]) -> None:
        self.endpoint: Endpoint[AsyncConnection] | None = None  # the pool's
        self._address = address
        self._on_goaway = on_goaway
        self._exchange: Exchange[asyncio.Future[Any]] = Exchange(address)
        self._error: PenstockError | None = None
        self._transport: asyncio.Transport | None = None
        self._room = asyncio.Event()  # the transport takes more
        self._room.set()

    @property
    def in_flight(self) -> int:
        return len(self._exchange)

    @property
    def usable(self) -> bool:
        return self._error is None and not self._exchange.leaving

    async def call(self, message: Callable[[int], bytes]) -> Any:
        """Send the request that `message(msgid)` makes and return its result, or raise its error."""
        await self._room.wait()
        if self._error is not None or self._transport is None:
            raise LinkError(self._error or lost(self._address, "it was closed"), sent=False)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        msgid = self._exchange.open(future)
        try:
            self._transport.write(message(msgid))
            return await future
        except BaseException as error:
            if self._exchange.take(msgid) is not None:
                if isinstance(error, asyncio.CancelledError):
                    self._transport.write(pack_notification("cancel", msgid))
                self._close_if_done()
            raise

    def retire(self) -> None:
        """Take no new calls; close when the last reply has come."""
        self._exchange.leaving = True
        self._close_if_done()

    def close(self, error: PenstockError | None = None) -> None:
        """End the connection; what waits for a reply gets `error`."""
        if self._error is not None:
            return
        self._error = error or CancelledError("the client was closed")
        self._room.set()
        for future in self._exchange.take_all():
            if not future.done():
                future.set_exception(LinkError(self._error, sent=True))
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(lost(self._address, str(exc) if exc else "the server closed it"))

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def data_received(self, data: bytes) -> None:
        try:
            for reply in self._exchange.replies(data):
                if reply is None:
                    self._on_goaway(self)
                    self.retire()
                    continue
                msgid, error, result = reply
                future = self._exchange.take(msgid)
                if future is not None and not future.done():
                    if error is None:
                        future.set_result(result)
                    else:
                        future.set_exception(error)
                self._close_if_done()
        except PenstockError as error:
            self.close(error)

    def _close_if_done(self) -> None:
        if self._exchange.finished:
            self.close()


class AsyncClient:
    """Calls a Penstock server, or several that serve the same models, from an event loop.

    Arguments, results and errors are those of `client.Client`.
    """

    def __init__(
        self,
        addresses: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        pool_size: int = 4,
        timeout_ms: float = 10_000,
        connect_timeout_ms: float = 2_000,
        retries: int = 5,
        retry_share: float = 0.1,
        retry_rate: float = 10.0,
        token: Token | None = None,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        server_name: str | None = None,
    ) -> None:
        self._pool: Pool[AsyncConnection] = Pool(addresses, pool_size)
        self._dialling = {id(endpoint): asyncio.Lock() for endpoint in self._pool.endpoints}
        self._timeout = timeout_ms / 1000
        self._connect_timeout = connect_timeout_ms / 1000
        self._retries = retries
        self._budget = RetryBudget(retry_share, retry_rate)
        self._token = token
        self._tls = client_context(ca, cert, key) if self._pool.tls else None
        self._server_name = server_name
        self._closed = False

    async def predict(
        self,
        model: str,
        entities: Columns,
        inputs: Columns | None = None,
        *,
        deadline_ms: float | None = None,
        now: Time | None = None,
        request_id: ArrayLike | None = None,
        priority: str | None = None,
        timings: bool = False,
        no_cache: bool = False,
        traceparent: str | None = None,
    ) -> Prediction:
        """As `Client.predict`."""
        call = predict_call(
            model,
            entities,
            inputs,
            deadline_ms=deadline_ms,
            now=now,
            request_id=request_id,
            priority=priority,
            timings=timings,
            no_cache=no_cache,
            traceparent=traceparent,
        )
        return await self._run(call)

    async def predict_vectors(
        self,
        model: str,
        rows: ArrayLike,
        *,
        deadline_ms: float | None = None,
        request_id: ArrayLike | None = None,
        timings: bool = False,
        traceparent: str | None = None,
    ) -> Prediction:
        """As `Client.predict_vectors`."""
        return await self._run(
            predict_vectors_call(
                model,
                rows,
                deadline_ms=deadline_ms,
                request_id=request_id,
                timings=timings,
                traceparent=traceparent,
            )
        )

    async def predict_many(
        self,
        model: str,
        table: Any,
        *,
        entities: Sequence[str] | None = None,
        now: Time | None = None,
        chunk_rows: int = 256,
    ) -> PredictionBatch:
        """As `Client.predict_many`."""
        columns = to_columns("table", table)
        names = entity_names(model, await self.models()) if entities is None else tuple(entities)
        calls = [
            predict_call(model, keys, inputs, now=now, priority="low")
            for keys, inputs in split_table(columns, names, chunk_rows)
        ]
        parts: dict[int, Prediction] = {}
        queue = iter(range(len(calls)))

        async def work() -> None:
            for i in queue:
                parts[i] = await self._run(calls[i], persists=True)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(_MANY_WINDOW, len(calls))):
                    group.create_task(work())
        except* PenstockError as errors:
            raise errors.exceptions[0] from None
        return join_predictions([parts[i] for i in range(len(calls))])

    async def features(
        self, refs: str | Sequence[str], entities: Columns, *, now: Time | None = None
    ) -> dict[str, Any]:
        """As `Client.features`."""
        wanted = refs if isinstance(refs, str) else list(refs)
        when = None if now is None else to_micros(now)
        return await self.call("features", wanted, to_columns("entities", entities), when)

    async def label(self, request_ids: ArrayLike, labels: Any, times: Any = None) -> dict[str, Any]:
        """As `Client.label`."""
        return await self._run(label_call(request_ids, labels, times))

    async def push(self, source: str, rows: Any) -> int:
        """As `Client.push`."""
        return await self._run(push_call(source, rows))

    async def models(self) -> dict[str, Any]:
        """As `Client.models`."""
        return await self.call("models")

    async def health(self) -> dict[str, Any]:
        """As `Client.health`."""
        return await self.call("health")

    async def stats(self) -> dict[str, Any]:
        """As `Client.stats`."""
        return await self.call("stats")

    async def drift(
        self, model: str | None = None, window_s: float | None = None, end: Time | None = None
    ) -> dict[str, Any]:
        """As `Client.drift`."""
        return await self.call("drift", model, window_s, None if end is None else to_micros(end, "end"))

    async def materialize(self, end: Time | None = None, views: Sequence[str] | None = None) -> Any:
        """As `Client.materialize`."""
        stamp = None if end is None else to_micros(end, "end")
        return await self.call("materialize", stamp, None if views is None else list(views))

    async def apply(self) -> Any:
        """As `Client.apply`."""
        return await self.call("apply")

    async def erase(self, view: str, keys: Columns) -> dict[str, Any]:
        """As `Client.erase`."""
        return await self.call("erase", view, to_columns("keys", keys))

    async def promote(self, model: str, version: str | int | None = None) -> Any:
        """As `Client.promote`."""
        return await self.call("promote", model, None if version is None else str(version))

    async def canary(self, model: str, share: float, version: str | int | None = None) -> Any:
        """As `Client.canary`."""
        return await self.call("canary", model, share, None if version is None else str(version))

    async def shadow(self, model: str, share: float, version: str | int | None = None) -> Any:
        """As `Client.shadow`."""
        return await self.call("shadow", model, share, None if version is None else str(version))

    async def rollback(self, model: str) -> Any:
        """As `Client.rollback`."""
        return await self.call("rollback", model)

    async def call(self, method: str, *params: Any, timeout_ms: float | None = None) -> Any:
        """As `Client.call`."""
        return await self._run(plain_call(method, *params), timeout_ms=timeout_ms)

    async def close(self) -> None:
        """Close every connection; calls under way fail with CancelledError of `penstock.errors`."""
        self._closed = True
        for endpoint in self._pool.endpoints:
            for link in endpoint.links:
                link.close()
        await asyncio.sleep(0)  # lets the transports close

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: Call[T], *, timeout_ms: float | None = None, persists: bool = False) -> T:
        deadline: float | None = time.monotonic() + self._timeout
        if call.deadline_ms is not None:
            deadline = time.monotonic() + call.deadline_ms / 1000
        elif timeout_ms is not None:
            deadline = time.monotonic() + timeout_ms / 1000
        elif call.method in ADMIN_METHODS:
            deadline = None
        retry = Retry(
            idempotent=call.idempotent,
            retries=self._retries,
            deadline=deadline,
            persists=persists,
            budget=self._budget,
        )
        renewed = False
        while True:
            cause: PenstockError
            link: AsyncConnection | None = None
            try:
                async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                    link = await self._link()
                    result = await self._attempt(link, call, deadline)
                self._pool.outcome(link.endpoint, None, 0.0)
                return call.decode(result)
            except LinkError as error:
                cause, sent = error.error, error.sent
            except PenstockError as error:  # before TimeoutError, which one of them also is
                cause, sent = error, True
            except TimeoutError:
                raise DeadlineExceededError("no reply within the deadline") from None
            if link is not None:
                self._pool.outcome(link.endpoint, cause, time.monotonic())
                if isinstance(cause, UnauthenticatedError):
                    link.retire()  # the next connection shows the token again
                    if callable(self._token) and not renewed:
                        renewed = True
                        continue
            now = time.monotonic()
            pause = retry.pause(cause, now, sent=sent)
            if pause is None:
                raise given_up(cause, now, deadline)
            await asyncio.sleep(pause)

    async def _attempt(self, link: AsyncConnection, call: Call[Any], deadline: float | None) -> Any:
        def message(msgid: int) -> bytes:
            left = None if deadline is None else max(0.001, (deadline - time.monotonic()) * 1000)
            return call.message(msgid, left)

        return await link.call(message)

    async def _link(self) -> AsyncConnection:
        if self._closed:
            raise LinkError(FailedPreconditionError("the client is closed"), sent=False)
        endpoint = self._pool.endpoint(time.monotonic())
        link = self._pool.link(endpoint)
        if link is not None:
            return link
        started = time.monotonic()
        async with self._dialling[id(endpoint)]:
            link = self._pool.link(endpoint)  # another task may have made one meanwhile
            if link is not None:
                return link
            if endpoint.failed_at >= started and endpoint.reason is not None:  # or failed to
                raise LinkError(endpoint.reason, sent=False)
            try:
                async with asyncio.timeout(self._connect_timeout):
                    link = await self._connect(endpoint)
            except LinkError as error:
                self._pool.failed(endpoint, time.monotonic(), error.error)
                raise LinkError(error.error, sent=False) from error  # nothing of the call itself
            except PenstockError:  # before OSError, which one of them also is
                raise
            except OSError as error:
                if isinstance(error, ssl.SSLError):
                    reason = f"TLS: {tls_reason(error)}"
                else:
                    reason = os.strerror(error.errno) if error.errno else str(error) or "timed out"
                cause = refused(endpoint.address, reason)
                self._pool.failed(endpoint, time.monotonic(), cause)
                raise LinkError(cause, sent=False) from error
            if self._closed:
                link.close()
                raise LinkError(FailedPreconditionError("the client is closed"), sent=False)
            self._pool.opened(endpoint, link)
            return link

    async def _connect(self, endpoint: Endpoint[AsyncConnection]) -> AsyncConnection:
        loop = asyncio.get_running_loop()
        address = endpoint.address

        def factory() -> AsyncConnection:
            return AsyncConnection(address, self._leaving)

        if address.path is not None:
            _, link = await loop.create_unix_connection(factory, address.path)
        else:
            server_name = (self._server_name or address.host) if address.tls else None
            transport, link = await loop.create_connection(
                factory,
                address.host or "",
                address.port,
                ssl=self._tls if address.tls else None,
                server_hostname=server_name,
            )
            tune(transport.get_extra_info("socket"))
        if self._token is not None:
            try:
                await link.call(auth_call(self._token).message)
            except BaseException:
                link.close()
                raise
        return link

    def _leaving(self, link: AsyncConnection) -> None:
        self._pool.leaving(link, time.monotonic())
