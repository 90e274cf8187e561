"""The wire as Python sees it: addresses, methods, params, replies. Shared by server and clients.

Pure functions and values, without sockets or threads. What a caller passes (arrays, frames, times) becomes
plain MessagePack here, and what cannot is refused here, by name, before a byte is sent.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import msgpack
import numpy as np
from numpy.typing import ArrayLike, NDArray

from penstock.errors import InternalError, InvalidArgumentError, NotFoundError, PenstockError, to_wire

REQUEST, RESPONSE, NOTIFICATION = 0, 1, 2
HOT_METHODS = frozenset({"predict", "predict_vectors"})
ADMIN_METHODS = frozenset({"materialize", "apply", "erase", "promote", "rollback", "canary", "shadow"})
AUTH_METHOD = "auth"
DATA_METHODS = frozenset({"features", "label", "push", "models", "health", "stats", "drift"})
METHODS = HOT_METHODS | DATA_METHODS | ADMIN_METHODS
# The same call made twice leaves the same state, so a client may repeat it after a lost connection. Not so a
# push: its source may have no event ids, and then each row is an event of its own.
IDEMPOTENT_METHODS = HOT_METHODS | DATA_METHODS - {"push"}

DEFAULT_ADDRESS = "tcp://127.0.0.1:7064"
MAX_MESSAGE_BYTES = 64 << 20  # of one reply, as the clients accept it
_MAX_ITEMS = 1 << 22  # of one array or map in a reply: a header cannot make a client reserve more

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_PLAIN = frozenset({type(None), bool, int, float, str})
_MISSING = frozenset({"NAType", "NaTType"})  # of pandas, which is not imported to find out

T = TypeVar("T")
Values = Any  # a scalar, or a list, numpy array, pandas, polars or pyarrow column of them
Columns = Mapping[str, Values]
Time = int | datetime | np.datetime64
Token = str | Callable[[], str]


@dataclass(frozen=True)
class Address:
    """Where a server listens: TCP (`host`, `port`), with `tls` or without, or a Unix socket (`path`)."""

    host: str | None = None
    port: int = 0
    path: str | None = None
    tls: bool = False

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in (self.host or "") else self.host
        return f"{'tls' if self.tls else 'tcp'}://{host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address of "tcp://host:port", "tls://host:port" or "unix:///path"; InvalidArgumentError
    otherwise."""
    try:
        url = urlsplit(text)
        port = url.port
    except (ValueError, AttributeError, TypeError):
        url, port = urlsplit(""), None
    if not (url.query or url.fragment or url.username is not None):
        if url.scheme in ("tcp", "tls") and url.hostname and port is not None and not url.path:
            return Address(host=url.hostname, port=port, tls=url.scheme == "tls")
        if url.scheme == "unix" and not url.netloc and len(url.path) > 1:
            return Address(path=url.path)
    raise InvalidArgumentError(
        f'address is {text!r}; expected "tcp://host:port", "tls://host:port" or "unix:///path"'
    )


def to_micros(value: Time, field: str = "now") -> int:
    """Return `value` as int64 microseconds UTC: an int is already that, a naive time is UTC."""
    if isinstance(value, np.datetime64) and not np.isnat(value):
        return int(value.astype("datetime64[us]").astype(np.int64))
    if isinstance(value, datetime) and type(value).__name__ not in _MISSING:
        aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        return (aware - _EPOCH) // _MICROSECOND
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if not -(1 << 63) <= value < 1 << 63:
            raise InvalidArgumentError(f"{field} is {value}; expected microseconds UTC within int64")
        return int(value)
    raise InvalidArgumentError(f"{field} is {value!r}; expected a datetime or int microseconds UTC")


def to_column(field: str, values: Values) -> Any:
    """Return a column as MessagePack has it: a plain scalar (one row), or a list of plain scalars.

    NaN stays NaN; None and the missing values of pandas become nil; times become microseconds.
    """
    if type(values) in _PLAIN:
        return values
    if isinstance(values, np.ndarray):
        if values.ndim == 0:
            return _plain(field, values[()])
        if values.ndim != 1:
            raise InvalidArgumentError(f"{field} has {values.ndim} dimensions; expected 1")
        if values.dtype.kind in "biufU":
            return values.tolist()
        items: list[Any] = list(values)
    elif isinstance(values, list | tuple):
        items = list(values)
    elif hasattr(values, "to_pylist"):  # pyarrow
        items = values.to_pylist()
    elif hasattr(values, "to_list"):  # pandas, polars
        items = values.to_list()
    else:
        return _plain(field, values)
    kinds = set(map(type, items))
    if str in kinds and float in kinds:  # pandas marks a missing string with NaN
        items = [None if item != item else item for item in items]
    if kinds <= _PLAIN:
        return items
    return [_plain(f"{field}[{i}]", item) for i, item in enumerate(items)]


def to_columns(group: str, columns: Any) -> dict[str, Any]:
    """Return the columns of a mapping or a pandas, pyarrow or polars frame, each as by `to_column`."""
    if type(columns) is dict:
        for name, values in columns.items():
            if type(values) not in _PLAIN or type(name) is not str:
                break
        else:
            return columns  # one row of plain scalars, as it is
    if hasattr(columns, "items"):
        pairs: Iterable[tuple[Any, Any]] = columns.items()
    elif hasattr(columns, "__arrow_c_stream__"):
        import pyarrow

        table = pyarrow.table(columns)
        pairs = zip(table.column_names, table.columns)
    else:
        raise InvalidArgumentError(
            f"{group} is a {type(columns).__name__}; expected a mapping of columns or a table"
        )
    made: dict[str, Any] = {}
    for name, values in pairs:
        if not isinstance(name, str):
            raise InvalidArgumentError(f"a column name of {group} is {name!r}; expected a string")
        made[name] = to_column(f"{group}.{name}", values)
    return made


def row_count(group: str, columns: Mapping[str, Any]) -> int:
    """Return how many rows plain `columns` have; InvalidArgumentError where they disagree."""
    first, rows = "", -1
    for name, values in columns.items():
        n = len(values) if isinstance(values, list) else 1
        if rows < 0:
            first, rows = name, n
        elif n != rows:
            raise InvalidArgumentError(
                f"{group}.{name} has {n} rows; expected {rows}, as {group}.{first} has"
            )
    if rows < 0:
        raise InvalidArgumentError(f"{group} has no column; expected at least one")
    return rows


def split_table(
    columns: Mapping[str, Any], entities: Iterable[str], chunk_rows: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Yield (entities, inputs) of each chunk of plain `columns`; `entities` names those that are keys."""
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise InvalidArgumentError(f"chunk_rows is {chunk_rows!r}; expected a whole number of at least 1")
    keys = list(entities)
    for name in keys:
        if name not in columns:
            raise InvalidArgumentError(f'table has no column "{name}"; expected {", ".join(keys)}')
    rows = row_count("table", columns)
    if rows == 0:
        raise InvalidArgumentError("table has no rows; expected at least one")
    lists = {name: v if isinstance(v, list) else [v] for name, v in columns.items()}
    for start in range(0, rows, chunk_rows):
        part = {name: values[start : start + chunk_rows] for name, values in lists.items()}
        inputs = {name: part[name] for name in part if name not in keys}
        yield {name: part[name] for name in keys}, inputs or None


@dataclass(slots=True)
class Prediction:
    """The answer to one `predict`.

    Attributes:
        scores: float64 [n], or [n, k] for k outputs, in the order of the rows asked.
        version: version of the model that ran.
        request_ids: uint64 [n]; `label` takes them.
        status: uint8 [n] or [n, views] (0 present, 1 null, 2 not found, 3 expired), where the server told it.
        timings: nanoseconds by stage (receive, gather, queue, run, total), where asked for.
    """

    scores: NDArray[np.float64]
    version: str
    request_ids: NDArray[np.uint64]
    status: NDArray[np.uint8] | None = None
    timings: dict[str, int] | None = None


@dataclass(frozen=True)
class PredictionBatch:
    """The answer to `predict_many`: as `Prediction`, for the whole table.

    `versions` are the distinct versions that ran, in order of first use: more than one only when the model
    was swapped meanwhile.
    """

    scores: NDArray[np.float64]
    request_ids: NDArray[np.uint64]
    versions: tuple[str, ...]


def join_predictions(parts: list[Prediction]) -> PredictionBatch:
    """Return the parts, in order, as one batch."""
    return PredictionBatch(
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.request_ids for part in parts]),
        tuple(dict.fromkeys(part.version for part in parts)),
    )


@dataclass(frozen=True)
class Call(Generic[T]):
    """One call, packed but for what differs by attempt: its msgid and the time that is left.

    `deadline_ms` is the caller's; a call that has one tells each attempt's server what is left of it.
    """

    method: str
    params: bytes  # the leading params, packed, without the header of the array
    count: int
    decode: Callable[[Any], T]
    options: Mapping[str, Any] | None = None
    deadline_ms: float | None = None

    @property
    def idempotent(self) -> bool:
        return self.method in IDEMPOTENT_METHODS

    def packed_params(self, remaining_ms: float | None = None) -> bytes:
        """Return the params; `remaining_ms` replaces the deadline of a call that has one."""
        options = dict(self.options) if self.options else {}
        if self.deadline_ms is not None:
            options["deadline_ms"] = self.deadline_ms if remaining_ms is None else remaining_ms
        if options:
            return bytes([0x90 | self.count + 1]) + self.params + msgpack.packb(options)
        return bytes([0x90 | self.count]) + self.params

    def message(self, msgid: int, remaining_ms: float | None = None) -> bytes:
        """Return the request's bytes, its params as by `packed_params`."""
        head = b"\x94\x00" + msgpack.packb(msgid) + msgpack.packb(self.method)
        return head + self.packed_params(remaining_ms)


def predict_params(
    model: str,
    entities: Columns,
    inputs: Columns | None = None,
    *,
    now: Time | None = None,
    request_id: ArrayLike | None = None,
    priority: str | None = None,
    timings: bool = False,
    no_cache: bool = False,
    traceparent: str | None = None,
) -> tuple[str, dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    """Return the params of `predict` as plain values; InvalidArgumentError for what the wire cannot carry."""
    _text("model", model)
    columns = to_columns("entities", entities)
    features = to_columns("inputs", inputs) if inputs is not None else None
    options: dict[str, Any] = {}
    if now is not None:
        options["now"] = to_micros(now)
    if request_id is not None:
        options["request_id"] = to_column("request_id", request_id)
    if priority is not None:
        options["priority"] = priority
    if timings:
        options["timings"] = True
    if no_cache:
        options["no_cache"] = True
    if traceparent is not None:
        options["traceparent"] = traceparent
    return model, columns, features, options


def pack_predict(params: tuple[Any, ...]) -> bytes:
    """Return the bytes of what `predict_params` made; InvalidArgumentError names what cannot be sent."""
    try:
        return _packers.packer.pack(params)
    except (OverflowError, ValueError, TypeError, UnicodeEncodeError):
        _leading_params(params)
        raise


def _leading_params(params: tuple[Any, ...]) -> bytes:
    return b"".join(_pack(name, part) for name, part in zip(("model", "entities", "inputs"), params))


def predict_call(
    model: str,
    entities: Columns,
    inputs: Columns | None = None,
    *,
    deadline_ms: float | None = None,
    **options: Any,
) -> Call[Prediction]:
    """Return the call of `predict`, with the options of `predict_params`.

    Raises InvalidArgumentError for what the wire cannot carry.
    """
    params = predict_params(model, entities, inputs, **options)
    return Call(
        "predict", _leading_params(params), 3, decode_prediction, params[3], check_deadline(deadline_ms)
    )


def predict_vectors_call(
    model: str,
    rows: ArrayLike,
    *,
    deadline_ms: float | None = None,
    request_id: ArrayLike | None = None,
    timings: bool = False,
    traceparent: str | None = None,
) -> Call[Prediction]:
    """Return the call of `predict_vectors`; `rows` are float32 [n, F] in the order of the model's inputs."""
    _text("model", model)
    try:
        array = np.asarray(rows, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"rows cannot be float32: {error}") from error
    if array.ndim != 2:
        raise InvalidArgumentError(f"rows has shape {array.shape}; expected [rows, features]")
    options: dict[str, Any] = {}
    if request_id is not None:
        options["request_id"] = to_column("request_id", request_id)
    if timings:
        options["timings"] = True
    if traceparent is not None:
        options["traceparent"] = traceparent
    data = np.ascontiguousarray(array, dtype="<f4").tobytes()
    params = _pack("rows", model) + _pack("rows", data) + _pack("rows", len(array))
    return Call("predict_vectors", params, 3, decode_prediction, options, check_deadline(deadline_ms))


def plain_call(method: str, *params: Any) -> Call[Any]:
    """Return the call of any other method with plain `params`; trailing None are left out."""
    given = list(params)
    while given and given[-1] is None:
        given.pop()
    if len(given) > 14:
        raise InvalidArgumentError(f"{method} has {len(given)} params; expected at most 14")
    return Call(
        method, b"".join(_pack("params", param) for param in given), len(given), lambda result: result
    )


def auth_call(token: Token) -> Call[Any]:
    """Return the call of `auth`; a token that is a function is asked for the one that holds now."""
    text = token() if callable(token) else token
    if not isinstance(text, str) or not text:
        raise InvalidArgumentError(f"token is a {type(text).__name__}; expected a non-empty string")
    return plain_call(AUTH_METHOD, text)


def label_call(request_ids: ArrayLike, labels: Any, times: Any = None) -> Call[dict[str, Any]]:
    """Return the call of `label`: one id, label and (optional) time of becoming known per row."""
    ids = _listed("request_ids", request_ids)
    values = _listed("labels", labels)
    if len(ids) != len(values):
        raise InvalidArgumentError(
            f"labels has {len(values)} values; expected {len(ids)}, one per request_id"
        )
    stamps = None
    if times is not None:
        stamps = _listed("times", times)
        if len(stamps) != len(ids):
            raise InvalidArgumentError(f"times has {len(stamps)} values; expected {len(ids)}")
    return plain_call("label", ids, values, stamps)


def push_call(source: str, rows: Any) -> Call[int]:
    """Return the call of `push`; `rows` are columns (mapping or frame) or a list of mappings."""
    _text("source", source)
    if isinstance(rows, list | tuple):
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping) or row.keys() != rows[0].keys():
                raise InvalidArgumentError(
                    f"rows[{i}] is {row!r}; expected a mapping with the columns of rows[0]"
                )
        rows = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    columns = to_columns("rows", rows)
    row_count("rows", columns)
    call = plain_call("push", source, columns)
    return Call(call.method, call.params, call.count, _accepted)


def _accepted(result: Any) -> int:
    try:
        return int(result["accepted"])
    except (KeyError, TypeError, ValueError) as error:
        raise InternalError(f"the reply is no count: {error}") from error


def decode_prediction(result: Any) -> Prediction:
    """Return the Prediction of a reply's map; InternalError if it is none."""
    try:
        scores = result["scores"]
        if isinstance(scores, bytes):
            values = np.frombuffer(scores, dtype="<f4").astype(np.float64)
        else:
            values = np.array(scores, dtype=np.float64)
        ids = np.array(result["request_ids"], dtype=np.uint64)
        status = result.get("status")
        return Prediction(
            _by_row(values, len(ids)),
            str(result["version"]),
            ids,
            None if status is None else _by_row(np.array(status, dtype=np.uint8), len(ids)),
            result.get("timings"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InternalError(f"the reply is no prediction: {type(error).__name__}: {error}") from error


def pack_notification(method: str, *params: Any) -> bytes:
    """Return the bytes of a notification."""
    return msgpack.packb([NOTIFICATION, method, list(params)])


def pack_error(msgid: int | None, error: PenstockError) -> bytes:
    """Return the bytes of an error response."""
    return msgpack.packb([RESPONSE, msgid, to_wire(error), None])


def unpacker(max_message_bytes: int = MAX_MESSAGE_BYTES) -> msgpack.Unpacker:
    """Return a stream decoder of replies, bounded in bytes and items."""
    return msgpack.Unpacker(
        raw=False,
        strict_map_key=False,
        max_buffer_size=max_message_bytes,
        max_array_len=_MAX_ITEMS,
        max_map_len=_MAX_ITEMS,
    )


def entity_names(model: str, models: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the entity columns of `model` from the reply of `models`; NotFoundError if it has none such."""
    if model not in models:
        raise NotFoundError(f'model is "{model}"; expected one of: {", ".join(sorted(models))}')
    return tuple(models[model]["entities"])


def unpack_params(params: bytes) -> list[Any]:
    """Return the params of a request that the native core passed on; InvalidArgumentError if not plain."""
    try:
        made = msgpack.unpackb(params, raw=False, strict_map_key=False, timestamp=3)
    except (ValueError, OverflowError, TypeError, msgpack.UnpackException) as error:
        raise InvalidArgumentError(f"params cannot be read: {error}") from error
    if not isinstance(made, list):
        raise InvalidArgumentError(f"params is a {type(made).__name__}; expected a list")
    return made


def pack_result(result: Any) -> bytes:
    """Return the MessagePack of what an engine's method returned; numpy and times become plain."""
    return msgpack.packb(result, default=_default)


def check_deadline(deadline_ms: float | None) -> float | None:
    """Return `deadline_ms`; InvalidArgumentError unless it is None or a number above 0."""
    if deadline_ms is None:
        return None
    if isinstance(deadline_ms, bool) or not isinstance(deadline_ms, int | float) or not deadline_ms > 0:
        raise InvalidArgumentError(f"deadline_ms is {deadline_ms!r}; expected a number above 0")
    return min(float(deadline_ms), 1e12) if math.isfinite(deadline_ms) else 1e12


def _plain(field: str, value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    if type(value).__name__ in _MISSING or (isinstance(value, np.datetime64) and np.isnat(value)):
        return None
    if isinstance(value, datetime | np.datetime64):
        return to_micros(value, field)
    if isinstance(value, np.generic):
        value = value.item()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise InvalidArgumentError(
        f"{field} is {value!r} ({type(value).__name__}); expected a number, string, bool, time or None"
    )


def _listed(field: str, values: Any) -> list[Any]:
    column = to_column(field, values)
    return column if isinstance(column, list) else [column]


def _by_row(values: NDArray[Any], rows: int) -> NDArray[Any]:
    return values if rows == 0 or len(values) == rows else values.reshape(rows, -1)


def _text(field: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidArgumentError(f"{field} is {value!r}; expected a non-empty string")


def _pack(field: str, value: Any) -> bytes:
    try:
        return msgpack.packb(value, default=_default)
    except (OverflowError, ValueError, TypeError, UnicodeEncodeError) as error:
        raise InvalidArgumentError(f"{field} cannot be sent: {error}") from error


def _default(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, datetime | np.datetime64):
        return to_micros(value, "a time")
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, frozenset | set):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__} has no MessagePack form")


class _Packers(threading.local):
    """A packer for each thread: one may call back into Python, and so let another thread in."""

    def __init__(self) -> None:
        self.packer = msgpack.Packer(default=_default)


_packers = _Packers()
