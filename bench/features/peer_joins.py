"""As-of joins of polars, DuckDB and pandas over the benchmark's Parquet files, sorting included.

The entity rows carry their number, so that every answer can be compared row by row.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from data import FEATURES
from peer_loop import seconds, serve

TIME, KEY = "event_timestamp", "user_id"


class Joins:
    """The tables of each set, in each library's own form."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrow: dict[str, tuple[pa.Table, pa.Table]] = {}
        self.con = duckdb.connect()
        self.con.execute("SET preserve_insertion_order = false")

    def _tables(self, name: str) -> tuple[pa.Table, pa.Table]:
        if name not in self.arrow:
            events = pq.read_table(self.folder / name / "events.parquet")
            asked = pq.read_table(self.folder / name / "entities.parquet")
            asked = asked.append_column("row", pa.array(np.arange(asked.num_rows)))
            self.arrow[name] = events, asked
            for kind, table in (("events", events), ("entities", asked)):
                self.con.register("made", table)
                self.con.execute(f"CREATE TABLE {name}_{kind} AS SELECT * FROM made")
        return self.arrow[name]

    def memory(self, data: str, peer: str, answer: str | None = None) -> float:
        """Seconds of one join from memory."""
        events, asked = self._tables(data)
        if peer == "polars":
            left, right = pl.from_arrow(asked), pl.from_arrow(events)
            taken, found = seconds(lambda: _polars(left, right))
        elif peer == "pandas":
            left, right = asked.to_pandas(), events.to_pandas()
            taken, found = seconds(lambda: _pandas(left, right))
        else:
            columns = ", ".join(f"e.{name}" for name in FEATURES)
            query = (
                f"SELECT a.row, {columns} FROM {data}_entities a ASOF LEFT JOIN {data}_events e "
                f"ON a.{KEY} = e.{KEY} AND a.{TIME} >= e.{TIME}"
            )
            taken, found = seconds(lambda: self.con.sql(query).to_arrow_table())
        _keep(found, answer)
        return taken

    def parquet(self, data: str, peer: str, answer: str | None = None) -> float:
        """Seconds from the files to a frame."""
        folder = self.folder / data
        assert peer == "polars"

        def work() -> Any:
            left = pl.read_parquet(folder / "entities.parquet").with_row_index("row")
            return _polars(left, pl.read_parquet(folder / "events.parquet"))

        taken, found = seconds(work)
        _keep(found, answer)
        return taken


def _polars(left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    return left.sort(TIME).join_asof(right.sort(TIME), on=TIME, by=KEY, strategy="backward")


def _pandas(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    return pd.merge_asof(left.sort_values(TIME), right.sort_values(TIME), on=TIME, by=KEY)


def _keep(found: Any, answer: str | None) -> None:
    """Write the answer, float32[rows, features] in the order of the entity rows."""
    if answer is None:
        return
    if isinstance(found, pl.DataFrame):
        found = found.to_arrow()
    elif isinstance(found, pd.DataFrame):
        found = pa.Table.from_pandas(found, preserve_index=False)
    values = np.column_stack([found[name].to_numpy(zero_copy_only=False) for name in FEATURES])
    out = np.empty_like(values, np.float32)
    out[found["row"].to_numpy()] = values
    np.save(answer, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    joins = Joins(parser.parse_args().folder)
    serve({"memory": joins.memory, "parquet": joins.parquet})


if __name__ == "__main__":
    main()
