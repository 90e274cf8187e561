"""The load generator against servers of a few lines: what it counts is what they did.

No assertion depends on how fast the machine is: counts, and lower bounds on latencies that a server forced.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from collections import Counter

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from load_server import Server, cut_http, cut_rpc, cut_size, error_reply, scores_reply

from penstock import _core, loadgen
from penstock.errors import InvalidArgumentError, UnavailableError
from penstock.loadgen import Load, http_request, requests_of, rpc_request, vector_requests

N, F = 16, 4
ROWS = np.arange(N * F, dtype=np.float32).reshape(N, F) / 7
SCORES = ROWS.astype(np.float64).sum(1)
REQUESTS = vector_requests("m", ROWS, expected=SCORES)


def load(server, **settings):
    defaults = {"warmup": 0.02, "duration": 0.2, "drain": 5.0}
    return Load(server.address, **{**defaults, **settings})


def row_of(params):
    model, data, rows = params
    assert (model, rows) == ("m", 1)
    return round(float(np.frombuffer(data, "<f4")[0]) * 7) // F


def right(link, message):
    msgid, method, params = message
    assert method == "predict_vectors"
    return scores_reply(msgid, [SCORES[row_of(params)]])


def never(link, message):
    return None


def check_books(result):
    """Every request of the window has exactly one end."""
    answered = sum(latency.count for latency in result.outcomes.values())
    assert result.due == result.sent + result.unsent + result.shed
    assert result.sent == answered + result.unanswered + result.transport_errors
    assert result.unexpected == 0


# ---- MessagePack-RPC, closed loop


@pytest.mark.parametrize("unix", [False, True])
def test_right_answers_are_ok(tmp_path, unix):
    seen = Counter()

    def answer(link, message):
        seen[row_of(message[2])] += 1
        return right(link, message)

    with Server(cut_rpc, answer, str(tmp_path / "s") if unix else None) as server:
        result = loadgen.run(load(server, connections=3), REQUESTS)
    assert set(result.outcomes) == {"OK"} and result.failed == 0
    assert result.rate > 0 and result.window == pytest.approx(0.2)
    assert 0 < result.max_error < 1e-5
    assert set(seen) == set(range(N))  # every row had its turn
    assert max(seen.values()) - min(seen.values()) <= 3 + 1
    assert result.ok.min <= result.ok.p50 <= result.ok.p99 <= result.ok.max
    assert result.from_send == result.outcomes
    check_books(result)


def test_a_wrong_answer_is_counted_and_not_ok():
    wrong = Counter()

    def answer(link, message):
        msgid, _, params = message
        row = row_of(params)
        wrong[row == 5] += 1
        return scores_reply(msgid, [SCORES[row] + (1e-3 if row == 5 else 0)])

    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server, warmup=0.0), REQUESTS)
    assert (result.wrong, result.ok.count) == (wrong[True], wrong[False])
    assert result.wrong > 0 and result.failed == result.wrong


@pytest.mark.parametrize(
    "scores", [[], [float("nan")], "twice"], ids=["no score", "not a number", "a score too many"]
)
def test_an_answer_of_another_shape_is_wrong(scores):
    def answer(link, message):
        msgid, _, params = message
        return scores_reply(msgid, [SCORES[row_of(params)]] * 2 if scores == "twice" else scores)

    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server), REQUESTS)
    assert set(result.outcomes) == {"WRONG_ANSWER"}


def test_scores_as_a_list_and_a_bare_result_are_read_too():
    def answer(link, message):
        msgid, _, params = message
        score = float(SCORES[row_of(params)])
        result = {"version": "1", "scores": [score]} if msgid % 2 else score
        return msgpack.packb([1, msgid, None, result])

    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server, connections=2, in_flight=2), REQUESTS)
    assert set(result.outcomes) == {"OK"}


def test_errors_are_counted_by_code():
    codes = [
        "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED",
        "CANCELLED", "UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED", "INTERNAL", "TEAPOT",
    ]  # fmt: skip
    sent = Counter()

    def answer(link, message):
        code = codes[link.seen % len(codes)]
        sent["OTHER_ERROR" if code == "TEAPOT" else code] += 1
        return error_reply(message[0], code)

    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server, warmup=0.0), REQUESTS)
    assert {name: latency.count for name, latency in result.outcomes.items()} == sent
    assert result.other_errors == {"TEAPOT": sent["OTHER_ERROR"]}
    assert result.rate == result.goodput == 0
    check_books(result)


def test_the_depth_is_kept_on_every_connection():
    def answer(link, message):
        link.waiting.append(message)
        link.most = max(link.most, len(link.waiting))
        if len(link.waiting) < 7:
            return None
        half, link.waiting = link.waiting[:4], link.waiting[4:]
        return b"".join(right(link, one) for one in reversed(half))  # in another order

    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server, connections=5, in_flight=7, drain=0.1), REQUESTS)
    assert [link.most for link in server.links] == [7] * 5
    assert set(result.outcomes) == {"OK"}
    assert result.unanswered <= 5 * 6
    check_books(result)


def test_requests_follow_the_order_given():
    seen = []

    def answer(link, message):
        seen.append(row_of(message[2]))
        return right(link, message)

    order = np.array([3, 3, 1, 15], np.uint32)
    with Server(cut_rpc, answer) as server:
        loadgen.run(load(server), dataclasses.replace(REQUESTS, order=order))
    assert seen[:8] == [3, 3, 1, 15] * 2


def test_a_large_reply_in_many_pieces_is_read():
    rows = np.repeat(ROWS, 4096, 0)
    requests = vector_requests("m", rows, rows_per_request=4096, expected=np.repeat(SCORES, 4096))

    def answer(link, message):
        msgid, _, (_, data, count) = message
        return scores_reply(msgid, np.frombuffer(data, "<f4").reshape(count, F).sum(1))

    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server, in_flight=3), requests)
    assert set(result.outcomes) == {"OK"}
    check_books(result)


def test_an_entity_request_is_carried_as_it_is():
    def answer(link, message):
        assert message[1:] == ("predict", ["m", {"user_id": 7}, None, {"deadline_ms": 5}])
        return scores_reply(message[0], [0.5])

    frame = rpc_request("predict", ["m", {"user_id": 7}, None, {"deadline_ms": 5}])
    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server), requests_of([frame], expected=np.array([[0.5]])))
    assert set(result.outcomes) == {"OK"}


# ---- connections that break


def test_a_dropped_connection_is_counted_and_made_again():
    def answer(link, message):
        if link.number < 3 and link.seen == 5:
            link.transport.abort()
            return None
        return right(link, message)

    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server, warmup=0.0, duration=1.0, connections=3, in_flight=2), REQUESTS)
    assert result.broken_connections == result.reconnects == 3
    assert 3 <= result.transport_errors <= 6
    assert result.failed == result.transport_errors
    assert len(server.links) == 6
    check_books(result)


def test_a_stream_that_is_no_messagepack_rpc_is_hung_up():
    with Server(cut_rpc, lambda link, message: b"\xc1") as server:
        result = loadgen.run(load(server, warmup=0.0), REQUESTS)
    assert result.broken_connections >= 1 and not result.outcomes
    check_books(result)


def test_an_answer_to_nobody_is_unexpected():
    def answer(link, message):
        return right(link, (message[0] ^ 1 << 20, *message[1:])) + right(link, message)

    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server), REQUESTS)
    assert result.unexpected > 0 and set(result.outcomes) == {"OK"}


def test_a_server_that_goes_away_gets_its_connections_back_without_a_loss():
    goaway = msgpack.packb([2, "goaway", [1000]])

    def answer(link, message):
        return (goaway if link.seen == 4 else b"") + right(link, message)

    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server, in_flight=2), REQUESTS)
    assert result.failed == result.broken_connections == 0
    assert 1 <= result.reconnects <= len(server.links) - 1
    assert all(link.seen <= 4 + 2 for link in server.links)
    check_books(result)


def test_a_greeting_goes_first_and_a_refused_one_ends_the_run():
    greeting = rpc_request("auth", ["token"], loadgen.GREETING_ID)
    refuse = False

    def answer(link, message):
        if message[1] == "auth":
            assert link.seen == 1 and message[2] == ["token"]
            return error_reply(message[0], "UNAUTHENTICATED") if refuse else scores_reply(message[0], [])
        assert link.seen > 1
        return right(link, message)

    requests = dataclasses.replace(REQUESTS, greeting=greeting)
    with Server(cut_rpc, answer) as server:
        assert loadgen.run(load(server, connections=2), requests).failed == 0
        refuse = True
        with pytest.raises(UnavailableError, match="refused the greeting: UNAUTHENTICATED"):
            loadgen.run(load(server), requests)


# ---- open loop


def raw_run(server, **settings):
    return _core.run_load(
        server.address, REQUESTS.data, REQUESTS.offsets, warmup_s=0.0, drain_s=5.0, tick_us=0, **settings
    )


@pytest.mark.parametrize("rate", [1000.0, 0.0], ids=["open", "closed"])
def test_a_stall_counts_against_every_request_that_fell_due_in_it(rate):
    stalled = []

    def answer(link, message):
        if link.seen == 20:
            start = time.monotonic()
            time.sleep(0.2)
            stalled.append(time.monotonic() - start)
        return right(link, message)

    with Server(cut_rpc, answer) as server:
        made = raw_run(server, duration_s=1.0, rate=rate, in_flight=512 if rate else 1)
    latency = made["outcomes"]["OK"]["latency"]
    late = latency.count - latency.count_up_to(100_000_000)
    assert latency.max >= 199_000_000
    if rate:  # those due in the first half of the stall waited for its second half
        assert late >= 98 and latency.count == 1000
    else:  # one request waited; the others were not sent meanwhile, so nothing shows what they would have had
        assert late >= 1
    assert made["unanswered"] == made["unsent"] == 0
    assert stalled


def test_a_full_client_sends_late_and_counts_from_the_due_time():
    """One in flight and a server that takes its time: the backlog grows, nothing is skipped."""

    def answer(link, message):
        time.sleep(0.01)
        return right(link, message)

    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server, warmup=0.0, rate=500, poisson=False), REQUESTS)
    assert result.due == result.sent == result.ok.count == 100
    assert result.held_back >= 90
    # The last was due at 0.2 s and answered after 100 x 10 ms at the earliest.
    assert result.ok.max >= (1.0 - 0.2) * 1e6 > result.from_send["OK"].min
    check_books(result)


def test_what_is_never_sent_or_answered_is_counted():
    with Server(cut_rpc, never) as server:
        result = loadgen.run(
            load(server, warmup=0.0, drain=0.1, rate=1000, poisson=False, connections=2, in_flight=3),
            REQUESTS,
        )
    assert (result.due, result.sent, result.unsent, result.unanswered) == (200, 6, 194, 6)
    assert result.failed == 200 and result.rate == 0
    check_books(result)


def test_a_full_client_that_sheds_keeps_no_backlog():
    def answer(link, message):
        time.sleep(0.01)
        return right(link, message)

    with Server(cut_rpc, answer) as server:
        result = loadgen.run(load(server, warmup=0.0, rate=500, poisson=False, shed=True), REQUESTS)
    assert result.due == 100 and result.held_back == result.unsent == 0
    assert result.ok.count == result.sent <= 21  # one in each 10 ms
    assert result.shed == result.failed == 100 - result.sent
    check_books(result)


def test_poisson_arrivals_are_seeded_and_have_the_variance_of_a_poisson_process():
    def due(seed, poisson=True):
        return raw_run(server, duration_s=0.05, rate=2000, poisson=poisson, seed=seed, in_flight=512)["due"]

    with Server(cut_rpc, right) as server:
        counts = [due(seed) for seed in range(40)]
        assert due(3) == counts[3]
        assert due(3, poisson=False) == 100
    assert 95 < np.mean(counts) < 105
    assert 0.5 < np.var(counts) / np.mean(counts) < 1.7  # fixed by the seeds


def test_the_window_holds_the_rate_after_a_warm_up():
    with Server(cut_rpc, right) as server:
        result = loadgen.run(
            load(server, warmup=0.1, rate=1000, poisson=False, connections=4, in_flight=64, series=True),
            REQUESTS,
        )
    assert result.due == 200 and result.failed == 0
    assert len(result.series) == 1
    assert result.series[0][0] == round(result.rate * result.window)
    check_books(result)


# ---- HTTP/1.1


def http_reply(body, status="200 OK", *, chunked=False, headers=""):
    if not chunked:
        return f"HTTP/1.1 {status}\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body
    parts = [body[:1], body[1:3], body[3:]]
    framed = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(part), part) for part in parts if part)
    head = f"HTTP/1.1 {status}\r\n{headers}Transfer-Encoding: Chunked\r\n\r\n"
    return head.encode() + framed + b"0\r\nTrailer: x\r\n\r\n"


ENCODERS = {
    "f32": lambda score: np.float32(score).tobytes(),
    "f64": lambda score: np.float64(score).tobytes(),
    "f32-tail": lambda score: b'{"shape":[1,1]}' + np.float32(score).tobytes(),
    "json": lambda score: b'{"id":"a\\"9","shape":[1,1],"data":[' + repr(float(score)).encode() + b"]}",
    "msgpack": lambda score: msgpack.packb({"id": "x", "out": [[float(score)]]}),
}


def http_requests(body_format):
    frames = [http_request("/predict", row.tobytes(), headers={"X-Test": "1"}) for row in ROWS]
    return requests_of(
        frames, protocol="http", body_format=body_format, json_key="data", expected=SCORES[:, None]
    )


def http_row(message):
    head, body = message
    assert head.startswith("POST /predict HTTP/1.1\r\n") and "X-Test: 1" in head
    return round(float(np.frombuffer(body, "<f4")[0]) * 7) // F


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("body_format", ENCODERS)
def test_http_bodies_are_verified(body_format, chunked):
    wrong = Counter()

    def answer(link, message):
        row = http_row(message)
        wrong[row == 2] += 1
        score = SCORES[row] + (row == 2)
        return http_reply(ENCODERS[body_format](score), chunked=chunked)

    with Server(cut_http, answer) as server:
        result = loadgen.run(
            load(server, warmup=0.0, duration=0.2, connections=2, in_flight=2), http_requests(body_format)
        )
    assert (result.ok.count, result.wrong) == (wrong[False], wrong[True])
    assert result.wrong > 0
    check_books(result)


def test_http_statuses_are_counted():
    statuses = ["200 OK", "503 Service Unavailable", "429 Too Many Requests"]
    sent = Counter()

    def answer(link, message):
        status = statuses[link.seen % 3]
        sent[int(status[:3])] += 1
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        return interim + http_reply(ENCODERS["f32"](SCORES[http_row(message)]), status)

    with Server(cut_http, answer) as server:
        result = loadgen.run(load(server, warmup=0.0), http_requests("f32"))
    assert result.ok.count == sent.pop(200)
    assert result.http_statuses == sent
    assert result.outcomes["HTTP_ERROR"].count == sum(sent.values()) == result.failed


def test_an_http_server_that_closes_after_each_answer_loses_nothing():
    def answer(link, message):
        link.transport.write(
            http_reply(ENCODERS["f32"](SCORES[http_row(message)]), headers="Connection: close\r\n")
        )
        link.transport.close()

    with Server(cut_http, answer) as server:
        result = loadgen.run(load(server, connections=2), http_requests("f32"))
    assert result.failed == result.broken_connections == 0
    assert result.reconnects > 0 and result.ok.count > 0
    check_books(result)


@pytest.mark.parametrize(
    "junk",
    [
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabcdEXTRA\r\n\r\n",
    ],
)
def test_an_answer_that_is_no_http_ends_the_connection(junk):
    with Server(cut_http, lambda link, message: junk) as server:
        result = loadgen.run(load(server, warmup=0.0), http_requests("f32"))
    assert result.broken_connections >= 1 and result.ok is None
    check_books(result)


# ---- bare bytes


def test_an_echo_is_compared_with_what_was_sent():
    size = len(REQUESTS.data) // N

    def answer(link, message):
        return message if link.seen % 4 else message[:-1] + b"x"

    fixed = dataclasses.replace(REQUESTS, protocol="fixed")
    with Server(cut_size(size), answer) as server:
        result = loadgen.run(load(server, in_flight=4), fixed)
    assert result.ok.count > result.wrong > 0
    check_books(result)


def test_a_reply_of_fixed_bytes_is_compared():
    size = len(REQUESTS.data) // N
    fixed = dataclasses.replace(REQUESTS, protocol="fixed", fixed_reply=b"reply")
    with Server(cut_size(size), lambda link, message: b"reply") as server:
        result = loadgen.run(load(server, in_flight=4), fixed)
    assert set(result.outcomes) == {"OK"}


# ---- the ends of a run


def test_a_watcher_sees_the_phases_and_can_end_the_run():
    phases = []

    def watch(phase, seconds, ok, failed):
        phases.append(phase)
        assert failed == 0
        return phase != "window" or seconds < 0.4

    with Server(cut_rpc, right) as server:
        start = time.monotonic()
        result = loadgen.run(load(server, duration=600), REQUESTS, watch)
    assert result.stopped and 0.3 < result.window < 500
    assert time.monotonic() - start < 500
    assert list(dict.fromkeys(phases)) == ["connect", "warmup", "window"]
    check_books(result)


def test_an_error_of_the_watcher_comes_out():
    def watch(*_):
        raise RuntimeError("enough")

    with Server(cut_rpc, right) as server, pytest.raises(RuntimeError, match="enough"):
        loadgen.run(load(server, duration=600), REQUESTS, watch)


def test_ctrl_c_ends_the_run():
    script = (
        "import sys, numpy as np; from penstock.loadgen import *\n"
        "def watch(phase, *_):\n"
        "    if phase == 'window': print('running', flush=True)\n"
        "requests = vector_requests('m', np.zeros((1, 4), np.float32))\n"
        "run(Load(sys.argv[1], duration=600, warmup=0), requests, watch)"
    )
    with Server(cut_rpc, never) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", script, server.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=loadgen.environment(),
        )
        assert child.stdout.readline() == b"running\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors


def test_a_process_of_its_own_gives_the_same_figures():
    phases = []
    with Server(cut_rpc, right) as server:
        result = loadgen.run_apart(
            load(server, rate=500, poisson=False, in_flight=300, series=True),
            REQUESTS,
            lambda phase, *_: phases.append(phase),
        )
        with pytest.raises(InvalidArgumentError, match="duration_s is 0"):
            loadgen.run_apart(load(server, duration=0), REQUESTS)
        stopped = loadgen.run_apart(load(server, duration=600), REQUESTS, lambda phase, *_: phase != "window")
    assert result.ok.count == result.due == 100 and result.series[0][0] > 0
    assert list(dict.fromkeys(phases)) == ["connect", "warmup", "window", "drain", "done"]
    assert stopped.stopped
    with pytest.raises(UnavailableError, match="cannot connect"):
        loadgen.run_apart(load(server), REQUESTS)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"address": "http://x:1"}, "address is 'http://x:1'"),
        ({"address": "unix://"}, "address is 'unix://'"),
        ({"connections": 0}, "connections is 0; expected 1 to 65536"),
        ({"in_flight": 65536}, "in_flight is 65536; expected 1 to 65535"),
        ({"rate": -1.0}, "rate is -1"),
        ({"duration": float("nan")}, "duration_s is nan"),
    ],
)
def test_a_wrong_setting_is_named(settings, text):
    with pytest.raises(InvalidArgumentError, match=text):
        loadgen.run(Load(**{"address": "tcp://127.0.0.1:1", **settings}), REQUESTS)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": b"", "offsets": np.zeros(1, np.uint64)}, "requests are none"),
        ({"data": b"\x00" * 20, "offsets": np.array([0, 20], np.uint64)}, "request 0 is no MessagePack-RPC"),
        ({"offsets": np.array([0, 5], np.uint64)}, "offsets do not cover"),
        ({"order": np.array([99], np.uint32)}, "order holds 99; expected less than the 16"),
        ({"expected": np.zeros((N + 1, 1))}, "expected has 17 scores"),
        ({"protocol": "smtp"}, "protocol is 'smtp'; expected one of rpc, http, fixed"),
    ],
)
def test_wrong_requests_are_named(changes, text):
    with pytest.raises(InvalidArgumentError, match=text):
        loadgen.run(Load("tcp://127.0.0.1:1"), dataclasses.replace(REQUESTS, **changes))


def test_too_few_rows_or_scores_are_named():
    with pytest.raises(InvalidArgumentError, match="rows are 16; expected at least 17"):
        vector_requests("m", ROWS, rows_per_request=17)
    with pytest.raises(InvalidArgumentError, match="expected scores are 3; expected 16, one per row"):
        vector_requests("m", ROWS, expected=SCORES[:3])


# ---- the histogram


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**42 - 1), min_size=1, max_size=300), st.floats(0.001, 1.0))
def test_quantiles_are_exact_to_three_digits(values, q):
    histogram = _core.HdrHistogram()
    histogram.add(np.array(values, np.int64))
    found = histogram.quantile(q)
    rank = int(np.ceil(q * len(values)))
    exact = sorted(values)[max(rank, 1) - 1]
    assert exact <= found <= exact * (1 + 1 / 1024)
    assert (histogram.count, histogram.max, histogram.min) == (len(values), max(values), min(values))
    assert histogram.mean == pytest.approx(np.mean(values))
    below = histogram.count_up_to(exact)
    assert sum(v <= exact for v in values) <= below <= sum(v <= exact * (1 + 1 / 1024) for v in values)


def test_quantiles_agree_with_numpy():
    rng = np.random.default_rng(1)
    values = (rng.lognormal(11, 1.5, 199_999)).astype(np.int64)
    histogram = _core.HdrHistogram()
    histogram.add(values)
    for q in (0.5, 0.9, 0.99, 0.999, 0.9999):
        assert histogram.quantile(q) == pytest.approx(
            np.percentile(values, 100 * q, method="inverted_cdf"), rel=1e-3
        )


def test_an_empty_histogram_and_values_beyond_its_range():
    histogram = _core.HdrHistogram()
    assert (histogram.quantile(0.5), histogram.count, histogram.min, histogram.max) == (0, 0, 0, 0)
    histogram.add(np.array([-5, 2**50], np.int64))
    assert (histogram.quantile(0.5), histogram.max) == (0, 2**50)
    assert histogram.quantile(1.0) == 2**42 - 1
