"""A log of records: what was appended is read, whatever end the file has."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.monitoring import record_log
from penstock.monitoring.record_log import RecordLog

Call = tuple[list[int], list[int], list[int]]
CALLS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2**64 - 1), max_size=4),
        st.lists(st.integers(0, 1), max_size=4),
        st.lists(st.integers(-(2**62), 2**62), max_size=4),
    ),
    max_size=8,
)


def as_lists(calls: list[Call]) -> list[Call]:
    return [(list(a), list(b), list(c)) for a, b, c in calls]


@settings(max_examples=30, deadline=None)
@given(calls=CALLS, cut=st.integers(1, 40))
def test_a_cut_tail_is_dropped_and_the_log_goes_on(
    tmp_path_factory: pytest.TempPathFactory, calls: list[Call], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = RecordLog(folder, "labels")
    for call in calls:
        log.append([call])
    log.close()
    (segment,) = folder.glob("labels-*.log")
    size = segment.stat().st_size
    os.truncate(segment, max(0, size - cut))
    reopened = RecordLog(folder, "labels")
    kept = as_lists(list(reopened.read()))
    assert kept == as_lists(calls)[: len(kept)] and len(kept) < max(1, len(calls))
    reopened.append([([7], [1], [9])])
    assert as_lists(list(reopened.read())) == [*kept, ([7], [1], [9])]
    reopened.close()


def test_old_segments_leave_in_order(tmp_path: Path) -> None:
    log = RecordLog(tmp_path, "labels", segment_bytes=1, max_segments=3)
    for i in range(10):
        log.append([([i], [1], [i])])
    assert [ids for ids, _, _ in log.read()] == [[8], [9]]  # and the one that is open and empty
    log.close()
    log = RecordLog(tmp_path, "labels", segment_bytes=1, max_segments=3)
    log.append([([10], [0], [10])])
    assert [ids for ids, _, _ in log.read()][-1] == [10]
    log.close()


def test_a_full_disk_is_an_error_and_nothing_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RecordLog(tmp_path, "labels")
    log.append([([1], [0], [5])])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_log.os, "fdatasync", full)
    with pytest.raises(OSError, match="No space"):
        log.append([([2], [1], [6])])
    monkeypatch.undo()
    log.append([([3], [1], [7])])
    assert [ids for ids, _, _ in log.read()] == [[1], [3]]
    log.close()
