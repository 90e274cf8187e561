"""`import penstock` stays light."""

import json
import subprocess
import sys

import pytest

import penstock

HEAVY = ["pandas", "pyarrow", "numba", "lmdb", "pydantic", "triton"]


def test_import_pulls_in_no_heavy_package():
    program = f"import json, sys, penstock; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_every_public_name_is_there_lazily():
    assert set(penstock.__all__) <= set(dir(penstock))
    for name in penstock.__all__:
        assert getattr(penstock, name).__name__ == name


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'penstock' has no attribute 'FeatureStor'"):
        penstock.FeatureStor  # noqa: B018
