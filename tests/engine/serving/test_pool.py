"""The pool's choice among connections and endpoints, and the rules of retries."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from penstock.serving.pool import Pool, Retry


class _Link:
    def __init__(self, in_flight=0, usable=True):
        self.in_flight, self.usable = in_flight, usable


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=4), min_size=1, max_size=4))
@settings(max_examples=100)
def test_choice_is_the_least_in_flight(loads):
    pool = Pool([f"tcp://h:{i + 1}" for i in range(len(loads))], size=3)
    for endpoint, links in zip(pool.endpoints, loads):
        endpoint.links = [_Link(*link) for link in links]
    usable = [[n for n, ok in links if ok] for links in loads]
    endpoint = pool.endpoint(0.0)
    assert sum(usable[pool.endpoints.index(endpoint)]) == min(map(sum, usable))
    link = pool.link(endpoint)
    left = [link.in_flight for link in endpoint.links]
    if link is None:
        assert len(left) < 3 and 0 not in left
    else:
        assert link.in_flight == min(left)


def test_endpoints_that_are_down_come_last():
    pool = Pool(["tcp://a:1", "tcp://b:1"], size=1)
    first, second = pool.endpoints
    pool.failed(first, 100.0)
    assert all(pool.endpoint(100.0) is second for _ in range(5))
    pool.failed(second, 100.0)
    pool.failed(second, 100.0)
    first.down_until, second.down_until = 101.0, 102.0
    assert pool.endpoint(100.0) is first
    link = _Link()
    pool.opened(first, link)
    assert first.down_until == 0.0
    pool.leaving(link, 100.0)
    assert first.down_until == 101.0


def test_retry_rules():
    def pause(error, *, sent=True, **given):
        retry = Retry(**{"idempotent": True, "retries": 3, "deadline": None, **given})
        return retry.pause(error, 10.0, sent=sent)

    busy = ResourceExhaustedError("x", retry_after_ms=500)
    assert 0.5 <= pause(busy) <= 0.51
    assert 0 <= pause(UnavailableError("x")) <= 0.01
    assert pause(busy, deadline=10.4) is None
    assert pause(busy, retries=0) is None
    assert pause(busy, idempotent=False) is None
    assert pause(UnavailableError("x"), idempotent=False, sent=False) is not None
    assert pause(InvalidArgumentError("x")) is None
    assert pause(DeadlineExceededError("x")) is None
    assert pause(DeadlineExceededError("x"), persists=True, retries=0) is not None
