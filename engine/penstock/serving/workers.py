"""A small bounded pool of threads for what must not run on the event loop.

Daemon threads with a queue of their own: a call that hangs neither blocks the loop nor keeps the process from
exiting. `submit` and the callbacks belong to the loop thread; only the work itself runs elsewhere.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable

Work = Callable[[], bytes]
Done = Callable[[bytes | BaseException], None]


class Workers:
    """`threads` threads and at most `limit` calls that wait or run."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, threads: int, limit: int) -> None:
        self._loop = loop
        self._limit = limit
        self._queue: queue.SimpleQueue[tuple[Work, Done] | None] = queue.SimpleQueue()
        self.outstanding = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"penstock-{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Work, done: Done) -> bool:
        """Run `work` on a thread, then `done(result or exception)` on the loop; False when full."""
        if self.outstanding >= self._limit:
            return False
        self.outstanding += 1
        self._queue.put((work, done))
        return True

    def close(self) -> None:
        """Let the threads end after what they are at; waits for none of them."""
        for _ in self._threads:
            self._queue.put(None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, done = item
            result: bytes | BaseException
            try:
                result = work()
            except BaseException as error:  # reaches the caller as an error reply
                result = error
            try:
                self._loop.call_soon_threadsafe(self._finish, done, result)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def _finish(self, done: Done, result: bytes | BaseException) -> None:
        self.outstanding -= 1
        done(result)
