"""Bars that show how far joins and materialisations are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error for each view; yields what is told of the view, the rows done and all rows."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    with Progress(console=Console(stderr=True)) as bars:

        def show(view: str, done: int, total: int) -> None:
            if view not in tasks:
                tasks[view] = bars.add_task(view)
            bars.update(tasks[view], completed=done, total=max(total, 1))

        yield show
