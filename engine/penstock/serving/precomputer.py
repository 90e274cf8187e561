"""Keeps the most frequent inputs computed while their features change, so that no request waits for them."""

from __future__ import annotations

import logging
import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.serving.live import LiveModels

_log = logging.getLogger("penstock.serving")
_WAIT_S = 0.2
_PAUSE_S = 0.5  # between two runs: one for all changes meanwhile


class Precomputer:
    """Computes the edge cache's most frequent inputs after pushes.

    Attributes:
        errors: runs that failed.
    """

    def __init__(self, live: LiveModels, changing: AbstractContextManager[object]) -> None:
        """`changing` is held during a run: no version goes live or ends meanwhile."""
        self._live, self._changing = live, changing
        self._changed = threading.Event()
        self.errors = 0

    def note_change(self) -> None:
        """Features have changed. Any thread; does not wait."""
        self._changed.set()

    def run(self, closing: threading.Event) -> None:
        """Until `closing` is set. One thread."""
        while not closing.is_set():
            if not self._changed.wait(_WAIT_S):
                continue
            self._changed.clear()
            try:
                with self._changing:
                    for model in self._live.live.values():
                        if not closing.is_set():
                            self._live.precompute(model)
            except Exception:  # the inputs are then computed when they are asked for
                self.errors += 1
                _log.exception("inputs could not be computed ahead")
            closing.wait(_PAUSE_S)
