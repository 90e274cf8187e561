"""Run every benchmark but `make bench-serving`, a process each, then write README's tables.

What fails is named; the rest goes on.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "cache": "cache/bench.py",
    "model": "model/bench.py",
    "predict": "features/predict.py",
    "serving in process": "serving/in_process.py",
}


def main() -> int:
    failed = []
    for subject, script in SCRIPTS.items():
        start = time.monotonic()
        command = [sys.executable, str(Path("bench") / script), *sys.argv[1:]]
        print(f"{subject}: running", flush=True)
        if subprocess.run(command, cwd=HERE.parent, check=False).returncode != 0:
            failed.append(subject)
        print(f"{subject}: {time.monotonic() - start:.0f} s", flush=True)
    subprocess.run([sys.executable, str(HERE / "tables.py")], check=True)
    for subject in failed:
        print(f"{subject}: failed, its figures are the old ones")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
