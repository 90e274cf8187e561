"""Both clients against real servers, servers that die, and peers that only pretend to be servers."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
import uvloop
from pretender import free_address, pretender

from penstock.errors import (
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PenstockError,
    ResourceExhaustedError,
    UnavailableError,
)
from penstock.serving.async_client import AsyncClient
from penstock.serving.client import Client


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request):
    def run_until_done(main):
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(asyncio.wait_for(main, 60))

    return run_until_done


def test_predict_and_the_other_methods(serve):
    running = serve()
    running.engine.gate.set()
    with Client(running.address) as client:
        made = client.predict("echo", {"id": [3, 4]}, {"km": np.array([1.0, 2.0])})
        assert made.scores.tolist() == [3.0, 4.0]
        assert (made.version, made.request_ids.tolist()) == ("1", [0, 1])
        assert client.predict("echo", {"id": 5}).scores.tolist() == [5.0]
        assert len(client.predict_vectors("echo", np.zeros((2, 3), np.float32)).scores) == 24
        assert client.health()["ready"] is True
        assert client.stats()["server"]["connections"] == 1
        assert client.models()["echo"]["entities"] == ["id"]
        assert client.features("3", {"id": [1]})["columns"] == {"big": "xxx"}
        client.label([1, 2], [0, 1])
        client.materialize(5, ["v"])
        client.materialize()
        client.apply()
        client.rollback("echo")
        client.canary("echo", 0.5)
        client.shadow("echo", 0.5, 2)
        with pytest.raises(InvalidArgumentError, match="model is 'echo'"):
            client.promote("echo", 2)
        with pytest.raises(InternalError, match="no reference"):
            client.drift("echo", 60, 5)
    assert [call[:2] for call in running.engine.calls[3:]] == [
        ("label", [[1, 2], [0, 1]]),
        ("materialize", [5, ["v"]]),
        ("materialize", []),
        ("apply", []),
        ("rollback", ["echo"]),
        ("canary", ["echo", 0.5]),
        ("shadow", ["echo", 0.5, "2"]),
        ("promote", ["echo", "2"]),
        ("drift", ["echo", 60, 5]),
    ]


def test_async_client_has_the_same_methods(serve, run):
    running = serve()
    running.engine.gate.set()

    async def main():
        async with AsyncClient(running.address) as client:
            made = await client.predict("echo", {"id": [3, 4]}, {"km": [1.0, 2.0]})
            assert made.scores.tolist() == [3.0, 4.0]
            assert len((await client.predict_vectors("echo", [[0.5]])).scores) == 4
            assert (await client.health())["ready"] is True
            assert (await client.stats())["server"]["connections"] == 1
            assert "echo" in await client.models()
            assert await client.features("3", {"id": [1]}) == {"columns": {"big": "xxx"}}
            await client.label([1], [0])
            await client.materialize(5, ["v"])
            await client.apply()
            await client.rollback("echo")
            await client.canary("echo", 0.5)
            await client.shadow("echo", 0.5, 2)
            with pytest.raises(InvalidArgumentError):
                await client.promote("echo")
            with pytest.raises(InternalError):
                await client.drift()

    run(main())
    public = {name for name in dir(Client) if not name.startswith("_")}
    assert public == {name for name in dir(AsyncClient) if not name.startswith("_")}


def test_errors_of_the_server_are_raised_by_class(serve):
    with Client(serve().address) as client:
        with pytest.raises(NotFoundError, match='model is "eco"'):
            client.predict("eco", {"id": 1})
        with pytest.raises(InvalidArgumentError, match=r"entities\.id is 1\.5"):
            client.predict("echo", {"id": 1.5})
        with pytest.raises(NotFoundError, match='method is "nosuch"'):
            client.call("nosuch")
        assert client.predict("echo", {"id": 1}).scores.tolist() == [1.0]


def test_many_threads_share_one_client(serve):
    running = serve()
    with Client(running.address, pool_size=2) as client, ThreadPoolExecutor(8) as threads:

        def work(thread):
            values = range(1000 * thread, 1000 * thread + 150)
            return all(client.predict("echo", {"id": v}).scores.tolist() == [float(v)] for v in values)

        assert all(threads.map(work, range(8)))
        assert running.server.accepted <= 2


def test_many_tasks_share_one_client(serve, run):
    running = serve()

    async def main():
        async with AsyncClient(running.address, pool_size=2) as client:
            made = await asyncio.gather(*(client.predict("echo", {"id": i}) for i in range(300)))
        assert [m.scores[0] for m in made] == list(range(300))
        assert running.server.accepted <= 2

    run(main())


def test_reader_role_passes_on(serve):
    """A waiter that reads for all is answered first, last, or gives up: the others still get theirs."""
    running = serve()
    with Client(running.address, pool_size=1) as client, ThreadPoolExecutor(8) as threads:
        held = [threads.submit(client.predict, "hold", {"id": i}) for i in range(6)]
        for _ in held:
            assert running.core.arrived.acquire(timeout=30)
        with pytest.raises(DeadlineExceededError):
            client.predict("hold", {"id": 9}, deadline_ms=20)
        assert client.predict("echo", {"id": 7}).scores.tolist() == [7.0]
        running.core.release()
        assert [future.result(30).scores[0] for future in held] == list(range(6))
        assert running.server.accepted == 1


def test_first_reader_that_gives_up_leaves_the_role_to_the_next(serve):
    running = serve()
    with Client(running.address, pool_size=1) as client, ThreadPoolExecutor(2) as threads:
        first = threads.submit(client.predict, "hold", {"id": 1}, deadline_ms=300)
        assert running.core.arrived.acquire(timeout=30)
        second = threads.submit(client.predict, "hold", {"id": 2})
        assert running.core.arrived.acquire(timeout=30)
        with pytest.raises(DeadlineExceededError):
            first.result(30)
        running.core.release()
        assert second.result(30).scores[0] == 2.0


def test_local_deadline_cancels_the_request(serve):
    running = serve()
    with Client(running.address, timeout_ms=300) as client:
        with pytest.raises(DeadlineExceededError, match="no reply within the deadline"):
            client.predict("hold", {"id": 1})
        client.health()  # on the same connection, so after the cancel
        assert (running.core.cancelled, running.core.held) == (1, [])
        with pytest.raises(DeadlineExceededError):
            client.call("materialize", timeout_ms=20)


def test_cancelled_task_cancels_the_request(serve, run):
    running = serve()

    async def main():
        async with AsyncClient(running.address) as client:
            task = asyncio.create_task(client.predict("hold", {"id": 1}))
            await asyncio.to_thread(running.core.arrived.acquire, timeout=30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await client.health()
            assert (running.core.cancelled, running.core.held) == (1, [])
            with pytest.raises(DeadlineExceededError):
                await client.predict("hold", {"id": 1}, deadline_ms=20)
            with pytest.raises(DeadlineExceededError):
                await client.call("stats", timeout_ms=0.001)

    run(main())


def test_remaining_time_is_told_to_the_server(serve):
    running = serve()
    with Client(running.address) as client:
        client.predict("echo", {"id": 1}, deadline_ms=5000)
        client.predict("echo", {"id": 1})
    first, second = (call["options"]["deadline_us"] for call in running.core.calls)
    assert 0 < first <= 5_000_000
    assert second == 0


def test_refusals_are_retried_until_they_end(serve, run):
    running = serve()
    running.core.busy = 3
    with Client(running.address) as client:
        assert client.predict("busy", {"id": 1}).scores.tolist() == [1.0]
    running.core.busy = 1000
    with Client(running.address, retries=2) as client, pytest.raises(ResourceExhaustedError):
        client.predict("busy", {"id": 1})
    assert running.core.busy == 997
    running.core.busy = 3

    async def main():
        async with AsyncClient(running.address) as client:
            assert (await client.predict("busy", {"id": 1})).scores.tolist() == [1.0]

    run(main())


def test_reconnects_after_the_server_was_killed(spawn, tmp_path):
    address = f"unix://{tmp_path}/s"
    first = spawn(listen=[address])
    with Client(address, retries=0) as client:
        assert client.predict("echo", {"id": 1}).scores.tolist() == [1.0]
        held = ThreadPoolExecutor(1).submit(client.predict, "hold", {"id": 1})
        client.health()
        first.process.kill()
        first.wait()
        with pytest.raises(UnavailableError):
            held.result(30)
        with pytest.raises(UnavailableError, match=r"cannot connect to unix:///.*refused"):
            client.predict("echo", {"id": 2})
        spawn(listen=[address])
        assert client.predict("echo", {"id": 3}).scores.tolist() == [3.0]


def test_async_client_reconnects_after_the_server_was_killed(spawn, tmp_path, run):
    address = f"unix://{tmp_path}/s"
    first = spawn(listen=[address])

    async def main():
        async with AsyncClient(address, retries=0, pool_size=1) as client:
            await client.health()
            held = asyncio.create_task(client.predict("hold", {"id": 1}))
            await client.health()
            first.process.kill()
            with pytest.raises(UnavailableError, match="was lost"):
                await held
            first.wait()
            with pytest.raises(UnavailableError, match="cannot connect to unix:///"):
                await client.predict("echo", {"id": 2})
            spawn(listen=[address])
            assert (await client.predict("echo", {"id": 3})).scores.tolist() == [3.0]

    run(main())


def test_lost_connection_repeats_a_prediction_but_never_an_admin_call(run):
    ok = msgpack.packb([1, 0, None, {"scores": [1.0], "version": "1", "request_ids": [1]}])
    with pretender(b"", b"", ok) as (address, got), Client(address) as client:
        assert client.predict("m", {"id": 1}).scores.tolist() == [1.0]
        assert len(got) == 3
    for method in ("apply", "materialize", "promote"):
        with pretender(b"", ok) as (address, got), Client(address) as client:
            with pytest.raises(UnavailableError, match="was lost"):
                client.call(method, "x")
            assert len(got) == 1

    async def main(address):
        async with AsyncClient(address) as client:
            with pytest.raises(UnavailableError, match="was lost"):
                await client.call("apply", "x")

    with pretender(b"", ok) as (address, got):
        run(main(address))
        assert len(got) == 1


@pytest.mark.parametrize("reply", [b"\xc1", b"\x05", b"\x91\x01", b"\x94\x01\x00\xdd\xff\xff\xff\xff"])
def test_peer_that_sends_no_replies(reply, run):
    with pretender(reply) as (address, _), Client(address, retries=0) as client:  # noqa: SIM117
        with pytest.raises(InternalError, match="what is no reply"):
            client.predict("m", {"id": 1})

    async def main(address):
        async with AsyncClient(address, retries=0) as client:
            with pytest.raises(InternalError, match="what is no reply"):
                await client.predict("m", {"id": 1})

    with pretender(reply) as (address, _):
        run(main(address))


def test_connection_limit_is_an_error_that_is_retried(serve, connect):
    running = serve(max_connections=1)
    first = connect(running.address)
    first.send([0, 1, "health", []])
    assert first.read()[2] is None
    with Client(running.address, retries=0) as client:
        with pytest.raises(ResourceExhaustedError, match="1 connections"):
            client.health()
        first.close()
        assert running.core.dropped.acquire(timeout=30)
        assert client.health()["ready"] is True


def test_goaway_moves_new_calls_to_another_server(serve, run):
    old, new = serve(), serve()
    with Client([old.address, new.address], pool_size=1) as client, ThreadPoolExecutor(1) as threads:
        for i in range(4):
            client.predict("echo", {"id": i})
        assert old.core.predictions and new.core.predictions
        held = threads.submit(client.predict, "hold", {"id": 9})
        while not (old.core.held or new.core.held):
            client.health()
        leaving, staying = (old, new) if old.core.held else (new, old)
        leaving.begin_stop()
        for i in range(20):
            assert client.predict("echo", {"id": i}).scores.tolist() == [float(i)]
        leaving.core.release()
        assert held.result(30).scores.tolist() == [9.0]
        assert leaving.stop() is True
        before = staying.core.predictions
        client.predict("echo", {"id": 1})
        assert staying.core.predictions == before + 1


def test_no_call_is_lost_while_its_server_shuts_down(serve):
    old, new = serve(goaway_grace=60.0), serve()
    with Client([old.address, new.address], pool_size=1) as client, ThreadPoolExecutor(4) as threads:
        began, stopped = threading.Semaphore(0), threading.Event()

        def work():
            made = []
            while not stopped.is_set() or len(made) < 50:
                made.append(client.predict("echo", {"id": len(made)}).scores[0])
                began.release()
            return made == list(range(len(made)))

        futures = [threads.submit(work) for _ in range(4)]
        for _ in range(40):
            assert began.acquire(timeout=30)
        assert old.stop() is True
        stopped.set()
        assert all(future.result(30) for future in futures)
        assert old.core.predictions and new.core.predictions


def test_async_client_follows_a_goaway(serve, run):
    old, new = serve(), serve()

    async def main():
        async with AsyncClient([old.address, new.address], pool_size=1) as client:
            for i in range(4):
                await client.predict("echo", {"id": i})
            assert old.core.predictions and new.core.predictions
            assert await asyncio.to_thread(old.stop) is True
            for i in range(20):
                assert (await client.predict("echo", {"id": i})).scores.tolist() == [float(i)]

    run(main())


def test_endpoint_that_is_down_is_avoided(serve, run):
    running = serve()
    addresses = [free_address(), running.address]
    with Client(addresses) as client:
        assert [client.predict("echo", {"id": i}).scores[0] for i in range(10)] == list(range(10))

    async def main():
        async with AsyncClient(addresses) as client:
            assert (await client.predict("echo", {"id": 1})).scores[0] == 1.0

    run(main())


def test_retries_of_a_struggling_server_are_few(serve, run):
    """However many calls fail, those made again stay within the budget."""
    running = serve()
    running.core.busy = 1 << 30
    with Client(running.address, retry_share=0.1, retry_rate=1.0) as client:
        for _ in range(100):
            with pytest.raises(ResourceExhaustedError):
                client.predict("busy", {"id": 1})
    assert 100 <= running.core.predictions <= 100 + 1 + 10 + 60  # a minute at most

    async def main():
        before = running.core.predictions
        async with AsyncClient(running.address, retry_share=0.0, retry_rate=0.0) as client:
            calls = (client.predict("busy", {"id": 1}) for _ in range(50))
            failed = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in failed} == {ResourceExhaustedError}
        assert running.core.predictions == before + 50

    run(main())


def test_endpoint_that_refuses_everything_is_ejected(serve, run):
    bad, good = serve(), serve()
    bad.core.draining = True  # answers every prediction UNAVAILABLE
    with Client([bad.address, good.address]) as client:
        for i in range(200):
            assert client.predict("echo", {"id": i}).scores.tolist() == [i]
    tried = bad.core.predictions
    assert 5 <= tried < 40

    async def main():
        async with AsyncClient([bad.address, good.address]) as client:
            for i in range(200):
                assert (await client.predict("echo", {"id": i})).scores.tolist() == [i]

    run(main())
    assert bad.core.predictions < tried + 40


def test_nobody_listens(run):
    address = free_address()
    with Client(address, retries=1) as client, pytest.raises(UnavailableError, match="refused"):
        client.health()
    with Client(address, retries=10**9) as client, pytest.raises(PenstockError):
        client.predict("m", {"id": 1}, deadline_ms=30)

    async def main():
        async with AsyncClient(address, retries=1) as client:
            with pytest.raises(UnavailableError, match="refused"):
                await client.health()

    run(main())


def test_predict_many_keeps_the_order_of_the_table(serve, run):
    running = serve()
    table = {"id": np.arange(1000), "km": np.arange(1000) / 2}
    with Client(running.address) as client:
        made = client.predict_many("echo", table, chunk_rows=37)
        assert made.scores.tolist() == list(range(1000))
        assert (len(made.request_ids), made.versions) == (1000, ("1",))
        assert all(call["options"]["priority"] == "low" for call in running.core.calls)
        assert {call["rows"] for call in running.core.calls} == {37, 1000 % 37}
        running.core.busy = 20  # more refusals than one call has retries
        assert client.predict_many("busy", table, entities=["id"]).scores.tolist() == list(range(1000))
        with pytest.raises(NotFoundError):
            client.predict_many("other", table, entities=["id"], chunk_rows=500)
        with pytest.raises(NotFoundError, match="expected one of: echo"):
            client.predict_many("other", table)

    async def main():
        async with AsyncClient(running.address) as client:
            running.core.busy = 20
            batch = await client.predict_many("busy", table, entities=["id"], chunk_rows=37)
            assert batch.scores.tolist() == list(range(1000))
            assert len((await client.predict_many("echo", {"id": [1]})).scores) == 1
            with pytest.raises(NotFoundError):
                await client.predict_many("other", table, entities=["id"])

    run(main())


def test_requests_and_replies_that_fill_both_sockets(serve, run):
    """The server stops reading until we read; the client reads while it cannot write."""
    running = serve(pause_output_bytes=1 << 12)
    table = {"id": np.arange(400_000)}
    with Client(running.address, pool_size=1) as client:
        made = client.predict_many("echo", table, entities=["id"], chunk_rows=100_000)
        assert np.array_equal(made.scores, table["id"])

    async def main():
        async with AsyncClient(running.address, pool_size=1) as client:
            batch = await client.predict_many("echo", table, entities=["id"], chunk_rows=100_000)
            assert np.array_equal(batch.scores, table["id"])

    run(main())


def test_predict_many_that_fails_takes_back_what_it_sent_ahead(serve):
    running = serve()
    with Client(running.address, pool_size=1) as client:
        ids = [0, "x", 2, 3]  # the second chunk is refused while the others are held
        with ThreadPoolExecutor(1) as threads:
            failing = threads.submit(client.predict_many, "hold", {"id": ids}, entities=["id"], chunk_rows=1)
            for _ in range(3):
                assert running.core.arrived.acquire(timeout=30)
            running.core.release_first()
            with pytest.raises(InvalidArgumentError, match=r"entities\.id\[0\] is"):
                failing.result(30)
        client.health()
        assert (running.core.cancelled, running.core.held) == (2, [])


def test_client_reads_while_it_cannot_write():
    """The peer reads nothing until we have taken 32 MiB from it: more than the sockets hold."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk_first():
            with listener.accept()[0] as peer:
                note = msgpack.packb([2, "note", [b"x" * (1 << 20)]])
                for _ in range(32):
                    peer.sendall(note)
                unpacker = msgpack.Unpacker(max_buffer_size=0)
                for message in iter(lambda: next(unpacker, None), 0):
                    if message is not None:
                        result = {"scores": [1.0], "version": "1", "request_ids": [len(message[3][1])]}
                        peer.sendall(msgpack.packb([1, message[1], None, result]))
                        return
                    unpacker.feed(peer.recv(1 << 20))

        rows = np.zeros((1, 8 << 20), np.float32)
        with (
            ThreadPoolExecutor(1) as threads,
            Client(f"tcp://127.0.0.1:{listener.getsockname()[1]}") as client,
        ):
            peer = threads.submit(talk_first)
            assert client.predict_vectors("m", rows).request_ids.tolist() == [rows.nbytes]
            peer.result(30)


def test_deadline_in_the_middle_of_a_request_ends_its_connection():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Client(f"tcp://127.0.0.1:{listener.getsockname()[1]}") as client,
    ):
        for _ in range(2):
            with pytest.raises(DeadlineExceededError):
                client.predict_vectors("m", np.zeros((1, 8 << 20), np.float32), deadline_ms=200)
            with listener.accept()[0] as peer:
                while peer.recv(1 << 20):
                    pass


def test_closed_client(serve, run):
    running = serve()
    client = Client(running.address)
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(client.predict, "hold", {"id": 1})
        assert running.core.arrived.acquire(timeout=30)
        client.close()
        with pytest.raises(CancelledError, match="closed"):
            held.result(30)
    with pytest.raises(FailedPreconditionError, match="the client is closed"):
        client.predict("echo", {"id": 1})

    async def main():
        other = AsyncClient(running.address)
        task = asyncio.create_task(other.predict("hold", {"id": 1}))
        await asyncio.to_thread(running.core.arrived.acquire, timeout=30)
        await other.close()
        with pytest.raises(CancelledError):
            await task
        with pytest.raises(FailedPreconditionError):
            await other.health()

    run(main())


@pytest.mark.parametrize(
    ("addresses", "size", "match"),
    [([], 1, "addresses is empty"), ("h:1", 1, "address is 'h:1'"), ("tcp://h:1", 0, "pool_size is 0")],
)
def test_client_that_cannot_be(addresses, size, match):
    with pytest.raises(InvalidArgumentError, match=match):
        Client(addresses, pool_size=size)
