"""The digest of rows: any changed bit, length or split shows; parts of any size give the same as written."""

from __future__ import annotations

import numpy as np

from penstock.features.digests import RowsDigest


def digest(*parts: bytes) -> str:
    made = RowsDigest()
    for part in parts:
        assert made.write(part) == len(part)
    return made.hexdigest()


def test_every_bit_and_every_length_counts() -> None:
    rng = np.random.default_rng(5)
    seen = {digest()}
    count = 1
    for size in range(67):
        data = bytearray(rng.bytes(size))
        variants = [bytes(data)]
        for bit in range(8 * size):
            data[bit // 8] ^= 1 << bit % 8
            variants.append(bytes(data))
            data[bit // 8] ^= 1 << bit % 8
        seen |= {digest(variant) for variant in variants}
        count += len(variants)
    seen |= {digest(bytes(size)) for size in range(200)}
    assert len(seen) == count + 199  # no two alike; the empty part was there before


def test_the_bounds_between_parts_count_and_the_order_too() -> None:
    assert digest(b"ab", b"c") != digest(b"a", b"bc")
    assert digest(b"12345678", b"abcdefgh") != digest(b"abcdefgh", b"12345678")
    words = bytes(range(64))
    swapped = words[8:16] + words[:8] + words[16:]
    assert digest(words) != digest(swapped)
    assert digest(words) == digest(words) and len(digest()) == 32
