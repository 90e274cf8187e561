"""The names of the package, which load what they need when they are first used."""

import pytest

import penstock


def test_every_public_name_is_there_lazily():
    assert set(penstock.__all__) <= set(dir(penstock))
    for name in penstock.__all__:
        assert getattr(penstock, name).__name__ == name


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'penstock' has no attribute 'FeatureStor'"):
        penstock.FeatureStor  # noqa: B018
