"""The verdicts of the feature benchmark, its workers' protocol, and the table made of its samples."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def _module(path, name):
    spec = importlib.util.spec_from_file_location(name, BENCH / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return _module("features/targets.py", "bench_feature_targets")


@pytest.fixture
def book(targets):
    from serving.lines import Book

    return Book()


def test_what_was_not_measured_has_no_verdict_and_says_why(targets, book):
    targets.target_lines(book, {targets.VISIBLE: "this build takes no pushes"})
    assert len(book.lines) == 12
    assert {line.passed for line in book.lines} == {None}
    assert all(line.note.startswith("not available: ") for line in book.lines)
    notes = {line.measure: line.note for line in book.lines}
    assert notes["push to readable in process, p99"] == "not available: this build takes no pushes"
    assert notes["memory of an entity of 50 float32"] == "not available: not measured"


@pytest.mark.parametrize(("value", "passed"), [(5.0, True), (5.01, False)])
def test_a_limit_holds_for_ours_alone_and_the_best_peer_stands_beside_it(targets, book, value, passed):
    book.add(targets.OURS, targets.ONE, value)
    book.add(targets.SQLITE, targets.ONE, 150.0)
    book.add(targets.REDIS, targets.ONE, 100.0)
    targets.target_lines(book, {})
    line = book.lines[0]
    assert (line.passed, line.peer, line.theirs, line.ratio) == (passed, targets.REDIS, 100.0, value / 100)
    assert (line.target, line.unit, line.note) == ("<= 5 us", "us", "")


def test_a_limit_without_a_peer_still_has_a_verdict(targets, book):
    book.add(targets.OURS, targets.WINDOW, 49.0)
    targets.target_lines(book, {})
    line = next(line for line in book.lines if "aggregates" in line.measure)
    assert (line.passed, line.ratio, line.theirs) == (True, None, None)
    assert line.note.startswith("OpenMLDB publishes")


@pytest.mark.parametrize(
    ("cold", "warm", "passed"), [(66.0, 22.0, [True, True]), (67.0, 22.1, [False, False])]
)
def test_joins_are_held_against_polars_of_the_same_run(targets, book, cold, warm, passed):
    for value in (1.0, 66.0, 900.0):  # the median counts
        book.add("polars", targets.COLD, value)
    book.add(targets.OURS, targets.COLD, cold)
    book.add(targets.OURS, targets.WARM, warm)
    targets.target_lines(book, {})
    lines = [line for line in book.lines if "historical join" in line.measure]
    assert [line.passed for line in lines] == [*passed, None]
    assert [line.target for line in lines] == ["<= 1x polars", "<= 1/3 polars", "<= 1x polars"]
    assert lines[2].note == "not available: not measured"


def test_a_ratio_without_its_peer_is_not_available(targets, book):
    book.add(targets.OURS, targets.MATERIALIZE, 0.1)
    targets.target_lines(book, {})
    line = next(line for line in book.lines if "materialize" in line.measure)
    assert (line.passed, line.note) == (None, "not available: Feast on SQLite was not measured")
    book.add(targets.SQLITE, targets.MATERIALIZE, 2.0)
    book.lines.clear()
    targets.target_lines(book, {})
    line = next(line for line in book.lines if "materialize" in line.measure)
    assert (line.passed, line.ratio) == (True, 0.05)


def test_skew_compares_each_with_its_own_short_histories(targets, book):
    for who, long, short in ((targets.OURS, 15.0, 10.0), ("polars", 30.0, 10.0)):
        book.add(who, targets.LONG, long)
        book.add(who, targets.SHORT, short)
    targets.target_lines(book, {})
    line = next(line for line in book.lines if "1 000 rows a key" in line.measure)
    assert (line.passed, line.ratio, line.note) == (True, 1.5, "polars 3.00x")
    book.add(targets.OURS, targets.LONG, 30.0)
    book.lines.clear()
    targets.target_lines(book, {})
    assert next(line for line in book.lines if "1 000 rows" in line.measure).passed is False


def test_memory_and_pushes(targets, book):
    book.add(targets.OURS, targets.MEMORY, 324.0)
    book.add(targets.REDIS, targets.MEMORY, 856.0)
    book.add(targets.OURS, targets.VISIBLE, 201.0)
    book.add(targets.OURS, targets.DURABLE, 1234.5)
    targets.target_lines(book, {})
    memory = next(line for line in book.lines if "memory of" in line.measure)
    pushed = next(line for line in book.lines if "push" in line.measure)
    assert (memory.passed, memory.target, pushed.passed) == (True, "<= 324 bytes", False)
    assert pushed.note == "durable after 1,234 us"


def test_the_readme_table_has_a_row_for_each_measure(targets, book, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    tables = _module("tables.py", "bench_tables")
    from common import rows_of

    book.add(targets.OURS, targets.ONE, 4.0)
    book.add(targets.REDIS, targets.ONE, 200.0)
    targets.target_lines(book, {})
    facts = {"virtual": True, "cores": 2, "cpu": "c", "kernel": "k", "load_before": 0.1}
    text = tables.table(
        {
            "rows": rows_of({(column, who): v for (who, column), v in book.samples.items()}),
            "targets": book.plain_lines(),
            "settings": {"unit": "measure", "rounds": 3},
            "machine": facts,
            "versions": {"python": "3"},
            "commit": "abc",
            "command": "python b",
            "absent": ["Feast: no network"],
            "notes": [],
        }
    )
    assert (
        "| online, 1 entity x 10 features, p50 | 4 us | 200 us (Feast on Redis) | 0.02x | <= 5 us | pass |  |"
        in text
    )
    assert "| 1 x 10, p50 us | 4.00 (4.00-4.00) | 200 (200-200) |" in text
    assert "Left out: Feast: no network." in text


LOOP = """
import sys
sys.path.insert(0, {folder!r})
from peer_loop import percentiles, serve

def noisy(value):
    print("a library talks")
    return value * 2

def wrong():
    raise ValueError("first line\\nsecond")

serve({{"noisy": noisy, "wrong": wrong, "times": lambda: sorted(percentiles(lambda x: x, [1] * 10))}})
"""


def test_a_peers_process_answers_lines_whatever_its_libraries_print():
    asked = [
        {"case": "noisy", "value": 4},
        {"case": "wrong"},
        {"case": "times"},
        {"case": "noisy", "value": 1},
    ]
    done = subprocess.run(
        [sys.executable, "-c", LOOP.format(folder=str(BENCH / "features"))],
        input="".join(json.dumps(line) + "\n" for line in asked),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert replies == [{"ok": 8}, {"error": "ValueError: first line"}, {"ok": ["p50", "p99"]}, {"ok": 2}]
    assert done.stderr.count("a library talks") == 2


def test_the_data_has_no_ties_and_no_event_at_an_entity_rows_time(monkeypatch):
    monkeypatch.syspath_prepend(BENCH / "features")
    data = _module("features/data.py", "bench_feature_data")
    events = data.events(5000, 10, 1)
    asked = data.entities(1000, 10, 5000 * 1_000_000, 2)
    times = events["event_timestamp"].to_pylist()
    assert len(set(times)) == 5000
    assert not set(times) & set(asked["event_timestamp"].to_pylist())
    assert data.events(5000, 10, 1).equals(events)  # the same in every process
    assert data.latest(7, 3, features=2, prefix="x").column_names == [
        "user_id",
        "event_timestamp",
        "x0",
        "x1",
    ]


@pytest.mark.long
def test_the_windows_of_the_benchmark_run_and_are_right():
    """Without peers and without writing results; a wrong answer ends it with another code."""
    before = sorted((BENCH / "results").iterdir())
    done = subprocess.run(
        [sys.executable, str(BENCH / "features" / "bench.py"), "--quick", "--only", "windows", "pushes"],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert "10 aggregates x 30 days" in " ".join(done.stdout.split())
    assert "left out by --only" in done.stdout
    assert sorted((BENCH / "results").iterdir()) == before
