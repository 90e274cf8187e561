"""The reports: what they say, that the page is whole, closed and escaped, and how it reaches the disk."""

import io
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from penstock.errors import InvalidArgumentError
from penstock.models.reference import ReferenceDistribution
from penstock.monitoring import report_data
from penstock.monitoring.drift import DriftMonitor
from penstock.monitoring.freshness import FreshnessMonitor
from penstock.monitoring.report import print_report, write_report
from penstock.monitoring.report_charts import bars, lines

T0 = 1_700_000_000_000_000
NASTY = '[bold]<script>alert("x & y")</script>'


def drift(names, shift=1.0, rows=2_000):
    rng = np.random.default_rng(1)
    width = len(names)
    reference = ReferenceDistribution.capture(
        names, rng.normal(size=(4_000, width)).astype(np.float32), rng.random(4_000)
    )
    monitor = DriftMonitor(reference, pane_us=10**6, window_us=10**7)
    served = rng.normal(size=(rows, width)).astype(np.float32)
    served[:, -1] += shift
    monitor.add(np.full(rows, T0), served, rng.random(rows))
    return monitor.report().to_dict()


def full_data(names=("calm", "moved")):
    freshness = FreshnessMonitor({"user_view": 90_000_000, "item_view": None}, pane_us=10**6, window_us=10**7)
    events = np.array([[T0 - 2_000_000, np.iinfo(np.int64).min]])
    freshness.add(np.array([T0]), events, np.zeros(1, np.uint8))
    return {
        "model": "fraud",
        "version": "7",
        "generated_us": T0,
        "drift": drift(list(names)),
        "freshness": freshness.report().to_dict(),
        "performance": {
            "n": 2_000,
            "labelled": 1_500,
            "coverage": 0.75,
            "auc": 0.87654,
            "auc_error_bound": 0.0001,
            "logloss": 0.4321,
            "brier": float("nan"),
            "accuracy": 0.9,
        },
        "latency": {
            "count": 10,
            "p50_ns": 180_000,
            "p99_ns": 1_900_000,
            "max_ns": 12_000_000,
            "limit_ms": 5.0,
        },
        "stages": {
            stage: {"count": n, "p50_ns": ns, "p99_ns": 2 * ns, "max_ns": 3 * ns, "sum_ns": 10 * ns}
            for stage, n, ns in (
                ("receive", 10, 1_000),
                ("gather", 0, 0),
                ("queue", 10, 5_000),
                ("run", 10, 30_000),
                ("encode", 10, 4_000),
                ("total", 10, 40_000),
            )
        },
        "service": {
            "slo": {"met": 3, "due": 4, "attainment": 0.75, "attainment_10s": None, "attainment_60s": 0.9981},
            "goodput": {"requests_per_s_60s": 1234.56},
            "busy_ratio": 0.421,
            "queue_delay_ratio": 0.125,
        },
        "history": [
            {"time_us": T0 + k * 10**9, "p50_ns": 1e5, "p99_ns": 2e6, "auc": None if k == 2 else 0.8}
            for k in range(5)
        ],
    }


def page_of(tmp_path, data):
    path = tmp_path / "report.html"
    write_report(path, data)
    text = path.read_text(encoding="utf-8")
    return text, ET.fromstring(text.removeprefix("<!DOCTYPE html>"))


def printed(data):
    out = io.StringIO()
    print_report(data, Console(file=out, width=160))
    return out.getvalue()


def words(root):
    return " ".join(" ".join(root.itertext()).split())


def test_the_page_shows_every_part_and_is_well_formed(tmp_path):
    root = page_of(tmp_path, full_data())[1]
    said = words(root)
    for expected in (
        "fraud version 7",
        "alert",
        "moved",
        "calm",
        "PSI",
        "score (model output)",
        "psi_adj is ",
        "180 us",
        "1.9 ms",
        "0.8765",
        "75.0 %",
        "user_view",
        "2 s",
        "2023-11-14 22:13:20 UTC",
        "Over time",
        "Benjamini-Hochberg",
        "Where the time goes",
        "Run the model 10 30 us 60 us 90 us 75.0 %",
        "99.8 % of the last minute",
        "1234.6 good answers a second",
        "12.5 % queue delay of the limit",
    ):
        assert expected in said
    assert "Gather features" not in said  # no request had any
    assert len(root.findall(".//svg")) == 2 + 3  # latency and AUC, then a plot for each feature and the score
    rows = [row[0].text for row in root.findall(".//tbody/tr")]
    assert rows[:3] == ["score (model output)", "moved", "calm"]  # the worst first


def test_the_page_is_self_contained_light_and_dark(tmp_path):
    text, root = page_of(tmp_path, full_data())
    assert "http" not in text
    assert root.findall(".//script") == []
    assert root.findall(".//link") == []
    assert re.findall(r"url\(|@import|\ssrc=|\shref=|\son\w+=", text) == []
    assert "prefers-color-scheme:dark" in text


def test_text_from_outside_is_escaped(tmp_path):
    data = full_data((NASTY, NASTY + "2"))
    data["model"], data["version"] = NASTY, '"><b>'
    data["drift"]["features"][0]["reason"] = NASTY
    data["freshness"]["views"][0]["view"] = NASTY
    text, root = page_of(tmp_path, data)
    assert root.findall(".//script") == []
    assert "<script" not in text
    assert words(root).count(NASTY) >= 6
    assert printed(data).count(NASTY) >= 4


def test_only_the_needed_parts_make_a_page_without_the_others(tmp_path):
    data = {key: full_data()[key] for key in ("model", "version", "generated_us", "drift")}
    data |= {"freshness": None, "performance": None, "latency": None, "history": None}
    data |= {"stages": None, "service": None}
    said = words(page_of(tmp_path, data)[1])
    for absent in ("Over time", "Freshness", "latency", "AUC", "Where the time goes", "in time"):
        assert absent not in said
    assert "Drift from the training data" in said
    assert "Latency" not in printed(data)


def test_an_empty_window_makes_a_page(tmp_path):
    rng = np.random.default_rng(2)
    reference = ReferenceDistribution.capture(
        ["x"], rng.normal(size=(500, 1)).astype(np.float32), rng.random(500)
    )
    data = full_data()
    data["drift"] = DriftMonitor(reference, pane_us=1, window_us=1).report().to_dict()
    data["freshness"] = FreshnessMonitor({"v": None}, pane_us=1, window_us=1).report().to_dict()
    data["latency"] = {"count": 0, "p50_ns": 0, "p99_ns": 0, "max_ns": 0}
    data["history"] = []
    said = words(page_of(tmp_path, data)[1])
    assert "insufficient" in said
    assert "no rows in the window" in said
    assert "no rows in the window" in printed(data)


def test_a_hundred_features_take_less_than_300_kb(tmp_path):
    data = full_data([f"feature_with_a_name_{k}" for k in range(100)])
    text, root = page_of(tmp_path, data)
    assert len(text.encode()) < 300_000
    assert len(root.findall(".//svg")) == 103


def test_bars_have_the_shares_of_both_windows():
    root = ET.fromstring(bars(["low", "a < b"], [10, 30], [50, 0], "x"))
    titles = [title.text for title in root.iter("title")]
    assert titles == ["low: reference 25.0 %, current 100.0 %", "a < b: reference 75.0 %, current 0.0 %"]
    heights = [
        [float(v) for v in re.findall(r"v-([\d.]+)", path.get("d"))]
        for path in root.findall("path")
        if path.get("class") in ("ref", "cur")
    ]
    full = heights[1][0]
    assert heights == [pytest.approx([full / 4, full * 3 / 4], abs=0.1), [full]]
    ET.fromstring(bars(["a"], [0], [0], "empty"))


def test_lines_leave_gaps_and_draw_a_near_limit_only():
    svg = lines([0, 10, 20, 30], [("p99", [1.0, 2.0, None, 4.0])], "Latency", limit=5.0)
    root = ET.fromstring(svg)
    path = next(p.get("d") for p in root.findall("path") if p.get("class") == "line cur")
    assert [path.count(step) for step in "ML"] == [2, 1]
    assert len(root.findall("circle")) == 3
    assert 'class="limit"' in svg
    assert 'class="limit"' not in lines([0, 10], [("p99", [1.0, 2.0])], "Latency", limit=50.0)
    ET.fromstring(lines([], [("p99", [])], "nothing"))
    ET.fromstring(lines([5], [("p99", [3.0])], "one"))


def test_a_failed_write_leaves_the_old_page_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def broken(fd):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space"):
        write_report(path, full_data())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_report(str(path), full_data())
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]


def test_the_terminal_shows_every_part():
    text = printed(full_data())
    for expected in (
        "fraud version 7  alert",
        "moved",
        "score (model output)",
        "0.8765",
        "1,500 (75.0 %)",
        "1.9 ms",
        "user_view",
    ):
        assert expected in text
    assert text.index("moved") < text.index("calm")


def test_missing_parts_are_named():
    data = full_data()
    del data["drift"]["score"]
    with pytest.raises(InvalidArgumentError, match="drift lacks 'score'"):
        write_report(Path("unused.html"), data)
    del data["model"]
    with pytest.raises(InvalidArgumentError, match="lacks 'model'"):
        print_report(data, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (report_data.number(None), "-"),
        (report_data.number(float("nan")), "-"),
        (report_data.number(0.0), "0.000"),
        (report_data.number(1e-5), "< 0.001"),
        (report_data.number(-0.25, 1), "-0.2"),
        (report_data.probability(0.0), "< 0.001"),
        (report_data.probability(0.04), "0.040"),
        (report_data.share(0.0001), "< 0.1 %"),
        (report_data.share(0.1234), "12.3 %"),
        (report_data.count(None), "-"),
        (report_data.count(1234567), "1,234,567"),
        (report_data.duration(None), "-"),
        (report_data.duration(12), "12 us"),
        (report_data.duration(-90_000_000), "-1.5 min"),
        (report_data.duration(2 * 86_400_000_000), "2 d"),
        (report_data.nanoseconds(1_500_000), "1.5 ms"),
        (report_data.time(0), "1970-01-01 00:00:00 UTC"),
        (report_data.time(2**62), "4611686018427387904 us"),
        (report_data.time(None), "-"),
    ],
)
def test_figures_are_written_for_people(text, expected):
    assert text == expected


def test_the_terminal_shows_stages_and_service():
    said = " ".join(printed(full_data()).split())
    assert re.search(r"Run the model \S 10 \S 30 us \S 60 us \S 90 us \S 75.0 %", said)
    assert "Answered in time" in said and "99.8 %" in said and "42.1 %" in said and "1234.6" in said
    assert "Gather features" not in said
    absent = printed({key: full_data()[key] for key in ("model", "version", "generated_us", "drift")})
    assert "Where the time goes" not in absent and "Service" not in absent
