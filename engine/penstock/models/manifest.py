"""model.yaml: what a model bundle says of itself. Its JSON Schema is `model-schema-1.json` beside this file.

Unknown keys, wrong types and names that are not one plain path component are errors: nothing that a bundle
says may point outside its folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from penstock.errors import BundleError, InvalidArgumentError

SCHEMA_VERSION = 1
MANIFEST = "model.yaml"
TREES, ONNX, REFERENCE = "trees.bin", "model.onnx", "reference.arrow"
ALIASES = ("champion", "challenger", "previous")
DTYPES = ("float32", "float64", "int64", "bool")
OutputKind = Literal["probability", "margin", "value"]
Format = Literal["trees", "onnx", "python"]
ClassLabel = bool | int | float | str
_COMPONENT = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
# A file of a bundle: a plain path below its folder.
_FILE = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}){0,7}$"
_ENTRY_POINT = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*){0,7}:[A-Za-z_][A-Za-z0-9_]*$"
_MAX_BYTES = 16 << 20
_PART_BYTES = 4 << 20
MAX_FILES = 1000
MAX_WIDTH = 4096

Component = Annotated[str, Field(pattern=_COMPONENT)]
FileName = Annotated[str, Field(pattern=_FILE)]
EntryName = Annotated[str, Field(pattern=_ENTRY_POINT)]
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


class DictionaryEntry(_Part):
    """How many texts the dictionary of a source's column had, of those whose codes reach the model."""

    source: Text
    column: Text
    texts: int = Field(ge=0)


class TrainingEntry(_Part):
    """Facts of the training: times are int64 microseconds UTC."""

    rows: int = Field(ge=1)
    label: Text | None
    time_range_us: Annotated[list[int], Field(min_length=2, max_length=2)] | None
    created_us: int | None
    libraries: dict[str, str]
    facts: dict[str, JsonValue]


class BackendEntry(_Part):
    """What a model that is no trees gives: scores of `width` columns; `column` is served; None: all."""

    width: int = Field(ge=1, le=MAX_WIDTH)
    column: int | None = Field(ge=0)


class OnnxEntry(BackendEntry):
    """model.onnx: `input` takes float32 [n, inputs]; `output` gives `dtype` [n] (rank 1) or [n, width]."""

    input: Text
    output: Text
    rank: Literal[1, 2]
    dtype: Literal["float32", "float64"]


class PythonEntry(BackendEntry):
    """`entry_point` "module:factory"; the module is among the bundle's files."""

    entry_point: EntryName


class Manifest(_Part):
    """All of model.yaml. `onnx` and `python` are there for that format alone.

    `dictionaries` is there where codes of texts reach the model. Without it, as in bundles of earlier builds,
    a dictionary that has grown is another one.
    """

    schema_version: Literal[1]
    name: Component
    version: Component
    format: Format
    service: Text | None
    fingerprint: Hash | None
    inputs: Annotated[list[InputEntry], Field(min_length=1)]
    output: OutputEntry
    files: dict[FileName, FileEntry]
    training: TrainingEntry
    metrics: dict[str, FiniteFloat]
    onnx: OnnxEntry | None = None
    python: PythonEntry | None = None
    dictionaries: Annotated[list[DictionaryEntry], Field(min_length=1)] | None = None

    @property
    def text_counts(self) -> dict[tuple[str, str], int] | None:
        """`dictionaries` by source and column."""
        if self.dictionaries is None:
            return None
        return {(entry.source, entry.column): entry.texts for entry in self.dictionaries}


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of model.yaml."""
    plain = manifest.model_dump()
    for section in ("onnx", "python", "dictionaries"):
        if plain[section] is None:
            del plain[section]
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
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
    try:
        _check_format(manifest)
    except InvalidArgumentError as error:
        raise BundleError(f"{file}: {error}") from error
    if (manifest.service is None) != (manifest.fingerprint is None):
        raise BundleError(f"{file}: service and fingerprint must be given together")
    if manifest.dictionaries is not None:
        if manifest.service is None:
            raise BundleError(f"{file}: dictionaries is there without a service")
        if len(manifest.text_counts or {}) != len(manifest.dictionaries):
            raise BundleError(f"{file}: dictionaries repeats a column of a source")
    return manifest


def code_files(manifest: Manifest) -> list[str]:
    """The files of a Python entry point: all but the reference distribution."""
    return [name for name in manifest.files if name != REFERENCE]


def entry_file(entry_point: str, files: Iterable[str]) -> str:
    """The file of the module of `entry_point` among `files`. Raises InvalidArgumentError."""
    if re.fullmatch(_ENTRY_POINT, entry_point) is None or entry_point.endswith("\n"):
        raise InvalidArgumentError(f'entry_point is {entry_point!r}; expected "module:factory"')
    path = entry_point.partition(":")[0].replace(".", "/")
    known = set(files)
    for found in (f"{path}.py", f"{path}/__init__.py"):
        if found in known:
            return found
    raise InvalidArgumentError(f"entry_point is {entry_point!r}, but there is no file {path}.py")


def check_files(names: Iterable[str]) -> None:
    """Raises InvalidArgumentError for a name that no file of a bundle may have."""
    for name in names:
        if re.fullmatch(_FILE, name) is None or name.endswith("\n"):
            raise InvalidArgumentError(
                f"file {name!r} cannot be in a bundle; expected parts of letters, digits, '.', '_', '-'"
            )


def _check_format(manifest: Manifest) -> None:
    """Raises InvalidArgumentError where the files and sections are not those of the format."""
    check_files(manifest.files)
    for section in ("onnx", "python"):
        if (getattr(manifest, section) is not None) != (manifest.format == section):
            state = "lacks" if manifest.format == section else "has"
            raise InvalidArgumentError(
                f"format is {manifest.format!r}, but the file {state} section {section}"
            )
    if MANIFEST in manifest.files:
        raise InvalidArgumentError(f"files has {MANIFEST}")
    required = {REFERENCE} | {"trees": {TREES}, "onnx": {ONNX}, "python": set()}[manifest.format]
    for name in sorted(required - set(manifest.files)):
        raise InvalidArgumentError(f"files lacks {name}")
    if manifest.python is None:
        for name in sorted(set(manifest.files) - required):
            raise InvalidArgumentError(f"files has {name}, which is none of {', '.join(sorted(required))}")
    else:
        if len(manifest.files) > MAX_FILES:
            raise InvalidArgumentError(f"files has {len(manifest.files)} names; expected at most {MAX_FILES}")
        entry_file(manifest.python.entry_point, manifest.files)
    entry = manifest.onnx or manifest.python
    if entry is not None and entry.column is not None and entry.column >= entry.width:
        raise InvalidArgumentError(f"column is {entry.column}; expected one of {entry.width}")


def read_plain(file: Path, max_bytes: int | None = None) -> bytes:
    """The bytes of a regular file, never through a link. Raises BundleError naming it."""
    return b"".join(plain_parts(file.parent, file.name, max_bytes))


def plain_parts(folder: Path, name: str, max_bytes: int | None = None) -> Iterator[bytes]:
    """As `read_plain` of `folder`/`name`, in parts; nor is a folder of `name` a link."""
    file = folder / name
    try:
        between = [folder.joinpath(*Path(name).parts[:i]) for i in range(1, len(Path(name).parts))]
        if file.is_symlink() or not file.is_file() or any(step.is_symlink() for step in between):
            state = "is not a plain file" if file.is_symlink() or file.exists() else "is missing"
            raise BundleError(f"{file}: {state}")
        if max_bytes is not None and file.stat().st_size > max_bytes:
            raise BundleError(f"{file}: has {file.stat().st_size} bytes; expected at most {max_bytes}")
        with file.open("rb") as source:
            while part := source.read(_PART_BYTES):
                yield part
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error}") from error


def _fault(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {where}"
    if item["type"] == "missing":
        return f"{where} is missing"
    return f"{where} is {str(item['input'])[:80]!r}: {item['msg']}"
