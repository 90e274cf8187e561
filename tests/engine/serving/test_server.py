"""The server against peers that behave badly, and its shutdown: real sockets, a made-up engine."""

from __future__ import annotations

import logging
import os
import random
import resource
import select
import signal
import socket
import struct
from pathlib import Path

import msgpack
import pytest

from penstock.config import Config, check_text
from penstock.errors import FailedPreconditionError, InvalidArgumentError
from penstock.serving import server as server_module
from penstock.serving.client import Client
from penstock.serving.listeners import bind_all
from penstock.serving.server import ServerSettings


def _predict(msgid, model, *ids, **options):
    return [0, msgid, "predict", [model, {"id": list(ids)}, None, options]]


def _settled(connect, address, check):
    """Ask for stats until `check` holds of the server's part; every ask is a round trip of the loop."""
    peer = connect(address)
    for msgid in range(10_000):
        peer.send([0, msgid, "stats", []])
        stats = peer.read()[3]["server"]
        if check(stats):
            return stats
    raise AssertionError(f"never came: {stats}")


def _open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_answers_over_tcp_and_unix_sockets(serve, connect, tmp_path):
    running = serve(listen=("tcp://127.0.0.1:0", f"unix://{tmp_path}/s"))
    assert len(running.addresses) == 2
    for address in running.addresses:
        peer = connect(address)
        peer.send(_predict(1, "echo", 3, 4))
        assert peer.read() == [1, 1, None, {"scores": [3.0, 4.0], "version": "1", "request_ids": [0, 1]}]


def test_peer_that_sends_one_byte_at_a_time(serve, connect):
    running = serve()
    slow, quick = connect(running.address), connect(running.address)
    data = msgpack.packb(_predict(1, "echo", 5)) + msgpack.packb([0, 2, "health", []])
    for i, byte in enumerate(data):
        slow.socket.send(bytes([byte]))
        quick.send(_predict(i, "echo", i))
        assert quick.read()[3]["scores"] == [float(i)]
    assert slow.read()[3]["scores"] == [5.0]
    assert slow.read()[3]["ready"] is True


def test_peer_that_never_reads_is_paused_then_dropped(serve, connect):
    running = serve(slow_reader_timeout=0.2, pause_output_bytes=1 << 16)
    deaf = connect(running.address)
    deaf.socket.setblocking(False)
    request = msgpack.packb(_predict(1, "wide", 1))
    gone = select.poll()
    gone.register(deaf.socket, 0)  # errors and hang-ups alone
    try:
        for _ in range(1_000_000):
            try:
                deaf.socket.send(request)
            except BlockingIOError:
                break
    except OSError:
        pass
    assert gone.poll(30_000)
    stats = _settled(connect, running.address, lambda stats: stats["connections"] == 1)
    assert stats["slow_readers_dropped"] == 1
    assert stats["slow_readers"] >= 1


def test_slow_reader_gets_every_reply(serve, connect):
    running = serve(pause_output_bytes=1 << 16)
    peer = connect(running.address)
    peer.send(*(_predict(i, "wide", 1) for i in range(8)))
    _settled(connect, running.address, lambda stats: stats["slow_readers"] == 1)
    assert [peer.read()[1] for _ in range(8)] == list(range(8))
    peer.send(_predict(9, "echo", 9))
    assert peer.read()[3]["scores"] == [9.0]


@pytest.mark.parametrize("head", [0xC6, 0xDB], ids=["bin", "str"])
def test_header_that_announces_1_gib(serve, connect, head):
    running = serve()
    peer = connect(running.address)
    peer.socket.sendall(struct.pack(">BI", head, 1 << 30) + b"x" * 1000)
    _, msgid, error, _ = peer.read()
    assert (msgid, error["code"]) == (None, "INVALID_ARGUMENT")
    assert "above the limit" in error["message"]
    assert peer.read() is None
    other = connect(running.address)
    other.send(_predict(1, "echo", 1))
    assert other.read()[2] is None


def test_truncated_message_then_close(serve, connect):
    running = serve()
    peer = connect(running.address)
    peer.socket.sendall(msgpack.packb(_predict(1, "echo", 1))[:-2])
    peer.close()
    assert running.core.dropped.acquire(timeout=30)
    assert _settled(connect, running.address, lambda stats: stats["connections"] == 1)
    assert running.core.predictions == 0


def test_broken_framing_gets_one_error_though_the_peer_goes_on_sending(serve, connect):
    running = serve()
    peer = connect(running.address)
    peer.send(_predict(1, "echo", 1))
    peer.socket.sendall(b"\xc1" + b"\xc1" * (1 << 20))
    assert peer.read()[1] == 1
    assert peer.read()[2]["code"] == "INVALID_ARGUMENT"
    assert peer.read() is None


def test_answers_come_in_any_order(serve, connect):
    running = serve()
    peer = connect(running.address)
    peer.send(_predict(1, "hold", 1), _predict(2, "hold", 2), _predict(3, "echo", 3))
    assert peer.read()[1] == 3
    peer.send([0, 4, "label", ["release", []]])
    replies = {}
    for _ in range(3):
        _, msgid, error, result = peer.read()
        assert error is None
        replies[msgid] = result
    assert (replies[1]["scores"], replies[2]["scores"]) == ([1.0], [2.0])


def test_cancel_answers_the_request_it_names(serve, connect):
    running = serve()
    peer = connect(running.address)
    peer.send(_predict(1, "hold", 1), _predict(2, "hold", 2), [2, "cancel", [1]])
    reply = peer.read()
    assert (reply[1], reply[2]["code"]) == (1, "CANCELLED")
    running.core.release()
    assert peer.read()[:3] == [1, 2, None]


def test_deadline_is_answered_while_the_model_hangs(serve, connect):
    running = serve()
    peer = connect(running.address)
    peer.send(
        _predict(1, "hold", 1, deadline_ms=60_000),
        _predict(2, "hold", 2, deadline_ms=30),
        _predict(3, "hold", 3, deadline_ms=10),
    )
    late = [peer.read() for _ in range(2)]
    assert sorted(reply[1] for reply in late) == [2, 3]
    assert {reply[2]["code"] for reply in late} == {"DEADLINE_EXCEEDED"}
    running.core.release()
    assert peer.read()[:3] == [1, 1, None]


def test_connection_above_the_limit_gets_one_error(serve, connect):
    running = serve(max_connections=2)
    first, second = connect(running.address), connect(running.address)
    for peer in (first, second):
        peer.send([0, 1, "health", []])
        assert peer.read()[2] is None
    third = connect(running.address)
    _, msgid, error, _ = third.read()
    assert (msgid, error["code"], error["retryable"]) == (None, "RESOURCE_EXHAUSTED", True)
    assert "2 connections" in error["message"]
    assert third.read() is None
    second.close()
    assert running.core.dropped.acquire(timeout=30)
    assert _settled(connect, running.address, lambda stats: stats["refused"] == 1)


def test_peer_that_ends_its_stream_gets_the_replies_due(serve, connect):
    running = serve()
    peer = connect(running.address)
    peer.send(_predict(1, "hold", 1))
    peer.socket.shutdown(socket.SHUT_WR)
    assert running.core.arrived.acquire(timeout=30)
    running.core.release()
    assert peer.read()[:3] == [1, 1, None]
    assert peer.read() is None


def test_requests_of_a_peer_that_is_gone_are_dropped(serve, connect):
    running = serve()
    peer = connect(running.address)
    peer.send(_predict(1, "hold", 1))
    assert running.core.arrived.acquire(timeout=30)
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    assert running.core.dropped.acquire(timeout=30)
    assert running.core.held == []


def test_core_that_breaks_costs_one_connection(serve, connect, caplog):
    running = serve()
    peer, other = connect(running.address), connect(running.address)
    peer.send(_predict(1, "boom", 1))
    assert peer.read() is None
    other.send(_predict(1, "echo", 1))
    assert other.read()[2] is None
    assert "the core broke" in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_random_peers_leave_nothing_behind(serve, connect, seed):
    """Peers that send whole, cut off, broken and cancelled requests, and go away in every way."""
    rng = random.Random(seed)
    running = serve()
    good = connect(running.address)
    good.send([0, 0, "health", []])
    assert good.read()[2] is None
    files = _open_files()
    for i in range(100):
        peer = connect(running.address)
        messages = [
            msgpack.packb(
                rng.choice(
                    [
                        _predict(msgid, "echo", msgid),
                        _predict(msgid, "hold", msgid, deadline_ms=rng.choice([1, 5, 60_000])),
                        _predict(msgid, "echo", "text"),
                        [0, msgid, "stats", []],
                        [2, "cancel", [rng.randrange(6)]],
                        [2, "predict", []],
                        [5],
                    ]
                )
            )
            for msgid in range(rng.randrange(6))
        ]
        data = b"".join([*messages, rng.choice([b"", b"", b"\xc1", b"\xc6\xff\xff\xff\xff", b"\x94\x00"])])
        ending = rng.choice(["close", "reset", "shut"])
        peer.socket.sendall(data[: rng.choice([len(data), rng.randrange(len(data) + 1)])])
        if ending == "reset":
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif ending == "shut" and b"\xcd\xea\x60" not in data:  # nothing that is held for a minute
            peer.socket.shutdown(socket.SHUT_WR)
            while peer.read() is not None:
                pass
        peer.close()
        good.send(_predict(i, "echo", i))
        assert good.read()[3]["scores"] == [float(i)]
    running.core.release()  # a stream that ended may still want its replies, until they are written
    _settled(connect, running.address, lambda stats: stats["connections"] == 2)
    assert running.core.held == []
    _settled(connect, running.address, lambda _: _open_files() <= files + 4)


def test_slow_admin_call_blocks_neither_stats_nor_health(serve, connect):
    running = serve(admin_queue=2)
    peer = connect(running.address)
    peer.send(*([0, msgid, "materialize", []] for msgid in (1, 2, 3)))
    reply = peer.read()
    assert (reply[1], reply[2]["code"]) == (3, "RESOURCE_EXHAUSTED")
    assert reply[2]["retry_after_ms"] > 0
    assert running.engine.started.acquire(timeout=30)
    peer.send([0, 4, "stats", []], [0, 5, "health", []])
    replies = {}
    for _ in range(2):
        _, msgid, error, result = peer.read()
        assert error is None
        replies[msgid] = result
    assert replies[4]["server"]["admin_calls_outstanding"] == 2
    assert replies[5] == {"ready": True, "state": "serving", "models": {"echo": "1"}}
    peer.send([0, 6, "label", ["open", []]])
    assert sorted(peer.read()[1] for _ in range(3)) == [1, 2, 6]


def test_one_connection_cannot_take_every_call(serve, connect):
    running = serve(calls_per_connection=3, data_queue=8, admin_queue=8)
    greedy, modest = connect(running.address), connect(running.address)
    greedy.send(*([0, i, "materialize", []] for i in range(5)))
    assert running.engine.started.acquire(timeout=30)
    refused = [greedy.read() for _ in range(2)]
    assert [reply[1] for reply in refused] == [3, 4]
    assert {reply[2]["code"] for reply in refused} == {"RESOURCE_EXHAUSTED"}
    assert "3 calls of the connection are waiting" in refused[0][2]["message"]
    modest.send([0, 1, "stats", []], [0, 2, "materialize", []])
    assert modest.read()[1:3] == [1, None]
    running.engine.gate.set()
    assert modest.read()[1:3] == [2, None]
    assert sorted(greedy.read()[1] for _ in range(3)) == [0, 1, 2]
    greedy.send([0, 9, "stats", []])
    assert greedy.read()[1:3] == [9, None]


def test_admin_methods_are_told_apart(serve, connect):
    running = serve()
    running.engine.gate.set()
    peer = connect(running.address)
    peer.send([0, 1, "materialize", [5]])
    assert peer.read()[3] == {"rows": {}}
    peer.send([0, 2, "label", [[1], [0]]])
    assert peer.read()[3] == {"method": "label"}
    assert running.engine.calls == [("materialize", [5], True), ("label", [[1], [0]], False)]


def test_unknown_method_names_those_that_are_known(serve, connect):
    peer = connect(serve().address)
    peer.send([0, 1, "predcit", []])
    _, _, error, _ = peer.read()
    assert error["code"] == "NOT_FOUND"
    assert '"predcit"' in error["message"]
    assert "predict_vectors" in error["message"]


def test_errors_of_the_engine_reach_the_caller(serve, connect, caplog):
    peer = connect(serve().address)
    peer.send([0, 1, "promote", ["fare"]])
    _, _, error, _ = peer.read()
    assert error == {
        "code": "INVALID_ARGUMENT",
        "message": "model is 'fare'; expected one that is loaded",
        "retryable": False,
    }
    assert not caplog.records
    with caplog.at_level(logging.ERROR):
        peer.send([0, 2, "drift", []])
        _, _, error, _ = peer.read()
    assert (error["code"], error["message"]) == ("INTERNAL", "RuntimeError: no reference")
    assert "drift failed" in caplog.text


def test_params_that_are_no_text_are_refused(serve, connect):
    peer = connect(serve().address)
    peer.socket.sendall(b"\x94\x00\x01\xa6models\x91\xa1\xff")
    _, _, error, _ = peer.read()
    assert (error["code"], "cannot be read" in error["message"]) == ("INVALID_ARGUMENT", True)


def test_reply_above_the_output_limit_is_an_error(serve, connect):
    peer = connect(serve(max_output_bytes=1 << 16).address)
    peer.send([0, 1, "features", [1 << 17, {}]])
    _, _, error, _ = peer.read()
    assert (error["code"], "does not fit" in error["message"]) == ("RESOURCE_EXHAUSTED", True)


def test_dropped_notifications_are_counted_past_the_end_of_their_connection(serve, connect):
    running = serve()
    first, second = connect(running.address), connect(running.address)
    for peer in (first, second):
        peer.send([2, "nonsense", []], [0, 1, "health", []])
        peer.read()
    first.close()
    assert running.core.dropped.acquire(timeout=30)
    second.send([0, 2, "stats", []])
    server = second.read()[3]["server"]
    assert (server["connections"], server["dropped_notifications"]) == (1, 2)


def test_health_that_fails_is_an_error_reply(serve, connect, monkeypatch):
    running = serve()
    monkeypatch.setattr(running.engine, "health", lambda: {"bad": object()})
    peer = connect(running.address)
    peer.send([0, 1, "health", []], [0, 2, "models", []])
    assert peer.read()[2]["code"] == "INTERNAL"
    assert peer.read()[2] is None


def test_sigterm_answers_what_is_in_flight_and_refuses_what_is_new(spawn, connect):
    spawned = spawn()
    peer, idle = connect(spawned.addresses[0]), connect(spawned.addresses[0])
    peer.send(_predict(1, "hold", 7), [0, 2, "health", []])
    idle.send([0, 1, "health", []])
    assert peer.read()[3]["ready"] is True
    assert idle.read()[3]["state"] == "serving"
    os.kill(spawned.process.pid, signal.SIGTERM)
    assert peer.read() == [2, "goaway", [30_000]]
    assert idle.read() == [2, "goaway", [30_000]]
    with pytest.raises(ConnectionRefusedError):
        connect(spawned.addresses[0])
    idle.send([0, 2, "health", []], [0, 3, "models", []])
    assert idle.read()[3]["state"] == "draining"
    assert idle.read()[2]["code"] == "UNAVAILABLE"
    idle.send(_predict(4, "echo", 1))  # refused; the fake engine then answers what it holds
    assert idle.read()[2]["code"] == "UNAVAILABLE"
    assert peer.read() == [1, 1, None, {"scores": [7.0], "version": "1", "request_ids": [0]}]
    assert peer.read() is None
    assert idle.read() is None
    peer.close()
    idle.close()
    assert spawned.wait() == (0, "")


def test_shutdown_says_goaway_to_idle_connections_and_hangs_up(serve, connect):
    running = serve()
    peers = [connect(running.address) for _ in range(5)]
    for peer in peers:
        peer.send([0, 1, "health", []])
        assert peer.read()[2] is None
    running.begin_stop()
    for peer in peers:
        assert peer.read() == [2, "goaway", [30_000]]
        assert peer.read() is None
        peer.close()
    assert running.stop() is True


def test_request_that_crosses_the_goaway_is_refused_with_an_answer(serve, connect):
    running = serve(goaway_grace=60.0)
    peers = [connect(running.address) for _ in range(2)]
    for peer in peers:
        peer.send([0, 1, "health", []])
        assert peer.read()[2] is None
    running.begin_stop()
    for peer in peers:
        assert peer.read()[1] == "goaway"
    for peer in peers:
        peer.send(_predict(2, "echo", 1), [0, 3, "models", []])
        assert [peer.read()[2]["code"] for _ in range(2)] == ["UNAVAILABLE"] * 2
        peer.close()
    assert running.stop() is True  # without the grace: nobody is left


def test_shutdown_does_not_wait_for_a_peer_that_never_hangs_up(serve, connect):
    running = serve()
    peer = connect(running.address)
    peer.send([0, 1, "health", []])
    assert peer.read()[2] is None
    assert running.stop() is True
    assert peer.read() == [2, "goaway", [30_000]]


def test_accepts_again_after_it_ran_out_of_files(spawn, connect):
    spawned = spawn()
    address = spawned.addresses[0]
    first = connect(address)
    first.send(_predict(1, "echo", 1))
    assert first.read()[2] is None
    pid = spawned.process.pid
    used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 2, hard))
    crowd = [connect(address) for _ in range(8)]
    first.send(_predict(2, "echo", 2))
    assert first.read()[3]["scores"] == [2.0]
    for peer in crowd:
        peer.close()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    with Client(address) as client:
        assert client.predict("echo", {"id": 3}).scores.tolist() == [3.0]


def test_second_signal_exits_at_once(spawn, connect):
    spawned = spawn()
    peer = connect(spawned.addresses[0])
    peer.send(_predict(1, "hold", 7), [0, 2, "health", []])
    assert peer.read()[1] == 2
    os.kill(spawned.process.pid, signal.SIGINT)
    assert peer.read()[1] == "goaway"
    os.kill(spawned.process.pid, signal.SIGTERM)
    assert spawned.wait()[0] == 1


def test_drain_limit_ends_a_shutdown_that_hangs(spawn, connect):
    spawned = spawn(drain_timeout=0.2)
    peer = connect(spawned.addresses[0])
    peer.send(_predict(1, "hold", 7), [0, 2, "materialize", []], [0, 3, "health", []])
    assert peer.read()[1] == 3
    os.kill(spawned.process.pid, signal.SIGTERM)
    status, err = spawned.wait()
    assert status == 1
    assert "drain limit" in err


def test_shutdown_waits_for_a_call_on_a_pool(serve, connect):
    running = serve()
    peer = connect(running.address)
    peer.send([0, 1, "materialize", []])
    assert running.engine.started.acquire(timeout=30)
    running.begin_stop()
    assert peer.read()[1] == "goaway"
    assert not running.answered.done()
    running.engine.gate.set()
    assert peer.read() == [1, 1, None, {"rows": {}}]
    assert peer.read() is None
    peer.close()
    assert running.stop() is True


def test_two_servers_on_one_port(spawn):
    first = spawn()
    second = spawn(listen=first.addresses)
    assert second.addresses == []
    status, err = second.wait()
    assert status == 1
    assert err == f"penstock: cannot listen on {first.addresses[0]}: the port is in use\n"


def test_one_address_that_cannot_be_had_leaves_none_bound(tmp_path):
    taken = bind_all([f"unix://{tmp_path}/taken"])
    with pytest.raises(FailedPreconditionError, match="another process is listening"):
        bind_all([f"unix://{tmp_path}/free", f"unix://{tmp_path}/taken"])
    assert not (tmp_path / "free").exists()
    taken[0].close()
    assert not (tmp_path / "taken").exists()


def test_unix_socket_of_a_killed_server_is_replaced(spawn, tmp_path):
    address = f"unix://{tmp_path}/s"
    first = spawn(listen=[address])
    first.process.kill()
    first.wait()
    assert (tmp_path / "s").exists()
    second = spawn(listen=[address])
    with Client(address) as client:
        assert client.predict("echo", {"id": 4}).scores.tolist() == [4.0]
    second.process.terminate()
    assert second.wait() == (0, "")
    assert not (tmp_path / "s").exists()


def test_unix_socket_of_a_live_server_is_an_error(spawn, tmp_path):
    address = f"unix://{tmp_path}/s"
    spawn(listen=[address])
    status, err = spawn(listen=[address]).wait()
    assert (status, "another process is listening" in err) == (1, True)
    with Client(address) as client:
        assert client.health()["ready"] is True


def test_unix_socket_path_that_is_a_file(tmp_path):
    Path(tmp_path / "s").write_text("mine")
    with pytest.raises(FailedPreconditionError, match="is no socket"):
        bind_all([f"unix://{tmp_path}/s"])
    assert Path(tmp_path / "s").read_text() == "mine"


@pytest.mark.parametrize("path", ["/x" * 60, "/proc/no/such/folder/s"])
def test_unix_socket_path_that_cannot_be(path):
    with pytest.raises((InvalidArgumentError, FailedPreconditionError), match="cannot listen on unix:///"):
        bind_all([f"unix://{path}"])


def test_host_that_does_not_exist():
    with pytest.raises(InvalidArgumentError, match="cannot listen on tcp://no-such-host"):
        bind_all(["tcp://no-such-host.invalid:1"])


def test_few_open_files_leave_room_for_fewer_connections(monkeypatch, caplog):
    limits = [100, 700]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    fitting = server_module._fit_files(1024)
    assert 1 <= fitting < 700
    assert limits == [700, 700]
    assert "700" in caplog.text
    limits[:] = [100, 100_000]
    assert server_module._fit_files(1024) == 1024
    assert 2048 < limits[0] < 4096


def test_settings_come_from_the_configuration():
    settings = ServerSettings.from_config(Config())
    assert settings.listen == ("tcp://127.0.0.1:7064",)
    assert settings.max_connections == 1024
    assert settings.max_message_bytes == 16 << 20


def test_every_bound_of_the_server_is_a_setting() -> None:
    text = """
server:
  listen: ["unix:///tmp/x.sock"]
  limits:
    max_message_bytes: 2KiB
    max_depth: 7
    max_connections: 3
    max_in_flight_per_connection: 5
    max_output_bytes: 1MiB
    pause_output_bytes: 2KiB
    slow_reader_timeout: 2s
    max_calls: 11
    max_admin_calls: 2
    max_calls_per_connection: 4
  call_threads: 6
  drain_timeout: 1500ms
  goaway_grace: 0
"""
    config, faults = check_text(text)
    assert config is not None, faults
    assert ServerSettings.from_config(config) == ServerSettings(
        ("unix:///tmp/x.sock",), 2048, 7, 3, 5, 1 << 20, 2048, 2.0, 1.5, 0.0, 6, 11, 2, 4
    )
    assert ServerSettings.from_config(Config()) == ServerSettings(("tcp://127.0.0.1:7064",))
