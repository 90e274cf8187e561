"""A fast digest of the bytes that are written to it, 128 bits, for telling states of a table apart.

SHA-256 over a large table takes longer than sorting it. Four lanes of multiply and rotate run over 8-byte
words and are mixed in the end; a part's length is among the words, so that moved bounds show. No defence
against people. One thread at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Odd constants with evenly spread bits: those of xxHash64 (its specification, "Constants").
_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)


@njit(cache=True, nogil=True)
def _absorb(words, lanes):  # type: ignore[no-untyped-def]
    a, b, c, d = lanes[0], lanes[1], lanes[2], lanes[3]
    left, right = np.uint64(31), np.uint64(33)
    whole = len(words) // 4 * 4
    for i in range(0, whole, 4):
        a += words[i] * _P2
        b += words[i + 1] * _P2
        c += words[i + 2] * _P2
        d += words[i + 3] * _P2
        a = ((a << left) | (a >> right)) * _P1
        b = ((b << left) | (b >> right)) * _P1
        c = ((c << left) | (c >> right)) * _P1
        d = ((d << left) | (d >> right)) * _P1
    for i in range(whole, len(words)):
        a += words[i] * _P2
        a = ((a << left) | (a >> right)) * _P1
    lanes[0], lanes[1], lanes[2], lanes[3] = a, b, c, d


class RowsDigest:
    """A file that can only be written to, and keeps nothing but the digest."""

    closed = False

    def __init__(self) -> None:
        self._lanes = np.array([1, 2, 3, 4], np.uint64) * _P1

    def write(self, data: Any) -> int:
        """Take in bytes; returns how many."""
        raw: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
        whole = len(raw) // 8 * 8
        if whole:
            _absorb(raw[:whole].view(np.uint64), self._lanes)
        tail = np.zeros(16, np.uint8)
        tail[: len(raw) - whole] = raw[whole:]
        tail[8:] = np.frombuffer(len(raw).to_bytes(8, "little"), np.uint8)
        _absorb(tail.view(np.uint64), self._lanes)
        return len(raw)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""

    def hexdigest(self) -> str:
        """32 hex digits. The state stays as it is."""
        a, b, c, d = (int(lane) for lane in self._lanes)
        mask = 2**64 - 1
        found = []
        for first, second, third, fourth in ((a, b, c, d), (c, d, a, b)):
            x = (first ^ (second << 1) ^ (third << 7) ^ (fourth << 12)) & mask
            for factor, shift in ((int(_P2), 33), (int(_P1), 29), (0x165667B19E3779F9, 32)):
                x = (x ^ (x >> shift)) * factor & mask
            found.append(f"{x ^ (x >> 31):016x}")
        return "".join(found)
