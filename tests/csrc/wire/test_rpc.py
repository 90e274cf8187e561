"""Requests in flight, call decoding, replies and the golden frames."""

from __future__ import annotations

import ast
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest

from penstock import _core

_GOLDEN = Path(__file__).parents[2] / "golden"
_NAMES = sorted(path.stem for path in _GOLDEN.glob("*.bin"))


def _golden(name: str) -> tuple[bytes, Any]:
    text = (_GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    return (_GOLDEN / f"{name}.bin").read_bytes(), ast.literal_eval(text)


def _request(session: _core.WireSession, frame: Any) -> tuple[Any, ...]:
    session.feed(msgpack.packb(frame))
    return session.next_message()


@pytest.mark.parametrize("name", _NAMES)
def test_golden_bytes_and_text_agree(name: str) -> None:
    frame, value = _golden(name)
    assert msgpack.packb(value) == frame
    assert msgpack.unpackb(frame) == value
    assert _core.wire_transcode(frame) == frame


# The example of the specification of W3C Trace Context.
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_golden_requests_decode() -> None:
    session = _core.WireSession()
    for name in ("request_predict", "request_predict_vectors", "request_health", "notification_cancel"):
        session.feed(_golden(name)[0])
    kind, msgid, _, params, _ = session.next_message()
    assert (kind, msgid) == ("predict", 1)
    call = _core.wire_decode_predict(params, {"city": "string", "km": "float64"})
    assert call["model"] == "fare"
    assert call["rows"] == 2
    assert call["entities"] == {"user_id": [7, 8], "city": ["Zürich", None]}
    assert call["inputs"] == {"km": [1.5, 2.0]}
    assert call["options"] == {
        "deadline_us": 50_000,
        "now_us": None,
        "request_id": [11, 12],
        "priority": "high",
        "timings": False,
        "no_cache": False,
        "traceparent": None,
    }
    kind, msgid, _, params, _ = session.next_message()
    assert (kind, msgid) == ("predict_vectors", 2)
    call = _core.wire_decode_predict_vectors(params)
    assert (call["model"], call["rows"], call["data"]) == ("fare", 2, struct.pack("<4f", 1, 2, 3, 4))
    assert session.next_message()[:3] == ("other", 3, "health")
    assert session.next_message()[:3] == ("cancel", 1, "cancel")


def test_golden_replies_encode() -> None:
    session = _core.WireSession()

    def check(name: str, fits: bool) -> None:
        assert fits
        assert session.take_output() == _golden(name)[0]
        session.output_sent()

    scores, ids = [0.25, -1.5], [11, 12]
    check("response_scores", session.reply_scores(1, scores, "3", ids))
    timings = [("features", 1200), ("model", 34)]
    check("response_scores_full", session.reply_scores(1, scores, "3", ids, [0, 2], timings))
    check("response_scores_bin", session.reply_scores(2, scores, "3", ids, as_bin_f32=True))
    check("response_raw", session.reply_raw(3, msgpack.packb({"ok": True})))
    text = 'model is "fair"; expected one of: fare'
    check("error", session.reply_error(4, "NOT_FOUND", text, False))
    check("error_retry", session.reply_error(5, "RESOURCE_EXHAUSTED", "the queue is full", True, 20))
    check("notification_goaway", session.goaway(5000))
    session.feed(b"\xc1")
    assert session.next_message()[0] == "framing_error"
    check("error_framing", True)


def test_duplicate_msgid_is_bad_until_the_first_is_finished() -> None:
    session = _core.WireSession()
    assert _request(session, [0, 7, "health", []])[0] == "other"
    kind, msgid, _, _, status = _request(session, [0, 7, "health", []])
    assert (kind, msgid, status[0]) == ("bad", 7, "INVALID_ARGUMENT")
    assert "msgid is 7" in status[1]
    assert session.in_flight == 1
    assert session.finish(7)
    assert not session.finish(7)
    assert _request(session, [0, 7, "health", []])[0] == "other"


def test_in_flight_limit() -> None:
    session = _core.WireSession(max_in_flight=3)
    for msgid in range(3):
        assert _request(session, [0, msgid, "health", []])[0] == "other"
    kind, msgid, _, _, status = _request(session, [0, 3, "health", []])
    assert (kind, msgid, status[0]) == ("bad", 3, "RESOURCE_EXHAUSTED")
    assert session.in_flight == 3
    assert session.finish(1)
    assert _request(session, [0, 3, "health", []])[0] == "other"


def test_in_flight_table_against_a_set() -> None:
    session = _core.WireSession(max_in_flight=8)
    expected: set[int] = set()
    state = 1
    for _ in range(3000):
        state = state * 6364136223846793005 + 1442695040888963407 & 2**64 - 1
        msgid = (state >> 40) % 24
        if state >> 63:
            assert session.finish(msgid) == (msgid in expected)
            expected.discard(msgid)
        else:
            admitted = _request(session, [0, msgid, "health", []])[0] == "other"
            assert admitted == (msgid not in expected and len(expected) < 8)
            if admitted:
                expected.add(msgid)
        assert session.in_flight == len(expected)


@pytest.mark.parametrize(
    "frame",
    [
        [2, "predict", ["m", {}]],
        [2, "cancel", [1]],
        [2, "cancel", []],
        [2, "cancel", ["1"]],
        [2, 5, []],
        [1, 1, None, 1],
    ],
)
def test_other_notifications_are_dropped_and_counted(frame: Any) -> None:
    session = _core.WireSession()
    assert _request(session, frame)[0] == "notification"
    assert session.dropped == 1
    assert session.in_flight == 0


@pytest.mark.parametrize(
    ("frame", "msgid", "match"),
    [
        (5, None, "message is 5 (int)"),
        ([3, 1, "x", []], None, "message type is 3 (int)"),
        ([0, -1, "x", []], None, "msgid is -1 (int)"),
        ([0, 2**32, "x", []], None, "expected uint32"),
        ([0, 1, "x"], 1, "expected 4 values"),
        ([0, 1, 2, []], 1, "method is 2 (int)"),
        ([0, 1, "x" * 257, []], 1, "at most 256 bytes"),
        ([0, 1, "x", {}], 1, "params is of 0 entries (map)"),
    ],
)
def test_bad_envelope_names_what_is_wrong(frame: Any, msgid: int | None, match: str) -> None:
    session = _core.WireSession()
    kind, got, _, _, status = _request(session, frame)
    assert (kind, got, status[0]) == ("bad", msgid, "INVALID_ARGUMENT")
    assert match in status[1]
    assert session.in_flight == 0
    assert _request(session, [0, 1, "health", []])[0] == "other"


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ([], "params is of 0 values (list)"),
        ([5, {}], "model is 5 (int)"),
        (["", {}], "non-empty"),
        (["m", 5], "entities is 5 (int)"),
        (["m", None], "no column"),
        (["m", {1: 2}], "a column name of entities is 1 (int)"),
        (["m", {"a": [1, 2], "b": [1]}], "entities.b has 1 rows; expected 2"),
        (["m", {"a": 1}, {"b": [1, 2]}], "inputs.b has 2 rows; expected 1"),
        (["m", {str(i): i for i in range(65)}], "entities has 65 columns; expected at most 64"),
        (["m", {"u": 1.5}], "entities.u is 1.5 (float); expected int64"),
        (["m", {"u": [1, 2, 3, 1.5]}], "entities.u[3] is 1.5 (float); expected int64"),
        (["m", {"u": [2**63]}], "entities.u[0] is 9223372036854775808 (int); expected int64"),
        (["m", {"u": ["x" * 50]}], f'entities.u[0] is "{"x" * 40}..." (string); expected int64'),
        (["m", {"u": [True]}], "entities.u[0] is true (bool)"),
        (["m", {"u": {}}], "entities.u is of 0 entries (map)"),
        (["m", {"f": [1, "a"]}], 'entities.f[1] is "a" (string); expected a number'),
        (["m", {"b": [1]}], "entities.b[0] is 1 (int); expected bool"),
        (["m", {"s": [b"ab"]}], "entities.s[0] is of 2 bytes (binary); expected a UTF-8 string"),
        (["m", {"u": 1}, None, 5], "options is 5 (int)"),
        (
            ["m", {"u": 1}, None, {"deadline_ms": 0}],
            "options.deadline_ms is 0 (int); expected a number above 0",
        ),
        (["m", {"u": 1}, None, {"deadline_ms": -1.5}], "options.deadline_ms is -1.5 (float)"),
        (["m", {"u": 1}, None, {"deadline_ms": float("nan")}], "options.deadline_ms is nan"),
        (["m", {"u": 1}, None, {"request_id": -1}], "options.request_id is -1 (int)"),
        (["m", {"u": 1}, None, {"request_id": ["a"]}], 'options.request_id[0] is "a"'),
        (["m", {"u": [1, 2]}, None, {"request_id": [1]}], "options.request_id has 1 values; expected 2"),
        (["m", {"u": [1, 2]}, None, {"request_id": 1}], "options.request_id has 1 values; expected 2"),
        (["m", {"u": 1}, None, {"now": 1.0}], "options.now is 1 (float)"),
        (["m", {"u": 1}, None, {"priority": "top"}], 'options.priority is "top"'),
        (["m", {"u": 1}, None, {"timings": 1}], "options.timings is 1 (int); expected a bool"),
        (["m", {"u": 1}, None, {"no_cache": 1}], "options.no_cache is 1 (int); expected a bool"),
        (["m", {"u": 1}, None, {"dedline": 1}], "options.dedline is unknown"),
        (["m", {"u": 1}, None, {"traceparent": 7}], "options.traceparent is 7 (int); expected a W3C"),
        *(
            (["m", {"u": 1}, None, {"traceparent": bad}], "options.traceparent is ")
            for bad in (
                "",
                TRACEPARENT[:-1],
                TRACEPARENT + "0",
                TRACEPARENT + "-0",
                "ff" + TRACEPARENT[2:],
                TRACEPARENT.upper(),
                TRACEPARENT.replace("-", "_"),
                "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
                "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
                "01" + TRACEPARENT[2:] + "x",
            )
        ),
        (["m" * 257, {"u": 1}], "at most 256 bytes"),
        (["m", {"u" * 257: 1}], f'a column name of entities is "{"u" * 40}..."'),
        (["m", {"u": 1}, None, {"o" * 257: 1}], "a name in options"),
    ],
)
def test_bad_predict_names_field_value_and_expectation(params: Any, match: str) -> None:
    kinds = {"f": "float64", "b": "bool", "s": "string"}
    with pytest.raises(ValueError) as caught:
        _core.wire_decode_predict(msgpack.packb(params), kinds)
    assert match in str(caught.value)


def test_column_given_twice() -> None:
    params = b"\x92\xa1m\x82\xa1u\x01\xa1u\x02"
    with pytest.raises(ValueError, match=r"entities\.u is given twice"):
        _core.wire_decode_predict(params)


@pytest.mark.parametrize("text", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"])
def test_text_that_is_not_utf8(text: bytes) -> None:
    params = b"\x92\xa1m\x81\xa1s\x91" + bytes([0xA0 | len(text)]) + text
    with pytest.raises(ValueError, match=r"entities\.s\[0\] is .* expected a UTF-8 string"):
        _core.wire_decode_predict(params, {"s": "string"})


def test_predict_values_and_nulls() -> None:
    entities = {
        "u": [2**63 - 1, -(2**63), None],
        "f": [1, None, 2.5],
        "b": [True, False, None],
        "s": ["", "日本", "😀"],
    }
    call = _core.wire_decode_predict(
        msgpack.packb(["m", entities]), {"f": "float64", "b": "bool", "s": "string"}
    )
    assert call["entities"] == entities
    assert call["rows"] == 3


def test_options_values() -> None:
    def options(**given: Any) -> dict[str, Any]:
        return _core.wire_decode_predict(msgpack.packb(["m", {"u": 1}, None, given]))["options"]

    assert options(deadline_ms=1.5)["deadline_us"] == 1500
    assert options(deadline_ms=1e300)["deadline_us"] == 10**15
    assert options(now=-5)["now_us"] == -5
    assert options(request_id=2**64 - 1)["request_id"] == 2**64 - 1
    assert options(priority="low", timings=True, no_cache=True)["priority"] == "low"
    assert options(timings=True)["timings"] is True
    assert options(no_cache=True)["no_cache"] is True
    ids = (0x4BF92F3577B34DA6, 0xA3CE929D0E0E4736, 0x00F067AA0BA902B7)
    assert options(traceparent=TRACEPARENT)["traceparent"] == (*ids, True)
    assert options(traceparent=TRACEPARENT[:-2] + "02")["traceparent"] == (*ids, False)
    assert options(traceparent="cc" + TRACEPARENT[2:] + "-later")["traceparent"] == (*ids, True)
    for seconds, nanos in [(5, 0), (2**33, 5000), (-1, 999_999_000), (2**35, 1000)]:
        stamp = msgpack.Timestamp(seconds, nanos)
        assert options(now=stamp)["now_us"] == seconds * 1_000_000 + nanos // 1000


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (["m", b""], "params is of 2 values"),
        (["m", [1.0], 1], "data is of 1 values (list)"),
        (["m", b"1234", -1], "rows is -1 (int)"),
        (["m", b"12345", 1], "data is of 5 bytes; expected 1 rows of float32"),
        (["m", b"1234", 0], "expected 0 rows"),
        (["m", b"1234" * 3, 2], "expected 2 rows"),
    ],
)
def test_bad_predict_vectors(params: Any, match: str) -> None:
    with pytest.raises(ValueError) as caught:
        _core.wire_decode_predict_vectors(msgpack.packb(params))
    assert match in str(caught.value)


def test_output_is_double_buffered() -> None:
    session = _core.WireSession()
    assert session.take_output() is None
    assert session.goaway(1)
    first = session.take_output()
    assert session.goaway(2)
    assert session.take_output() is None
    assert session.pending_output_bytes == 2 * len(first)
    session.output_sent()
    assert msgpack.unpackb(session.take_output()) == [2, "goaway", [2]]
    session.output_sent()
    assert session.pending_output_bytes == 0


def test_reply_above_the_output_limit_leaves_no_trace() -> None:
    session = _core.WireSession(max_output_bytes=40)
    assert session.goaway(1)
    assert not session.reply_scores(1, [1.0] * 10, "1", list(range(10)))
    assert not session.reply_error(1, "INTERNAL", "x" * 60, False)
    assert session.goaway(2)
    assert session.take_output() == msgpack.packb([2, "goaway", [1]]) + msgpack.packb([2, "goaway", [2]])
