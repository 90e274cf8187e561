"""The log of served rows: what was flushed is read back whole, from any process, after any end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import FailedPreconditionError, InvalidArgumentError
from penstock.monitoring.served_log import ServedLog, read_served

NAMES = ("a", "b")


def batch(start, n, width=2):
    ids = np.arange(start, start + n)
    rows = np.column_stack([ids * 10 + j for j in range(width)]).astype(np.float32)
    return ids.astype(np.uint64), ids * 1_000, rows, ids / 4, (ids % 4).astype(np.uint8)


def put(log, start, n, model="m", version="1"):
    log.append(model, version, NAMES, *batch(start, n))


def segments(directory):
    return sorted(directory.glob("served-*.arrow"))


def run_child(code, *args, **kwargs):
    """A real process that has the packages; returns it with pipes."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
        text=True,
        **kwargs,
    )


def test_rows_come_back_as_they_were_served(tmp_path):
    log = ServedLog(tmp_path / "log")
    rid, now, rows, scores, status = batch(2**40, 5)
    rid[0] = 2**64 - 1
    rows[1] = np.nan, -np.inf
    log.append("m", "1", NAMES, rid, now, rows, scores, status)
    table = log.read("m")
    assert table.column_names == ["version", "rid", "now_us", "status", "score", "a", "b"]
    assert table["version"].to_pylist() == ["1"] * 5
    np.testing.assert_array_equal(table["rid"].to_numpy(), rid)
    np.testing.assert_array_equal(table["now_us"].to_numpy(), now)
    np.testing.assert_array_equal(table["status"].to_numpy(), status)
    np.testing.assert_array_equal(table["score"].to_numpy(), scores)
    assert str(table.schema.field("a").type) == "float"
    assert table["a"].null_count == 0
    assert np.isnan(table["a"][1].as_py())
    assert table["b"][1].as_py() == -np.inf
    assert table["b"][4].as_py() == np.float32((2**40 + 4) * 10 + 1)
    log.close()


def test_versions_have_their_own_files_and_inputs(tmp_path):
    log = ServedLog(tmp_path)
    put(log, 0, 3)
    log.append("m", "2", ("b", "c", "d"), *batch(100, 2, width=3))
    put(log, 50, 4, model="other")
    assert len(log.read("m", "1")) == 3
    both = log.read("m")
    assert both["version"].to_pylist() == ["1"] * 3 + ["2"] * 2
    assert both["a"].to_pylist() == [0, 10, 20, None, None]
    assert both["b"].to_pylist() == [1, 11, 21, 1000, 1010]
    assert log.read("m", since=2_000)["rid"].to_pylist() == [2, 100, 101]
    assert log.read("m", since=10**9).num_rows == 0
    assert len(segments(tmp_path)) == 3
    log.close()


def test_names_that_no_file_may_have_and_names_of_own_columns(tmp_path):
    log = ServedLog(tmp_path)
    model, version = "a/b@c-d é", "1-2@3"
    log.append(model, version, ("score", "x"), *batch(0, 2))
    table = log.read(model, version)
    assert table["input:score"].to_pylist() == [0, 10]
    assert table["score"].to_pylist() == [0, 0.25]
    assert [path.parent for path in segments(tmp_path)] == [tmp_path]
    log.close()


def test_a_model_or_version_without_a_log_has_no_rows(tmp_path):
    log = ServedLog(tmp_path)
    put(log, 0, 1)
    for args in (("x",), ("m", "9")):
        table = log.read(*args)
        assert table.num_rows == 0
        assert table.schema.names == ["version", "rid", "now_us", "status", "score"]
    log.close()


def test_rows_wait_for_the_flush_interval_and_no_longer(tmp_path):
    log = ServedLog(tmp_path, flush_us=100)
    log.flush(5_000)
    put(log, 0, 1)
    log.flush(5_099)
    assert log.stats()["pending"] == 1
    assert segments(tmp_path) == []
    log.flush(5_100)
    stats = log.stats()
    assert (stats["pending"], stats["written"], stats["rows"], stats["lost"]) == (0, 1, 1, 0)
    put(log, 1, 1)
    log.flush(5_199)
    assert log.stats()["pending"] == 1
    log.flush(4_000)  # the clock was set back
    assert log.stats()["pending"] == 0
    assert read_served(tmp_path, "m")["rid"].to_pylist() == [0, 1]
    log.close()


def test_many_waiting_rows_are_flushed_at_once(tmp_path):
    log = ServedLog(tmp_path, flush_rows=10)
    put(log, 0, 9)
    assert log.stats()["pending"] == 9
    put(log, 9, 1)
    assert log.stats()["written"] == 10
    log.close()


def test_full_segments_rotate_and_the_oldest_are_deleted(tmp_path):
    log = ServedLog(tmp_path, flush_rows=1, segment_bytes=2_000, max_bytes=10_000, max_segments=100)
    for i in range(60):
        put(log, i, 10)
        assert sum(path.stat().st_size for path in segments(tmp_path)) <= 10_000
    stats = log.stats()
    assert stats["deleted_segments"] > 0
    assert stats["segments"] == len(segments(tmp_path))
    assert stats["bytes"] == sum(path.stat().st_size for path in segments(tmp_path))
    ids = log.read("m")["rid"].to_pylist()
    assert ids[-1] == 68
    assert ids[0] > 0
    assert ids == [i + k for i in range(ids[0], 60) for k in range(10)]
    log.close()


def test_the_number_of_segments_is_bounded_over_versions(tmp_path):
    log = ServedLog(tmp_path, flush_rows=1, max_segments=3)
    for version in range(5):
        put(log, version, 1, version=str(version))
    assert len(segments(tmp_path)) == 3
    put(log, 9, 1, version="0")  # its segment was deleted while it was open
    assert log.read("m", "0")["rid"].to_pylist() == [9]
    assert log.stats()["deleted_segments"] == 3
    log.close()


def test_versions_long_unused_give_their_file_back(tmp_path):
    log = ServedLog(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for version in range(100):
        put(log, version, 1, version=str(version))
        log.flush()
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 65
    assert log.read("m")["rid"].to_pylist() == list(range(100))
    log.close()


def test_a_new_log_continues_beside_old_segments(tmp_path):
    for start in (0, 5):
        log = ServedLog(tmp_path)
        put(log, start, 5)
        log.close()
    assert read_served(tmp_path, "m")["rid"].to_pylist() == list(range(10))
    ServedLog(tmp_path, max_segments=1).close()
    assert read_served(tmp_path, "m")["rid"].to_pylist() == list(range(5, 10))


def test_a_segment_cut_anywhere_gives_its_whole_messages(tmp_path):
    log = ServedLog(tmp_path)
    ends = []
    for i in range(3):
        put(log, i, 1)
        log.flush()
        ends.append(segments(tmp_path)[0].stat().st_size)
    log.close()
    path = segments(tmp_path)[0]
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        assert read_served(tmp_path, "m")["rid"].to_pylist() == list(range(whole))


KILLED = """
import sys
import numpy as np
from penstock.monitoring.served_log import ServedLog
log = ServedLog(sys.argv[1], flush_us=1_000, segment_bytes=5_000)
i = 0
while True:
    ids = np.arange(i, i + 7)
    log.append("m", "1", ("a",), ids.astype(np.uint64), ids, ids.astype(np.float32)[:, None], ids / 1.0,
               np.zeros(7, np.uint8))
    log.flush(i * 1000)
    i += 7
    print(log.stats()["written"], flush=True)
"""


def test_a_log_is_read_while_written_and_after_kill_9(tmp_path):
    child = run_child(KILLED, tmp_path)
    written = 0
    while len(segments(tmp_path)) < 4:
        written = int(child.stdout.readline())
        if written:
            ids = read_served(tmp_path, "m")["rid"].to_pylist()
            assert len(ids) >= written
            assert ids == list(range(len(ids)))
    os.kill(child.pid, signal.SIGKILL)
    tail = child.stdout.read().split("\n")
    child.wait()
    written = int(next((line for line in reversed(tail[:-1]) if line), written))
    table = read_served(tmp_path, "m")
    ids = table["rid"].to_pylist()
    assert len(ids) >= written
    assert ids == list(range(len(ids)))
    assert table["a"].to_pylist() == ids
    assert len(segments(tmp_path)) > 1
    log = ServedLog(tmp_path)
    assert log.read("m").num_rows == len(ids)
    log.close()


FULL_DISK = """
import json, resource, signal, sys
import numpy as np
from penstock.monitoring.served_log import ServedLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = ServedLog(sys.argv[1], flush_rows=1)
def put(i):
    ids = np.arange(i, i + 10)
    log.append("m", "1", ("a",), ids.astype(np.uint64), ids, ids.astype(np.float32)[:, None], ids / 1.0,
               np.zeros(10, np.uint8))
put(0)
put(10)
size = log.stats()["bytes"]
seen = []
for limit in (size + 100, size, 50):  # part of a message fits, none fits, not even a schema fits
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    put(1000)
    seen.append(log.read("m").num_rows)
    put(2000)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
put(20)
stats = log.stats()
log.close()
print(json.dumps([seen, *(stats[k] for k in ("rows", "written", "lost", "errors", "last_error"))]))
"""


def test_a_full_disk_loses_counted_rows_and_nothing_else(tmp_path):
    child = run_child(FULL_DISK, tmp_path)
    seen, rows, written, lost, errors, last = json.loads(child.communicate()[0])
    assert seen == [20, 20, 20]
    assert (rows, written, lost, errors) == (90, 30, 60, 6)
    assert "too large" in last.lower()
    assert read_served(tmp_path, "m")["rid"].to_pylist() == list(range(30))


def test_a_directory_that_vanished_loses_counted_rows(tmp_path):
    log = ServedLog(tmp_path / "log", flush_rows=1)
    (tmp_path / "log").rmdir()
    put(log, 0, 2)
    assert (log.stats()["lost"], log.stats()["errors"], log.stats()["segments"]) == (2, 1, 0)
    (tmp_path / "log").mkdir()
    put(log, 2, 2)
    assert log.read("m")["rid"].to_pylist() == [2, 3]
    log.close()


def test_foreign_files_in_the_folder_are_left_alone(tmp_path):
    for name in ("served-x.arrow", "labels-1.arrow", "served-a@b-x.arrow"):
        (tmp_path / name).write_bytes(b"not ours")
    log = ServedLog(tmp_path, flush_rows=1, max_segments=1)
    put(log, 0, 1)
    put(log, 0, 1, version="2")
    log.close()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rows": np.zeros((2, 2))}, "rows is float64"),
        ({"rows": np.zeros((2, 3), np.float32)}, r"expected float32 \(2, 2\)"),
        ({"scores": np.zeros(1)}, "scores is float64"),
        ({"rid": np.zeros(2, np.int64)}, "rid is int64"),
        ({"status": np.zeros(2)}, "status is float64"),
        ({"names": ("a", "a")}, "repeated name"),
        ({"model": ""}, "model is empty"),
        ({"version": "v" * 200}, "201 bytes of a file name"),
    ],
)
def test_bad_rows_are_refused_and_change_nothing(tmp_path, change, text):
    log = ServedLog(tmp_path)
    rid, now, rows, scores, status = batch(0, 2)
    good = {
        "model": "m",
        "version": "1",
        "names": NAMES,
        "rid": rid,
        "now_us": now,
        "rows": rows,
        "scores": scores,
        "status": status,
    }
    with pytest.raises(InvalidArgumentError, match=text):
        log.append(**{**good, **change})
    assert log.stats()["rows"] == 0
    log.append(**good)
    with pytest.raises(InvalidArgumentError, match=r"names of 'm' version '1'"):
        log.append(**{**good, "names": ("b", "a")})
    log.close()
    assert read_served(tmp_path, "m").num_rows == 2


def test_a_closed_log_and_bad_settings_are_refused(tmp_path):
    log = ServedLog(tmp_path)
    log.close()
    log.close()
    with pytest.raises(FailedPreconditionError, match="closed"):
        put(log, 0, 1)
    with pytest.raises(InvalidArgumentError, match="flush_us is 0"):
        ServedLog(tmp_path, flush_us=0)
    with pytest.raises(InvalidArgumentError, match="max_bytes is 10"):
        ServedLog(tmp_path, max_bytes=10, segment_bytes=11)


def test_the_folder_is_made(tmp_path):
    ServedLog(Path(tmp_path) / "x" / "log").close()
    assert (tmp_path / "x" / "log").is_dir()
