"""The rows of a source in batches, for sources that are not to be held in memory as one table.

The batches in order have the rows of `source_reading.raw_table`, with the types that it gives them: those of
all files together. A CSV file is read once before, to know the types. Any thread; one pass by one thread.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from penstock.features import sql
from penstock.features.source_definitions import (
    ArrowSource,
    CSVSource,
    DuckDBSource,
    FileSource,
    Source,
    TableSource,
)
from penstock.features.source_reading import (
    arrow_reader,
    csv_options,
    held_table,
    joined,
    reading,
    renamed,
    source_files,
    where_of,
    whole_file,
    whole_schema,
)

_PAGE = 1 << 20  # bytes that a Parquet column is read by
_CSV_BLOCK = 1 << 20  # bytes; a line must fit, as in Arrow's own reading of a whole file


class SourceBatches:
    """An opened source.

    Attributes:
        schema: of all columns that there are.
        table_schema: of the batches: the wanted columns, those among them that there are.
    """

    def __init__(self, source: Source, base: Path, wanted: Sequence[str]) -> None:
        """Look at the source; only of CSV files rows are read.

        Args:
            source: files, a query or a table.
            base: folder from which paths count.
            wanted: the columns to read, by the source's names.

        Raises:
            InvalidArgumentError: as `raw_table`.
        """
        self._source, self._base = source, base
        self._wanted = list(wanted)
        self._files: list[tuple[Path, dict[str, pa.DataType] | None]] = []
        if isinstance(source, TableSource):
            self.schema = held_table(source).schema
        elif isinstance(source, DuckDBSource):
            self.schema = sql.query_schema(source.query, base, where_of(source))
        else:
            assert isinstance(source, FileSource)
            empty = []
            for path in source_files(source, base):
                types = None
                with reading(source, path):
                    if isinstance(source, CSVSource):
                        types = csv_types(source, path)
                    if types is None:
                        schema = whole_schema(source, path)
                    else:
                        schema = pa.schema(list(types.items()))
                empty.append(renamed(source, schema.empty_table()))
                self._files.append((path, types))
            self.schema = joined(source, empty).schema
            kinds = {_columns(part, self._wanted).schema: part for part in empty}
            self._empty = [_columns(part, self._wanted) for part in kinds.values()]
        self.table_schema = _columns(self.schema.empty_table(), self._wanted).schema

    def read(self, rows: int) -> Iterator[pa.Table]:
        """The rows, about `rows` a batch; CSV comes by the megabyte. Raises as `raw_table`."""
        source = self._source
        if isinstance(source, TableSource):
            table = _columns(held_table(source), self._wanted)
            for batch in table.to_batches(max_chunksize=rows):
                yield pa.Table.from_batches([batch])
        elif isinstance(source, DuckDBSource):
            where = where_of(source)
            for batch in sql.query_batches(source.query, self._base, where, self._wanted, rows):
                yield pa.Table.from_batches([batch])
        else:
            assert isinstance(source, FileSource)
            for path, types in self._files:
                with reading(source, path):
                    for table in self._of_file(source, path, types, rows):
                        made = _columns(renamed(source, table), self._wanted)
                        yield _columns(joined(source, [made, *self._empty]), self._wanted)

    def _of_file(
        self, source: FileSource, path: Path, types: dict[str, pa.DataType] | None, rows: int
    ) -> Iterator[pa.Table]:
        names = source.file_columns(self._wanted)
        if isinstance(source, CSVSource) and types is not None:
            yield from _csv_batches(path, types, names)
        elif isinstance(source, CSVSource):
            yield from _slices(whole_file(source, path), rows)
        elif isinstance(source, ArrowSource):
            with pa.memory_map(str(path)) as file:
                opened = arrow_reader(file)
                for batch in _ipc_batches(opened):
                    kept = [i for i, name in enumerate(batch.schema.names) if name in names]
                    yield from _slices(pa.Table.from_batches([batch.select(kept)]), rows)
        else:
            from pyarrow import parquet

            with parquet.ParquetFile(path, buffer_size=_PAGE, pre_buffer=False) as file:
                there = [name for name in names if name in file.schema_arrow.names]
                # Several threads would each keep the memory of what they have decoded.
                for batch in file.iter_batches(batch_size=rows, columns=there, use_threads=False):
                    yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


def _columns(table: pa.Table, names: Sequence[str]) -> pa.Table:
    return table.select([name for name in names if name in table.column_names])


def _slices(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    for at in range(0, table.num_rows, rows):
        yield table.slice(at, rows)


def _ipc_batches(opened: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(opened, pa.ipc.RecordBatchStreamReader):
        yield from opened
    else:
        for i in range(opened.num_record_batches):
            yield opened.get_batch(i)


def _csv_batches(path: Path, types: dict[str, pa.DataType], names: Sequence[str]) -> Iterator[pa.Table]:
    from pyarrow import csv

    there = [name for name in types if name in names]
    if not there:
        there = list(types)[:1]  # Arrow takes no columns for all
    options = csv_options({name: types[name] for name in there}, there)
    with csv.open_csv(path, _csv_blocks(), convert_options=options) as opened:
        for batch in opened:
            yield pa.Table.from_batches([batch])


def _csv_blocks() -> Any:
    from pyarrow import csv

    return csv.ReadOptions(block_size=_CSV_BLOCK)


def csv_types(source: CSVSource, path: Path) -> dict[str, pa.DataType] | None:
    """The types that `pyarrow.csv.read_csv` finds for a whole file, block by block.

    Arrow takes the first type of a fixed list that all values convert to. So the values that ruled out a type
    are kept, a few a column, and tried with each block's.

    Returns:
        Types by column; None where they cannot be told so: a file with repeated names or bytes that are no
        UTF-8, which has to be read whole.
    """
    from pyarrow import csv

    plain = csv_options({}, None)
    with csv.open_csv(path, _csv_blocks(), convert_options=plain) as opened:
        names = opened.schema.names
    if len(set(names)) < len(names):
        return None
    declared = csv_options(source, None).column_types
    kinds: dict[str, pa.DataType] = dict.fromkeys(names, pa.null())
    kept: dict[str, list[str]] = {name: [] for name in names}
    try:
        texts = csv_options(dict.fromkeys(names, pa.string()), None)
        with csv.open_csv(path, _csv_blocks(), convert_options=texts) as opened:
            for batch in opened:
                for name, column in zip(names, batch.columns):
                    if name not in declared:
                        kinds[name] = _loosened(kinds[name], kept[name], column)
    except pa.ArrowInvalid:
        return None
    return {**kinds, **{name: kind for name, kind in declared.items() if name in kinds}}


def _loosened(kind: pa.DataType, kept: list[str], column: pa.Array) -> pa.DataType:
    """The type of a CSV column with a block more; `kept` gets the values that rule the earlier types out."""
    values = column.drop_null()
    whole = _inferred(kept, values)
    while kind != whole:
        low, high = 0, len(values)  # the first `low` values leave the type as it is, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            if _inferred(kept, values.slice(0, middle)) == kind:
                low = middle
            else:
                high = middle
        kept.append(values[high - 1].as_py())
        kind = _inferred(kept, values.slice(0, 0))
    return kind


def _inferred(kept: Sequence[str], values: pa.Array) -> pa.DataType:
    from pyarrow import csv

    if not kept and not len(values):
        return pa.null()
    texts = pa.concat_arrays([pa.array(kept, pa.string()), values])
    sink = io.BytesIO()
    csv.write_csv(pa.table({"c": texts}), sink, csv.WriteOptions(quoting_style="all_valid"))
    sink.seek(0)
    return csv.read_csv(sink, convert_options=csv_options({}, None)).schema.field(0).type
