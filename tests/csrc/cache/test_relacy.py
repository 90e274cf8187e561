"""The slot protocol and the takeover from a dead writer under Relacy's memory model, whole and with a part
removed."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INCLUDE = Path("/usr/include/relacy")
READ_FENCE = "sync::fence(sync::kAcquire);"
WRITE_FENCE = "sync::fence(sync::kRelease);"


@pytest.mark.parametrize(
    "removed",
    [
        None,
        pytest.param(READ_FENCE, marks=pytest.mark.long),
        pytest.param(WRITE_FENCE, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("name", ["relacy_slot", "relacy_takeover"])
def test_slot_protocol(tmp_path: Path, name: str, removed: str | None) -> None:
    if not INCLUDE.is_dir() or shutil.which("g++") is None:
        pytest.skip("needs g++ and the Relacy headers in /usr/include/relacy (Debian: relacy-dev)")
    text = (ROOT / "csrc/cache/slot_protocol.h").read_text()
    if removed is not None:
        assert text.count(removed) == 1
        text = text.replace(removed, "")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/slot_protocol.h").write_text(text)
    program = tmp_path / name
    source = ROOT / f"tests/csrc/cache/{name}.cc"
    includes = [f"-I{tmp_path}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", "-std=c++20", "-O0", "-w", *includes, source, "-o", program], check=True)
    done = subprocess.run([program], cwd=tmp_path, capture_output=True, timeout=120)
    assert (done.returncode == 0) == (removed is None), done.stdout[-2000:]
