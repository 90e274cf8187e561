"""Tokens, time limits and ages of connections: real sockets, a made-up engine."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.config import check_text
from penstock.credentials import Grant, digest_of, grant, read_tokens
from penstock.errors import InvalidArgumentError, PermissionDeniedError, UnauthenticatedError
from penstock.serving.async_client import AsyncClient
from penstock.serving.auth import Authenticator
from penstock.serving.client import Client
from penstock.serving.server import ServerSettings

DATA, ADMIN = "data-token-0123456789", "admin-token-0123456789"
GRANTS = (grant(DATA, "data"), grant(ADMIN, "admin"))


class Clock:
    """A wall clock that the test moves."""

    def __init__(self):
        self.now = 1_000_000

    def __call__(self):
        return self.now


def _predict(msgid, *ids, model="echo"):
    return [0, msgid, "predict", [model, {"id": list(ids)}]]


def _code(peer):
    """Msgid and error code (None: answered) of the next reply."""
    _, msgid, error, _ = peer.read()
    return msgid, error and error["code"]


# Tokens


def test_nothing_is_answered_before_a_token_is_shown(serve, connect):
    running = serve(grants=GRANTS)
    peer = connect(running.address)
    peer.send(_predict(1, 1), [0, 2, "stats", []], [0, 3, "health", []], [0, 4, "apply", []])
    assert sorted(_code(peer) for _ in range(4)) == [(i, "UNAUTHENTICATED") for i in (1, 2, 3, 4)]
    assert running.core.predictions == 0 and running.engine.calls == []
    # What is sent behind the token waits for it, also in the same bytes.
    peer.send([0, 5, "auth", [DATA]], _predict(6, 7), [0, 7, "health", []])
    assert sorted(_code(peer) for _ in range(3)) == [(5, None), (6, None), (7, None)]
    assert running.core.predictions == 1


def test_roles(serve):
    running = serve(grants=GRANTS)
    running.engine.gate.set()
    with Client(running.address, token=DATA) as client:
        assert client.predict("echo", {"id": 3}).scores.tolist() == [3.0]
        for method in ("materialize", "apply", "promote", "rollback", "canary", "shadow"):
            with pytest.raises(PermissionDeniedError, match='needs the role "admin"'):
                client.call(method)
        assert client.stats()["server"]["denied"] == 6
    assert not any(admin for _, _, admin in running.engine.calls)
    with Client(running.address, token=ADMIN) as client:
        assert client.predict("echo", {"id": 4}).scores.tolist() == [4.0]
        client.apply()


def test_a_wrong_token_tells_nothing_and_three_end_the_connection(serve, connect, caplog):
    caplog.set_level(logging.DEBUG)
    running = serve(grants=GRANTS)
    peer, other = connect(running.address), connect(running.address)
    wrong = DATA[:-1] + "x"
    peer.send(*([0, i, "auth", [wrong]] for i in range(5)))
    texts = [str(peer.read()) for _ in range(3)]
    assert all("UNAUTHENTICATED" in text and wrong not in text for text in texts)
    assert peer.read() is None
    other.send([0, 1, "auth", [7]], [0, 2, "auth", []], [0, 3, "auth", [ADMIN]], [0, 4, "stats", []])
    assert [_code(other) for _ in range(3)] == [(1, "UNAUTHENTICATED"), (2, "INVALID_ARGUMENT"), (3, None)]
    stats = other.read()[3]
    assert stats["server"]["auth_failures"] == 5
    for secret in (wrong, DATA, ADMIN, digest_of(DATA.encode()).hex()):
        assert secret not in str(stats) and secret not in caplog.text


def test_an_expired_token_ends_also_where_it_was_shown_before(serve, connect):
    clock = Clock()
    running = serve(
        grants=(Grant(digest_of(DATA.encode()), "data", clock.now + 5), grant(ADMIN, "admin")), clock=clock
    )
    peer = connect(running.address)
    peer.send([0, 1, "auth", [DATA]], _predict(2, 1), [0, 3, "stats", []])
    assert sorted(_code(peer) for _ in range(3)) == [(1, None), (2, None), (3, None)]
    clock.now += 5
    peer.send(_predict(4, 1), [0, 5, "stats", []], [0, 6, "auth", [DATA]])
    assert sorted(_code(peer) for _ in range(3)) == [(i, "UNAUTHENTICATED") for i in (4, 5, 6)]
    peer.send([0, 7, "auth", [ADMIN]], _predict(8, 1))
    assert [_code(peer) for _ in range(2)] == [(7, None), (8, None)]


def test_a_peer_without_a_token_is_dropped_in_time(serve, connect):
    running = serve(grants=GRANTS, auth_timeout=0.05)
    late, known = connect(running.address), connect(running.address)
    known.send([0, 1, "auth", [DATA]])
    assert _code(known) == (1, None)
    _, msgid, error, _ = late.read()
    assert (msgid, error["code"]) == (None, "UNAUTHENTICATED")
    assert late.read() is None
    known.send(_predict(2, 1), [0, 3, "stats", []])
    assert _code(known) == (2, None)
    assert known.read()[3]["server"]["auth_timeouts"] == 1


def test_reload_revokes_the_tokens_that_are_gone(serve, connect):
    running = serve(grants=GRANTS)
    kept, gone = connect(running.address), connect(running.address)
    kept.send([0, 1, "auth", [ADMIN]])
    gone.send([0, 1, "auth", [DATA]])
    assert _code(kept) == _code(gone) == (1, None)
    done = threading.Event()

    def reload():
        running.server.reload(ServerSettings(listen=(), grants=GRANTS[1:]))
        done.set()

    running.loop.call_soon_threadsafe(reload)
    assert done.wait(30)
    gone.send(_predict(2, 1), [0, 3, "stats", []])
    assert [_code(gone) for _ in range(2)] == [(2, "UNAUTHENTICATED"), (3, "UNAUTHENTICATED")]
    kept.send(_predict(2, 1), [0, 3, "stats", []])
    assert [_code(kept) for _ in range(2)] == [(2, None), (3, None)]


def test_clients_show_the_token_on_every_connection(serve):
    running = serve(grants=GRANTS, max_connection_age=0.05, connection_age_grace=5.0)
    with Client(running.address, token=DATA, retries=0) as client:
        for _ in range(100_000):
            assert client.predict("echo", {"id": 1}).scores.tolist() == [1.0]
            if running.server.stats()["aged"] >= 3:
                break
        assert running.server.stats()["aged"] >= 3

    async def main():
        async with AsyncClient(running.address, token=lambda: DATA, retries=0) as client:
            made = await asyncio.gather(*(client.predict("echo", {"id": i}) for i in range(64)))
            assert [m.scores.tolist() for m in made] == [[i] for i in range(64)]

    asyncio.run(main())


def test_a_client_with_a_wrong_token_says_so_at_once(serve):
    running = serve(grants=GRANTS)
    with Client(running.address, token="wrong" * 5) as client, pytest.raises(UnauthenticatedError) as caught:
        client.health()
    assert "wrong" not in str(caught.value)
    with (
        Client(running.address) as client,
        pytest.raises(UnauthenticatedError, match="no valid token was given"),
    ):
        client.predict("echo", {"id": 1})

    async def main():
        async with AsyncClient(running.address, token="wrong" * 5) as client:
            with pytest.raises(UnauthenticatedError):
                await client.health()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_token_function_is_asked_again_when_the_token_has_expired(serve, kind):
    clock = Clock()
    grants = (Grant(digest_of(DATA.encode()), "data", clock.now + 5), grant(ADMIN, "admin"))
    running = serve(grants=grants, clock=clock)
    asked = []

    def token():
        asked.append(DATA if not asked else ADMIN)
        return asked[-1]

    if kind == "sync":
        with Client(running.address, token=token) as client:
            client.predict("echo", {"id": 1})
            clock.now += 5
            assert client.predict("echo", {"id": 2}).scores.tolist() == [2.0]
    else:

        async def main():
            async with AsyncClient(running.address, token=token) as client:
                await client.predict("echo", {"id": 1})
                clock.now += 5
                assert (await client.predict("echo", {"id": 2})).scores.tolist() == [2.0]

        asyncio.run(main())
    assert asked == [DATA, ADMIN]


def test_a_token_is_no_hindrance_where_none_is_set(serve):
    running = serve()
    with Client(running.address, token="anything") as client:
        assert client.predict("echo", {"id": 1}).scores.tolist() == [1.0]


tokens = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=16, max_size=40)


@given(
    st.dictionaries(tokens, st.tuples(st.sampled_from(["data", "admin"]), st.integers(0, 10)), max_size=6),
    st.one_of(tokens, st.binary(max_size=20), st.none(), st.integers()),
    st.integers(0, 12),
    st.integers(0, 5),
)
def test_check_is_a_look_up(known, candidate, now, pick):
    """Against a dictionary: whoever shows a known token that has not expired has its role, nobody else."""
    if known and pick:  # often one that is known
        candidate = sorted(known)[pick % len(known)]
    made = Authenticator(
        (Grant(digest_of(t.encode()), role, until) for t, (role, until) in known.items()), lambda: now
    )
    found = made.check(candidate)
    expected = known.get(candidate) if isinstance(candidate, str) else None
    if isinstance(candidate, bytes) and candidate.isascii():
        expected = known.get(candidate.decode())
    if expected is None or expected[1] <= now:
        assert found is None
    else:
        assert (found.role, found.expires_us) == expected


# Configuration


def test_tokens_of_a_file_and_of_the_configuration(tmp_path):
    (tmp_path / "tokens").write_text(
        f"# ours\n{DATA}  2030-01-31T12:00:00Z\n\nanother-token-0123456789 # no expiry\n"
    )
    text = f"""
server:
  auth:
    token_file: tokens
    admin_tokens: [{ADMIN}]
    tokens:
      - {{token: third-token-0123456789, expires: 2031-01-01T00:00:00Z}}
      - {{token: fourth-token-0123456789, role: admin}}
    max_failures: 7
"""
    config, faults = check_text(text, base=tmp_path)
    assert config is not None, faults
    settings = ServerSettings.from_config(config)
    assert settings.max_auth_failures == 7
    named = {given.digest: (given.role, given.expires_us) for given in settings.grants}
    never = (1 << 63) - 1
    assert named == {
        digest_of(b"third-token-0123456789"): ("data", 1_924_992_000_000_000),
        digest_of(b"fourth-token-0123456789"): ("admin", never),
        digest_of(ADMIN.encode()): ("admin", never),
        digest_of(DATA.encode()): ("data", 1_896_091_200_000_000),
        digest_of(b"another-token-0123456789"): ("data", never),
    }
    assert DATA not in repr(config) and ADMIN not in repr(config) and "fourth" not in repr(config)


@pytest.mark.parametrize(
    ("auth", "line", "words"),
    [
        ("tokens: [short-secret]", 3, "server.auth.tokens[0]"),
        ("tokens: ['has a space in it, secret']", 3, "has a space"),
        ("tokens: []", 3, "at least 1 item"),
        ("tokens:\n    - {token: secret-0123456789abc, role: root}", 4, "'data' or 'admin'"),
        ("tokens:\n    - {token: secret-0123456789abc, expires: soon}", 4, "datetime"),
        ("admin_tokens:\n    - {token: secret-0123456789abc, role: data}", 3, "expected it under tokens"),
        ("token_file: missing.txt", 3, "No such file"),
        ("admin_token_file: bad.txt", 3, "bad.txt line 2: "),
        ("max_failures: 0", 3, "greater than or equal to 1"),
        ("token: secret-0123456789abc", 3, "unknown key server.auth.token"),
    ],
)
def test_a_bad_token_is_told_by_its_line_but_never_shown(tmp_path, auth, line, words):
    (tmp_path / "bad.txt").write_text(f"{DATA}\nsecret\n")
    config, faults = check_text(f"server:\n  auth:\n   {auth}\n", base=tmp_path)
    assert config is None
    assert [fault.line for fault in faults] == [line]
    assert words in faults[0].message
    assert "secret" not in faults[0].message


@pytest.mark.parametrize("text", ["", "# none\n", "a b c\n", f"{DATA} tomorrow\n"])
def test_a_token_file_that_is_none(tmp_path, text):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match="expected") as caught:
        read_tokens(path, "data")
    assert DATA not in str(caught.value)


# Time


def test_half_a_message_and_nothing_more_ends_the_connection(serve, connect):
    running = serve(read_timeout=0.1)
    slow, quick = connect(running.address), connect(running.address)
    whole = msgpack.packb(_predict(2, 1))
    slow.send(_predict(1, 1))
    assert _code(slow) == (1, None)
    slow.socket.sendall(whole[:-1])
    _, msgid, error, _ = slow.read()
    assert (msgid, error["code"]) == (None, "INVALID_ARGUMENT")
    assert "not finished within 0.1 s" in error["message"]
    assert slow.read() is None
    quick.send(_predict(1, 1), [0, 2, "stats", []])
    assert _code(quick) == (1, None)  # silence between messages is no offence
    assert quick.read()[3]["server"]["stuck_closed"] == 1


def test_a_byte_now_and_then_is_no_progress(serve, connect):
    running = serve(read_timeout=0.1)
    slow = connect(running.address)
    slow.socket.settimeout(0.02)
    slow.socket.sendall(b"\x94\x00\x01\xa7predict\x93\xc6\x00\x0f\x00\x00")
    for _ in range(1000):
        try:
            if b"not finished" in slow.socket.recv(4096):
                break
        except TimeoutError:
            slow.socket.sendall(b"x")
    else:
        raise AssertionError("was never dropped")


def test_an_idle_connection_is_sent_away_and_its_client_does_not_mind(serve, connect):
    running = serve(idle_timeout=0.05)
    with Client(running.address, retries=0) as client:
        client.health()
        idle = connect(running.address)
        busy = connect(running.address)
        busy.send(_predict(1, 1, model="hold"))
        assert idle.read() == [2, "goaway", [0]]
        assert idle.read() is None
        assert client.health()["ready"]
    running.core.release()
    assert _code(busy) == (1, None)  # who waits for an answer is not idle
    assert busy.read() == [2, "goaway", [0]]


def test_an_old_connection_is_drained_without_a_loss(serve, connect):
    running = serve(max_connection_age=0.05, connection_age_grace=0.05)
    peer = connect(running.address)
    peer.send(_predict(1, 1, model="hold"))
    assert peer.read() == [2, "goaway", [50]]
    running.core.arrived.acquire(timeout=30)
    while not next(iter(running.server.peers())).over:  # past the grace: it is not read from any more
        pass
    running.core.release()
    assert _code(peer) == (1, None)
    assert peer.read() is None


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_no_call_is_lost_while_connections_grow_old(serve, kind):
    running = serve(max_connection_age=0.02, connection_age_grace=30.0)
    calls = 3000

    if kind == "sync":
        with Client(running.address, retries=0) as client:
            for i in range(calls):
                assert client.predict("echo", {"id": i}).scores.tolist() == [i]
    else:

        async def main():
            async with AsyncClient(running.address, retries=0) as client:
                for i in range(0, calls, 30):
                    made = await asyncio.gather(*(client.predict("echo", {"id": i + j}) for j in range(30)))
                    assert [m.scores.tolist() for m in made] == [[i + j] for j in range(30)]

        asyncio.run(main())
    assert running.server.stats()["aged"] >= 1
    assert running.core.predictions == calls


def test_connections_of_one_address(serve, connect, tmp_path):
    running = serve(listen=("tcp://127.0.0.1:0", f"unix://{tmp_path}/s"), max_connections_per_address=2)
    peers = [connect(running.address) for _ in range(2)]
    for peer in peers:
        peer.send(_predict(1, 1))
        assert _code(peer) == (1, None)
    third = connect(running.address)
    _, msgid, error, _ = third.read()
    assert (msgid, error["code"], error["retryable"]) == (None, "RESOURCE_EXHAUSTED", True)
    assert third.read() is None
    local = connect(running.addresses[1])  # a Unix socket has no address
    local.send(_predict(1, 1))
    assert _code(local) == (1, None)
    peers[0].close()
    assert running.core.dropped.acquire(timeout=30) and running.core.dropped.acquire(timeout=30)
    again = connect(running.address)
    again.send(_predict(1, 1))
    assert _code(again) == (1, None)


def test_limits_of_time_come_from_the_configuration():
    text = """
server:
  limits: {read_timeout: 1s, handshake_timeout: 2s, auth_timeout: 3s, idle_timeout: 4m,
           max_connection_age: 1h, connection_age_grace: 5s, max_connections_per_address: 6}
"""
    config, faults = check_text(text)
    assert config is not None, faults
    made = ServerSettings.from_config(config)
    assert (made.read_timeout, made.handshake_timeout, made.auth_timeout) == (1, 2, 3)
    assert (made.idle_timeout, made.max_connection_age, made.connection_age_grace) == (240, 3600, 5)
    assert made.max_connections_per_address == 6
    default = ServerSettings(listen=())
    assert (default.idle_timeout, default.max_connection_age) == (math.inf, math.inf)
    config, faults = check_text("server:\n  limits:\n    read_timeout: 0\n")
    assert config is None and faults[0].line == 3


def test_a_half_closed_peer_gets_every_reply(serve, connect):
    running = serve()
    peer = connect(running.address)
    for i in range(200):
        peer.send(_predict(i, i, model="hold" if i % 2 else "echo"))
    peer.send([0, 200, "stats", []])
    peer.socket.shutdown(socket.SHUT_WR)
    for _ in range(100):
        assert running.core.arrived.acquire(timeout=30)
    running.core.release()
    got = []
    while (message := peer.read()) is not None:
        assert message[2] is None
        got.append(message[1])
    assert sorted(got) == list(range(201))
