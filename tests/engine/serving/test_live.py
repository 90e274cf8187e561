"""A live version's way from the rows that it served to its monitors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from penstock.serving.live import LiveModel


def test_a_drain_ends_though_rows_come_faster_than_it_takes_them():
    ring_rows, taken = 5000, []

    class Served:
        def drain(self, n):  # there is always more
            taken.append(n)
            return (
                np.ones(n, np.uint64),
                np.full(n, 7),
                np.ones((n, 1)),
                np.ones((n, 1)),
                np.zeros(n, np.uint8),
                np.ones((n, 0)),
            )

    ignored = SimpleNamespace(add=lambda *_: None, append=lambda *_: None)
    bundle = SimpleNamespace(name="m", version="1", inputs=[("a", "float32")])
    model = LiveModel(
        bundle, None, Served(), ignored, "thread", 0, ignored, ignored, None, ignored, ring_rows
    )
    model.drain()
    assert ring_rows <= sum(taken) < ring_rows + max(taken)  # all that can have waited, and no more than that
    assert model.newest_us == 7
