"""The synchronous client. Thread-safe: any number of threads share its connections, and calls are pipelined.

It has no thread of its own: the threads that wait for replies read them (see `connection`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from numpy.typing import ArrayLike

from penstock.credentials import client_context
from penstock.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    PenstockError,
    UnauthenticatedError,
    UnavailableError,
)
from penstock.serving.connection import Connection, Ticket
from penstock.serving.pool import Endpoint, LinkError, Pool, Retry, RetryBudget, given_up
from penstock.serving.protocol import (
    ADMIN_METHODS,
    DEFAULT_ADDRESS,
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


class Client:
    """Calls a Penstock server, or several that serve the same models.

    ```python
    with Client("tcp://127.0.0.1:7064") as client:
        client.predict("fare", {"user_id": [7, 8]}, {"km": [1.5, 2.0]}).scores
    ```
    Every method raises the errors of `penstock.errors`; those that are retryable only after the retries.
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
        """Nothing is connected until the first call.

        `pool_size`: most connections to each address. `timeout_ms`: the longest that a call other than an
        admin one takes, retries included, unless it has a deadline of its own; admin calls have none. A call
        is made again at most `retries` times, all calls together at most `retry_share` of their number plus
        `retry_rate` a second. `token`, or a function that returns it, is shown on each new connection.

        For "tls://" addresses: `ca`, PEM certificates to trust instead of the system's; `cert` and `key`, of
        this client, PEM; `server_name`, the name in the server's certificate, if it is not the address's.
        """
        self._pool: Pool[Connection] = Pool(addresses, pool_size)
        self._lock = threading.Lock()
        self._dialling = {id(endpoint): threading.Lock() for endpoint in self._pool.endpoints}
        self._timeout = timeout_ms / 1000
        self._connect_timeout = connect_timeout_ms / 1000
        self._retries = retries
        self._budget = RetryBudget(retry_share, retry_rate)
        self._token = token
        self._tls = client_context(ca, cert, key) if self._pool.tls else None
        self._server_name = server_name
        self._closed = False

    def predict(
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
        """Return scores for the rows of `entities` and `inputs`: columns of equal lengths, or scalars.

        `deadline_ms` bounds the whole call; `now` (datetime or microseconds UTC) replays a past moment where
        the server allows it; `request_id` (uint64, one per row) is assigned by the server if not given.
        `traceparent` (W3C Trace Context) makes a server that traces add its spans to the caller's trace.
        """
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
        return self._run(call, self._deadline(call, None))

    def predict_vectors(
        self,
        model: str,
        rows: ArrayLike,
        *,
        deadline_ms: float | None = None,
        request_id: ArrayLike | None = None,
        timings: bool = False,
        traceparent: str | None = None,
    ) -> Prediction:
        """Return scores for final model inputs, float32 [n, F] in the order of the model's inputs."""
        call = predict_vectors_call(
            model,
            rows,
            deadline_ms=deadline_ms,
            request_id=request_id,
            timings=timings,
            traceparent=traceparent,
        )
        return self._run(call, self._deadline(call, None))

    def predict_many(
        self,
        model: str,
        table: Any,
        *,
        entities: Sequence[str] | None = None,
        now: Time | None = None,
        chunk_rows: int = 256,
    ) -> PredictionBatch:
        """Return scores for a whole table (mapping of columns, pandas, pyarrow, polars), in its order.

        `entities` names the columns that are entity keys, the others being inputs; not given, the server's
        description of the model tells. Sent with low priority, in chunks of `chunk_rows` rows, a few at a
        time; the time limit of the client holds for each chunk.
        """
        columns = to_columns("table", table)
        names = entity_names(model, self.models()) if entities is None else tuple(entities)
        parts: list[Prediction] = []
        window: deque[tuple[Call[Prediction], float, tuple[Connection, Ticket] | None]] = deque()
        try:
            for keys, inputs in split_table(columns, names, chunk_rows):
                call = predict_call(model, keys, inputs, now=now, priority="low")
                deadline = time.monotonic() + self._timeout
                window.append((call, deadline, self._send_ahead(call, deadline)))
                if len(window) == _MANY_WINDOW:
                    parts.append(self._collect(*window.popleft()))
            while window:
                parts.append(self._collect(*window.popleft()))
        except BaseException:
            for _, _, ahead in window:
                if ahead is not None:
                    ahead[0].abandon(ahead[1])
            raise
        return join_predictions(parts)

    def features(
        self, refs: str | Sequence[str], entities: Columns, *, now: Time | None = None
    ) -> dict[str, Any]:
        """Return `{"columns": ..., "status": ...}` of a service or of feature references, at `now`."""
        wanted = refs if isinstance(refs, str) else list(refs)
        when = None if now is None else to_micros(now)
        return self.call("features", wanted, to_columns("entities", entities), when)

    def label(self, request_ids: ArrayLike, labels: Any, times: Any = None) -> dict[str, Any]:
        """Tell what became of served rows; returns `{"matched": n, ...}` once it is durable."""
        call = label_call(request_ids, labels, times)
        return self._run(call, self._deadline(call, None))

    def push(self, source: str, rows: Any) -> int:
        """Push events (columns, a frame, or a list of mappings); returns their number once they are durable.

        It is not made again after a lost connection: whether it was taken in is not known then.
        """
        call = push_call(source, rows)
        return self._run(call, self._deadline(call, None))

    def models(self) -> dict[str, Any]:
        """Return the served models, their versions and their inputs."""
        return self.call("models")

    def health(self) -> dict[str, Any]:
        """Return whether the server is ready; answered even while it is busy or shutting down."""
        return self.call("health")

    def stats(self) -> dict[str, Any]:
        """Return the counters of the server and its engine."""
        return self.call("stats")

    def drift(
        self, model: str | None = None, window_s: float | None = None, end: Time | None = None
    ) -> dict[str, Any]:
        """Return the drift of each feature and of the score against the reference, by model.

        Of `model` alone, if given; over `window_s` seconds of request time up to `end`; the server knows the
        defaults.
        """
        return self.call("drift", model, window_s, None if end is None else to_micros(end, "end"))

    def materialize(self, end: Time | None = None, views: Sequence[str] | None = None) -> Any:
        """Write the stored features as of `end` (default: now) to the online store."""
        stamp = None if end is None else to_micros(end, "end")
        return self.call("materialize", stamp, None if views is None else list(views))

    def apply(self) -> Any:
        """Record the server's feature definitions and read the sources that changed again."""
        return self.call("apply")

    def erase(self, view: str, keys: Columns) -> dict[str, Any]:
        """Erase the entities of a view by its join keys (columns); returns the receipt."""
        return self.call("erase", view, to_columns("keys", keys))

    def promote(self, model: str, version: str | int | None = None) -> Any:
        """Make `version` (default: the challenger) the champion."""
        return self.call("promote", model, None if version is None else str(version))

    def canary(self, model: str, share: float, version: str | int | None = None) -> Any:
        """Have `version` (default: the challenger) answer that share (0 to 1) of the keys; 0 ends it."""
        return self.call("canary", model, share, None if version is None else str(version))

    def shadow(self, model: str, share: float, version: str | int | None = None) -> Any:
        """Have `version` (default: the challenger) score that share of the keys unseen; 0 ends it."""
        return self.call("shadow", model, share, None if version is None else str(version))

    def rollback(self, model: str) -> Any:
        """Make the previous champion the champion again."""
        return self.call("rollback", model)

    def call(self, method: str, *params: Any, timeout_ms: float | None = None) -> Any:
        """Call any method with plain params, for what has no method of its own here."""
        call = plain_call(method, *params)
        return self._run(call, self._deadline(call, timeout_ms))

    def close(self) -> None:
        """Close every connection; calls under way fail with CancelledError."""
        with self._lock:
            self._closed = True
            links = [link for endpoint in self._pool.endpoints for link in endpoint.links]
        for link in links:
            link.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deadline(self, call: Call[Any], timeout_ms: float | None) -> float | None:
        """The monotonic time by which the call must have ended, None for never."""
        now = time.monotonic()
        if call.deadline_ms is not None:
            return now + call.deadline_ms / 1000
        if timeout_ms is not None:
            return now + timeout_ms / 1000
        return None if call.method in ADMIN_METHODS else now + self._timeout

    def _run(self, call: Call[T], deadline: float | None, *, persists: bool = False) -> T:
        retry = Retry(
            idempotent=call.idempotent,
            retries=self._retries,
            deadline=deadline,
            persists=persists,
            budget=self._budget,
        )
        renewed = False
        while True:
            link: Connection | None = None
            try:
                link = self._link(deadline)
                ticket = self._submit(link, call, deadline)
                result = link.wait(ticket, deadline)
                self._outcome(link, None)
                return call.decode(result)
            except LinkError as error:
                cause, sent = error.error, error.sent
            except PenstockError as error:
                cause, sent = error, True
            if link is not None:
                self._outcome(link, cause)
                if isinstance(cause, UnauthenticatedError):
                    link.retire()  # the next connection shows the token again
                    if callable(self._token) and not renewed:
                        renewed = True
                        continue
            now = time.monotonic()
            pause = retry.pause(cause, now, sent=sent)
            if pause is None:
                raise given_up(cause, now, deadline)
            time.sleep(pause)

    def _outcome(self, link: Connection, error: PenstockError | None) -> None:
        if error is not None or (link.endpoint is not None and link.endpoint.errors):
            with self._lock:
                self._pool.outcome(link.endpoint, error, time.monotonic())

    def _submit(self, link: Connection, call: Call[Any], deadline: float | None) -> Ticket:
        def message(msgid: int) -> bytes:
            left = None if deadline is None else max(0.001, (deadline - time.monotonic()) * 1000)
            return call.message(msgid, left)

        return link.submit(message, deadline)

    def _send_ahead(self, call: Call[Any], deadline: float) -> tuple[Connection, Ticket] | None:
        """Send without waiting; None if that failed: `_collect` then makes the whole call."""
        try:
            link = self._link(deadline)
            return link, self._submit(link, call, deadline)
        except (LinkError, PenstockError):
            return None

    def _collect(self, call: Call[T], deadline: float, ahead: tuple[Connection, Ticket] | None) -> T:
        if ahead is not None:
            link, ticket = ahead
            try:
                return call.decode(link.wait(ticket, deadline))
            except (LinkError, PenstockError) as error:
                cause = error.error if isinstance(error, LinkError) else error
                if not cause.retryable and not isinstance(cause, DeadlineExceededError):
                    raise cause from None
        return self._run(call, deadline, persists=True)

    def _link(self, deadline: float | None) -> Connection:
        """Return the connection to use, made if need be; LinkError or DeadlineExceededError otherwise."""
        while True:
            with self._lock:
                if self._closed:
                    raise LinkError(_closed(), sent=False)
                endpoint = self._pool.endpoint(time.monotonic())
                link = self._pool.link(endpoint)
            if link is None:
                return self._dial(endpoint, deadline)
            if link.in_flight == 0:
                link.check()
            if link.usable:
                return link

    def _dial(self, endpoint: Endpoint[Connection], deadline: float | None) -> Connection:
        started = time.monotonic()
        left = self._connect_timeout
        if deadline is not None:
            left = min(left, deadline - started)
        dialling = self._dialling[id(endpoint)]
        if left <= 0 or not dialling.acquire(timeout=left):
            raise DeadlineExceededError("no connection within the deadline")
        try:
            with self._lock:  # another thread may have made one meanwhile
                link = self._pool.link(endpoint)
            if link is not None:
                return link
            if endpoint.failed_at >= started and endpoint.reason is not None:  # or failed to
                raise LinkError(endpoint.reason, sent=False)
            try:
                link = Connection(endpoint.address, left, self._leaving, self._tls, self._server_name)
                if self._token is not None:
                    self._authenticate(link, self._token, time.monotonic() + left)
            except LinkError as error:
                with self._lock:
                    self._pool.failed(endpoint, time.monotonic(), error.error)
                raise LinkError(error.error, sent=False) from error  # nothing of the call itself
            with self._lock:
                self._pool.opened(endpoint, link)
                closed = self._closed
            if closed:
                link.close()
                raise LinkError(_closed(), sent=False)
            return link
        finally:
            dialling.release()

    def _authenticate(self, link: Connection, token: Token, deadline: float) -> None:
        try:
            link.authenticate(auth_call(token), deadline)
        except BaseException as error:
            link.close()
            if isinstance(error, DeadlineExceededError):
                raise LinkError(UnavailableError(f"auth was not answered: {error}"), sent=False) from error
            raise

    def _leaving(self, link: Connection) -> None:
        with self._lock:
            self._pool.leaving(link, time.monotonic())


def _closed() -> FailedPreconditionError:
    return FailedPreconditionError("the client is closed")
