"""Calls between two processes of a server, here between two ends of a socket pair."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from penstock.errors import (
    DeadlineExceededError,
    InternalError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from penstock.serving.link import CallPool, Link, unknown_method


class Ends:
    def __init__(self) -> None:
        self.pool = CallPool("test", 4, 8)
        self.gate = threading.Event()
        self.notes: list[Any] = []
        self.sockets = socket.socketpair()
        self.here, self.there = (
            Link(sock, self.handle, lambda method, params: self.pool, frozenset({"note"}))
            for sock in self.sockets
        )
        self.here.start()
        self.there.start()

    def handle(self, method: str, params: list[Any]) -> Any:
        if method == "note":
            self.notes.append(params[0])
            return None
        if method == "echo":
            return params
        if method == "notes":
            return len(self.notes)
        if method == "wait":
            assert self.gate.wait(30)
            return None
        if method == "break":
            raise ValueError("it broke")
        raise unknown_method(method)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.gate.set()
    made.here.close()
    made.there.close()
    made.pool.close()


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_both_ends_call_and_get_what_was_meant(ends: Ends) -> None:
    assert ends.here.call("echo", [1, "a", b"b", {3: None}, 2.5], 30) == [1, "a", b"b", {3: None}, 2.5]
    assert ends.there.call("echo", [np.int64(7)], 30) == [7]
    big = bytes(range(256)) * 40_000
    threads = [in_thread(lambda: ends.here.call("echo", [big], 60)) for _ in range(4)]
    threads += [in_thread(lambda: ends.there.call("echo", [big], 60)) for _ in range(4)]
    for thread, results in threads:
        thread.join(60)
        assert results == [[big]]


def test_notes_are_taken_before_a_call_behind_them_is_answered(ends: Ends) -> None:
    for i in range(500):
        ends.here.note("note", [i])
        if i % 50 == 49:
            assert ends.here.call("notes", [], 30) == i + 1
    assert ends.notes == list(range(500))


def test_errors_come_back_as_what_they_are(ends: Ends) -> None:
    with pytest.raises(NotFoundError, match="'what' is no method"):
        ends.here.call("what", [], 30)
    with pytest.raises(InternalError, match="ValueError: it broke"):
        ends.here.call("break", [], 30)
    assert ends.here.call("echo", [1], 30) == [1]


def test_a_call_that_takes_too_long_gives_up_alone(ends: Ends) -> None:
    with pytest.raises(DeadlineExceededError, match=r"wait: no answer of the other worker in 0\.01 s"):
        ends.here.call("wait", [], 0.01)
    assert ends.here.call("echo", [1], 30) == [1]
    ends.gate.set()
    assert ends.here.call("wait", [], 30) is None  # the late answer of the first went to nobody


def test_calls_beyond_the_bound_are_refused(ends: Ends) -> None:
    waiting = [in_thread(lambda: ends.here.call("wait", [], 30)) for _ in range(12)]
    refused = 0
    while refused < 4:
        refused = sum(isinstance(result, ResourceExhaustedError) for _, found in waiting for result in found)
    ends.gate.set()
    for thread, _ in waiting:
        thread.join(30)
    assert [result for _, found in waiting for result in found].count(None) == 8


@pytest.mark.parametrize("end", ["here", "there"])
def test_what_waits_fails_when_an_end_closes(ends: Ends, end: str) -> None:
    thread, results = in_thread(lambda: ends.here.call("wait", [], 60))
    while not ends.here._waiting:
        pass
    getattr(ends, end).close()
    thread.join(30)
    assert isinstance(results[0], UnavailableError)
    assert ends.here.closed.wait(30) and ends.there.closed.wait(30)
    with pytest.raises(UnavailableError):
        ends.here.call("echo", [1], 30)


@pytest.mark.parametrize("frame", [b"\xff\xff\xff\xff", struct.pack("<I", 3) + b"\xc1\xc1\xc1", b"\x05\x00"])
def test_a_broken_frame_ends_the_link(frame: bytes) -> None:
    mine, theirs = socket.socketpair()
    closed = threading.Event()
    pool = CallPool("test", 1, 1)
    link = Link(theirs, lambda method, params: None, lambda method, params: pool, on_close=closed.set)
    link.start()
    mine.sendall(frame)
    mine.shutdown(socket.SHUT_WR)
    assert closed.wait(30)
    mine.close()
    pool.close()
