"""Vectors of a fixed length inside an expression: names for several expressions at once.

A vector exists only while a definition is built. What leaves it (`v[i]`, `dot`, `norm`, `sum`) is an
expression, so every back end has vectors, with the bits of the scalar operations in the stated order. A
feature itself is always one value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from penstock.features.expressions import Expr, lit, refuse


class Vector:
    """One or more expressions, in order; made by `vector`.

    Attributes:
        parts: the expressions.
    """

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[Expr, ...]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Expr]:
        return iter(self.parts)

    def __getitem__(self, index: int) -> Expr:
        if isinstance(index, bool) or not isinstance(index, int) or not -len(self) <= index < len(self):
            refuse(f"vector index is {index!r}; expected an int below {len(self)}")
        return self.parts[index]

    def __repr__(self) -> str:
        return f"<Vector of {len(self)}>"

    def _with(self, other: Any, operation: Callable[[Expr, Expr], Expr]) -> Vector:
        """Part by part with a vector, or each part with one value."""
        others = other.parts if isinstance(other, Vector) else (lit(other),) * len(self)
        if len(others) != len(self):
            refuse(f"vectors have {len(self)} and {len(others)} parts; expected one length")
        return Vector(tuple(map(operation, self.parts, others)))

    def __add__(self, other: Any) -> Vector:
        return self._with(other, lambda a, b: a + b)

    def __radd__(self, other: Any) -> Vector:
        return self._with(other, lambda a, b: b + a)

    def __sub__(self, other: Any) -> Vector:
        return self._with(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Vector:
        return self._with(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Vector:
        return self._with(other, lambda a, b: a * b)

    def __rmul__(self, other: Any) -> Vector:
        return self._with(other, lambda a, b: b * a)

    def __truediv__(self, other: Any) -> Vector:
        return self._with(other, lambda a, b: a / b)

    def __neg__(self) -> Vector:
        return Vector(tuple(-part for part in self.parts))

    def sum(self) -> Expr:
        """(v[0] + v[1]) + v[2] and so on; null if a part is null."""
        total = self.parts[0]
        for part in self.parts[1:]:
            total = total + part
        return total

    def dot(self, other: Vector) -> Expr:
        """The sum, from the left, of the products part by part."""
        if not isinstance(other, Vector):
            refuse(f"operation 'dot' with {other!r}; expected a vector")
        return (self * other).sum()

    def norm(self) -> Expr:
        """sqrt(self.dot(self)), float64."""
        return self.dot(self).sqrt()

    __hash__ = None  # type: ignore[assignment]  # as an Expr's

    def __eq__(self, other: object) -> NoReturn:
        refuse("operation '==' of a vector; compare its parts")

    def __bool__(self) -> NoReturn:
        refuse("a vector has no truth value while it is defined")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") or name in Vector.__slots__:
            raise AttributeError(name)  # copy, pickle and inspect probe for these
        refuse(f"a vector has no operation '{name}'")


def vector(*parts: Any) -> Vector:
    """A vector of expressions and literals, one or more."""
    if not parts:
        refuse("vector has no parts; expected one or more")
    return Vector(tuple(map(lit, parts)))
