"""Prints the newest major version of CUDA that the NVIDIA driver serves; exits with 1 where there is none."""

from __future__ import annotations

import ctypes
import sys


def cuda_major() -> int | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value // 1000 if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


if __name__ == "__main__":
    major = cuda_major()
    if major is None:
        sys.exit(1)
    print(major)
