"""The load generator's histogram against exact quantiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import _core


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**42 - 1), min_size=1, max_size=300), st.floats(0.001, 1.0))
def test_quantiles_are_exact_to_three_digits(values, q):
    histogram = _core.HdrHistogram()
    histogram.add(np.array(values, np.int64))
    found = histogram.quantile(q)
    rank = int(np.ceil(q * len(values)))
    exact = sorted(values)[max(rank, 1) - 1]
    assert exact <= found <= exact * (1 + 1 / 1024)
    assert (histogram.count, histogram.max, histogram.min) == (len(values), max(values), min(values))
    assert histogram.mean == pytest.approx(np.mean(values))
    below = histogram.count_up_to(exact)
    assert sum(v <= exact for v in values) <= below <= sum(v <= exact * (1 + 1 / 1024) for v in values)


def test_quantiles_agree_with_numpy():
    rng = np.random.default_rng(1)
    values = (rng.lognormal(11, 1.5, 199_999)).astype(np.int64)
    histogram = _core.HdrHistogram()
    histogram.add(values)
    for q in (0.5, 0.9, 0.99, 0.999, 0.9999):
        assert histogram.quantile(q) == pytest.approx(
            np.percentile(values, 100 * q, method="inverted_cdf"), rel=1e-3
        )


def test_an_empty_histogram_and_values_beyond_its_range():
    histogram = _core.HdrHistogram()
    assert (histogram.quantile(0.5), histogram.count, histogram.min, histogram.max) == (0, 0, 0, 0)
    histogram.add(np.array([-5, 2**50], np.int64))
    assert (histogram.quantile(0.5), histogram.max) == (0, 2**50)
    assert histogram.quantile(1.0) == 2**42 - 1
