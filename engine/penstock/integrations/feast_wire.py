"""Feast's bytes: protobuf messages, entity keys and hash fields, as its registry and online stores hold them.

Only what those need: a reader of protobuf's wire format, `feast.types.Value` in both directions, the entity
key of serialization version 3 (`feast/infra/key_encoding_utils.py`) and the field names of the Redis store
(`feast/infra/online_stores/helpers.py`). Nothing here imports Feast. Pure functions; any thread may call.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import pyarrow as pa

from penstock.errors import InvalidArgumentError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Numbers of feast.types.ValueType, which are the field numbers of feast.types.Value.
T_BYTES, T_STRING, T_INT32, T_INT64, T_DOUBLE, T_FLOAT, T_BOOL, T_TIMESTAMP = range(1, 9)
T_NULL = 19
_LIST = 10  # number of a list type: that of its elements + 10
TYPE_NAMES = {T_BYTES: "Bytes", T_STRING: "String", T_INT32: "Int32", T_INT64: "Int64", T_DOUBLE: "Float64",
              T_FLOAT: "Float32", T_BOOL: "Bool", T_TIMESTAMP: "UnixTimestamp", 20: "Map", 32: "Json",
              34: "Struct"}  # fmt: skip
_SCALARS = {T_BYTES: pa.binary(), T_STRING: pa.string(), T_INT32: pa.int32(), T_INT64: pa.int64(),
            T_DOUBLE: pa.float64(), T_FLOAT: pa.float32(), T_BOOL: pa.bool_(),
            T_TIMESTAMP: pa.timestamp("us", "UTC")}  # fmt: skip


_TAGS = {T_DOUBLE: T_DOUBLE << 3 | FIXED64, T_INT64: T_INT64 << 3, T_STRING: T_STRING << 3 | BYTES}
_DOUBLE = struct.Struct("<d")
_INT_KEY = struct.Struct("<IIq")


def type_name(number: int) -> str:
    """Feast's name of a value type."""
    if number - _LIST in _SCALARS:
        return f"Array({TYPE_NAMES[number - _LIST]})"
    return TYPE_NAMES.get(number, f"number {number}")


def arrow_type(number: int) -> pa.DataType | None:
    """The Arrow type of a value type: of scalars and lists of them; None for all others."""
    if number in _SCALARS:
        return _SCALARS[number]
    return pa.list_(_SCALARS[number - _LIST]) if number - _LIST in _SCALARS else None


# Protobuf


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number does not end")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & (2**64 - 1), at
        shift += 7


def fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value) of each field of a message; value is an int or bytes.

    Raises:
        ValueError: the bytes are no message.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        value: Any
        if kind == VARINT:
            value, at = _varint(data, at)
        elif kind in (BYTES, FIXED32, FIXED64):
            size = {FIXED32: 4, FIXED64: 8}.get(kind, 0)
            if kind == BYTES:
                size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("a field is cut short")
        else:
            raise ValueError(f"wire type {kind} is unknown")
        if number == 0:
            raise ValueError("field number 0")
        yield number, kind, value


class Message:
    """A message by field numbers; absent fields read as protobuf's defaults.

    Its methods raise ValueError where a field is of another kind than asked for.
    """

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[Any]] = {}
        for number, _, value in fields(data):
            self._fields.setdefault(number, []).append(value)

    def has(self, number: int) -> bool:
        return number in self._fields

    def _all(self, number: int, kind: type) -> list[Any]:
        found = self._fields.get(number, [])
        if not all(isinstance(value, kind) for value in found):
            raise ValueError(f"field {number} is of another kind than {kind.__name__}")
        return found

    def text(self, number: int) -> str:
        return self.data(number).decode()

    def data(self, number: int) -> bytes:
        found: list[bytes] = self._all(number, bytes)
        return found[-1] if found else b""

    def number(self, number: int) -> int:
        found = self._all(number, int)
        return signed(found[-1]) if found else 0

    def message(self, number: int) -> Message:
        return Message(self.data(number))

    def messages(self, number: int) -> list[Message]:
        return [Message(data) for data in self._all(number, bytes)]

    def texts(self, number: int) -> list[str]:
        return [data.decode() for data in self._all(number, bytes)]

    def mapping(self, number: int) -> dict[str, str]:
        """A map of strings."""
        return {entry.text(1): entry.text(2) for entry in self.messages(number)}


def signed(value: int) -> int:
    """A 64-bit varint as a signed number."""
    return value - 2**64 if value >= 2**63 else value


def encode_varint(value: int) -> bytes:
    """A signed 64-bit number as a varint."""
    value &= 2**64 - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, kind: int, payload: bytes) -> bytes:
    size = encode_varint(len(payload)) if kind == BYTES else b""
    return encode_varint(number << 3 | kind) + size + payload


def timestamp_us(data: bytes) -> int:
    """Microseconds of a google.protobuf.Timestamp, rounded down."""
    found = {1: 0, 2: 0}
    for number, kind, value in fields(data):
        if kind != VARINT:
            raise ValueError(f"field {number} of a time is of wire type {kind}")
        found[number] = signed(value)
    return found[1] * 1_000_000 + found[2] // 1000


def encode_timestamp(us: int) -> bytes:
    """A google.protobuf.Timestamp."""
    seconds, rest = divmod(us, 1_000_000)
    out = _field(1, VARINT, encode_varint(seconds)) if seconds else b""
    return out + (_field(2, VARINT, encode_varint(rest * 1000)) if rest else b"")


# feast.types.Value


def decode_value(data: bytes, expected: int) -> Any:
    """The Python value of a serialized Value; None if it holds none.

    Args:
        expected: the value type that it must have: of a scalar or a list of them.

    Raises:
        ValueError: the bytes are no Value, or one of another type.
    """
    if not data:
        return None
    # What nearly all are: one field, whose tag is a byte.
    if data[0] == _TAGS.get(expected):
        if expected == T_DOUBLE and len(data) == 9:
            return _DOUBLE.unpack_from(data, 1)[0]
        if expected in (T_INT64, T_STRING):
            number, at = _varint(data, 1)
            if expected == T_INT64 and at == len(data):
                return signed(number)
            if expected == T_STRING and at + number == len(data):
                return data[at:].decode()
    found: Any = None
    for number, kind, value in fields(data):
        if number == T_NULL:
            found = None
        elif number != expected:
            raise ValueError(f"a value of type {type_name(number)}")
        elif number in _SCALARS:
            found = _scalar(number, kind, value)
        elif number - _LIST in _SCALARS and kind == BYTES:
            found = _elements(number - _LIST, value)
        else:
            raise ValueError(f"a value of type {type_name(number)}")
    return found


def _scalar(number: int, kind: int, value: Any) -> Any:
    expected = {T_BYTES: BYTES, T_STRING: BYTES, T_DOUBLE: FIXED64, T_FLOAT: FIXED32}.get(number, VARINT)
    if kind != expected:
        raise ValueError(f"a {type_name(number)} of wire type {kind}")
    if number == T_BYTES:
        return bytes(value)
    if number == T_STRING:
        return bytes(value).decode()
    if number == T_DOUBLE:
        return struct.unpack("<d", value)[0]
    if number == T_FLOAT:
        return struct.unpack("<f", value)[0]
    if number == T_BOOL:
        return bool(value)
    whole = signed(value)
    if number != T_TIMESTAMP:
        return whole
    if whole == -(2**63):  # what Feast writes for NaT
        return None
    try:
        return _EPOCH + timedelta(seconds=whole)
    except OverflowError as error:
        raise ValueError(f"a time of {whole} seconds") from error


def _elements(number: int, data: bytes) -> list[Any]:
    found: list[Any] = []
    for at, kind, value in fields(data):
        if at != 1:
            raise ValueError(f"field {at} in a list")
        if kind == BYTES and number not in (T_BYTES, T_STRING):  # packed
            found += [_scalar(number, k, v) for k, v in _packed(number, value)]
        else:
            found.append(_scalar(number, kind, value))
    return found


def _packed(number: int, data: bytes) -> Iterator[tuple[int, Any]]:
    size = {T_DOUBLE: 8, T_FLOAT: 4}.get(number)
    at = 0
    while at < len(data):
        if size is None:
            value, at = _varint(data, at)
            yield VARINT, value
        else:
            yield (FIXED64 if size == 8 else FIXED32), data[at : at + size]
            at += size


def encode_value(number: int, value: Any) -> bytes:
    """A serialized Value of a scalar type; None gives the empty Value, Feast's null. A time is whole seconds.

    Raises:
        InvalidArgumentError: a type that is no scalar.
    """
    if value is None:
        return b""
    if number not in _SCALARS:
        raise InvalidArgumentError(f"a {type_name(number)} cannot be written into Feast's online store")
    if number == T_BYTES:
        return _field(number, BYTES, bytes(value))
    if number == T_STRING:
        return _field(number, BYTES, str(value).encode())
    if number == T_DOUBLE:
        return _field(number, FIXED64, struct.pack("<d", value))
    if number == T_FLOAT:
        return _field(number, FIXED32, struct.pack("<f", value))
    return _field(number, VARINT, encode_varint(int(value)))


# Keys


class KeyEncoder:
    """Serialized entity keys, version 3: names and values in the order of the names."""

    def __init__(self, names: Sequence[str], types: Sequence[int]) -> None:
        """Prepare.

        Args:
            names: join keys.
            types: the value type of each: String, Bytes, Int32, Int64 or UnixTimestamp.
        """
        order = sorted(range(len(names)), key=lambda i: names[i])
        encoded = [names[i].encode() for i in order]
        heads = [struct.pack("<II", T_STRING, len(name)) + name for name in encoded]
        self._prefix = struct.pack("<I", len(names)) + b"".join(heads)
        self._values = [(i, names[i], types[i]) for i in order]

    def encode(self, values: Sequence[Any]) -> bytes:
        """The key of int, str or bytes values, in the order of the names given.

        Raises:
            InvalidArgumentError: a value that does not fit its type.
        """
        out = self._prefix
        for i, name, kind in self._values:
            value = values[i]
            if kind == T_INT64 and type(value) is int and -(2**63) <= value < 2**63:
                out += _INT_KEY.pack(T_INT64, 8, value)
                continue
            data = _key_value(name, kind, value)
            out += struct.pack("<II", kind, len(data)) + data
        return out


def entity_key(names: Sequence[str], types: Sequence[int], values: Sequence[Any]) -> bytes:
    """One serialized entity key; see `KeyEncoder`."""
    return KeyEncoder(names, types).encode(values)


def _key_value(name: str, number: int, value: Any) -> bytes:
    try:
        if number == T_STRING and isinstance(value, str):
            return value.encode()
        if number == T_BYTES and isinstance(value, bytes):
            return value
        if number in (T_INT32, T_INT64, T_TIMESTAMP) and isinstance(value, int):
            return struct.pack("<i" if number == T_INT32 else "<q", value)
    except struct.error as error:
        raise InvalidArgumentError(f"join key '{name}' is {value!r}: {error}") from error
    raise InvalidArgumentError(f"join key '{name}' is {value!r}; expected {type_name(number)}")


def murmur3_32(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0 (Appleby's reference code, public domain)."""

    def mixed(k: int) -> int:
        k = k * 0xCC9E2D51 & 0xFFFFFFFF
        return ((k << 15 | k >> 17) & 0xFFFFFFFF) * 0x1B873593 & 0xFFFFFFFF

    h, whole = 0, len(data) // 4 * 4
    for at in range(0, whole, 4):
        h ^= mixed(int.from_bytes(data[at : at + 4], "little"))
        h = ((h << 13 | h >> 19) * 5 + 0xE6546B64) & 0xFFFFFFFF
    if whole < len(data):
        h ^= mixed(int.from_bytes(data[whole:], "little"))
    h ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ h >> shift) * factor & 0xFFFFFFFF
    return h ^ h >> 16


@lru_cache(maxsize=65_536)
def redis_field(view: str, feature: str) -> bytes:
    """The hash field of a feature in Feast's Redis layout."""
    return struct.pack("<I", murmur3_32(f"{view}:{feature}".encode()))


def redis_time_field(view: str) -> bytes:
    """The hash field of a view's event time."""
    return f"_ts:{view}".encode()
