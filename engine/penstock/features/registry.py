"""What the feature definitions alone cannot tell, kept on disk: key seed, dictionaries, fits, view numbers.

The registry is a folder of numbered versions. A version is one JSON file with a checksum, written so that it
is whole or absent; the greatest number counts and a few older ones are kept. Fitted distributions lie beside
it in files named after their content. Every change reads the newest version under a lock file, so several
processes may share a registry. Any thread may use a `Registry`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from penstock import diskio
from penstock.errors import StoreError
from penstock.features.program import Distribution

_FORMAT = 1
_KEPT_VERSIONS = 3
_SEED_BYTES = 16


@dataclass(frozen=True)
class Fit:
    """Where a fitted distribution is: its version (1, 2, ...), and the SHA-256 that names its file."""

    version: int
    sha256: str
    samples: int
    fit_until_us: int | None


@dataclass(frozen=True)
class RegistryState:
    """One version of the registry; never changed in place.

    Attributes:
        seed: hex of the 16 random bytes that key the entity hash.
        dictionaries: texts by code, for each source path and column.
        fits: newest fit of each distribution, by its key.
        view_ids: number of each view identity (definition and fits); numbers are never used twice.
        applied: what `apply` recorded of the definitions, by kind and name; None before the first:
            "views", "services": fingerprints; "view_parts": what a view's fingerprint is made of, by part;
            "service_features": ordered features of each service; "dtypes": of each view's features;
            "sources": schema of each source, by its key.
    """

    seed: str
    dictionaries: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    view_ids: dict[str, int] = field(default_factory=dict)
    applied: dict[str, dict[str, Any]] | None = None

    def recorded(self, kind: str) -> dict[str, Any]:
        """One kind of what `apply` recorded; empty where it has not recorded it."""
        return (self.applied or {}).get(kind, {})


class Registry:
    """The registry in a folder.

    Attributes:
        state: the newest version that this object has seen.
        version: its number.
    """

    def __init__(self, path: Path) -> None:
        """Open the registry, or make it with a new key seed.

        Raises:
            StoreError: the folder cannot be written, or the newest version is corrupt.
        """
        self.path = path
        self._lock = threading.Lock()
        self._fitted: dict[str, Distribution] = {}
        self.version = 0
        try:
            diskio.make_folders(path)
        except OSError as error:
            raise StoreError(f"registry '{path}' cannot be made: {error}") from error
        if not self._versions():
            with self._exclusive():
                if not self._versions():
                    self._write(RegistryState(secrets.token_bytes(_SEED_BYTES).hex()))
        self.state = self._read()

    @property
    def seed(self) -> bytes:
        """The 16 bytes of the entity hash's key."""
        return bytes.fromhex(self.state.seed)

    def extend_dictionaries(self, source: str, grown: Mapping[str, Sequence[str]]) -> bool:
        """Record the dictionaries of a source, by column.

        Returns:
            False, and nothing is recorded, where one does not continue what is recorded by now (another
            process gave codes meanwhile): read the source again with the state's dictionaries.
        """
        continues = True

        def change(state: RegistryState) -> RegistryState | None:
            nonlocal continues
            known = state.dictionaries.get(source, {})
            for column, texts in grown.items():
                given = known.get(column, [])
                if given != list(texts[: len(given)]):
                    continues = False
                    return None
            merged = {**known, **{column: list(texts) for column, texts in grown.items()}}
            if merged == known:
                return None
            return _replace(state, dictionaries={**state.dictionaries, source: merged})

        self._update(change)
        return continues

    def record_fits(
        self, fitted: Mapping[str, Distribution], fit_until_us: int | None, *, refit: bool
    ) -> None:
        """Record distributions by key, each as a new version where it differs from the newest one.

        With `refit` false a key that is already recorded stays as it is: another process was first.
        """

        def change(state: RegistryState) -> RegistryState | None:
            fits = dict(state.fits)
            for key, distribution in fitted.items():
                old = fits.get(key)
                if old is not None and not refit:
                    continue
                content = _pack(distribution)
                sha256 = hashlib.sha256(content).hexdigest()
                if old is not None and (old.sha256, old.fit_until_us) == (sha256, fit_until_us):
                    continue
                self._write_file(_fit_name(sha256), content)
                version = 1 if old is None else old.version + 1
                fits[key] = Fit(version, sha256, distribution.cumulative[-1], fit_until_us)
            return None if fits == state.fits else _replace(state, fits=fits)

        self._update(change)

    def distribution(self, key: str) -> Distribution | None:
        """The newest fit of a key; None if there is none.

        Raises:
            StoreError: its file is missing or corrupt.
        """
        fit = self.state.fits.get(key)
        if fit is None:
            return None
        if fit.sha256 not in self._fitted:
            file = self.path / _fit_name(fit.sha256)
            try:
                content = file.read_bytes()
            except OSError as error:
                raise StoreError(f"registry file '{file}' cannot be read: {error}") from error
            if hashlib.sha256(content).hexdigest() != fit.sha256:
                raise StoreError(f"registry file '{file}' is corrupt: its checksum differs")
            self._fitted[fit.sha256] = _unpack(content)
        return self._fitted[fit.sha256]

    def view_id(self, identity: str) -> int:
        """The number of a view identity, 1 or more; a new identity gets the next one."""
        if identity not in self.state.view_ids:
            self._update(
                lambda state: (
                    None
                    if identity in state.view_ids
                    else _replace(
                        state,
                        view_ids={**state.view_ids, identity: max(state.view_ids.values(), default=0) + 1},
                    )
                )
            )
        return self.state.view_ids[identity]

    def record_applied(self, applied: Mapping[str, Mapping[str, Any]]) -> None:
        """Record the definitions in force; see `RegistryState.applied`."""
        made = {kind: dict(by_name) for kind, by_name in applied.items()}
        self._update(lambda state: None if state.applied == made else _replace(state, applied=made))

    def reload(self) -> None:
        """Take over what other processes have written."""
        with self._lock:
            self.state = self._read()

    def _update(self, change: Callable[[RegistryState], RegistryState | None]) -> None:
        """Apply `change` to the newest state; None leaves it. On an error the state stays as it was."""
        with self._lock, self._exclusive():
            state = self._read()
            changed = change(state)
            if changed is not None:
                self._write(changed)
            self.state = changed or state

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        try:
            file = (self.path / "LOCK").open("a")
        except OSError as error:
            raise StoreError(f"registry '{self.path}' cannot be locked: {error}") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            diskio.sweep(self.path)  # what killed writers have left
            yield

    def _versions(self) -> list[int]:
        return sorted(int(p.stem) for p in self.path.glob("*.json") if p.stem.isdigit())

    def _read(self) -> RegistryState:
        # A reader without the lock may lose the race against a writer that removes old versions.
        for _ in range(100):
            versions = self._versions()
            if not versions:
                raise StoreError(f"registry '{self.path}' holds no version")
            file = self.path / _version_name(versions[-1])
            try:
                text = file.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StoreError(f"registry file '{file}' cannot be read: {error}") from error
            state = _parse(text, file)
            self.version = versions[-1]
            return state
        raise StoreError(f"registry '{self.path}' changes too fast to be read")

    def _write(self, state: RegistryState) -> None:
        versions = self._versions()
        number = (versions[-1] if versions else 0) + 1
        body = json.dumps(asdict(state), sort_keys=True)
        checksum = hashlib.sha256(body.encode()).hexdigest()
        text = f'{{"format": {_FORMAT}, "sha256": "{checksum}", "state": {body}}}\n'
        self._write_file(_version_name(number), text.encode())
        self.version = number
        for old in versions[: max(0, len(versions) + 1 - _KEPT_VERSIONS)]:
            (self.path / _version_name(old)).unlink(missing_ok=True)

    def _write_file(self, name: str, content: bytes) -> None:
        target = self.path / name
        try:
            diskio.write_file(target, content)
        except OSError as error:
            raise StoreError(f"registry file '{target}' cannot be written: {error}") from error


def _replace(state: RegistryState, **changes: Any) -> RegistryState:
    return RegistryState(**{**vars(state), **changes})


def _version_name(number: int) -> str:
    return f"{number:08d}.json"


def _fit_name(sha256: str) -> str:
    return f"distribution-{sha256[:32]}.npz"


def _parse(text: bytes, file: Path) -> RegistryState:
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            raise StoreError(f"registry file '{file}' has format {data['format']!r}; expected {_FORMAT}")
        body = json.dumps(data["state"], sort_keys=True)
        if hashlib.sha256(body.encode()).hexdigest() != data["sha256"]:
            raise ValueError("its checksum differs")
        state = RegistryState(**data["state"])
        fits = {key: Fit(**fit) for key, fit in data["state"]["fits"].items()}
        return _replace(state, fits=fits)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"registry file '{file}' is corrupt: {error}") from error


def _pack(distribution: Distribution) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.savez(
        buffer,
        values=np.array(distribution.values, np.float64),
        cumulative=np.array(distribution.cumulative, np.int64),
    )
    return buffer.getvalue()


def _unpack(content: bytes) -> Distribution:
    import numpy as np

    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return Distribution(tuple(arrays["values"].tolist()), tuple(arrays["cumulative"].tolist()))
