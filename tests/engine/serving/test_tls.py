"""TLS between the server and both clients, and peers that shake hands badly."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import uvloop
from certs import Certs

from penstock.config import check_text
from penstock.credentials import client_context
from penstock.errors import InvalidArgumentError, UnavailableError
from penstock.serving.async_client import AsyncClient
from penstock.serving.client import Client
from penstock.serving.server import ServerSettings

TLS = ("tls://127.0.0.1:0",)


def _predict(msgid, *ids, model="echo"):
    return [0, msgid, "predict", [model, {"id": list(ids)}]]


def _where(address):
    host, port = address.rsplit("/", 1)[1].rsplit(":", 1)
    return host, int(port)


def test_both_clients_over_tls_and_in_the_clear_beside_it(serve, certs):
    running = serve(listen=(*TLS, "tcp://127.0.0.1:0"), tls=certs.tls())
    assert [address.split(":")[0] for address in running.addresses] == ["tls", "tcp"]
    with Client(running.addresses, ca=certs.ca) as client:
        for _ in range(4):  # over both in turn
            assert client.predict("echo", {"id": [1, 2]}).scores.tolist() == [1.0, 2.0]
    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):

        async def main():
            async with AsyncClient(running.addresses[0], ca=certs.ca) as client:
                made = await asyncio.gather(*(client.predict("echo", {"id": i}) for i in range(100)))
                assert [m.scores.tolist() for m in made] == [[i] for i in range(100)]

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())


def test_many_threads_share_one_tls_connection(serve, certs):
    running = serve(listen=TLS, tls=certs.tls())
    with Client(running.address, ca=certs.ca, pool_size=1) as client, ThreadPoolExecutor(8) as pool:

        def ask(i):
            rows = np.full((64, 1024), i, np.float32)  # 256 KiB, many records each way
            return len(client.predict_vectors("echo", rows).scores), client.predict("echo", {"id": i})

        for i, (count, made) in enumerate(pool.map(ask, range(24))):
            assert count == 64 * 1024 * 4
            assert made.scores.tolist() == [i]
        assert client.stats()["server"]["connections"] == 1


def test_a_reader_that_is_slow_gets_every_reply(serve, certs, connect):
    running = serve(listen=TLS, tls=certs.tls(), pause_output_bytes=1 << 16)
    peer = connect(running.address, certs.context())
    peer.send(*(_predict(i, 1, model="wide") for i in range(20)))  # 20 MB
    other = connect(running.address, certs.context())
    for msgid in range(1000):
        other.send([0, msgid, "stats", []])
        if other.read()[3]["server"]["slow_readers"]:
            break
    else:
        raise AssertionError("was never paused")
    assert [peer.read()[1] for _ in range(20)] == list(range(20))
    peer.send(_predict(21, 9))
    assert peer.read()[3]["scores"] == [9.0]


def test_a_reader_that_takes_nothing_is_dropped(serve, certs, connect):
    running = serve(listen=TLS, tls=certs.tls(), pause_output_bytes=1 << 16, slow_reader_timeout=0.2)
    peer = connect(running.address, certs.context())
    peer.send(*(_predict(i, 1, model="wide") for i in range(20)))
    assert running.core.dropped.acquire(timeout=30)
    assert running.server.stats()["slow_readers_dropped"] == 1


def test_what_a_reader_takes_is_counted_though_tls_has_handed_all_to_the_socket(serve, certs, connect):
    running = serve(listen=TLS, tls=certs.tls(), pause_output_bytes=1 << 16)
    peer = connect(running.address, certs.context())
    peer.send(*(_predict(i, 1, model="wide") for i in range(20)))
    while not running.server.peers():
        pass
    [there] = running.server.peers()
    while not there.blocked:
        pass
    before = there.untaken_bytes()
    assert [peer.read()[1] for _ in range(10)] == list(range(10))
    while before - there.untaken_bytes() < 1 << 20:
        pass


def test_a_client_that_does_not_trust_the_server(serve, certs, tmp_path):
    running = serve(listen=TLS, tls=certs.tls())
    tmp_path.joinpath("other").mkdir()
    stranger = Certs(tmp_path / "other")
    for ca in (stranger.ca, None):
        client = Client(running.address, ca=ca, retries=0)
        with client, pytest.raises(UnavailableError, match=r"TLS: unable to get local issuer|self-signed"):
            client.health()

        async def main(ca=ca):
            async with AsyncClient(running.address, ca=ca, retries=0) as client:
                with pytest.raises(UnavailableError, match="TLS: "):
                    await client.health()

        asyncio.run(main())
    client = Client(running.address, ca=certs.ca, server_name="example.org", retries=0)
    with client, pytest.raises(UnavailableError, match="Hostname mismatch"):
        client.health()
    with Client(running.address, ca=certs.ca, server_name="localhost") as client:
        assert client.health()["ready"]


def test_client_certificates(serve, certs):
    running = serve(listen=TLS, tls=certs.tls(client_ca=certs.ca, require_client_cert=True))
    with Client(running.address, ca=certs.ca, cert=certs.client) as client:
        assert client.health()["ready"]
    with Client(running.address, ca=certs.ca, retries=0) as client, pytest.raises(UnavailableError):
        client.health()
    optional = serve(listen=TLS, tls=certs.tls(client_ca=certs.ca))
    for cert in (None, certs.client):
        with Client(optional.address, ca=certs.ca, cert=cert) as client:
            assert client.health()["ready"]


def test_old_versions_are_refused(serve, certs):
    running = serve(listen=TLS, tls=certs.tls())
    context = certs.context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    sock = context.wrap_socket(socket.create_connection(_where(running.address)), server_hostname="127.0.0.1")
    assert sock.version() == "TLSv1.2"
    sock.close()
    address = running.address.removeprefix("tls://")
    done = subprocess.run(
        ["openssl", "s_client", "-connect", address, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"],
        input=b"",
        capture_output=True,
        timeout=60,
    )
    assert done.returncode != 0


def test_a_stalled_handshake_holds_nothing_up_and_counts_as_a_connection(serve, certs, connect):
    running = serve(listen=TLS, tls=certs.tls(), handshake_timeout=30.0, max_connections=3)
    stalled = [socket.create_connection(_where(running.address)) for _ in range(2)]
    stalled[1].sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a hello
    while running.server.stats()["handshaking"] < 2:
        pass
    peer = connect(running.address, certs.context())
    peer.send(_predict(1, 7))
    assert peer.read()[3]["scores"] == [7.0]
    with socket.create_connection(_where(running.address)) as above:
        above.settimeout(30)
        assert above.recv(1) == b""  # the limit counts those that shake hands
    for sock in stalled:
        sock.close()
    while running.server.stats()["handshaking"]:
        pass
    again = connect(running.address, certs.context())
    again.send(_predict(1, 8))
    assert again.read()[3]["scores"] == [8.0]
    assert running.server.stats()["handshakes_failed"] == 2


def test_a_handshake_that_takes_too_long_is_dropped(serve, certs):
    running = serve(listen=TLS, tls=certs.tls(), handshake_timeout=0.1)
    with socket.create_connection(_where(running.address)) as sock:
        sock.settimeout(30)
        sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    while not running.server.stats()["handshakes_failed"]:
        pass
    assert running.server.stats()["handshaking"] == 0


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x94\x00\x01\xa6health\x90", b"\xff" * 70_000])
def test_bytes_that_are_no_tls(serve, certs, connect, data):
    running = serve(listen=TLS, tls=certs.tls(), handshake_timeout=0.3)
    with socket.create_connection(_where(running.address)) as sock:
        sock.settimeout(30)
        try:
            sock.sendall(data)
            while sock.recv(4096):  # an alert, perhaps
                pass
        except ConnectionError:
            pass
    peer = connect(running.address, certs.context())
    peer.send(_predict(1, 7))
    assert peer.read()[3]["scores"] == [7.0]


def test_broken_framing_gets_its_error_over_tls(serve, certs, connect):
    running = serve(listen=TLS, tls=certs.tls())
    peer = connect(running.address, certs.context())
    peer.send(_predict(1, 1))
    peer.socket.sendall(b"\xc1" * 100)
    assert peer.read()[1] == 1
    assert peer.read()[2]["code"] == "INVALID_ARGUMENT"
    assert peer.read() is None


def test_a_peer_that_says_goodbye_gets_what_was_ready_and_leaves_nothing(serve, certs, connect, caplog):
    running = serve(listen=TLS, tls=certs.tls())
    peer = connect(running.address, certs.context())
    peer.send(_predict(1, 1), _predict(2, 1, model="hold"))
    assert peer.read()[1] == 1
    assert running.core.arrived.acquire(timeout=30)
    peer.socket.settimeout(30)
    with contextlib.suppress(OSError):
        peer.socket.unwrap()
    assert running.core.dropped.acquire(timeout=30)
    assert running.core.held == []
    assert caplog.text == ""


def test_shutdown_answers_what_is_in_flight_over_tls(serve, certs):
    running = serve(listen=TLS, tls=certs.tls())
    with Client(running.address, ca=certs.ca) as client, ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(client.predict, "hold", {"id": i}) for i in range(4)]
        for _ in futures:
            assert running.core.arrived.acquire(timeout=30)
        stalled = socket.create_connection(_where(running.address))
        while not running.server.stats()["handshaking"]:
            pass
        running.begin_stop()
        while not running.server.draining:
            pass
        running.core.release()
        assert [future.result(30).scores.tolist() for future in futures] == [[i] for i in range(4)]
        assert running.stop() is True
        stalled.close()


def test_reload_takes_a_new_certificate_for_new_handshakes(serve, certs, connect, tmp_path):
    running = serve(listen=TLS, tls=certs.tls())
    old = connect(running.address, certs.context())
    new = Certs(tmp_path)
    outcome = []
    done = threading.Semaphore(0)

    def reload(settings):
        try:
            running.server.reload(settings)
            outcome.append(None)
        except InvalidArgumentError as error:
            outcome.append(str(error))
        done.release()

    bad = ServerSettings(listen=TLS, tls=certs.tls(client_ca=tmp_path / "none.pem"))
    for settings in (bad, ServerSettings(listen=TLS), ServerSettings(listen=TLS, tls=new.tls())):
        running.loop.call_soon_threadsafe(reload, settings)
        assert done.acquire(timeout=30)
        context = (certs if len(outcome) < 3 else new).context()
        peer = connect(running.address, context)
        peer.send(_predict(1, 1))
        assert peer.read()[2] is None
    assert "none.pem cannot be read" in outcome[0]
    assert "came or went" in outcome[1]
    assert outcome[2] is None
    old.send(_predict(1, 1))
    assert old.read()[2] is None


def test_settings_of_tls(certs):
    text = f"""
server:
  listen: ["tls://127.0.0.1:0"]
  tls: {{cert: {certs.cert}, key: {certs.key}, client_ca: {certs.ca}, require_client_cert: true}}
"""
    config, faults = check_text(text)
    assert config is not None, faults
    made = ServerSettings.from_config(config)
    assert made.tls == certs.tls(client_ca=certs.ca, require_client_cert=True)


@pytest.mark.parametrize(
    ("tls", "line", "words"),
    [
        ("cert: none.pem\n    key: {key}", 4, "cert none.pem cannot be read: No such file"),
        ("cert: {cert}\n    key: none.pem", 5, "key none.pem cannot be read"),
        ("cert: {cert}\n    key: {cert}", 3, "cannot be used: "),
        ("cert: {cert}\n    key: {client}", 3, "KEY_VALUES_MISMATCH"),
        ("cert: {cert}\n    key: {key}\n    client_ca: {key}", 3, "holds no certificates"),
        ("cert: {cert}\n    key: {key}\n    require_client_cert: true", 3, "without a client_ca"),
        ("cert: {cert}", 3, "server.tls.key"),
    ],
)
def test_tls_files_that_cannot_be_used_are_told_with_their_line(certs, tls, line, words):
    text = "server:\n  listen: ['tls://h:1']\n  tls:\n    " + tls.format(**vars(certs))
    config, faults = check_text(text)
    assert config is None
    assert [fault.line for fault in faults] == [line], faults
    assert words in faults[0].message


def test_a_tls_address_needs_files(serve, certs):
    config, faults = check_text("server:\n  listen: ['tls://h:1']\n")
    assert config is None and faults[0].line == 1 and "expected a tls section" in faults[0].message
    with pytest.raises(InvalidArgumentError, match=r"server\.tls is not set"):  # as by --listen
        serve(listen=TLS)
    with pytest.raises(InvalidArgumentError, match="expected both"):
        client_context(certs.ca, key=certs.key)
    with pytest.raises(InvalidArgumentError, match=r"none\.pem cannot be read"):
        Client("tls://h:1", ca="none.pem")
