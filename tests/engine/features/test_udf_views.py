"""Views with Python functions: stored, joined and served alike, for files and for pushed events."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock import FeatureStore
from penstock.errors import DefinitionError

SECOND = 1_000_000
DEFINITIONS = """
from penstock import Entity, FeatureView, ParquetSource, PushSource, col, now, sum, udf

@udf(returns="float64")
def odd(x):
    return x % 2

user = Entity("user", join_keys=["user_id"])
events = PushSource("events", {"user_id": "int64", "at": "timestamp", "x": "float64"}, timestamp="at",
                    batch=ParquetSource("events.parquet", timestamp="at"))
view = FeatureView("view", entities=[user], source=events,
                   features={"odd": odd(col("x")), "total": sum(odd(col("x")), window="1h"), "x": col("x")})
"""


def write(path: Path, text: str) -> Path:
    (path / "feature_store.yaml").write_text("project: test\n")
    (path / "features.py").write_text(text)
    pq.write_table(
        pa.table(
            {
                "user_id": [1, 1, 2],
                "at": pa.array([SECOND, 2 * SECOND, 3 * SECOND], pa.timestamp("us", "UTC")),
                "x": [3.0, 4.5, 5.0],
            }
        ),
        path / "events.parquet",
    )
    return path


def test_a_view_with_a_udf_is_applied_materialised_pushed_and_read(tmp_path: Path) -> None:
    refs = ["view:odd", "view:total", "view:x"]
    with FeatureStore(write(tmp_path, DEFINITIONS)) as store:
        store.apply()
        store.materialize_incremental(10 * SECOND)
        assert store.push("events", {"user_id": 2, "at": 4 * SECOND, "x": 7.5}) == 1
        online = store.get_online_features(refs, {"user_id": [1, 2]}, now=10 * SECOND).to_dict()
        at = pa.array([10 * SECOND] * 2, pa.timestamp("us", "UTC"))
        joined = store.get_historical_features(pa.table({"user_id": [1, 2], "event_timestamp": at}), refs)
        wanted = {"odd": [0.5, 1.5], "total": [1.5, 2.5], "x": [4.5, 7.5]}
        assert {name: online[name] for name in wanted} == wanted
        assert joined.to_arrow().select(list(wanted)).to_pydict() == wanted


def test_a_udf_at_request_time_is_refused_with_its_place(tmp_path: Path) -> None:
    late = DEFINITIONS.replace('"x": col("x")}', '"x": odd((now() - col("at")).days())}')
    with FeatureStore(write(tmp_path, late)) as store, pytest.raises(DefinitionError) as refused:
        store.apply()
    message = str(refused.value)
    assert "view 'view': udf 'odd' is opaque Python and cannot be computed at request time" in message
    assert f"defined at {tmp_path / 'features.py'}:" in message
