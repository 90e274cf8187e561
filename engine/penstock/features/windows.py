"""Kernels over an `EventIndex`: the latest event at a time, window bounds, and aggregates of a window.

A window's float64 sum adds its values one by one in event order to 0.0, whoever asks and in whatever batch,
so that equal windows give equal bits. `locate` and `bounds` narrow `meta`, the interval of request time
around `now` in which they would find the same events.
Kernels only write to their outputs; any thread may run them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from penstock.features.expressions import INT_MAX, INT_MIN

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRESENT, NULL, NOT_FOUND, EXPIRED, FUTURE = range(5)
COUNT, SUM, MEAN, MIN, MAX = range(5)
KINDS = {"count": COUNT, "sum": SUM, "mean": MEAN, "min": MIN, "max": MAX}
_MIN, _MAX = INT_MIN, INT_MAX


@njit(cache=True, nogil=True)
def _add(a: int, b: int) -> int:
    """a + b for b >= 0, INT_MAX at most."""
    return _MAX if a > _MAX - b else a + b


@njit(cache=True, nogil=True)
def _sub(a: int, b: int) -> int:
    """a - b for b >= 0, INT_MIN at least."""
    return _MIN if a < _MIN + b else a - b


@njit(cache=True, nogil=True)
def _floor(t: int, every: int) -> int:
    return t if every == 0 else (_MIN if t < _MIN + every else t // every * every)


@njit(cache=True, nogil=True)
def _ceil(t: int, every: int) -> int:
    """The first time whose floor is t or later."""
    return t if every == 0 else _floor(_add(t, every - 1), every)


@njit(cache=True, nogil=True)
def _upper(times: NDArray[np.int64], first: int, stop: int, t: int) -> int:
    """Position of the first time > t in times[first:stop]."""
    while first < stop:
        middle = (first + stop) >> 1
        if times[middle] <= t:
            first = middle + 1
        else:
            stop = middle
    return first


@njit(cache=True, nogil=True)
def locate(
    slot: NDArray[np.int64],
    starts: NDArray[np.int64],
    event_time: NDArray[np.int64],
    known_at: NDArray[np.int64],
    now: NDArray[np.int64],
    known_by: NDArray[np.int64],
    ttl: int,
    tick: int,
    latest: NDArray[np.int64],
    status: NDArray[np.uint8],
    meta: NDArray[np.int64],
) -> None:
    """Find each row's newest event at `now`, its status and its interval.

    Args:
        slot: int64[n]; position of the row's key in the index, -1 for none.
        known_by: int64[n], or of length 0: only events known by then count.
        ttl: microseconds, 0 for none.
        tick: microseconds; where above 0, the row reads only windows that move at multiples of it or rarer
            ones, so an event between two ticks changes nothing but whether the key is known.
        latest: out; position of the newest event, -1 unless the row is PRESENT.
    """
    for i in range(len(slot)):
        latest[i] = -1
        meta[i, 0] = meta[i, 2] = meta[i, 3] = _MIN
        meta[i, 1] = _MAX
        status[i] = NOT_FOUND
        if slot[i] < 0:
            continue
        first, stop = starts[slot[i]], starts[slot[i] + 1]
        after = _upper(event_time, first, stop, now[i])
        if after > first:
            meta[i, 0] = event_time[after - 1]
        if after < stop:
            meta[i, 1] = event_time[after]
        at = after - 1
        if len(known_by) > 0:
            while at >= first and (known_at[at] > known_by[i] or known_at[at] == _MIN):
                at -= 1
        if at < first:
            status[i] = FUTURE
            continue
        if tick > 0:
            # `bounds` narrows this to the ticks at which a window changes.
            used = max(first, _upper(event_time, first, stop, _floor(now[i], tick)) - 1)
            meta[i, 0], meta[i, 1] = event_time[first], _MAX
            meta[i, 2], meta[i, 3] = event_time[used], known_at[used]
            status[i] = PRESENT
            latest[i] = at
            continue
        meta[i, 2], meta[i, 3] = event_time[at], known_at[at]
        if ttl > 0:
            gone = _add(_add(event_time[at], ttl), 1)
            if now[i] >= gone and gone < _MAX:
                status[i] = EXPIRED
                meta[i, 0] = max(meta[i, 0], gone)
                continue
            meta[i, 1] = min(meta[i, 1], gone)
        status[i] = PRESENT
        latest[i] = at


@njit(cache=True, nogil=True)
def bounds(
    slot: NDArray[np.int64],
    latest: NDArray[np.int64],
    starts: NDArray[np.int64],
    event_time: NDArray[np.int64],
    now: NDArray[np.int64],
    window: int,
    every: int,
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    meta: NDArray[np.int64],
) -> None:
    """Events low:high in (T - window, T], T = now floored to `every` (0 for none); narrows `meta`."""
    for i in range(len(slot)):
        low[i] = high[i] = 0
        if latest[i] < 0:
            continue
        first, stop = starts[slot[i]], starts[slot[i] + 1]
        t = _floor(now[i], every)
        b = _upper(event_time, first, stop, t)
        a = _upper(event_time, first, b, _sub(t, window))
        low[i], high[i] = a, b
        # The times at which an event enters or leaves, on either side of now.
        since, until = meta[i, 0], meta[i, 1]
        if b > first:
            since = max(since, _ceil(event_time[b - 1], every))
        if b < stop:
            until = min(until, _ceil(event_time[b], every))
        if a > first:
            since = max(since, _ceil(_add(event_time[a - 1], window), every))
        if a < b:
            until = min(until, _ceil(_add(event_time[a], window), every))
        meta[i, 0], meta[i, 1] = since, until


@njit(cache=True, nogil=True)
def _counts(event: int, valid: NDArray[np.bool_], known_at: NDArray[np.int64], cut: bool, by: int) -> bool:
    if len(valid) > 0 and not valid[event]:
        return False
    return not cut or (known_at[event] <= by and known_at[event] != _MIN)


@njit(cache=True, nogil=True)
def _replaces(kind: int, value: float, best: float) -> bool:
    """Whether `value` is the new least or greatest; -0.0 is below 0.0."""
    if value == best == 0.0:
        value, best = np.copysign(1.0, value), np.copysign(1.0, best)
    return value < best if kind == MIN else value > best


@njit(cache=True, nogil=True)
def aggregate_real(
    kind: int,
    values: NDArray[np.float64],
    valid: NDArray[np.bool_],
    known_at: NDArray[np.int64],
    known_by: NDArray[np.int64],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    out: NDArray[np.float64],
    out_valid: NDArray[np.bool_],
) -> None:
    """SUM, MEAN, MIN or MAX of the values that are not null; a NaN makes the result NaN."""
    cut = len(known_by) > 0
    for i in range(len(low)):
        total, n = 0.0, 0
        by = known_by[i] if cut else _MAX
        for event in range(low[i], high[i]):
            if not _counts(event, valid, known_at, cut, by):
                continue
            value = values[event]
            if kind in (SUM, MEAN):
                total += value
            elif n == 0 or np.isnan(value) or _replaces(kind, value, total):
                total = value
            n += 1
        if kind == MEAN and n > 0:
            total /= n
        out[i] = np.nan if np.isnan(total) else total  # one NaN, whatever made it
        out_valid[i] = kind == SUM or n > 0


@njit(cache=True, nogil=True)
def aggregate_int(
    kind: int,
    values: NDArray[np.int64],
    valid: NDArray[np.bool_],
    known_at: NDArray[np.int64],
    known_by: NDArray[np.int64],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    out: NDArray[np.int64],
    out_valid: NDArray[np.bool_],
) -> None:
    """COUNT, SUM (modulo 2**64, as `+`), MIN or MAX of the values that are not null."""
    cut = len(known_by) > 0
    for i in range(len(low)):
        total, n = 0, 0
        by = known_by[i] if cut else _MAX
        for event in range(low[i], high[i]):
            if not _counts(event, valid, known_at, cut, by):
                continue
            if kind == COUNT:
                total += 1
            else:
                value = values[event]
                if kind == SUM:
                    total += value
                elif n == 0 or (value < total if kind == MIN else value > total):
                    total = value
            n += 1
        out[i] = total
        out_valid[i] = kind in (COUNT, SUM) or n > 0


@njit(cache=True, nogil=True)
def difference(
    prefix: NDArray[Any], low: NDArray[np.int64], high: NDArray[np.int64], out: NDArray[np.int64]
) -> None:
    """prefix[high] - prefix[low]: exact for counts and for sums modulo 2**64."""
    for i in range(len(low)):
        out[i] = prefix[high[i]] - prefix[low[i]]
