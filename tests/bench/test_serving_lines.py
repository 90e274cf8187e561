"""The verdicts of the serving benchmark and the tables made of them, from samples: nothing is measured."""

from __future__ import annotations

import importlib.util
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
def lines(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return _module("serving/lines.py", "bench_lines")


def _book(lines, **figures):
    book = lines.Book()
    for who, values in figures.items():
        for value in values:
            book.add(who, "x", value)
    return book


@pytest.mark.parametrize(
    ("ours", "theirs", "target", "below", "passed"),
    [
        ([9, 10, 30], [1, 1, 1], 10, False, True),  # medians: 10 and 1
        ([9.9], [1], 10, False, False),
        ([13], [10], 1.3, True, True),
        ([13.1], [10], 1.3, True, False),
    ],
)
def test_a_ratio_of_medians_is_compared_with_its_target(lines, ours, theirs, target, below, passed):
    book = _book(lines, ours=ours, theirs=theirs)
    book.compare("m", "x", "ours", "theirs", "/s", target, below=below)
    assert book.lines[0].passed is passed


def test_what_was_not_measured_has_no_verdict(lines):
    book = _book(lines, ours=[1])
    book.compare("m", "x", "ours", "nobody", "/s", 1, below=True)
    book.limit("m", None, "ms", 5)
    book.share("m", None, 1.0, 0.9, "/s")
    book.share("m", 1.0, 0.0, 0.9, "/s")
    assert [(line.passed, line.ratio) for line in book.lines] == [(None, None)] * 4
    assert all("not available" in line.note for line in book.lines)


def test_a_part_that_is_missing_becomes_a_note(lines):
    from common import Absent

    book = lines.Book()

    def work():
        raise Absent("no onnx backend")

    lines.attempt(book, "m", ">= 2x", work)
    assert lines.row_of(book.plain_lines()[0]) == [
        "m", "-", "-", "-", ">= 2x", "-", "not available: no onnx backend",
    ]  # fmt: skip


def _model(portable, peers):
    def row(case, batch1, batch64):
        figures = {"batch 1": {"median": batch1}, "batch 64": {"median": batch64}}
        return {"case": f"200 x 31: {case}", "figures": figures}

    rows = [row("Penstock in C++, portable", 3.0, portable), row("Penstock in C++, AVX-512", 2.0, 10.0)]
    return {"commit": "abc", "rows": rows + [row(name, *figures) for name, figures in peers.items()]}


def test_kernel_lines_take_the_best_peer(lines):
    book = lines.Book()
    lines.kernel_lines(book, _model(99.0, {"tl2cgen": (13.0, 300.0), "onnxruntime": (9.0, 350.0)}))
    found = {line.measure: (line.peer, line.passed) for line in book.lines}
    assert found == {
        "tree kernel, 200 x 31, batch 64, AVX-512": ("tl2cgen", True),  # 10 <= 300 / 25
        "tree kernel, 200 x 31, batch 64, AVX2": ("", None),
        "tree kernel, 200 x 31, batch 64, portable": ("tl2cgen", True),
        "tree kernel, 200 x 31, batch 1": ("onnxruntime", True),  # 2 <= 9 / 3
        "tree kernel, 1 000 x 255, batch 64": ("", None),
    }
    book = lines.Book()
    lines.kernel_lines(book, _model(101.0, {"tl2cgen": (5.9, 300.0)}))
    assert [line.passed for line in book.lines] == [True, None, False, False, None]
    book = lines.Book()
    lines.kernel_lines(book, None)
    assert book.lines[0].note.startswith("not available")


def test_the_tables_show_targets_and_figures(lines, monkeypatch):
    tables = _module("tables.py", "bench_tables")
    book = _book(lines, ours=[2.0], theirs=[1.0])
    book.compare("a measure", "x", "ours", "theirs", "/s", 3, below=False)
    facts = {"virtual": True, "cores": 2, "cpu": "c", "kernel": "k", "load_before": 0.1}
    figure = {"median": 2.0, "p10": 1.0, "p90": 3.0}
    text = tables.table(
        {
            "rows": [{"case": "ours", "figures": {"x": figure}}],
            "targets": book.plain_lines(),
            "settings": {"unit": "contender", "rounds": 3},
            "machine": facts,
            "versions": {"python": "3"},
            "commit": "abc",
            "command": "python b",
            "absent": ["mosec: no network"],
            "notes": [],
        }
    )
    assert "| a measure | 2 /s | 1 /s (theirs) | 2x | >= 3x theirs | MISS |  |" in text
    assert "| ours | 2.00 (1.00-3.00) |" in text
    assert "Left out: mosec: no network." in text


def test_a_gpus_table_has_what_was_measured_or_says_why_there_is_none(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    tables = _module("tables.py", "bench_tables_of_devices")
    times = {"median_us": 30.0, "p10_us": 20.0, "p90_us": 123.4, "samples": 50}
    document = {
        "status": "measured",
        "device": {"name": "NVIDIA H200"},
        "versions": {"triton": "3.6.0"},
        "commit": "abc",
        "command": "python x.py",
        "shapes": [{"program": "20 operations", "rows": 1000, "kernel": times, "copy": times,
                    "kernel_per_copy": 1.0},
                   {"columns": 9, "bins": 64, "rows": 2, "counts": times, "copy": times,
                    "counts_per_copy": 1.5}],
    }  # fmt: skip
    text = tables.device_table(document)
    assert "| 20 operations, 1,000 rows | 30.0 (20.0-123) | 30.0 (20.0-123) | 1.00 |" in text
    assert "| counts, 9 columns, 64 bins, 2 rows | 30.0 (20.0-123) | 30.0 (20.0-123) | 1.50 |" in text
    assert "of 50 calls; NVIDIA H200; triton 3.6.0; commit abc; `python x.py`." in text
    none = {"status": "not measured", "reason": "cupy is not installed"}
    assert tables.device_table(none) == "Not measured: cupy is not installed.\n"
