"""Model bundles: a folder NAME/VERSION with model.yaml, reference.arrow and the model.

The model is `trees.bin` (our flat arrays), `model.onnx`, or the files of a Python entry point. A bundle is
whole or absent (written aside, synced, renamed) and never changes. Saving scores the training rows with what
will be served, and proves of trees that they give the library's own margins; loading proves every byte.
Loading needs neither treelite nor the library that trained the model, and no backend: `models.backends`
brings one up when the model is scored or served.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from penstock import _core, diskio
from penstock.errors import BundleError, FailedPreconditionError, InvalidArgumentError
from penstock.models import library
from penstock.models.entry_point import EntryPoint
from penstock.models.manifest import (
    DTYPES,
    MANIFEST,
    ONNX,
    REFERENCE,
    TREES,
    ClassLabel,
    DictionaryEntry,
    FileEntry,
    Format,
    InputEntry,
    Manifest,
    OnnxEntry,
    OutputEntry,
    OutputKind,
    PythonEntry,
    TrainingEntry,
    check_component,
    check_version,
    dump_manifest,
    plain_parts,
    read_manifest,
)
from penstock.models.reference import ReferenceDistribution
from penstock.models.rows import as_table, input_dtype, model_rows
from penstock.models.tree_bytes import without_transform

if TYPE_CHECKING:
    import pyarrow as pa

    from penstock.features.plan import ServicePlan

_CHECKED_ROWS = 2048
_ABSOLUTE, _RELATIVE = 1e-5, 1e-6
_TIMESTAMP = "event_timestamp"


@dataclass(frozen=True, eq=False)
class ModelBundle:
    """A verified model version, held in memory; any thread.

    Attributes:
        path: the folder it was read from.
        inputs: (name, dtype) of the model inputs, in order; rows are their float32 casts, NaN for null.
        service: name of the feature service, None on bare vectors; fingerprint: that of its plan (hex);
            text_counts: how many texts its dictionaries had, by source and column (see `ServicePlan.fits`).
        format: "trees", "onnx" or "python"; `onnx` and `python` are the sections of that name.
        output_kind: "probability", "margin" or "value": what the scores are.
        classes: labels of the outputs, or of 0 and 1 for one probability; empty for a value.
        facts: training facts: rows, label, time_range_us, created_us, libraries, and the caller's own.
        trees: the bytes of trees.bin, empty for another format. reference: the training distribution.
        sizes: bytes of each file of the bundle.
    """

    path: Path
    name: str
    version: str
    inputs: tuple[tuple[str, str], ...]
    service: str | None
    output_kind: OutputKind
    classes: tuple[ClassLabel, ...]
    fingerprint: str | None
    metrics: Mapping[str, float]
    facts: Mapping[str, Any]
    trees: bytes = field(repr=False)
    reference: ReferenceDistribution = field(repr=False)
    format: Format = "trees"
    sizes: Mapping[str, int] = field(default_factory=dict, repr=False)
    onnx: OnnxEntry | None = None
    python: PythonEntry | None = None
    text_counts: Mapping[tuple[str, str], int] | None = None

    @cached_property
    def _ensemble(self) -> _core.TreeEnsemble:
        return _core.TreeEnsemble(self.trees)

    def ensemble(self) -> _core.TreeEnsemble:
        """The forest; its `predict` gives scores of `output_kind`, float64 [n, outputs]."""
        if self.format != "trees":
            raise FailedPreconditionError(
                f"model '{self.name}' is of format '{self.format}'; it has no forest"
            )
        return self._ensemble

    @property
    def n_outputs(self) -> int:
        """Scores of a row."""
        entry = self.onnx or self.python
        if entry is None:
            return self._ensemble.n_outputs
        return entry.width if entry.column is None else 1

    @property
    def size(self) -> int:
        """Bytes of the model's files, without the reference distribution."""
        return sum(size for name, size in self.sizes.items() if name != REFERENCE)


def save_bundle(
    model: Any,
    training_df: Any,
    *,
    name: str,
    directory: str | Path,
    version: str | None = None,
    inputs: Sequence[str] | None = None,
    label: str | None = None,
    plan: ServicePlan | None = None,
    kind: OutputKind = "probability",
    metrics: Mapping[str, float] | None = None,
    facts: Mapping[str, Any] | None = None,
    timestamp: str | None = None,
    created_us: int | None = None,
    output: str | None = None,
    classes: Sequence[ClassLabel] | None = None,
) -> ModelBundle:
    """Publish a fitted model as `directory`/NAME/VERSION, whole or absent, and return it as loaded back.

    Args:
        model: a fitted model of lightgbm, xgboost or sklearn.ensemble; an ONNX model (a ModelProto, its
            bytes, or the path of its file) with one float32 [n, inputs] input; or an `EntryPoint`.
        training_df: pandas, Arrow or polars table of the training rows.
        version: default: one more than the greatest integer version in `directory`/NAME.
        inputs: columns in model order. Default: the plan's outputs, else all columns but the label.
        plan: the feature service that makes the rows when served; None for bare vectors.
        kind: what the scores are; "value" for a regression.
        facts: plain JSON values of the caller's own.
        timestamp: column that gives the time range; default "event_timestamp" if there is one.
        created_us: creation time, microseconds UTC.
        output: name of the ONNX output that holds the scores; may be left out if just one can.
        classes: labels of an ONNX model or an entry point; default 0, 1, ... . Of probabilities of two
            classes, [n, 2], the second is served.

    Raises:
        InvalidArgumentError: an argument is wrong, the model is not supported, or our scores of the training
            rows are not the library's (1e-5 + 1e-6 of the margin).
        FailedPreconditionError: onnxruntime is not installed; the entry point's process does not start.
        FailedPreconditionError: the version is there.
        OSError: the disk failed; nothing is published.
    """
    check_component("name", name)
    if kind not in get_args(OutputKind):
        raise InvalidArgumentError(f"kind is {kind!r}; expected one of {', '.join(get_args(OutputKind))}")
    home = Path(directory) / name
    version = _next_version(home) if version is None else check_version(version)
    if (home / version).exists():
        raise FailedPreconditionError(f"{home / version} is there; a version never changes")
    table = as_table(training_df, "training_df")
    names, dtypes = _inputs(table, inputs, label, plan)
    rows = model_rows(table, names, "training_df")
    if not len(rows):
        raise InvalidArgumentError("training_df has no rows; expected at least 1")
    made = _made_of(model, names, rows, kind, output, classes)
    scores = made.scores
    if not np.isfinite(scores).all():
        bad = int(np.argmax(~np.isfinite(scores).all(axis=1)))
        raise InvalidArgumentError(
            f"model gives training row {bad} no finite score of kind {kind!r}: {scores[bad].tolist()}"
        )
    if kind == "probability" and not ((scores >= 0) & (scores <= 1)).all():
        raise InvalidArgumentError(
            f"kind is 'probability' but the model scores {scores.min():g} to {scores.max():g}; "
            "expected kind='value' or kind='margin'"
        )
    reference = ReferenceDistribution.capture(names, rows, np.ascontiguousarray(scores[:, 0]))
    files = {**made.files, REFERENCE: _arrow_bytes(reference.to_arrow())}
    try:
        manifest = Manifest(
            schema_version=1,
            name=name,
            version=version,
            format=made.format,
            service=None if plan is None else plan.name,
            fingerprint=None if plan is None else plan.fingerprint,
            inputs=[InputEntry.model_validate({"name": n, "dtype": d}) for n, d in zip(names, dtypes)],
            output=OutputEntry(kind=kind, classes=made.classes),
            files={
                file: FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
                for file, data in files.items()
            },
            training=TrainingEntry(
                rows=len(rows),
                label=label,
                time_range_us=_time_range(table, timestamp),
                created_us=created_us,
                libraries=made.libraries,
                facts=dict(facts or {}),
            ),
            metrics={key: float(value) for key, value in (metrics or {}).items()},
            onnx=made.onnx,
            python=made.python,
            dictionaries=None if plan is None else _dictionaries(plan),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidArgumentError(f"{where} is {first['input']!r}: {first['msg']}") from error
    with diskio.new_folder(home / version) as temporary:
        for file, data in files.items():
            diskio.write_below(temporary, file, data)
        diskio.write_synced(temporary / MANIFEST, dump_manifest(manifest))
        saved = load_bundle(temporary)
        if made.source is not None:
            _prove(saved, made.source, rows)
    return load_bundle(home / version)


def _dictionaries(plan: ServicePlan) -> list[DictionaryEntry] | None:
    """None where no code of a text reaches the model."""
    counts = sorted(plan.text_counts.items())
    return [DictionaryEntry(source=s, column=c, texts=count) for (s, c), count in counts] or None


def load_bundle(path: str | Path) -> ModelBundle:
    """Read and verify the bundle in folder `path`. Raises BundleError naming the file and its fault."""
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"{folder}: is no folder; expected a model bundle")
    manifest = read_manifest(folder)
    data: dict[str, bytes] = {}
    for file, entry in manifest.files.items():
        size, digest = 0, hashlib.sha256()
        kept: list[bytes] | None = [] if file in (TREES, REFERENCE) else None
        for part in plain_parts(folder, file):
            size += len(part)
            digest.update(part)
            if kept is not None:
                kept.append(part)
        if size != entry.size:
            raise BundleError(f"{folder / file}: has {size} bytes; model.yaml says {entry.size}")
        if digest.hexdigest() != entry.sha256:
            raise BundleError(f"{folder / file}: its sha256 is not the one in model.yaml")
        if kept is not None:
            data[file] = b"".join(kept)
    inputs = tuple((entry.name, entry.dtype) for entry in manifest.inputs)
    reference = _read_reference(folder / REFERENCE, data[REFERENCE])
    if reference.names != tuple(name for name, _ in inputs):
        raise BundleError(f"{folder / REFERENCE}: its features are not the inputs of model.yaml, in order")
    training = manifest.training.model_dump()
    bundle = ModelBundle(
        path=folder,
        name=manifest.name,
        version=manifest.version,
        inputs=inputs,
        service=manifest.service,
        output_kind=manifest.output.kind,
        classes=tuple(manifest.output.classes),
        fingerprint=manifest.fingerprint,
        metrics=manifest.metrics,
        facts={**training.pop("facts"), **training},
        trees=data.get(TREES, b"") if manifest.format == "trees" else b"",
        reference=reference,
        format=manifest.format,
        sizes={file: entry.size for file, entry in manifest.files.items()},
        onnx=manifest.onnx,
        python=manifest.python,
        text_counts=manifest.text_counts,
    )
    if bundle.format != "trees":
        _check_classes(bundle)
        return bundle
    try:
        ensemble = bundle.ensemble()
    except ValueError as error:
        raise BundleError(f"{folder / TREES}: {error}") from error
    if ensemble.n_features != len(inputs):
        raise BundleError(
            f"{folder / TREES}: has {ensemble.n_features} features; model.yaml has {len(inputs)} inputs"
        )
    _check_classes(bundle)
    return bundle


def _check_classes(bundle: ModelBundle) -> None:
    outputs = bundle.n_outputs
    if len(bundle.classes) not in ({0, outputs} if outputs > 1 else {0, 2}):
        raise BundleError(
            f"{bundle.path / MANIFEST}: output.classes has {len(bundle.classes)} labels; "
            f"the model has {outputs} outputs"
        )


def score(bundle: ModelBundle, table: Any) -> NDArray[np.float64]:
    """Scores of `table`: float64 [n], or [n, outputs] of a model with several outputs.

    `table` is pandas, Arrow or polars with the bundle's inputs among its columns, or float32 rows [n, F].
    An entry point runs in a process of its own for the call. A row without a finite score of the output's
    kind gets NaN. Raises InvalidArgumentError naming a column that is missing or no number,
    FailedPreconditionError where the backend is not there, InternalError where the model itself fails.
    """
    if isinstance(table, np.ndarray):
        rows = table
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != len(bundle.inputs):
            raise InvalidArgumentError(
                f"table is {rows.dtype} {list(rows.shape)}; expected float32 [n, {len(bundle.inputs)}]"
            )
        rows = np.ascontiguousarray(rows)
    else:
        rows = model_rows(as_table(table), [name for name, _ in bundle.inputs])
    if bundle.format == "trees":
        out = bundle.ensemble().predict(rows)
    else:
        from penstock.models.backends import predict_offline

        out = predict_offline(bundle, rows)
    return np.ascontiguousarray(out[:, 0]) if out.shape[1] == 1 else out


@dataclass(frozen=True)
class _Made:
    """What a bundle will hold of a model, and its scores of the training rows, float64 [n, outputs]."""

    format: Format
    files: dict[str, bytes]
    scores: NDArray[np.float64]
    classes: list[ClassLabel]
    libraries: dict[str, str]
    onnx: OnnxEntry | None = None
    python: PythonEntry | None = None
    source: Any = None  # the library's model that trees must agree with


def _made_of(
    model: Any,
    names: list[str],
    rows: NDArray[np.float32],
    kind: OutputKind,
    output: str | None,
    classes: Sequence[ClassLabel] | None,
) -> _Made:
    from penstock.models import backends, onnx_backend

    if output is not None and not onnx_backend.is_onnx(model):
        raise InvalidArgumentError(f"output is {output!r}, but the model is no ONNX model")
    if onnx_backend.is_onnx(model):
        data = onnx_backend.model_bytes(model)
        onnx = onnx_backend.inspect(data, len(names), rows, kind, output)
        scores = onnx_backend.predict(data, onnx, len(names), kind == "probability", rows)
        labels = _labels(classes, kind, scores.shape[1])
        return _Made("onnx", {ONNX: data}, scores, labels, onnx_backend.versions(), onnx=onnx)
    if isinstance(model, EntryPoint):
        files, python, scores = backends.run_entry_point(model, len(names), kind, rows)
        labels = _labels(classes, kind, scores.shape[1])
        return _Made("python", files, scores, labels, library.own_versions(), python=python)
    if classes is not None:
        raise InvalidArgumentError("classes is given, but the model knows its own")
    source = library.served_form(model)
    library.check_names(source, names)
    trees = library.to_trees(source)
    if kind == "margin":
        trees = without_transform(trees)
    ensemble = _core.TreeEnsemble(trees)
    if ensemble.n_features != len(names):
        raise InvalidArgumentError(
            f"model was trained on {ensemble.n_features} inputs; got {len(names)}: {names}"
        )
    labels = library.class_labels(model, kind, ensemble.n_outputs)
    return _Made(
        "trees", {TREES: trees}, ensemble.predict(rows), labels, library.versions_of(model), source=source
    )


def _labels(given: Sequence[ClassLabel] | None, kind: OutputKind, n_outputs: int) -> list[ClassLabel]:
    if given is None:
        return list(range(n_outputs)) if n_outputs > 1 else [0, 1] if kind == "probability" else []
    labels = [label.item() if isinstance(label, np.generic) else label for label in given]
    expected = n_outputs if n_outputs > 1 else 2
    if len(labels) not in (0, expected):
        raise InvalidArgumentError(
            f"classes has {len(labels)} labels; expected {expected} of a model with {n_outputs} outputs"
        )
    return labels


def _next_version(home: Path) -> str:
    found = [int(entry.name) for entry in home.iterdir() if entry.name.isdecimal()] if home.is_dir() else []
    return str(max(found, default=0) + 1)


def _inputs(
    table: pa.Table, inputs: Sequence[str] | None, label: str | None, plan: ServicePlan | None
) -> tuple[list[str], list[str]]:
    """Names and dtypes of the model inputs; the plan's outputs, where there is one, in their order."""
    if label is not None and label not in table.column_names:
        raise InvalidArgumentError(f"label is {label!r}; training_df has {table.column_names}")
    if isinstance(inputs, str):
        raise InvalidArgumentError(f"inputs is {inputs!r}; expected a list of column names")
    if plan is not None:
        names = list(plan.output_names)
        if inputs is not None and list(inputs) != names:
            raise InvalidArgumentError(
                f"inputs is {list(inputs)}; service {plan.name!r} gives {names}, in that order"
            )
        for name, dtype in zip(names, plan.output_dtypes):
            if dtype not in DTYPES:
                raise InvalidArgumentError(
                    f"feature {name!r} of service {plan.name!r} is {dtype}; a model input is one of "
                    + ", ".join(DTYPES)
                )
            input_dtype(table, name, "training_df")
        dtypes = list(plan.output_dtypes)
    else:
        names = [n for n in table.column_names if n != label] if inputs is None else list(inputs)
        dtypes = [input_dtype(table, name, "training_df") for name in names]
    if not names:
        raise InvalidArgumentError("inputs is empty; expected at least 1 column")
    if len(set(names)) != len(names):
        raise InvalidArgumentError(f"inputs repeats {next(n for n in names if names.count(n) > 1)!r}")
    if label in names:
        raise InvalidArgumentError(f"inputs has the label {label!r}")
    return names, dtypes


def _time_range(table: pa.Table, timestamp: str | None) -> list[int] | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    name = _TIMESTAMP if timestamp is None else timestamp
    if name not in table.column_names:
        if timestamp is None:
            return None
        raise InvalidArgumentError(f"timestamp is {timestamp!r}; training_df has {table.column_names}")
    column = table[name]
    if not pa.types.is_timestamp(column.type):
        if timestamp is None:
            return None
        raise InvalidArgumentError(f"timestamp column {name!r} is {column.type}; expected a timestamp")
    range_ = pc.min_max(column.cast(pa.timestamp("us", column.type.tz), safe=False).cast(pa.int64()))
    first, last = range_["min"].as_py(), range_["max"].as_py()
    return None if first is None else [first, last]


def _arrow_bytes(table: pa.Table) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _read_reference(file: Path, data: bytes) -> ReferenceDistribution:
    import pyarrow as pa

    try:
        return ReferenceDistribution.from_arrow(pa.ipc.open_file(pa.py_buffer(data)).read_all())
    except (pa.ArrowException, InvalidArgumentError, OSError) as error:
        raise BundleError(f"{file}: {error}") from error


def _prove(bundle: ModelBundle, source: Any, rows: NDArray[np.float32]) -> None:
    """Raises InvalidArgumentError unless our margins of a sample of rows are the library's."""
    picked = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _CHECKED_ROWS)).astype(np.int64))
    sample = np.ascontiguousarray(rows[picked])
    ours, theirs = bundle.ensemble().predict_margin(sample), library.margins(source, sample)
    if ours.shape != theirs.shape:
        raise InvalidArgumentError(f"model gives {theirs.shape[1]} outputs; its trees give {ours.shape[1]}")
    far = ~(np.abs(ours - theirs) <= _ABSOLUTE + _RELATIVE * np.abs(theirs))
    if far.any():
        row, output = np.argwhere(far)[0]
        raise InvalidArgumentError(
            f"our margin of training row {picked[row]} is {ours[row, output]:.9g}, the library's is "
            f"{theirs[row, output]:.9g} ({far.any(axis=1).sum()} of {len(sample)} rows differ); not published"
        )
