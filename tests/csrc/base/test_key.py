"""SipHash-2-4-128 against the reference vectors, and entity keys against a slow oracle."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import _core

SEED = bytes(range(16))
# Key 00..0f, input 00..n-1; from the reference implementation's vectors_sip128.
VECTORS = {
    0: "a3817f04ba25a8e66df67214c7550293",
    1: "da87c1d86b99af44347659119b22fc45",
    2: "8177228da4a45dc7fca38bdef60affe4",
    3: "9c70b60c5267a94e5f33b6b02985ed51",
    7: "a1f1ebbed8dbc153c0b84aa61ff08239",
    8: "3b62a9ba6258f5610f83e264f31497b4",
    9: "264499060ad9baabc47f8b02bb6d71ed",
    15: "5493e99933b0a8117e08ec0f97cfc3d9",
    16: "6ee2a4ca67b054bbfd3315bf85230577",
    33: "77c6077146f01c32b6b69d5f4ea9ffcf",
    63: "5150d1772f50834a503e069a973fbd7c",
}
M = (1 << 64) - 1


def sip_oracle(data: bytes, seed: bytes) -> bytes:
    k0, k1 = struct.unpack("<QQ", seed)
    v = [
        k0 ^ 0x736F6D6570736575,
        k1 ^ 0x646F72616E646F6D ^ 0xEE,
        k0 ^ 0x6C7967656E657261,
        k1 ^ 0x7465646279746573,
    ]

    def rotl(x: int, b: int) -> int:
        return ((x << b) | (x >> (64 - b))) & M

    def rounds(n: int) -> None:
        for _ in range(n):
            v[0] = (v[0] + v[1]) & M
            v[1] = rotl(v[1], 13) ^ v[0]
            v[0] = rotl(v[0], 32)
            v[2] = (v[2] + v[3]) & M
            v[3] = rotl(v[3], 16) ^ v[2]
            v[0] = (v[0] + v[3]) & M
            v[3] = rotl(v[3], 21) ^ v[0]
            v[2] = (v[2] + v[1]) & M
            v[1] = rotl(v[1], 17) ^ v[2]
            v[2] = rotl(v[2], 32)

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) & 0xFF])
    for (word,) in struct.iter_unpack("<Q", padded):
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    v[2] ^= 0xEE
    rounds(4)
    low = v[0] ^ v[1] ^ v[2] ^ v[3]
    v[1] ^= 0xDD
    rounds(4)
    return struct.pack("<QQ", low, v[0] ^ v[1] ^ v[2] ^ v[3])


@pytest.mark.parametrize("n", sorted(VECTORS))
def test_reference_vectors(n: int) -> None:
    assert _core.siphash128(bytes(range(n)), SEED).hex() == VECTORS[n]


@given(st.binary(max_size=300), st.binary(min_size=16, max_size=16))
def test_siphash_matches_oracle(data: bytes, seed: bytes) -> None:
    assert _core.siphash128(data, seed) == sip_oracle(data, seed)


CELL = st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(max_size=20), st.binary(max_size=20), st.none())


@given(st.lists(st.lists(CELL, min_size=1, max_size=4), min_size=1, max_size=5))
def test_keys_match_oracle(rows: list[list[int | str | bytes | None]]) -> None:
    width = min(map(len, rows))
    keys, nulls = _core.keys128([[row[c] for row in rows] for c in range(width)], SEED)
    for row, key, null in zip(rows, keys, nulls):
        parts = row[:width]
        assert null == (None in parts)
        if null:
            assert key.tolist() == [0, 0]
            continue
        if width == 1 and isinstance(parts[0], int):
            assert key.tolist() == [parts[0] & M, 0]
            continue
        canonical = b""
        for part in parts:
            if isinstance(part, int):
                canonical += b"i" + struct.pack("<q", part)
            else:
                raw = part.encode() if isinstance(part, str) else part
                canonical += (b"s" if isinstance(part, str) else b"b") + struct.pack("<Q", len(raw)) + raw
        low, high = struct.unpack("<QQ", sip_oracle(canonical, SEED))
        assert key.tolist() == [low, high | 1]


def test_array_and_list_columns_agree() -> None:
    ints = np.array([-1, 0, 2**62], np.int64)
    for columns, plain in [
        ([ints], [ints.tolist()]),
        ([ints, ["a", "b", "c"]], [ints.tolist(), ["a", "b", "c"]]),
    ]:
        np.testing.assert_array_equal(_core.keys128(columns, SEED)[0], _core.keys128(plain, SEED)[0])


@pytest.mark.parametrize(
    ("columns", "seed", "message"),
    [
        ([[1]], b"short", "seed is 5 bytes; expected 16"),
        ([], SEED, "columns is empty"),
        ([[1, 2], [1]], SEED, r"columns\[1\] has 1 rows; expected 2"),
        ([[1, True]], SEED, r"columns\[0\]\[1\] is bool; expected"),
        ([[1.5]], SEED, r"columns\[0\]\[0\] is float; expected"),
        ([[2**63]], SEED, r"columns\[0\]\[0\] is an int beyond int64"),
        ([["\ud800"]], SEED, r"columns\[0\]\[0\] is a str with lone surrogates"),
        ([np.zeros(2, np.int32)], SEED, r"columns\[0\] is int32\(2,\); expected a C-contiguous int64"),
    ],
)
def test_bad_input(columns: list[object], seed: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.keys128(columns, seed)
