#!/usr/bin/env bash
# The work of `make gpu`: the kernel tests on an NVIDIA GPU, then the benchmark. It needs numpy, CuPy, Triton and
# pytest: those of $PYTHON if it has all four, else of $VENV, made here. Penstock itself need not be installed.
# Without a GPU the tests skip and the benchmark says "not measured".
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}
wanted="import numpy, cupy, triton, pytest"
# Interpreter mode would keep the kernels off the device.
unset TRITON_INTERPRET

command -v "$python" >/dev/null || { echo "$python is missing: apt-get install python3"; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$python is older than 3.11"; exit 1; }

if ! "$python" -c "$wanted" 2>/dev/null; then
  if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import ensurepip' 2>/dev/null || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
    "$python" -m venv "$venv"
  fi
  python="$venv/bin/python"
  # CuPy is built for one major version of CUDA: the newest that the driver serves.
  if cuda=$("$python" bench/gpu/driver_cuda.py); then
    [ "$cuda" -ge 12 ] || { echo "the NVIDIA driver serves CUDA $cuda; expected 12 or later"; exit 1; }
    packages=(numpy pytest triton "cupy-cuda$((cuda > 13 ? 13 : cuda))x[ctk]")
  else
    echo "no NVIDIA driver (libcuda.so.1): the tests will skip, and CuPy is not installed"
    packages=(numpy pytest triton)
    wanted="import numpy, triton, pytest"
  fi
  "$python" -c "$wanted" 2>/dev/null || "$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" ||
    { echo "missing, and could not be installed: ${packages[*]}"; exit 1; }
fi

export PYTHONPATH="kernels${PYTHONPATH:+:$PYTHONPATH}"
# The settings name an option of a plugin that is not needed here.
"$python" -m pytest tests/gpu -q -W ignore::pytest.PytestConfigWarning
"$python" bench/gpu/bench_counts.py "$@"
"$python" bench/gpu/bench_programs.py "$@"
