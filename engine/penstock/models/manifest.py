"""model.yaml: what a model bundle says of itself. Its JSON Schema is `model-schema-1.json` beside this file.

Unknown keys, wrong types and names that are not one plain path component are errors: nothing that a bundle
says may point outside its folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from penstock.errors import BundleError, InvalidArgumentError

SCHEMA_VERSION = 1
MANIFEST = "model.yaml"
FileName = Literal["trees.bin", "reference.arrow"]
TREES: Literal["trees.bin"] = "trees.bin"
REFERENCE: Literal["reference.arrow"] = "reference.arrow"
ALIASES = ("champion", "challenger", "previous")
DTYPES = ("float32", "float64", "int64", "bool")
OutputKind = Literal["probability", "margin", "value"]
ClassLabel = bool | int | float | str
_COMPONENT = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_MAX_BYTES = 16 << 20

Component = Annotated[str, Field(pattern=_COMPONENT)]
Text = Annotated[str, Field(min_length=1)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def check_component(field: str, value: str) -> str:
    """Return `value` if it can be a model's name or version. Raises InvalidArgumentError naming `field`."""
    if not isinstance(value, str) or re.fullmatch(_COMPONENT, value) is None or value.endswith("\n"):
        raise InvalidArgumentError(
            f"{field} is {value!r}; expected 1 to 128 letters, digits, '.', '_', '-', the first no sign"
        )
    return value


def check_version(value: str) -> str:
    """Return `value` if it can be a version: a component that is no alias."""
    if check_component("version", value) in ALIASES:
        raise InvalidArgumentError(f"version is {value!r}, which is an alias; expected another name")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputEntry(_Part):
    """One model input, in order."""

    name: Text
    dtype: Literal["float32", "float64", "int64", "bool"]


class OutputEntry(_Part):
    """What the scores are. `classes` are the labels of the outputs, or of 0 and 1 for one probability."""

    kind: OutputKind
    classes: list[ClassLabel]


class FileEntry(_Part):
    """One file of the bundle; size in bytes."""

    sha256: Hash
    size: int = Field(ge=0)


class TrainingEntry(_Part):
    """Facts of the training: times are int64 microseconds UTC."""

    rows: int = Field(ge=1)
    label: Text | None
    time_range_us: Annotated[list[int], Field(min_length=2, max_length=2)] | None
    created_us: int | None
    libraries: dict[str, str]
    facts: dict[str, JsonValue]


class Manifest(_Part):
    """All of model.yaml."""

    schema_version: Literal[1]
    name: Component
    version: Component
    format: Literal["trees"]
    service: Text | None
    fingerprint: Hash | None
    inputs: Annotated[list[InputEntry], Field(min_length=1)]
    output: OutputEntry
    files: dict[FileName, FileEntry]
    training: TrainingEntry
    metrics: dict[str, FiniteFloat]


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of model.yaml."""
    text = yaml.safe_dump(manifest.model_dump(), sort_keys=False, allow_unicode=True)
    return text.encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/model.yaml. Raises BundleError naming the file and its faults."""
    file = folder / MANIFEST
    try:
        data = yaml.safe_load(read_plain(file, _MAX_BYTES))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BundleError(f"{file}: is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{file}: is a {type(data).__name__}; expected a mapping")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{file}: schema_version is {data.get('schema_version')!r}; this build reads {SCHEMA_VERSION}"
        )
    try:
        manifest = Manifest.model_validate(data)
        check_version(manifest.version)
    except ValidationError as error:
        faults = "; ".join(_fault(dict(item)) for item in error.errors(include_url=False))
        raise BundleError(f"{file}: {faults}") from error
    except InvalidArgumentError as error:
        raise BundleError(f"{file}: {error}") from error
    names = [entry.name for entry in manifest.inputs]
    if len(set(names)) != len(names):
        raise BundleError(f"{file}: inputs repeats {next(n for n in names if names.count(n) > 1)!r}")
    for required in get_args(FileName):
        if required not in manifest.files:
            raise BundleError(f"{file}: files lacks {required}")
    if (manifest.service is None) != (manifest.fingerprint is None):
        raise BundleError(f"{file}: service and fingerprint must be given together")
    return manifest


def read_plain(file: Path, max_bytes: int | None = None) -> bytes:
    """The bytes of a regular file, never through a link. Raises BundleError naming it."""
    try:
        if file.is_symlink() or not file.is_file():
            state = "is not a plain file" if file.is_symlink() or file.exists() else "is missing"
            raise BundleError(f"{file}: {state}")
        if max_bytes is not None and file.stat().st_size > max_bytes:
            raise BundleError(f"{file}: has {file.stat().st_size} bytes; expected at most {max_bytes}")
        return file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error}") from error


def _fault(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {where}"
    if item["type"] == "missing":
        return f"{where} is missing"
    return f"{where} is {str(item['input'])[:80]!r}: {item['msg']}"
