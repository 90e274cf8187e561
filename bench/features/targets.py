"""The target table of the feature benchmark, made from samples alone: nothing is measured here.

Samples lie in a `Book` by (contender, column). A line without its samples says that it is not available, and
why where the run knows it; it is never filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serving.lines import Book, Line

OURS = "Penstock"
SQLITE, REDIS, FEAST = "Feast on SQLite", "Feast on Redis", "Feast"
ONE, MANY, WIDE = "1 x 10, p50 us", "64 x 10, p50 us", "100 x 50 of 5 views, p50 us"
COLD, WARM, FILES = "join, memory, ms", "join, warm index, ms", "join, Parquet to frame, ms"
LONG, SHORT = "join, 1 000 rows a key, ms", "join, 20 rows a key, ms"
WINDOW = "10 windows, p99 us"
VISIBLE, DURABLE = "push to readable, p99 us", "push to durable, p99 us"
MATERIALIZE = "materialize, s"
OPS = "20 operations, us"
MEMORY = "entity of 50, bytes"
RAW_BYTES = 50 * 4


def target_lines(book: Book, why: Mapping[str, str]) -> None:
    """Append all lines. `why` says of a column of ours why it has no samples."""
    feast = (SQLITE, REDIS)
    limit_beside(book, "online, 1 entity x 10 features, p50", ONE, feast, "us", 5, why)
    limit_beside(book, "online, 64 entities x 10 features, p50", MANY, feast, "us", 15, why)
    limit_beside(book, "online, 100 entities x 50 features of 5 views, p50", WIDE, feast, "us", 100, why)
    size = "1e6 feature rows x 1e5 entity rows x 10"
    ratio(book, f"historical join, {size}, from memory", COLD, COLD, "polars", "ms", 1, why)
    ratio(book, f"historical join, {size}, warm index", WARM, COLD, "polars", "ms", 1 / 3, why)
    ratio(book, f"historical join, {size}, Parquet to a frame", FILES, FILES, "polars", "ms", 1, why)
    skew(book, why)
    measure = "10 aggregates x 30 days over 1e5 events of a key, one read, p99"
    published = "OpenMLDB publishes some 1 200 us, pre-aggregated"
    limit_beside(book, measure, WINDOW, (), "us", 50, why, published)
    durable = book.median(OURS, DURABLE)
    note = "" if durable is None else f"durable after {durable:,.0f} us"
    limit_beside(book, "push to readable in process, p99", VISIBLE, (), "us", 200, why, note)
    measure = "materialize 1e6 source rows of 1e4 entities"
    ratio(book, measure, MATERIALIZE, MATERIALIZE, SQLITE, "s", 1 / 20, why)
    limit_beside(book, "20 request-time operations on one row, added", OPS, (SQLITE,), "us", 3, why)
    most = 1.3 * RAW_BYTES + 64
    limit_beside(book, "memory of an entity of 50 float32", MEMORY, (REDIS,), "bytes", most, why)


def limit_beside(
    book: Book,
    measure: str,
    column: str,
    peers: Sequence[str],
    unit: str,
    target: float,
    why: Mapping[str, str],
    note: str = "",
) -> None:
    """A line on a figure of ours that may be `target` at most, with the best peer's figure beside it."""
    line = Line(measure, f"<= {target:g} {unit}", unit, book.median(OURS, column), note=note)
    found = [(value, peer) for peer in peers if (value := book.median(peer, column)) is not None]
    if found:
        line.theirs, line.peer = min(found)
    if line.ours is None:
        line.note = f"not available: {why.get(column, 'not measured')}"
    else:
        line.passed = line.ours <= target
        line.ratio = None if line.theirs is None else line.ours / line.theirs
    book.lines.append(line)


def ratio(
    book: Book,
    measure: str,
    column: str,
    theirs: str,
    peer: str,
    unit: str,
    target: float,
    why: Mapping[str, str],
) -> None:
    """A line on our `column` over the peer's column `theirs`: `target` at most."""
    text = f"<= {target:g}x" if target >= 1 else f"<= 1/{1 / target:g}"
    line = Line(measure, f"{text} {peer}", unit, book.median(OURS, column), peer, book.median(peer, theirs))
    if line.ours is None:
        line.note = f"not available: {why.get(column, 'not measured')}"
    elif not line.theirs:
        line.note = f"not available: {peer} was not measured"
    else:
        line.ratio = line.ours / line.theirs
        line.passed = line.ratio <= target
    book.lines.append(line)


def skew(book: Book, why: Mapping[str, str]) -> None:
    """The line on long histories against short ones; the peers' own ratios are its note."""
    ratios = {}
    for who in (OURS, "polars", "DuckDB", "pandas"):
        long, short = book.median(who, LONG), book.median(who, SHORT)
        if long is not None and short:
            ratios[who] = long / short
    line = Line("1 000 rows a key against 20, same total", "<= 1.5x", "ms", book.median(OURS, LONG))
    line.peer, line.theirs = "its short ones", book.median(OURS, SHORT)
    if OURS in ratios:
        line.ratio = ratios.pop(OURS)
        line.passed = line.ratio <= 1.5
        line.note = ", ".join(f"{who} {found:.2f}x" for who, found in ratios.items())
    else:
        line.note = f"not available: {why.get(LONG, 'not measured')}"
    book.lines.append(line)
