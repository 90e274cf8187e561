"""`import penstock` stays light."""

import json
import subprocess
import sys

HEAVY = ["pandas", "pyarrow", "numba", "lmdb", "pydantic", "triton"]


def test_import_pulls_in_no_heavy_package():
    program = f"import json, sys, penstock; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
