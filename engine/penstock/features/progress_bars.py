"""Bars that show how far joins and materialisations are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with a view, the rows that are done, and all rows."""


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar on standard error for each view; yields what is told of the view, the rows done and all rows."""
    from rich import progress
    from rich.console import Console

    tasks: dict[str, progress.TaskID] = {}
    with progress.Progress(console=Console(stderr=True)) as bars:

        def show(view: str, done: int, total: int) -> None:
            if view not in tasks:
                tasks[view] = bars.add_task(view)
            bars.update(tasks[view], completed=done, total=max(total, 1))

        yield show


def told_of(work: Callable[[Progress | None], T], progress: Progress | bool | None) -> Callable[[], T]:
    """`work` with what it is to tell of its progress: a callable, bars for true, or nothing."""
    if progress is not True:
        return lambda: work(progress or None)

    def with_bars() -> T:
        with progress_bars() as told:
            return work(told)

    return with_bars
