"""The long forms of the fuzzers; `test_native.py` runs the short ones."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from native_builds import build

ROOT = Path(__file__).resolve().parents[3]
_CLANGS = ("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))


@pytest.mark.long
def test_1e8_mutated_bytes_through_a_connection() -> None:
    target = "native_connection_fuzz"
    options = ("-DPENSTOCK_TESTS=ON", "-DPENSTOCK_SANITIZE=address")
    program = build("sanitize-address", *options, target=target) / target
    done = subprocess.run([str(program), "100000000"], capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    print(done.stdout)


@pytest.mark.long
def test_libfuzzer_finds_nothing_in_60_seconds(tmp_path: Path) -> None:
    clang = next(filter(None, map(shutil.which, _CLANGS)), None)
    if clang is None:
        pytest.skip("there is no clang++")
    probe = tmp_path / "probe.cc"
    probe.write_text('extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }\n')
    command = [clang, "-fsanitize=fuzzer,address,undefined", str(probe), "-o", str(tmp_path / "probe")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{clang} lacks the runtime of libFuzzer: {done.stderr.splitlines()[-1:]}")
    options = ("-DPENSTOCK_SANITIZE=fuzzer", f"-DCMAKE_CXX_COMPILER={clang}")
    program = build("fuzzer", *options, target="fuzz_session") / "fuzz_session"
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i, frame in enumerate(sorted((ROOT / "tests" / "golden").glob("*.bin"))):
        corpus.joinpath(str(i)).write_bytes(b"\x18" + frame.read_bytes())
    # By way of a shell: what a child of this process has for its peak of memory begins with ours.
    command = ["sh", "-c", '"$@"; exit $?', "sh", str(program), "-max_total_time=60", "-max_len=8192",
               "-timeout=20", "-print_final_stats=1", f"-artifact_prefix={tmp_path}/",
               str(corpus)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    print("\n".join(line for line in done.stderr.splitlines() if line.startswith("stat::")))
