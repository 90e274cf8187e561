"""A real server under peers that mean ill or die: who behaves is served, and every request has one end."""

from __future__ import annotations

import datetime
import itertools
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import pytest
import yaml
from certs import Certs
from raw_peer import Raw

from penstock.errors import PermissionDeniedError, UnauthenticatedError
from penstock.serving.client import Client

DATA, ADMIN, LATE = "data-token-0123456789", "admin-token-0123456789", "late-token-0123456789"
ROOM = {"max_queued_rows": 1 << 18, "max_latency_ms": 20_000}  # however slow the machine is

quick_and_long = pytest.mark.parametrize  # the first value is the quick form, the others are marked long


def long(value: Any) -> Any:
    return pytest.param(value, marks=[pytest.mark.long, pytest.mark.timeout(1700)])


def where(address: str) -> tuple[str, int]:
    host, port = address.rsplit("/", 1)[1].rsplit(":", 1)
    return host, int(port)


def predict(shop: Any, msgid: int, rows: slice = slice(0, 2), **options: Any) -> bytes:
    return msgpack.packb([0, msgid, "predict", ["buy", shop.entities(rows), shop.inputs(rows), options]])


def assert_conserved(stats: dict[str, Any]) -> None:
    for model in stats["models"].values():
        for counts in (model["requests"], model["rows"]):
            assert counts["submitted"] == sum(counts.values()) - counts["submitted"], counts


def settle(peer: Any, connections: int = 1) -> dict[str, Any]:
    """Stats, once only `connections` are left and nothing is in flight; conserved in every snapshot."""
    until = time.monotonic() + 60
    while True:
        stats = peer.call("stats")
        assert_conserved(stats)
        in_flight = sum(model["requests"]["in_flight"] for model in stats["models"].values())
        if not in_flight and stats["server"]["connections"] <= connections:
            return stats
        assert time.monotonic() < until, stats["server"]


# Slow, silent and half-deaf peers


def test_slow_lorises_are_dropped_and_nobody_else_notices(shop, serve, tmp_path):
    served = serve(shop.config(tmp_path, server={"limits": {"read_timeout": 0.3, "max_connections": 300}}))
    good = served.raw()
    lorises = [served.raw() for _ in range(200)]
    message = predict(shop, 1)
    for i, loris in enumerate(lorises):
        loris.socket.sendall(message[: 1 + i % (len(message) - 1)])
    ends = 0
    for loris in lorises:
        assert good.call("predict", "buy", shop.entities(slice(0, 1)), shop.inputs(slice(0, 1)))["scores"]
        kind, msgid, error, _ = loris.read()
        assert (kind, msgid) == (1, None) and "not finished within 0.3 s" in error["message"]
        assert loris.read() is None
        ends += 1
    stats = settle(good)
    assert stats["server"]["stuck_closed"] == ends == 200


def test_half_closing_peers_get_every_reply(shop, serve, tmp_path):
    served = serve(shop.config(tmp_path, serving=ROOM))
    peers = [served.raw() for _ in range(8)]
    for peer in peers:
        peer.socket.sendall(b"".join(predict(shop, i, slice(i % 50, i % 50 + 70)) for i in range(100)))
        peer.socket.shutdown(socket.SHUT_WR)
    for peer in peers:
        replies = []
        while (reply := peer.read()) is not None:
            replies.append(reply)
        assert sorted(reply[1] for reply in replies) == list(range(100))
        assert all(error is None for _, _, error, _ in replies)
    stats = settle(served.raw())
    assert stats["models"]["buy"]["requests"]["ok"] == 800


@quick_and_long("rounds", [300, long(10_000)])
def test_garbage_costs_only_whoever_sends_it(shop, serve, tmp_path, rounds):
    served = serve(shop.config(tmp_path))
    good = served.raw()
    rng = random.Random(3)
    whole = predict(shop, 1)
    for i in range(rounds):
        peer = Raw(served.address)
        data = bytearray(rng.choice((whole, rng.randbytes(rng.randint(1, 3000)))))
        for _ in range(rng.randint(0, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            peer.socket.sendall(data)
            if rng.random() < 0.3:
                peer.socket.shutdown(socket.SHUT_WR)
                while peer.socket.recv(1 << 16):
                    pass
        except ConnectionError:
            pass
        peer.close()
        if i % 50 == 0:
            assert good.call("predict", "buy", shop.entities(slice(0, 1)), shop.inputs(slice(0, 1)))["scores"]
            assert_conserved(good.call("stats"))
    settle(good)


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@quick_and_long("wanted", [1000, long(10_000)])
def test_thousands_of_connections(shop, serve, tmp_path, wanted):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = 1000  # files of this process and of the server besides its connections, two files each
    need, most = 2 * wanted + room, wanted
    if soft != resource.RLIM_INFINITY and soft < need:
        files = need if hard == resource.RLIM_INFINITY else max(need, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # a hard limit is root's to raise
        except (OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            most = min(wanted, (hard - room) // 2)
            print(f"the hard limit of open files, {hard}, leaves room for {most} of {wanted} connections")
    served = serve(shop.config(tmp_path, server={"limits": {"max_connections": most + 10}}))
    good = served.raw()
    good.call("predict", "buy", shop.entities(slice(0, 1)), shop.inputs(slice(0, 1)))
    before = _resident(served.process.pid)
    peers = []
    try:
        for _ in range(most):
            peers.append(socket.create_connection(where(served.address), timeout=60))
        while good.call("stats")["server"]["connections"] < most + 1:
            pass
        idle = (_resident(served.process.pid) - before) / most
        message = predict(shop, 7)
        for start in range(0, most, 500):  # each is served, and the idle ones cost the others nothing
            for peer in peers[start : start + 500]:
                peer.sendall(message)
            for peer in peers[start : start + 500]:
                reply = msgpack.unpackb(peer.recv(1 << 16))
                assert reply[:3] == [1, 7, None]
        used = (_resident(served.process.pid) - before) / most
        print(f"{most} connections: {idle / 1024:.1f} KiB each when idle, {used / 1024:.1f} KiB once used")
        assert idle < 32 << 10 and used < 64 << 10
    finally:
        for peer in peers:
            peer.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    settle(good)


# Peers and servers that die

_VICTIM = """
import socket, sys
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
data = open(sys.argv[3], "rb").read()
peer.sendall(data[:int(sys.argv[4])])
print(flush=True)
peer.sendall(data[int(sys.argv[4]):])
while peer.recv(1): pass
"""


@quick_and_long("times", [50, long(1000)])
def test_a_client_that_is_killed_takes_its_requests_with_it(shop, serve, tmp_path, times):
    served = serve(shop.config(tmp_path, serving=ROOM))
    good = served.raw()
    data = b"".join(predict(shop, i, slice(0, 200)) for i in range(60))
    file = tmp_path / "requests"
    file.write_bytes(data)
    rng = random.Random(9)
    for i in range(times):
        command = [sys.executable, "-I", "-S", "-c", _VICTIM, *map(str, where(served.address)), str(file)]
        victim = subprocess.Popen([*command, str(rng.randrange(len(data)))], stdout=subprocess.PIPE)
        assert victim.stdout is not None
        victim.stdout.read(1)
        victim.kill()
        victim.communicate()
        assert victim.returncode == -signal.SIGKILL
        stats = good.call("stats")
        assert_conserved(stats)
        if i % 10 == 0:
            assert good.call("predict", "buy", shop.entities(slice(0, 1)), shop.inputs(slice(0, 1)))["scores"]
    stats = settle(good)
    requests = stats["models"]["buy"]["requests"]
    assert requests["submitted"] > times  # requests were on their way
    assert requests["cancelled"] > 0 and requests["failed"] == 0
    assert good.call("health")["ready"]


class Load:
    """A peer that pipelines until it is told to go away, then waits for what it is owed, and hangs up."""

    def __init__(self, address: str, message: Any, window: int = 64) -> None:
        self._peer = Raw(address)
        self._message, self._window = message, window
        self.owed: set[int] = set()
        self.ok = self.refused = 0
        self.faults: list[Any] = []
        self.warmed = threading.Event()

    def run(self) -> None:
        msgids = itertools.count()
        leaving = False
        try:
            while True:
                while not leaving and len(self.owed) < self._window:
                    msgid = next(msgids)
                    self.owed.add(msgid)
                    self._peer.socket.sendall(self._message(msgid))
                if leaving and not self.owed:
                    break
                reply = self._peer.read()
                if reply is None:
                    self.faults.append(f"hung up on with {len(self.owed)} owed")
                    break
                if reply[0] == 2:
                    leaving = True
                    continue
                if reply[1] not in self.owed:
                    self.faults.append(reply)
                self.owed.discard(reply[1])
                if reply[2] is None:
                    self.ok += 1
                elif reply[2]["code"] == "UNAVAILABLE":
                    self.refused += 1
                else:
                    self.faults.append(reply)
                if self.ok == 2 * self._window:
                    self.warmed.set()
        except OSError as error:
            self.faults.append(error)
        finally:
            self.warmed.set()
            self._peer.close()


@quick_and_long("times", [3, long(100)])
def test_sigterm_at_peak_loses_and_doubles_no_reply(shop, serve, tmp_path, times):
    config = shop.config(tmp_path, serving=ROOM, server={"goaway_grace": 30.0, "drain_timeout": 60.0})
    for turn in range(times):
        served = serve(config)
        rows = (1, 3, 70)[turn % 3]
        loads = [Load(served.address, lambda i, n=rows: predict(shop, i, slice(i % 99, i % 99 + n)))
                 for _ in range(6)]  # fmt: skip
        with ThreadPoolExecutor(len(loads)) as pool:
            running = [pool.submit(load.run) for load in loads]
            for load in loads:
                assert load.warmed.wait(60)
            served.process.send_signal(signal.SIGTERM)
            for future in running:
                future.result(120)
        assert served.process.wait(60) == 0
        for load in loads:
            assert not load.faults and not load.owed, load.faults
            assert load.ok >= 128


@quick_and_long("snapshots", [60, long(1500)])
def test_every_snapshot_of_the_counters_adds_up(shop, serve, tmp_path, snapshots):
    """Under load, deadlines, cancels, peers that vanish, and at the end a shutdown."""
    lane = {"max_latency_ms": 50, "max_queued_rows": 512}
    served = serve(shop.config(tmp_path, serving=lane, monitoring={"ring_rows": 1024}))
    watcher = served.raw()
    stop = threading.Event()
    faults: list[BaseException] = []

    def trouble(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not stop.is_set():
                peer = Raw(served.address)
                sent = b""
                count = rng.randint(1, 200)
                for i in range(count):
                    n = rng.choice((1, 2, 64, 130))
                    options = rng.choice(({}, {"deadline_ms": rng.choice((0.01, 1, 5))}, {"priority": "low"}))
                    sent += predict(shop, i, slice(0, n), **options)
                    if rng.random() < 0.2:
                        sent += msgpack.packb([2, "cancel", [rng.randint(0, i)]])
                peer.socket.sendall(sent)
                for _ in range(rng.randint(0, count)):
                    if peer.read() is None:
                        break
                peer.close()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=trouble, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(snapshots):
            assert_conserved(watcher.call("stats"))
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    requests = settle(watcher)["models"]["buy"]["requests"]
    assert requests["ok"] and requests["expired"] + requests["rejected"] and requests["cancelled"]
    assert not faults
    assert served.stop() == 0


# Tokens and TLS


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certs:
    return Certs(tmp_path_factory.mktemp("certs"))


def _secure(shop: Any, folder: Path, certs: Certs, **limits: Any) -> Path:
    server = {
        "tls": {"cert": str(certs.cert), "key": str(certs.key)},
        "auth": {"token_file": "tokens", "admin_tokens": [ADMIN]},
        "limits": limits,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens").write_text(f"{DATA}\n")
    return shop.config(folder, server=server)


def test_predictions_need_a_token_and_admin_methods_an_admin_one(shop, serve, certs, tmp_path):
    served = serve(_secure(shop, tmp_path, certs), "tls://127.0.0.1:0", "tcp://127.0.0.1:0")
    rows = slice(0, 3)
    for address in served.addresses:
        context = certs.context() if address.startswith("tls") else None
        peer = Raw(address, context)
        peer.socket.sendall(predict(shop, 1) + predict(shop, 2))
        peer.send([0, 3, "models", []])
        replies = [peer.read() for _ in range(3)]
        assert {reply[2]["code"] for reply in replies} == {"UNAUTHENTICATED"}
        peer.send([0, 4, "auth", [DATA]])
        peer.socket.sendall(predict(shop, 5))  # in one read with the token, or soon after
        assert [peer.read()[1:3] for _ in range(2)] == [[4, None], [5, None]]
        peer.close()
        with Client(address, token=DATA, ca=certs.ca) as client:
            made = client.predict("buy", shop.entities(rows), shop.inputs(rows))
            assert len(made.scores) == 3
            with pytest.raises(PermissionDeniedError):
                client.materialize()
        with Client(address, ca=certs.ca) as client, pytest.raises(UnauthenticatedError):
            client.health()
    with Client(served.address, token=ADMIN, ca=certs.ca) as client:
        client.materialize()
        stats = client.stats()
        assert stats["models"]["buy"]["requests"]["submitted"] == 4  # what was refused got nowhere
        assert stats["server"]["unauthenticated"] == 8 and stats["server"]["denied"] == 2
        assert DATA not in str(stats) and ADMIN not in str(stats)
    assert served.stop() == 0
    log = served.log.read_text()
    assert DATA not in log and ADMIN not in log


def test_a_token_expires_on_a_connection_that_is_in_use(shop, serve, certs, tmp_path):
    config = _secure(shop, tmp_path, certs)
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=4)
    (tmp_path / "tokens").write_text(f"{DATA}\n{LATE} {expires.isoformat()}\n")
    served = serve(config)
    peer = served.raw()
    if peer.call("auth", LATE) == "data":  # else the machine was so slow that it had expired before
        until = time.monotonic() + 60
        while "error" not in (made := peer.call("predict", "buy", shop.entities(slice(0, 1)),
                                                shop.inputs(slice(0, 1)))):  # fmt: skip
            assert time.monotonic() < until
        assert made["error"]["code"] == "UNAUTHENTICATED"
        assert datetime.datetime.now(datetime.UTC) >= expires
        assert peer.fault("stats")[0] == "UNAUTHENTICATED"
    else:
        assert peer.fault("models")[0] == peer.fault("stats")[0] == "UNAUTHENTICATED"
    assert peer.fault("auth", LATE)[0] == "UNAUTHENTICATED"
    assert peer.call("auth", DATA) == "data"
    assert peer.call("stats")["server"]["unauthenticated"] >= 2  # a prediction and stats


def test_sighup_takes_new_certificates_and_tokens(shop, serve, certs, tmp_path):
    folder = tmp_path / "run"
    mine = Certs(tmp_path)
    config = _secure(shop, folder, mine)
    served = serve(config, "tls://127.0.0.1:0")
    old = Client(served.address, token=DATA, ca=mine.ca)
    assert old.health()["ready"]

    def until(done: Any) -> None:
        limit = time.monotonic() + 60
        while not done():
            assert time.monotonic() < limit

    (folder / "tokens").write_text("short\n")  # kept, with a word in the log
    served.process.send_signal(signal.SIGHUP)
    until(lambda: "kept the certificates and tokens" in served.log.read_text())
    assert "short" not in served.log.read_text()
    assert old.health()["ready"]

    new = Certs(tmp_path)  # in the same files
    (folder / "tokens").write_text(f"{LATE}\n")
    served.process.send_signal(signal.SIGHUP)
    until(lambda: "read the certificates and tokens again" in served.log.read_text())
    with pytest.raises(UnauthenticatedError):
        old.health()
    old.close()
    with Client(served.address, token=LATE, ca=new.ca) as client:
        assert client.health()["ready"]
    assert served.stop() == 0


def test_stalled_handshakes_hold_nothing_up(shop, serve, certs, tmp_path):
    config = _secure(shop, tmp_path, certs, handshake_timeout=1.0)
    served = serve(config, "tls://127.0.0.1:0")
    stalled = [socket.create_connection(where(served.address)) for _ in range(100)]
    for i, sock in enumerate(stalled):
        sock.sendall(b"\x16\x03\x01\x02\x00\x01"[: i % 7])
    with Client(served.address, token=ADMIN, ca=certs.ca) as client:
        made = client.predict("buy", shop.entities(slice(0, 2)), shop.inputs(slice(0, 2)))
        assert len(made.scores) == 2
        until = time.monotonic() + 60
        while (stats := client.stats()["server"])["handshakes_failed"] < 100:
            assert time.monotonic() < until
        assert stats["handshaking"] == 0 and stats["connections"] == 1
    for sock in stalled:
        sock.close()
    assert served.stop() == 0


def test_the_commands_take_their_credentials_from_the_environment(
    shop, serve, certs, penstock, tmp_path, monkeypatch
):
    config = _secure(shop, tmp_path, certs)
    served = serve(config, "tls://127.0.0.1:0")
    ask = ("predict", "buy", '{"user_id": 7, "item_id": 1}', "--inputs", '{"basket_value": 9.5}', "--to",
           served.address, "--json")  # fmt: skip
    monkeypatch.setenv("PENSTOCK_CA", str(certs.ca))
    refused = penstock(*ask)
    assert refused.returncode == 1 and "no valid token" in refused.stderr
    monkeypatch.setenv("PENSTOCK_TOKEN", DATA)
    done = penstock(*ask)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("PENSTOCK_TOKEN", ADMIN)
    done = penstock("materialize", "--config", str(config))
    assert done.returncode == 0, done.stderr


def test_files_that_are_missing_are_told_with_their_line(shop, penstock, certs, tmp_path):
    config = shop.config(tmp_path, server=None)
    sections = yaml.safe_load(config.read_text())
    text = yaml.safe_dump({name: value for name, value in sections.items() if value})
    at = text.count("\n")
    config.write_text(
        text
        + f"server:\n  tls:\n    cert: gone.pem\n    key: {certs.key}\n  auth:\n    token_file: gone.txt\n"
    )
    for verb in ("check", "serve"):
        done = penstock(verb, config)
        assert done.returncode != 0
        said = done.stdout + done.stderr
        assert f"{at + 3}: server.tls.cert" in said and "gone.pem cannot be read" in said, said
        assert f"{at + 6}: server.auth.token_file" in said and "gone.txt" in said
