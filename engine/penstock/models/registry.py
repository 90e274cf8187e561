"""The model registry: verified copies of bundles under `models_dir`, and who is champion, in one state file.

A version exists once the state file names it, so every change is one atomic, durable replacement of it.
Writers take a file lock; readers need none and see the state before or after a change, in any process.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from penstock import diskio
from penstock.errors import BundleError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from penstock.models.bundle import ModelBundle, load_bundle
from penstock.models.manifest import (
    ALIASES,
    MANIFEST,
    Component,
    Manifest,
    check_component,
    plain_parts,
    read_manifest,
)

_PREFIX = ".adding-"


@dataclass(frozen=True)
class Trial:
    """A version on trial beside the champion: a "canary" answers `share` (0 to 1) of the sticky keys, a
    "shadow" scores them unseen.
    """

    version: str
    mode: Literal["canary", "shadow"]
    share: float


@dataclass(frozen=True)
class ModelInfo:
    """A registered version, and its trial while it is on one.

    `fault` says why it cannot be read; then only name, version, aliases and trial hold.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    service: str | None = None
    format: str | None = None
    output_kind: str | None = None
    n_inputs: int = 0
    created_us: int | None = None
    metrics: dict[str, float] | None = None
    fault: str | None = None
    trial: Trial | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "aliases": list(self.aliases)}


class _Trial(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Component
    mode: Literal["canary", "shadow"]
    share: Annotated[float, Field(gt=0, le=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    versions: list[Component] = []
    champion: Component | None = None
    challenger: Component | None = None
    previous: Component | None = None
    trial: _Trial | None = None


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["penstock.models"] = "penstock.models"
    schema_version: Literal[1] = 1
    models: dict[Component, _Entry] = {}


class ModelRegistry:
    """Models of one data directory. Any thread, any process; opening it writes nothing.

    Errors: NotFoundError for an unknown model or version, BundleError for a bundle that is not whole,
    FailedPreconditionError for a corrupt state file, OSError from the disk; the state is then unchanged.
    """

    def __init__(self, models_dir: str | Path, state_dir: str | Path) -> None:
        self._models, self._state_dir = Path(models_dir), Path(state_dir)
        self._file = self._state_dir / "models.json"

    def list(self) -> list[ModelInfo]:
        """Every version, by name and then in the order in which they were added."""
        models = self._read().models
        return [
            self._info(name, version, entry)
            for name, entry in sorted(models.items())
            for version in entry.versions
        ]

    def add(self, path: str | Path) -> ModelInfo:
        """Copy the bundle at `path` in. The first version becomes the champion, a later one the challenger.

        Adding the same bundle again changes nothing. Raises FailedPreconditionError if the version is there
        with other content.
        """
        source = load_bundle(path)
        name, version, manifest = source.name, source.version, read_manifest(source.path)
        target = self._models / name / version
        with self._writing():
            if target.exists():
                load_bundle(target)
                if read_manifest(target) != manifest:
                    raise FailedPreconditionError(
                        f"version '{version}' of model '{name}' is in {target} with other content than "
                        f"{source.path}; save the bundle under another version"
                    )
            else:
                self._copy(source.path, manifest, target)
            state = self._read()
            entry = state.models.setdefault(name, _Entry())
            if version not in entry.versions:
                entry.versions.append(version)
                if entry.champion is None:
                    entry.champion = version
                else:
                    entry.challenger = version
                self._write(state)
            return self._info(name, version, entry)

    def get(self, name: str, version_or_alias: str = "champion") -> ModelBundle:
        """Load and verify a version, by its name or as "champion", "challenger" or "previous"."""
        return self._load(name, self._entry(self._read(), name), version_or_alias)

    def aliases(self, name: str) -> dict[str, str]:
        """Alias to version, those that are set."""
        entry = self._entry(self._read(), name)
        found = {alias: getattr(entry, alias) for alias in ALIASES}
        return {alias: version for alias, version in found.items() if version is not None}

    def promote(self, name: str, version: str | None = None) -> str:
        """Make `version` (a version or an alias; default: the challenger) the champion; returns the version.

        The champion before it is kept as "previous". A trial compares with the champion: a new one ends it.
        Promoting the champion changes nothing.
        """
        self.aliases(name)
        with self._writing():
            state = self._read()
            entry = self._entry(state, name)
            chosen = self._load(name, entry, "challenger" if version is None else version).version
            if chosen != entry.champion:
                entry.previous, entry.champion, entry.trial = entry.champion, chosen, None
                if entry.challenger == chosen:
                    entry.challenger = None
                self._write(state)
            return chosen

    def rollback(self, name: str) -> str:
        """Swap the champion and the one before it; returns the version that is champion now."""
        self.aliases(name)
        with self._writing():
            state = self._read()
            entry = self._entry(state, name)
            chosen = self._load(name, entry, "previous").version
            entry.previous, entry.champion, entry.trial = entry.champion, chosen, None
            if entry.challenger == chosen:
                entry.challenger = None
            self._write(state)
            return chosen

    def trial(self, name: str) -> Trial | None:
        """The trial of `name` that is on, if any."""
        found = self._entry(self._read(), name).trial
        return None if found is None else Trial(found.version, found.mode, found.share)

    def set_trial(self, name: str, trial: Trial | None) -> None:
        """Put a version on trial in place of the one that is (None: end it).

        Raises FailedPreconditionError if it is the champion, InvalidArgumentError for a share that is not
        more than 0 and at most 1.
        """
        if trial is not None and not 0 < trial.share <= 1:
            raise InvalidArgumentError(f"share is {trial.share}; expected more than 0, at most 1")
        self.aliases(name)
        with self._writing():
            state = self._read()
            entry = self._entry(state, name)
            new = None
            if trial is not None:
                if self._load(name, entry, trial.version).version == entry.champion:
                    raise FailedPreconditionError(
                        f"version '{entry.champion}' of model '{name}' is the champion; expected another one"
                    )
                new = _Trial(version=trial.version, mode=trial.mode, share=trial.share)
            if new != entry.trial:
                entry.trial = new
                self._write(state)

    def _entry(self, state: _State, name: str) -> _Entry:
        entry = state.models.get(name)
        if entry is None:
            known = ", ".join(sorted(state.models)) or "there is none"
            raise NotFoundError(f"model {name!r} is unknown; expected one of: {known}")
        return entry

    def _load(self, name: str, entry: _Entry, version_or_alias: str) -> ModelBundle:
        version = version_or_alias
        if version_or_alias in ALIASES:
            found = getattr(entry, version_or_alias)
            if found is None:
                raise FailedPreconditionError(f"model '{name}' has no {version_or_alias}")
            version = found
        if version not in entry.versions:
            raise NotFoundError(
                f"model '{name}' has no version {version!r}; expected one of: {', '.join(entry.versions)}"
            )
        bundle = load_bundle(self._models / name / version)
        if (bundle.name, bundle.version) != (name, version):
            raise BundleError(
                f"{bundle.path / MANIFEST}: is version '{bundle.version}' of model '{bundle.name}'; "
                f"expected '{version}' of '{name}'"
            )
        return bundle

    def _info(self, name: str, version: str, entry: _Entry) -> ModelInfo:
        aliases = tuple(alias for alias in ALIASES if getattr(entry, alias) == version)
        trial = None
        if entry.trial is not None and entry.trial.version == version:
            trial = Trial(version, entry.trial.mode, entry.trial.share)
        try:
            manifest = read_manifest(self._models / name / version)
        except BundleError as error:
            return ModelInfo(name, version, aliases, fault=str(error), trial=trial)
        return ModelInfo(
            name,
            version,
            aliases,
            service=manifest.service,
            format=manifest.format,
            output_kind=manifest.output.kind,
            n_inputs=len(manifest.inputs),
            created_us=manifest.training.created_us,
            metrics=dict(manifest.metrics),
            trial=trial,
        )

    def _copy(self, source: Path, manifest: Manifest, target: Path) -> None:
        diskio.make_folders(target.parent)
        diskio.sweep(target.parent, _PREFIX)
        with diskio.new_folder(target, _PREFIX) as temporary:
            for file in (*manifest.files, MANIFEST):
                diskio.write_below(temporary, file, b"".join(plain_parts(source, file)))
            load_bundle(temporary)
            if read_manifest(temporary) != manifest:
                raise BundleError(f"{source}: changed while it was copied")

    def _read(self) -> _State:
        try:
            data = self._file.read_bytes()
        except FileNotFoundError:
            return _State()
        try:
            state = _State.model_validate_json(data)
            for name, entry in state.models.items():
                check_component("model", name)
                named = {getattr(entry, alias) for alias in ALIASES}
                named.add(None if entry.trial is None else entry.trial.version)
                unknown = named - {None, *entry.versions}
                if unknown:
                    raise FailedPreconditionError(f"{self._file}: model '{name}' has no {sorted(unknown)}")
        except ValidationError as error:
            raise FailedPreconditionError(f"{self._file}: is corrupt: {error}") from error
        return state

    def _write(self, state: _State) -> None:
        diskio.write_file(self._file, state.model_dump_json(indent=1).encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, over all processes; the lock dies with its holder."""
        diskio.make_folders(self._state_dir)
        fd = os.open(self._state_dir / "models.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            diskio.sweep(self._state_dir)
            yield
        finally:
            os.close(fd)
