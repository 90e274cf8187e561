"""The dtype of each node of an expression over a schema."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from penstock.errors import DefinitionError
from penstock.features.expressions import DTYPES, MATH, TIME_PARTS, Expr, is_floating, walk


def is_number(dtype: str) -> bool:
    return is_floating(dtype) or dtype == "int64"


def common_type(a: str, b: str) -> str | None:
    """The type in which both are compared or chosen; mixed numbers are float64."""
    if a == b:
        return a
    return "float64" if is_number(a) and is_number(b) else None


_TEMPORAL = {
    ("sub", "timestamp", "timestamp"): "duration",
    ("sub", "timestamp", "duration"): "timestamp",
    ("add", "timestamp", "duration"): "timestamp",
    ("add", "duration", "timestamp"): "timestamp",
    ("add", "duration", "duration"): "duration",
    ("sub", "duration", "duration"): "duration",
    ("mul", "duration", "int64"): "duration",
    ("mul", "int64", "duration"): "duration",
    ("div", "duration", "duration"): "float64",
    ("floor_div", "duration", "duration"): "int64",
    ("mod", "duration", "duration"): "duration",
}


def _result(node: Expr, types: list[str], schema: Mapping[str, str]) -> str | None:
    op, first = node.op, (types[0] if types else "")
    if op == "col":
        return schema.get(node.param)
    if op == "now":
        return "timestamp"
    if op == "lit":
        return str(node.param[0])
    if op in ("add", "sub", "mul", "div", "floor_div", "mod"):
        if is_number(first) and is_number(types[1]):
            return "int64" if op != "div" and first == types[1] == "int64" else "float64"
        return _TEMPORAL.get((op, first, types[1]))
    if op in ("neg", "abs"):
        if first == "float32":
            return "float64"
        return first if is_number(first) or first == "duration" else None
    if op in ("sqrt", "percentile_rank", "pow", *MATH):
        return "float64" if all(map(is_number, types)) else None
    if op in ("floor", "ceil", "round", "sign"):
        return ("int64" if first == "int64" else "float64") if is_number(first) else None
    if op in ("lt", "le", "eq"):
        common = common_type(*types)
        return "bool" if common not in (None, "string") and (op == "eq" or common != "bool") else None
    if op in ("minimum", "maximum"):
        common = common_type(*types)
        return common if common not in ("bool", "string") else None
    if op in ("and", "or", "not"):
        return "bool" if all(t == "bool" for t in types) else None
    if op == "where":
        return common_type(*types[1:]) if first == "bool" and "string" not in types else None
    if op == "fill_null":
        return common_type(*types) if "string" not in types else None
    if op == "is_null":
        return "bool"
    if op == "is_nan":
        return "bool" if is_floating(first) else None
    if op == "cast":
        if first in ("timestamp", "duration"):
            return "int64" if node.param == "int64" else None
        return str(node.param) if is_number(first) or first == "bool" else None
    if op in TIME_PARTS:
        return "int64" if first == "timestamp" else None
    if op == "truncate":
        return "timestamp" if first == "timestamp" else None
    if op == "in_unit":
        return "float64" if first == "duration" else None
    if op == "isin":
        return "bool" if is_number(first) else None
    if op == "bucketize":
        return "int64" if is_number(first) else None
    if op == "text_in":
        return "bool" if first == "string" else None
    if op == "code":
        return "int64" if first == "string" else None
    if op == "hash_bucket":
        return "int64" if first in ("string", "int64") else None
    if op == "udf":
        return str(node.param[0]) if "string" not in types else None
    raise DefinitionError(f"unknown operation '{op}'")


def at_line(node: Expr, message: str) -> DefinitionError:
    """An error that names where the node was built."""
    return DefinitionError(f"{message}; defined at {node.at[0]}:{node.at[1]}")


def infer(roots: Iterable[Expr], schema: Mapping[str, str]) -> dict[str, str]:
    """Give each node its dtype, by fingerprint.

    Raises:
        DefinitionError: an unknown column or dtype, or an operation on types that it does not have; it
            names the line where the node was built.
    """
    types: dict[str, str] = {}
    for node in walk(*roots):
        args = [types[arg.fingerprint()] for arg in node.args]
        if node.op == "col" and schema.get(node.param) not in DTYPES:
            known = schema.get(node.param)
            raise at_line(
                node,
                f"column '{node.param}' has dtype '{known}'; expected one of {', '.join(DTYPES)}"
                if known
                else f"column '{node.param}' is not in the schema ({', '.join(sorted(schema)) or 'empty'})",
            )
        result = _result(node, args, schema)
        if result is None:
            name = f"udf {node.param[1]}" if node.op == "udf" else node.op
            raise at_line(node, f"operation '{name}' is not defined on ({', '.join(args)})")
        types[node.fingerprint()] = result
    return types
