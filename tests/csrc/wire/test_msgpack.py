"""Cursor, Writer and the frame scanner against the `msgpack` package."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import _core

_INTS = st.integers(-(2**63), 2**64 - 1) | st.sampled_from(
    [s * 2**p + d for p in (0, 5, 7, 8, 15, 16, 31, 32, 63) for s in (1, -1) for d in (-1, 0, 1)]
).filter(lambda i: -(2**63) <= i < 2**64)
_SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 255, 256, 65535, 65536])
_SCALARS = (
    st.none()
    | st.booleans()
    | _INTS
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | _SIZES.map(lambda n: "x" * n)
    | _SIZES.map(lambda n: b"x" * n)
    | st.builds(msgpack.ExtType, st.integers(0, 127), _SIZES.map(lambda n: b"x" * n))
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=5), inner, max_size=20),
    max_leaves=20,
)


@given(_VALUES)
@settings(deadline=None)
def test_transcode_equals_packb(value: Any) -> None:
    packed = msgpack.packb(value)
    assert _core.wire_transcode(packed) == packed


@given(st.floats(width=32, allow_nan=False))
def test_transcode_keeps_float32(value: float) -> None:
    packed = msgpack.packb(value, use_single_float=True)
    assert _core.wire_transcode(packed) == packed


@pytest.mark.parametrize("size", [15, 16, 65535, 65536])
def test_containers_take_the_smallest_head(size: int) -> None:
    for value in ([1] * size, dict.fromkeys(range(size))):
        packed = msgpack.packb(value)
        assert _core.wire_transcode(packed) == packed


@pytest.mark.parametrize(
    ("wide", "value"),
    [
        (b"\xcf" + struct.pack(">Q", 5), 5),
        (b"\xd3" + struct.pack(">q", 200), 200),
        (b"\xd3" + struct.pack(">q", -1), -1),
        (b"\xd0\x80", -128),
        (b"\xdb" + struct.pack(">I", 2) + b"ab", "ab"),
        (b"\xdd" + struct.pack(">I", 1) + b"\x07", [7]),
        (b"\xc9" + struct.pack(">I", 1) + b"\x05z", msgpack.ExtType(5, b"z")),
    ],
)
def test_wide_encodings_become_the_smallest(wide: bytes, value: Any) -> None:
    assert _core.wire_transcode(wide) == msgpack.packb(value)


@given(_VALUES)
@settings(deadline=None, max_examples=30)
def test_cut_value_is_refused(value: Any) -> None:
    packed = msgpack.packb(value)
    for cut in {0, 1, len(packed) // 2, len(packed) - 1} - {len(packed)}:
        with pytest.raises(ValueError, match="one MessagePack value"):
            _core.wire_transcode(packed[:cut])


def _stream() -> tuple[bytes, list[int]]:
    big = [1.5, "é" * 40, b"\xc1" * 300, {"a": [[], {}, [1, [2]]]}, -5, 2**40, None, True]
    frames = [[0, 1, "health", []], [0, 2, "other", big], [0, 300, "predict", ["m", {}]], [0, 4, "x", [{}]]]
    return b"".join(msgpack.packb(f) for f in frames), [1, 2, 300, 4]


def _pull(session: _core.WireSession) -> list[int]:
    return [message[1] for message in iter(session.next_message, None)]


def test_every_split_of_a_stream_in_two() -> None:
    stream, msgids = _stream()
    for cut in range(len(stream) + 1):
        session = _core.WireSession()
        session.feed(stream[:cut])
        got = _pull(session)
        session.feed(stream[cut:])
        assert got + _pull(session) == msgids


def test_stream_in_single_bytes_through_get_buffer() -> None:
    stream, msgids = _stream()
    session = _core.WireSession()
    got = []
    for byte in stream:
        room = session.get_buffer(1)
        room[0] = byte
        session.advance(1)
        got += _pull(session)
    assert got == msgids


def test_a_message_larger_than_the_first_buffer_arrives_whole() -> None:
    frame = msgpack.packb([0, 9, "push", [b"z" * 300_000]])
    session = _core.WireSession()
    session.feed(frame + frame[:10])
    kind, msgid, method, params, status = session.next_message()
    assert (kind, msgid, method, status) == ("other", 9, "push", None)
    assert params == msgpack.packb([b"z" * 300_000])
    assert session.next_message() is None


def _refused(session: _core.WireSession, match: str) -> None:
    kind, msgid, _, _, status = session.next_message()
    assert (kind, msgid) == ("framing_error", None)
    assert status[0] == "INVALID_ARGUMENT"
    assert match in status[1]
    assert session.closed
    reply = msgpack.unpackb(session.take_output())
    assert reply == [1, None, {"code": "INVALID_ARGUMENT", "message": status[1], "retryable": False}, None]
    session.output_sent()
    assert session.next_message() is None
    assert session.take_output() is None
    assert len(session.get_buffer(10)) == 0
    with pytest.raises(RuntimeError, match="closed"):
        session.feed(b"\x00")


def test_reserved_byte_is_one_error_then_closed() -> None:
    session = _core.WireSession()
    session.feed(b"\x94\x00\x01\xc1" + msgpack.packb([0, 1, "x", []]))
    _refused(session, "0xc1")


@pytest.mark.parametrize("head", [b"\xc6", b"\xdb", b"\xdd", b"\xdf"])
def test_announced_gigabyte_is_refused_without_allocating(head: bytes) -> None:
    session = _core.WireSession()
    session.feed(b"\x94\x00\x01" + head + struct.pack(">I", 2**30))
    _refused(session, str(16 << 20))
    assert session.input_capacity <= 16 << 10


def test_announced_length_within_the_limit_allocates_only_what_came() -> None:
    session = _core.WireSession()
    session.feed(b"\x94\x00\x01\xc6" + struct.pack(">I", 15 << 20))
    assert session.next_message() is None
    session.get_buffer(1 << 20)
    assert session.input_capacity <= 32 << 10
    assert not session.closed


def test_message_limit_is_exact() -> None:
    frame = msgpack.packb([0, 1, "x", [b"z" * 100]])
    session = _core.WireSession(max_message_bytes=len(frame))
    session.feed(frame)
    assert session.next_message()[0] == "other"
    session = _core.WireSession(max_message_bytes=len(frame) - 1)
    session.feed(frame)
    _refused(session, f"{len(frame) - 1} bytes")


def test_depth_limit_is_exact() -> None:
    frame = msgpack.packb([0, 1, "x", [[[]]]])
    session = _core.WireSession(max_depth=4)
    session.feed(frame)
    assert session.next_message()[0] == "other"
    session = _core.WireSession(max_depth=3)
    session.feed(frame)
    _refused(session, "3 levels")
