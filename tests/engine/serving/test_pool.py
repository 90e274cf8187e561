"""The pool's choice among connections and endpoints, and the rules of retries."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from penstock.serving.pool import Pool, Retry, RetryBudget


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


def test_an_endpoint_that_answers_nothing_is_ejected_until_it_answers():
    pool = Pool(["tcp://a:1", "tcp://b:1"], size=1)
    first, second = pool.endpoints
    link = _Link()
    pool.opened(first, link)
    assert link.endpoint is first
    away = UnavailableError("x")
    for _ in range(4):
        pool.outcome(first, away, 100.0)
    assert first.down_until <= 100.0
    pool.outcome(first, InvalidArgumentError("x"), 100.0)  # an answer: the count begins anew
    for _ in range(4):
        pool.outcome(first, away, 100.0)
    pool.outcome(first, DeadlineExceededError("x"), 100.0)  # says nothing either way
    assert first.down_until <= 100.0
    pool.outcome(first, away, 100.0)
    downs = [first.down_until]
    assert downs[0] > 100.0
    assert all(pool.endpoint(100.0) is second for _ in range(5))
    for _ in range(4):  # it gets a chance when its time is up, and is out for longer when that fails
        now = first.down_until
        pool.opened(first, _Link())
        assert first.down_until == now
        pool.outcome(first, away, now)
        downs.append(first.down_until - now)
    assert downs[4] > downs[1] / 2 * 4  # doubles, within the jitter
    pool.outcome(first, None, first.down_until)
    assert (first.down_until, first.failures, first.errors) == (0.0, 0, 0)


@given(
    st.floats(0, 0.5),
    st.floats(0, 20),
    st.lists(st.tuples(st.booleans(), st.floats(0, 0.3)), max_size=300),
)
@settings(max_examples=100, deadline=None)
def test_retries_stay_within_the_budget(share, rate, steps):
    budget = RetryBudget(share, rate)
    now, calls, spent = 50.0, 0, 0
    for is_call, dt in steps:
        now += dt
        if is_call:
            calls += 1
            budget.called()
        elif budget.spend(now):
            spent += 1
        assert spent <= rate + share * calls + rate * (now - 50.0) + 1e-6
    for _ in range(1000):
        budget.spend(now)
    assert not budget.spend(now)
    if rate:
        assert budget.spend(now + 1.001 / rate)


def test_a_spent_budget_ends_retries_but_not_those_that_reached_nobody():
    budget = RetryBudget(share=0.0, rate=0.0)

    def pause(*, sent=True, **given):
        retry = Retry(idempotent=True, retries=3, deadline=None, budget=budget, **given)
        return retry.pause(UnavailableError("x"), 10.0, sent=sent)

    assert pause() is None
    assert pause(sent=False) is not None
    assert pause(persists=True) >= 0.02  # bulk work waits instead
    for bad in (-1, "x", True, float("nan")):
        with pytest.raises(InvalidArgumentError, match="retry_share"):
            RetryBudget(share=bad)


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
