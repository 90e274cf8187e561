"""Credentials from files and settings: tokens with their roles, TLS contexts. What cannot be used is refused
here, by name, so that a check of the configuration finds it.

Only the SHA-256 of a token is kept, and no token is part of an error. TLS 1.2 is the oldest version spoken.
"""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from penstock.errors import InvalidArgumentError

Role = Literal["data", "admin"]
FOREVER_US = (1 << 63) - 1
MIN_TOKEN = 16  # characters
_MAX_TOKEN = 4096


@dataclass(frozen=True)
class Grant:
    """What a token allows: `role`, until `expires_us` (wall clock, microseconds UTC). Does not hold it."""

    digest: bytes
    role: Role
    expires_us: int = FOREVER_US


def grant(token: str, role: Role, expires: datetime | None = None) -> Grant:
    """Return the grant of `token`; InvalidArgumentError, without the token in it, if it is none."""
    if not MIN_TOKEN <= len(token) <= _MAX_TOKEN or not token.isascii() or not token.isprintable():
        raise InvalidArgumentError(
            f"a token has {len(token)} characters; expected {MIN_TOKEN} to {_MAX_TOKEN} of printable ASCII"
        )
    if " " in token:
        raise InvalidArgumentError("a token has a space; expected none")
    until = FOREVER_US
    if expires is not None:
        aware = expires if expires.tzinfo is not None else expires.replace(tzinfo=UTC)
        until = int(aware.timestamp() * 1_000_000)
    return Grant(digest_of(token.encode()), role, until)


def read_tokens(path: Path, role: Role) -> list[Grant]:
    """Return the grants of a token file: a line is `TOKEN [EXPIRES]` (ISO 8601), `#` begins a comment.

    InvalidArgumentError names the file and the line, never the token.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidArgumentError(f"cannot read {path}: {reason}") from None
    grants = []
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        try:
            if len(words) > 2:
                raise InvalidArgumentError(f"has {len(words)} words; expected TOKEN [EXPIRES]")
            expires = datetime.fromisoformat(words[1]) if len(words) == 2 else None
            grants.append(grant(words[0], role, expires))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{path} line {number}: {error}") from None
        except ValueError:
            raise InvalidArgumentError(
                f"{path} line {number}: the expiry is no time; expected such as 2030-01-31T12:00:00Z"
            ) from None
    if not grants:
        raise InvalidArgumentError(f"{path} has no token; expected at least one")
    return grants


def digest_of(token: bytes) -> bytes:
    """Return what is kept of a token."""
    return hashlib.sha256(token).digest()


@dataclass(frozen=True)
class ServerTls:
    """Files of a server: PEM certificate chain and key; the CA of client certificates, if any are asked."""

    cert: Path
    key: Path
    client_ca: Path | None = None
    require_client_cert: bool = False

    def context(self) -> ssl.SSLContext:
        """Read the files; InvalidArgumentError says which is wrong."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        _load_chain(context, self.cert, self.key)
        if self.client_ca is not None:
            _load_ca(context, self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED if self.require_client_cert else ssl.CERT_OPTIONAL
        elif self.require_client_cert:
            raise InvalidArgumentError("require_client_cert is true without a client_ca; expected its path")
        return context


def client_context(
    ca: str | Path | None = None, cert: str | Path | None = None, key: str | Path | None = None
) -> ssl.SSLContext:
    """Return a context that verifies servers by `ca` (default: the system's) and shows `cert`, if given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the certificate and the name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _load_ca(context, Path(ca))
    if cert is not None:
        _load_chain(context, Path(cert), Path(cert if key is None else key))
    elif key is not None:
        raise InvalidArgumentError("key is given without cert; expected both")
    return context


def _load_chain(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    check_readable("cert", cert)
    check_readable("key", key)
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        raise InvalidArgumentError(f"cert {cert} and key {key} cannot be used: {reason}") from None
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"cert {cert} and key {key} cannot be used: {error}") from None


def _load_ca(context: ssl.SSLContext, ca: Path) -> None:
    check_readable("ca", ca)
    try:
        context.load_verify_locations(cafile=ca)
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise InvalidArgumentError(f"ca {ca} holds no certificates: {reason}") from None


def check_readable(what: str, path: Path) -> None:
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise InvalidArgumentError(f"{what} {path} cannot be read: {error.strerror}") from None


def _no_password() -> str:
    raise ValueError("the key is encrypted; expected one without a passphrase")
