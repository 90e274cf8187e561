"""The exceptions of Penstock, each with the canonical code that it has on the wire.

An error that crosses the socket is a map ``{"code", "message", "retryable", "retry_after_ms"?}``; `to_wire`
and `from_wire` are the only places that know that shape.
"""

from __future__ import annotations

from typing import Any, ClassVar


class PenstockError(Exception):
    """Base of every error that Penstock raises on purpose.

    Attributes:
        code: canonical wire code of the class.
        retryable: the same call may succeed if it is made again.
        retry_after_ms: the server's hint, milliseconds, or None.
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class InvalidArgumentError(PenstockError, ValueError):
    """The call itself is wrong; the same call can never succeed."""

    code = "INVALID_ARGUMENT"


class NotFoundError(PenstockError, LookupError):
    """A name (model, view, feature, column) is unknown."""

    code = "NOT_FOUND"

    def __str__(self) -> str:  # LookupError subclasses would print repr()
        return str(self.args[0]) if self.args else ""


class FailedPreconditionError(PenstockError):
    """The call is right but the state of the system does not allow it."""

    code = "FAILED_PRECONDITION"


class ResourceExhaustedError(PenstockError):
    """A bound was hit; try again after `retry_after_ms`."""

    code = "RESOURCE_EXHAUSTED"
    retryable = True


class DeadlineExceededError(PenstockError, TimeoutError):
    """No answer was possible within the deadline."""

    code = "DEADLINE_EXCEEDED"


class CancelledError(PenstockError):
    """The caller, or the end of its connection, cancelled the request."""

    code = "CANCELLED"


class UnavailableError(PenstockError):
    """The server, a lane or a store cannot answer now; try again."""

    code = "UNAVAILABLE"
    retryable = True


class UnauthenticatedError(PenstockError):
    """No valid token was given."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(PenstockError):
    """The token's role does not allow the call."""

    code = "PERMISSION_DENIED"


class InternalError(PenstockError):
    """A fault of Penstock itself."""

    code = "INTERNAL"


class ConfigError(InvalidArgumentError):
    """A configuration file is wrong; the message lists every fault with its line."""


class DefinitionError(InvalidArgumentError):
    """A feature definition is wrong."""


class MissingColumnError(InvalidArgumentError):
    """A source lacks a column. Attribute `column`: its name."""

    def __init__(self, message: str, column: str) -> None:
        super().__init__(message)
        self.column = column


class FeatureNameCollisionError(InvalidArgumentError):
    """Two requested features would get one column name."""


class BundleError(FailedPreconditionError):
    """A model bundle is missing a file, is corrupt, or does not fit the feature definitions."""


class StoreError(UnavailableError):
    """The online store failed."""


_BY_CODE: dict[str, type[PenstockError]] = {
    cls.code: cls
    for cls in (
        InvalidArgumentError,
        NotFoundError,
        FailedPreconditionError,
        ResourceExhaustedError,
        DeadlineExceededError,
        CancelledError,
        UnavailableError,
        UnauthenticatedError,
        PermissionDeniedError,
        InternalError,
    )
}


def to_wire(error: BaseException) -> dict[str, Any]:
    """Return the wire map of `error`. An exception that is not ours is INTERNAL, by its type and text."""
    if not isinstance(error, PenstockError):
        return {"code": "INTERNAL", "message": f"{type(error).__name__}: {error}", "retryable": False}
    wire: dict[str, Any] = {"code": error.code, "message": str(error), "retryable": error.retryable}
    if error.retry_after_ms is not None:
        wire["retry_after_ms"] = error.retry_after_ms
    return wire


def from_wire(error: Any) -> PenstockError:
    """Return the exception for the wire map `error`; an unknown code or shape becomes InternalError."""
    if not isinstance(error, dict):
        return InternalError(str(error))
    cls = _BY_CODE.get(str(error.get("code")), InternalError)
    retry_after = error.get("retry_after_ms")
    return cls(
        str(error.get("message", "")), retry_after_ms=int(retry_after) if retry_after is not None else None
    )
