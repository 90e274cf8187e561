"""What columns a source must have, what it has, and the difference. Pure functions over Arrow schemas.

A source may declare a schema; otherwise the one that `apply` found is kept in the registry. A column of
nulls alone (an empty CSV, say) has the type "null", which goes with every other. A column of no feature type
goes by its Arrow type in angle brackets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa

from penstock.errors import FailedPreconditionError, InvalidArgumentError, MissingColumnError
from penstock.features.source_definitions import CSVSource, Source
from penstock.features.source_reading import ARROW_TYPES

NULL = "null"


def feature_dtype(kind: pa.DataType) -> str | None:
    """The feature dtype of an Arrow type; None if it has none."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int64"
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return "float32"
    if pa.types.is_float64(kind) or pa.types.is_null(kind):
        return "float64"
    if is_text(kind):
        return "string"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "timestamp"
    return "duration" if pa.types.is_duration(kind) else None


def is_text(kind: pa.DataType) -> bool:
    """Whether the Arrow type is a string, dictionary-encoded or not."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def found_schema(source: Source, schema: pa.Schema) -> dict[str, str]:
    """The dtype of each column; texts in a time column are times."""
    found = {}
    for name, kind in zip(schema.names, schema.types):
        dtype = NULL if pa.types.is_null(kind) else feature_dtype(kind)
        if dtype == "string" and name in (source.timestamp, source.created):
            dtype = "timestamp"
        found[name] = dtype or f"<{kind}>"
    return found


def schema_of(source: Source, found: Mapping[str, str]) -> dict[str, str]:
    """The schema that stands for a source: what was found, or declared where nothing is there to be found."""
    return dict(found or source.schema or {})


def check_columns(source: Source, schema: pa.Schema, used: Iterable[str]) -> None:
    """Refuse a source that lacks a column, or has two of one name.

    Args:
        used: the columns that are read.

    Raises:
        InvalidArgumentError: it names source and column.
    """
    where = f"source '{source.name}'"
    names = schema.names
    for name in used:
        if name not in names:
            dtype = (source.schema or {}).get(name)
            of = "" if dtype is None else f" of dtype {dtype}"
            raise MissingColumnError(
                f"{where} has no column '{name}'{of}; expected one of {', '.join(names)}", name
            )
    for name in names if source.schema is not None else used:
        if names.count(name) > 1:
            raise InvalidArgumentError(f"{where} has two columns named '{name}'; expected distinct names")


def check_declared(source: Source, schema: pa.Schema) -> None:
    """Hold a source to the schema that it declares, if it does.

    Raises:
        InvalidArgumentError: it names source, column, what was found and what was expected.
    """
    if source.schema is None:
        return
    check_columns(source, schema, source.schema)
    found = found_schema(source, schema)
    for name, dtype in source.schema.items():
        if not _fits(source, found[name], dtype):
            raise InvalidArgumentError(
                f"source '{source.name}': column '{name}' is {found[name]}; expected {dtype} as declared"
            )


def check_recorded(
    source: Source, schema: pa.Schema, recorded: Mapping[str, str], used: Iterable[str]
) -> None:
    """Hold the columns that are read to the schema that `apply` recorded.

    Raises:
        FailedPreconditionError: a column has another type now.
    """
    found = found_schema(source, schema)
    for name in used:
        before = recorded.get(name, NULL)
        if found[name] != before and NULL not in (found[name], before):
            raise FailedPreconditionError(
                f"source '{source.name}': column '{name}' is {found[name]}; expected {before}, as it was "
                "when apply ran: bring it back, or open the store again and apply"
            )


def as_expected(
    source: Source, table: pa.Table, expected: Mapping[str, str], used: Iterable[str]
) -> pa.Table:
    """Give columns of nulls alone their expected type, and whole numbers in CSV the declared float type.

    Raises:
        InvalidArgumentError: a whole number that no float holds.
    """
    for name in used:
        column, dtype = table[name], expected.get(name)
        if dtype not in ARROW_TYPES:
            continue
        widened = (
            isinstance(source, CSVSource)
            and dtype in ("float32", "float64")
            and feature_dtype(column.type) in ("int64", "float64")
            and dtype == (source.schema or {}).get(name)
        )
        if not pa.types.is_null(column.type) and not widened:
            continue
        try:
            made = column.cast(ARROW_TYPES[dtype], safe=feature_dtype(column.type) == "int64")
        except pa.ArrowInvalid as error:
            raise InvalidArgumentError(
                f"source '{source.name}': column '{name}' has a value that is no {dtype}: {error}"
            ) from error
        table = table.set_column(table.column_names.index(name), name, made)
    return table


def schema_changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """What became of each column that differs: "added float64", "removed float64", "int64 to string"."""
    found = {name: f"removed {dtype}" for name, dtype in before.items() if name not in after}
    for name, dtype in after.items():
        if name not in before:
            found[name] = f"added {dtype}"
        elif dtype != before[name] and NULL not in (dtype, before[name]):
            found[name] = f"{before[name]} to {dtype}"
    return dict(sorted(found.items()))


def _fits(source: Source, found: str, declared: str) -> bool:
    if found in (declared, NULL):
        return True
    # The text of a CSV has no types of its own: a float column may hold whole numbers alone.
    csv = isinstance(source, CSVSource) and declared in ("float32", "float64")
    return csv and found in ("int64", "float64")
