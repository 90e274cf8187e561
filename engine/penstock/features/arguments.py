"""Calls in definitions with an argument that there is not: an error names it and those that there are."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from penstock.errors import DefinitionError

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


def named_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which raises DefinitionError where its arguments do not fit its signature."""
    return _checked(function, function.__name__)


def named_fields(cls: C) -> C:
    """A class whose constructor does so."""
    cls.__init__ = _checked(cls.__init__, cls.__name__)  # type: ignore[misc]
    return cls


def _checked(function: Callable[P, R], name: str) -> Callable[P, R]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            _check(name, signature, args, kwargs)
            raise

    return checked


def _check(name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        known = [name for name in signature.parameters if name != "self"]
        listed = f"its arguments are {', '.join(known)}"
        for given in kwargs:
            if given not in known:
                near = difflib.get_close_matches(given, known, 1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                raise DefinitionError(f"{name}: there is no argument '{given}'; {hint}{listed}") from None
        raise DefinitionError(f"{name}: {error}; {listed}") from None
