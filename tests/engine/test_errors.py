"""The error taxonomy and its wire form."""

import pytest

from penstock import errors

WIRE = {
    "INVALID_ARGUMENT": (errors.InvalidArgumentError, False),
    "NOT_FOUND": (errors.NotFoundError, False),
    "FAILED_PRECONDITION": (errors.FailedPreconditionError, False),
    "RESOURCE_EXHAUSTED": (errors.ResourceExhaustedError, True),
    "DEADLINE_EXCEEDED": (errors.DeadlineExceededError, False),
    "CANCELLED": (errors.CancelledError, False),
    "UNAVAILABLE": (errors.UnavailableError, True),
    "UNAUTHENTICATED": (errors.UnauthenticatedError, False),
    "PERMISSION_DENIED": (errors.PermissionDeniedError, False),
    "INTERNAL": (errors.InternalError, False),
}


@pytest.mark.parametrize("code", WIRE)
def test_every_code_survives_the_wire(code):
    cls, retryable = WIRE[code]
    wire = errors.to_wire(cls("why", retry_after_ms=0))
    assert wire == {"code": code, "message": "why", "retryable": retryable, "retry_after_ms": 0}
    back = errors.from_wire(wire)
    assert type(back) is cls
    assert (str(back), back.retry_after_ms) == ("why", 0)


def test_retry_after_is_left_out_when_unknown():
    assert "retry_after_ms" not in errors.to_wire(errors.UnavailableError("x"))


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (errors.ConfigError, errors.InvalidArgumentError),
        (errors.DefinitionError, errors.InvalidArgumentError),
        (errors.FeatureNameCollisionError, errors.InvalidArgumentError),
        (errors.BundleError, errors.FailedPreconditionError),
        (errors.StoreError, errors.UnavailableError),
    ],
)
def test_a_special_error_crosses_as_its_canonical_class(cls, base):
    assert type(errors.from_wire(errors.to_wire(cls("x")))) is base


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.InvalidArgumentError, ValueError),
        (errors.NotFoundError, LookupError),
        (errors.DeadlineExceededError, TimeoutError),
    ],
)
def test_errors_are_caught_as_the_builtin_kind(cls, builtin):
    with pytest.raises(builtin, match=r"^plain text$"):
        raise cls("plain text")


def test_a_foreign_exception_is_internal_with_its_type():
    assert errors.to_wire(KeyError("k")) == {
        "code": "INTERNAL",
        "message": "KeyError: 'k'",
        "retryable": False,
    }


@pytest.mark.parametrize("wire", ["text", None, {}, {"code": "NEW_CODE", "message": "m"}])
def test_an_unknown_shape_becomes_internal(wire):
    assert type(errors.from_wire(wire)) is errors.InternalError
