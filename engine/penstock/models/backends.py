"""What scores a bundle that is loaded: trees in C++, onnxruntime, or a Python entry point.

`open_backend` brings one up for serving: `Backend.model` is what a lane runs. `predict_offline` scores any
number of rows with the same code, on no lane.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penstock import _core
from penstock.errors import BundleError, FailedPreconditionError, InvalidArgumentError
from penstock.models import onnx_backend
from penstock.models.child import ChildProcess, ChildSettings, ChildSpec
from penstock.models.entry_point import MAX_ROWS, EntryPoint, make_model, scores_of, text_of, warm_up
from penstock.models.manifest import (
    MANIFEST,
    MAX_FILES,
    ONNX,
    REFERENCE,
    OutputKind,
    PythonEntry,
    check_files,
    entry_file,
    read_plain,
)

if TYPE_CHECKING:
    from penstock.models.bundle import ModelBundle

_log = logging.getLogger("penstock.models")
# Of a file's size: trees lie in memory as the file, as the ensemble's arrays and as its working memory; a
# session holds the model's weights, the plan that it made of them and an arena for what lies between.
TREES_FACTOR = 3
ONNX_FACTOR = 4


@dataclass
class Backend:
    """A loaded model. `close` ends what runs outside of it; idempotent, after the lane has stopped.

    `bytes_now()`: what it takes of memory, bytes: an estimate from the file's size for trees and onnx, the
    resident memory of the process for one that runs in its own.
    """

    model: bytes | onnx_backend.Runnable
    bytes_now: Callable[[], int]
    close: Callable[[], None] = field(default=lambda: None)
    process: ChildProcess | None = None


def expected_bytes(bundle: ModelBundle) -> int:
    """What the model will take of memory at least, known before it is loaded."""
    factor = {"trees": TREES_FACTOR, "onnx": ONNX_FACTOR, "python": 1}[bundle.format]
    return factor * bundle.size


def open_backend(
    bundle: ModelBundle,
    *,
    threads: int = 1,
    isolation: str = "process",
    settings: ChildSettings | None = None,
) -> Backend:
    """Bring the bundle's model up, ready to run.

    Raises BundleError for a bundle whose files do not fit each other, FailedPreconditionError where the
    backend is not there or its process does not become ready.
    """
    if bundle.format == "trees":
        return Backend(bundle.trees, lambda: expected_bytes(bundle))
    probability = bundle.output_kind == "probability"
    if bundle.onnx is not None:
        what = f"model '{bundle.name}' version {bundle.version}"
        try:
            opened = onnx_backend.open_session(
                read_plain(bundle.path / ONNX),
                bundle.onnx,
                len(bundle.inputs),
                probability,
                threads=threads,
                what=what,
            )
        except InvalidArgumentError as error:
            raise BundleError(f"{bundle.path / ONNX}: {error}") from error
        return Backend(opened, lambda: expected_bytes(bundle))
    if isolation == "thread":
        return Backend(_in_thread(bundle), lambda: expected_bytes(bundle))
    child = ChildProcess(_spec(bundle), settings or ChildSettings())
    return Backend(child.channel, child.resident_bytes, child.close, child)


def predict_offline(bundle: ModelBundle, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scores float64 [n, outputs] of float32 rows [n, F]."""
    backend = open_backend(bundle, settings=ChildSettings(run_timeout=3600.0))
    try:
        assert not isinstance(backend.model, bytes)
        return onnx_backend.run_all(backend.model, rows)
    finally:
        backend.close()


def run_entry_point(
    given: EntryPoint, n_features: int, kind: OutputKind, rows: NDArray[np.float32]
) -> tuple[dict[str, bytes], PythonEntry, NDArray[np.float64]]:
    """The files of an entry point, how it is served, and its scores of the training rows, from a child.

    Raises InvalidArgumentError for files that no bundle can hold and for a model that fails.
    """
    files = _files(given)
    entry_file(given.entry_point, files)
    spec = ChildSpec(given.entry_point, given.entry_point, Path(given.folder), n_features, 1, None, False)
    settings = ChildSettings(run_timeout=3600.0)
    try:
        probe = ChildProcess(spec, settings, probe=True)
        width = probe.width
        probe.close()
        entry = PythonEntry(
            width=width, column=onnx_backend.served_column(kind, width), entry_point=given.entry_point
        )
        child = ChildProcess(_spec_of(given.entry_point, given.folder, n_features, entry, kind), settings)
    except FailedPreconditionError as error:
        raise InvalidArgumentError(str(error)) from error
    try:
        return files, entry, onnx_backend.run_all(child.channel, rows)
    finally:
        child.close()


def _spec(bundle: ModelBundle) -> ChildSpec:
    assert bundle.python is not None
    name = f"{bundle.name}/{bundle.version}"
    return _spec_of(
        bundle.python.entry_point, bundle.path, len(bundle.inputs), bundle.python, bundle.output_kind, name
    )


def _spec_of(
    entry_point: str, folder: str | Path, n_features: int, entry: PythonEntry, kind: str, name: str = ""
) -> ChildSpec:
    return ChildSpec(
        name=name or entry_point,
        entry_point=entry_point,
        folder=Path(folder).absolute(),
        n_features=n_features,
        width=entry.width,
        column=entry.column,
        probability=kind == "probability",
    )


def _in_thread(bundle: ModelBundle) -> _core.PythonModel:
    """The entry point in this process. Its runs hold the GIL, and so everything up."""
    assert bundle.python is not None
    entry, name = bundle.python, f"model '{bundle.name}' version {bundle.version}"
    _log.warning(
        "%s runs in this process (isolation: thread): while it runs, no other request is answered in time",
        name,
    )
    try:
        model = make_model(entry.entry_point, bundle.path.absolute(), shared=True)
        warm_up(model, len(bundle.inputs), entry.width)
    except Exception as error:
        raise FailedPreconditionError(
            f"{name}: its entry point {entry.entry_point} failed: {text_of(error)}"
        ) from error
    rows = np.zeros((MAX_ROWS, len(bundle.inputs)), np.float32)
    scores = np.zeros((MAX_ROWS, entry.width), np.float64)

    def run(n: int) -> None:
        scores[:n] = scores_of(model, rows[:n], entry.width)

    return _core.PythonModel(
        run, rows, scores, column=entry.column, probability=bundle.output_kind == "probability"
    )


def _files(given: EntryPoint) -> dict[str, bytes]:
    folder = Path(given.folder)
    if not folder.is_dir():
        raise InvalidArgumentError(f"folder {str(folder)!r} is no folder; expected that of the entry point")
    files: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts) or path.is_dir():
            continue
        if name.as_posix() in (MANIFEST, REFERENCE):
            raise InvalidArgumentError(f"folder {str(folder)!r} has a file {name}, the bundle makes its own")
        if len(files) == MAX_FILES:
            raise InvalidArgumentError(f"folder {str(folder)!r} has more than {MAX_FILES} files")
        check_files([name.as_posix()])
        files[name.as_posix()] = path.read_bytes()
    return files


def describe(bundle: ModelBundle, isolation: str) -> dict[str, Any]:
    """The backend in plain values."""
    if bundle.python is not None:
        return {"format": bundle.format, "entry_point": bundle.python.entry_point, "isolation": isolation}
    return {"format": bundle.format}
