"""The clocks."""

import time

import pytest

from penstock.clock import ManualClock, SystemClock


def test_system_clock_reads_utc_microseconds_and_the_monotonic_clock():
    clock = SystemClock()
    before_us, before_ns = time.time_ns() // 1000, time.monotonic_ns()
    now, mono = clock.now_us(), clock.mono_ns()
    assert mono >= before_ns
    assert mono <= time.monotonic_ns()
    assert abs(now - before_us) < 60 * 10**6  # the unit, with room for a stepped wall clock


def test_manual_clock_stands_still_until_advanced():
    clock = ManualClock(us=5, ns=7)
    assert (clock.now_us(), clock.mono_ns()) == (5, 7)
    clock.advance(us=3)
    assert (clock.now_us(), clock.mono_ns()) == (8, 3007)


def test_manual_clock_does_not_go_back():
    clock = ManualClock()
    with pytest.raises(ValueError, match="us is -1"):
        clock.advance(us=-1)
    assert clock.now_us() == 0
