"""Declarations: classification of features, fingerprints, and one test for each refusal."""

from __future__ import annotations

from datetime import timedelta

import pytest

import penstock as d
from penstock.errors import DefinitionError
from penstock.features import aggregates
from penstock.features.expressions import col, now

USER = d.Entity("user", ["user_id"])
SOURCE = d.ParquetSource("data/t.parquet", timestamp="ts", created="created")


def view(**changes):
    given = {
        "name": "user_features",
        "entities": [USER],
        "source": SOURCE,
        "ttl": timedelta(days=90),
        "features": {
            "daily": d.count(window="1d"),
            "age": (now() - col("signup")).days(),
            "double": col("x") * 2,
        },
    }
    return d.FeatureView(**{**given, **changes})


def test_features_are_stored_or_computed_at_request_time():
    made = view()
    assert [(c.name, c.hidden) for c in made.stored] == [
        ("daily", False),
        ("double", False),
        ("__column_signup", True),
    ]
    assert list(made.request_time) == ["age"]
    assert made.hidden == {"signup": "__column_signup"}
    assert made.ttl_us == 90 * 86_400_000_000
    assert made.join_keys == ["user_id"]


@pytest.mark.parametrize(
    ("text", "us"),
    [("1d", 86_400_000_000), ("7d", 604_800_000_000), ("60m", 3_600_000_000), ("90s", 90_000_000)],
)
def test_window_lengths(text, us):
    assert aggregates.parse_window(text) == us


@pytest.mark.parametrize("text", ["", "1", "0d", "-1d", "1w", "1.5h", "1d\n", None, "9" * 30 + "d"])
def test_a_wrong_window_is_refused(text):
    with pytest.raises(DefinitionError, match="window"):
        d.count(window=text)


def test_view_fingerprint_sees_each_change():
    changes = [
        {},
        {"name": "other"},
        {"entities": [d.Entity("user", ["id"])]},
        {"source": d.CSVSource("data/t.parquet", timestamp="ts", created="created")},
        {"source": d.ParquetSource("data/t.parquet", timestamp="ts")},
        {"ttl": None},
        {"features": {"daily": d.count(window="1d")}},
        {"features": {"daily": d.count(window="2d")}},
        {"features": {"daily": d.count(window="1d", every="1h")}},
        {"features": {"daily": d.count(col("x"), window="1d")}},
        {"features": {"daily": d.sum(col("x"), window="1d")}},
        {"features": {"daily": d.mean(col("x"), window="1d")}},
        {"features": {"daily": d.min(col("x"), window="1d")}},
        {"features": {"daily": d.max(col("x"), window="1d")}},
    ]
    assert len({view(**change).fingerprint() for change in changes}) == len(changes)
    assert view().fingerprint() == view().fingerprint()


def test_service_fingerprint_sees_each_change():
    request = d.RequestSource("r", {"amount": "float64"})
    made = [
        d.FeatureService("s", ["v:a", "v:b"]),
        d.FeatureService("s", ["v:b", "v:a"]),
        d.FeatureService("s", ["v:a", "v:b"], request),
        d.FeatureService("s", ["v:a", "v:b"], on_missing="error"),
    ]
    assert len({s.fingerprint() for s in made}) == 4


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: d.Entity("a b", ["k"]), "entity name is 'a b'"),
        (lambda: d.Entity("user", "user_id"), "join_keys"),
        (lambda: d.Entity("user", ["k", "k"]), "join key 'k' is given twice"),
        (lambda: d.ParquetSource("", timestamp="ts"), "ParquetSource: path"),
        (lambda: d.ArrowSource("a", timestamp=""), "ArrowSource: timestamp"),
        (lambda: d.CSVSource("a", timestamp="ts", created="ts"), "CSVSource: created"),
        (lambda: d.RequestSource("r", {"x": "int8"}), "input 'x' has dtype 'int8'"),
        (lambda: d.sum(3, window="1d"), "sum: value is 3"),
        (lambda: d.mean(now(), window="1d"), r"cannot read now\(\)"),
        (lambda: d.max(col("x"), window="1d", every="x"), "max: every is 'x'"),
        (lambda: view(name="__v"), "view name"),
        (lambda: view(entities=None), "entities"),
        (lambda: view(entities=[USER, d.Entity("other", ["user_id"])]), "join key 'user_id' is given twice"),
        (lambda: view(source="t.parquet"), "source"),
        (lambda: view(ttl=timedelta(0)), "ttl"),
        (lambda: view(ttl="90 days"), "ttl is '90 days'; expected a datetime.timedelta"),
        (lambda: view(features={}), "no features"),
        (lambda: view(features={"user_id": col("x")}), "name of a join key"),
        (lambda: view(features={"__column_x": col("x")}), "feature name"),
        (lambda: view(features={"x": 3}), "feature 'x' is 3"),
        (lambda: d.FeatureService("s", []), "features"),
        (lambda: d.FeatureService("s", ["a"]), "'view:feature'"),
        (lambda: d.FeatureService("s", ["v:a", "v:a"]), "given twice"),
        (lambda: d.FeatureService("s", ["v:a"], on_missing="zero"), "on_missing"),
    ],
)
def test_a_wrong_declaration_is_named(build, match):
    with pytest.raises(DefinitionError, match=match):
        build()
