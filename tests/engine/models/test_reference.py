"""Reference distributions: exact counts, round trip through Arrow, named refusals."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from penstock import _core
from penstock.errors import InvalidArgumentError
from penstock.models.reference import ReferenceDistribution, score_column
from penstock_kernels.reference import count_rows

_ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 60), st.just(3)),
    elements=st.one_of(
        st.floats(width=32, allow_nan=True, allow_infinity=True), st.integers(-2, 5).map(float)
    ),
)


def make(n: int = 5000, seed: int = 0) -> tuple[ReferenceDistribution, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, 3)).astype(np.float32)
    rows[rng.random(n) < 0.2, 0] = np.nan
    rows[rng.random(n) < 0.3, 1] = 0.0
    rows[:, 2] = rng.integers(0, 4, n)
    scores = rng.random(n)
    return ReferenceDistribution.capture(["a", "b", "c"], rows, scores, {"c": 4}), rows, scores


@settings(max_examples=40, deadline=None)
@given(_ROWS, st.integers(0, 2**32 - 1))
def test_capture_counts_every_row_and_survives_arrow(rows: np.ndarray, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=len(rows))
    made = ReferenceDistribution.capture(["a", "b", "c"], rows, scores, {"c": 5})
    assert made.n_rows == len(rows)
    for j in range(3):
        part = made.spec.column(made.counts, j)
        assert int(part.bins.sum()) + part.missing + part.unseen == len(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, made.to_arrow().schema) as writer:
        writer.write_table(made.to_arrow())
    read = ReferenceDistribution.from_arrow(pa.ipc.open_file(sink.getvalue()).read_all())
    assert (read.names, read.kinds) == (made.names, made.kinds)
    np.testing.assert_array_equal(read.counts, made.counts)
    np.testing.assert_array_equal(read.score_counts, made.score_counts)
    np.testing.assert_array_equal(count_rows(read.spec, rows), made.counts)


def test_native_spec_counts_what_the_reference_counts() -> None:
    made, rows, scores = make()
    native = _core.HistogramCounts(made.native_spec())
    native.count(rows)
    np.testing.assert_array_equal(native.snapshot(), made.counts)
    native = _core.HistogramCounts(made.native_score_spec())
    native.count(score_column(scores))
    np.testing.assert_array_equal(native.snapshot(), made.score_counts)


def test_heavy_values_are_atoms_in_bins_of_their_own() -> None:
    made, rows, _ = make()
    assert list(made.atoms(1)) == [0.0]
    assert list(made.atoms(0)) == [] and list(made.atoms(2)) == []
    edges = made.spec.columns[1]
    assert not isinstance(edges, int)
    bins = made.spec.column(made.counts, 1).bins
    assert bins[np.searchsorted(edges, np.float32(0.0))] == (rows[:, 1] == 0).sum()
    assert made.to_arrow()["atoms"].to_pylist() == [[], [0.0], [], []]


def test_reference_bins_are_near_equal_in_mass() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(128_000, 1)).astype(np.float32)
    made = ReferenceDistribution.capture(["x"], rows, np.zeros(len(rows)))
    bins = made.spec.column(made.counts, 0).bins
    assert 1270 <= len(bins) <= 1300
    assert bins.max() <= 101


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.zeros((2, 1), np.float64)}, "rows is float64"),
        ({"rows": np.zeros((2, 2), np.float32)}, "expected float32"),
        ({"rows": np.zeros((0, 1), np.float32), "scores": np.zeros(0)}, "no rows"),
        ({"scores": np.zeros(3)}, "scores is float64"),
        ({"scores": np.zeros(2, np.float32)}, "scores is float32"),
        ({"categorical": {"z": 3}}, "'z' is not one of"),
        ({"categorical": {"a": 0}}, "'a' has 0 codes"),
        ({"categorical": {"a": True}}, "'a' has True codes"),
    ],
)
def test_bad_capture_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"names": ["a"], "rows": np.zeros((2, 1), np.float32), "scores": np.zeros(2)} | change
    with pytest.raises(InvalidArgumentError, match=message):
        ReferenceDistribution.capture(**arguments)


def test_repeated_input_name_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="repeated"):
        ReferenceDistribution.capture(["a", "a"], np.zeros((2, 2), np.float32), np.zeros(2))


def _with(row: int, **values: object) -> pa.Table:
    table = make(50)[0].to_arrow()
    rows = table.to_pylist()
    rows[row].update(values)
    return pa.Table.from_pylist(rows, schema=table.schema)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (lambda: make(50)[0].to_arrow().replace_schema_metadata(None), "metadata"),
        (lambda: make(50)[0].to_arrow().drop_columns(["atoms"]), "columns are"),
        (lambda: make(50)[0].to_arrow().slice(0, 3), "kind 'score'"),
        (lambda: make(50)[0].to_arrow().slice(0, 0), "kind 'score'"),
        (lambda: _with(0, edges=[2.0, 1.0], counts=[0, 0, 0]), "increasing"),
        (lambda: _with(0, counts=[1]), "numeric 'a' has 1 counts"),
        (lambda: _with(1, slots=[1]), "and 1 slots"),
        (lambda: _with(1, kind="other"), "unknown kind"),
        (lambda: _with(2, codes=0), "do not fit the kind"),
        (lambda: _with(0, edges=None), "has a null"),
    ],
)
def test_corrupt_reference_table_is_refused(table, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ReferenceDistribution.from_arrow(table())
