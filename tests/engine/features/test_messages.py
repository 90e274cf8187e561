"""Faults in definitions are told by what the user wrote: names, arguments, lines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from store_repo import make_repo, some_rows

import penstock
from penstock.errors import DefinitionError, InvalidArgumentError
from penstock.features import aggregates
from penstock.features.repo import load_repo
from penstock.features.store import FeatureStore

COMMON = "window, every, closed, lag, as_known"


@pytest.mark.parametrize(
    "name",
    ["count", "sum", "mean", "min", "max", "var", "std", "first", "last", "distinct", "top_k", "ewma",
     "Entity", "FeatureView", "FeatureService", "RequestSource", "ParquetSource", "CSVSource", "ArrowSource",
     "DuckDBSource", "PushSource"],
)  # fmt: skip
def test_an_argument_that_there_is_not_is_named_with_those_that_there_are(name: str) -> None:
    make: Any = getattr(penstock, name, None) or getattr(aggregates, name)
    known = [p for p in inspect.signature(make).parameters if p != "self"]
    with pytest.raises(DefinitionError) as found:
        make(windw="7d")
    assert str(found.value).startswith(f"{name}: there is no argument 'windw'; ")
    assert str(found.value).endswith(f"its arguments are {', '.join(known)}")
    assert ("did you mean 'window'?" in str(found.value)) == ("window" in known)


def test_other_calls_that_do_not_fit() -> None:
    with pytest.raises(DefinitionError, match=rf"^count: missing a required.*'window'; .*value, {COMMON}$"):
        penstock.count()
    with pytest.raises(
        DefinitionError, match=r"^Entity: missing a required argument: 'join_keys'; its arguments"
    ):
        penstock.Entity("user")  # type: ignore[call-arg]
    with pytest.raises(DefinitionError, match=r"^Entity: too many positional arguments"):
        penstock.Entity("user", ["a"], 3)  # type: ignore[call-arg]


def test_the_file_and_line_are_told(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "repo", some_rows())
    text = (repo / "features.py").read_text()
    (repo / "features.py").write_text(text.replace('count(window="1h")', 'count(windw="1h")'))
    line = 1 + text.splitlines().index('    "n": count(window="1h"),')
    with pytest.raises(DefinitionError, match=rf"features\.py:{line}: .*count: there is no argument 'windw'"):
        load_repo(repo)


def test_a_column_that_the_source_lacks_names_view_feature_and_line(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "repo", some_rows())
    text = (repo / "features.py").read_text()
    faults = [
        ('"last": col("x")', '"last": col("xx")', "feature 'last' reads it at .*features.py:{line}$"),
        (
            'sum(col("x"), window="90m")',
            'sum(col("xx"), window="90m")',
            "feature 'spend' reads it at .*:{line}$",
        ),
        (
            '(now() - col("at")).hours()',
            '(now() - col("xx")).hours()',
            "feature 'age' reads it at .*:{line}$",
        ),
        ('join_keys=["shop"]', 'join_keys=["xx"]', "it is a join key$"),
    ]
    for old, new, told in faults:
        (repo / "features.py").write_text(changed := text.replace(old, new))
        line = next(i for i, row in enumerate(changed.splitlines(), 1) if new in row)
        message = rf"^view '\w+': source 'events.parquet' has no column 'xx'; .*; {told.format(line=line)}"
        view = "pairs" if "last" in new or "shop" in old else "users"
        with FeatureStore(repo) as store, pytest.raises(InvalidArgumentError, match=message):
            store.computer(view)


def test_a_column_that_a_push_source_lacks(tmp_path: Path) -> None:
    from push_repo import make_push_repo

    repo = make_push_repo(tmp_path / "repo")
    text = (repo / "features.py").read_text()
    (repo / "features.py").write_text(text.replace('"top": max(col("x")', '"top": max(col("xx")'))
    message = (
        r"^view 'pairs': source 'events' has no column 'xx'; .*feature 'top' reads it at .*features\.py:\d+$"
    )
    with FeatureStore(repo) as store, pytest.raises(InvalidArgumentError, match=message):
        store.computer("pairs")
