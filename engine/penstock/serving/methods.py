"""The methods of the wire that are no predict calls, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.errors import (
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PenstockError,
    UnavailableError,
)

if TYPE_CHECKING:
    from penstock.serving.engine import Engine


def call_method(engine: Engine, method: str, params: list[Any]) -> Any:
    """Run a method with its decoded params; any error is a PenstockError."""
    known = {
        "label": (engine.label, 2, 3),
        "models": (engine.models, 0, 0),
        "health": (engine.health, 0, 0),
        "stats": (engine.stats, 0, 0),
        "drift": (engine.drift, 0, 3),
        "features": (engine.features, 2, 3),
        "push": (lambda source, columns: {"accepted": engine.push(source, columns)}, 2, 2),
        "materialize": (engine.materialize, 0, 2),
        "apply": (engine.apply, 0, 0),
        "erase": (engine.erase, 2, 2),
        "promote": (engine.promote, 1, 2),
        "rollback": (engine.rollback, 1, 1),
        "canary": (lambda model, share, version=None: engine.canary(model, version, share=share), 2, 3),
        "shadow": (lambda model, share, version=None: engine.shadow(model, version, share=share), 2, 3),
    }
    if method not in known:
        raise NotFoundError(f"method '{method}' is unknown; expected one of: {', '.join(sorted(known))}")
    function, least, most = known[method]
    if not least <= len(params) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise InvalidArgumentError(f"{method} has {len(params)} params; expected {wanted}")
    try:
        return function(*params)  # type: ignore[operator]
    except PenstockError:
        raise
    except OSError as error:
        raise UnavailableError(f"{method} failed: {error}") from error
    except Exception as error:
        raise InternalError(f"{method} failed: {type(error).__name__}: {error}") from error
