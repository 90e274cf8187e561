"""ONNX models through onnxruntime: its package inspects a model, the native library in it scores and serves.

A model is served if it takes one float32 tensor [n, inputs] and gives its scores as one float tensor, [n] or
[n, width].
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from penstock import _core
from penstock.errors import FailedPreconditionError, InternalError, InvalidArgumentError
from penstock.models.entry_point import MAX_ROWS
from penstock.models.manifest import MAX_WIDTH, OnnxEntry, OutputKind

if TYPE_CHECKING:
    import onnxruntime

Runnable = _core.OnnxSession | _core.PythonModel | _core.ChildChannel
_DTYPES: dict[str, Literal["float32", "float64"]] = {"tensor(float)": "float32", "tensor(double)": "float64"}
_ERRORS_ONLY = 3


def is_onnx(model: Any) -> bool:
    """Whether `model` is what `model_bytes` takes."""
    return isinstance(model, bytes | str | Path) or (
        type(model).__module__.partition(".")[0] == "onnx" and hasattr(model, "SerializeToString")
    )


def model_bytes(model: Any) -> bytes:
    """The bytes of an ONNX model: a ModelProto, its bytes, or the path of its file."""
    if isinstance(model, bytes):
        return model
    if isinstance(model, str | Path):
        try:
            return Path(model).read_bytes()
        except OSError as error:
            raise InvalidArgumentError(f"model file {str(model)!r} cannot be read: {error}") from error
    return bytes(model.SerializeToString())


def versions() -> dict[str, str]:
    """Versions of the libraries that made the bundle."""
    from penstock.models.library import own_versions

    return {**own_versions(), "onnxruntime": _runtime("an ONNX model").__version__}


def _python_session(data: bytes) -> onnxruntime.InferenceSession:
    """A session that tells of the model. Raises InvalidArgumentError if onnxruntime refuses it."""
    runtime = _runtime("the ONNX model")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    try:
        return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InvalidArgumentError(f"the ONNX model is refused by onnxruntime: {_line(error)}") from error


def inspect(
    data: bytes, n_features: int, rows: NDArray[np.float32], kind: OutputKind, output: str | None
) -> OnnxEntry:
    """How the model is served. Raises InvalidArgumentError for a model that cannot be, and says why."""
    opened = _python_session(data)
    taken = opened.get_inputs()
    if len(taken) != 1:
        raise InvalidArgumentError(
            f"the ONNX model has {len(taken)} inputs {[i.name for i in taken]}; expected one, float32 "
            f"[n, {n_features}]: join them into one matrix before it is exported"
        )
    given = taken[0]
    shape = [size if isinstance(size, int) else None for size in given.shape]
    if given.type != "tensor(float)" or len(shape) != 2 or shape[1] not in (None, n_features):
        raise InvalidArgumentError(
            f"the ONNX model's input '{given.name}' is {given.type} {given.shape}; "
            f"expected tensor(float) [n, {n_features}]"
        )
    if shape[0] is not None:
        raise InvalidArgumentError(
            f"the ONNX model takes batches of {shape[0]} rows alone; expected a free first dimension"
        )
    found = _output(opened, output)
    probes = [_raw(opened, given.name, found.name, rows[:n]) for n in (1, min(2, len(rows)))]
    for n, raw in zip((1, min(2, len(rows))), probes):
        if raw.ndim not in (1, 2) or len(raw) != n or (raw.ndim == 2 and not 1 <= raw.shape[1] <= MAX_WIDTH):
            raise InvalidArgumentError(
                f"the ONNX model's output '{found.name}' is {list(raw.shape)} for {n} rows; "
                f"expected [{n}] or [{n}, 1 to {MAX_WIDTH}]"
            )
    width = 1 if probes[0].ndim == 1 else probes[0].shape[1]
    return OnnxEntry(
        width=width,
        column=served_column(kind, width),
        input=given.name,
        output=found.name,
        rank=1 if probes[0].ndim == 1 else 2,
        dtype=_DTYPES[found.type],
    )


def served_column(kind: OutputKind, width: int) -> int | None:
    """Of the probabilities of two classes, the second is served, as trees do; else all columns."""
    return 1 if kind == "probability" and width == 2 else None


def open_session(
    data: bytes,
    entry: OnnxEntry,
    n_features: int,
    probability: bool,
    *,
    threads: int = 1,
    what: str = "the ONNX model",
) -> _core.OnnxSession:
    """What a lane runs: one run at a time, of any thread, without the GIL.

    Raises InvalidArgumentError if onnxruntime refuses the model or it is not as `entry` says,
    FailedPreconditionError if onnxruntime is not there.
    """
    try:
        return _core.OnnxSession(
            data,
            library=_library(what),
            input=entry.input,
            output=entry.output,
            n_features=n_features,
            width=entry.width,
            flat=entry.rank == 1,
            wide=entry.dtype == "float64",
            column=entry.column,
            probability=probability,
            threads=threads,
        )
    except ValueError as error:
        raise InvalidArgumentError(f"{what} is refused: {error}") from error
    except RuntimeError as error:
        raise FailedPreconditionError(f"{what} needs onnxruntime: {error}") from error


def predict(
    data: bytes, entry: OnnxEntry, n_features: int, probability: bool, rows: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Scores float64 [n, outputs] of rows [n, F], by the code that serves them."""
    return run_all(open_session(data, entry, n_features, probability), rows)


def run_all(model: Runnable, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scores of any number of rows, in runs of at most 64. Raises InternalError where the model fails."""
    parts = []
    for start in range(0, max(1, len(rows)), MAX_ROWS):
        part = rows[start : start + MAX_ROWS]
        wanted = len(part)
        scores = model.run(np.ascontiguousarray(part if wanted else np.zeros((1, rows.shape[1]), np.float32)))
        if isinstance(scores, tuple):
            raise InternalError(f"rows {start} to {start + wanted - 1}: {scores[1]}")
        parts.append(scores[:wanted])
    return np.concatenate(parts)


def _output(opened: onnxruntime.InferenceSession, name: str | None) -> Any:
    outputs = opened.get_outputs()
    described = ", ".join(f"'{o.name}' {o.type} {o.shape}" for o in outputs)
    if name is not None:
        chosen = [o for o in outputs if o.name == name]
        if not chosen:
            raise InvalidArgumentError(f"output is {name!r}; the ONNX model has {described}")
        if chosen[0].type not in _DTYPES:
            raise InvalidArgumentError(
                f"output '{name}' is {chosen[0].type}; expected a tensor of float or double "
                "(export a classifier without its map of probabilities: zipmap=False)"
            )
        return chosen[0]
    able = [o for o in outputs if o.type in _DTYPES]
    if len(able) != 1:
        raise InvalidArgumentError(
            f"the ONNX model has {len(able)} outputs that are tensors of float or double, among {described}; "
            + (
                "name one with output="
                if able
                else "export a classifier without its map of probabilities (zipmap=False)"
            )
        )
    return able[0]


def _raw(
    opened: onnxruntime.InferenceSession, taken: str, output: str, rows: NDArray[np.float32]
) -> NDArray[Any]:
    try:
        return np.asarray(opened.run([output], {taken: np.ascontiguousarray(rows)})[0])
    except Exception as error:
        raise InvalidArgumentError(f"the ONNX model cannot score training_df: {_line(error)}") from error


def _runtime(what: str) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise _not_installed(what) from error
    return onnxruntime


def _library(what: str) -> str:
    """The path of the library that the package brings; the package itself is not imported."""
    found = importlib.util.find_spec("onnxruntime")
    folders = found.submodule_search_locations if found is not None else None
    if not folders:
        raise _not_installed(what)
    for folder in folders:
        for path in sorted(Path(folder, "capi").glob("libonnxruntime.so*")):
            return str(path)
    raise FailedPreconditionError(f"{what} needs onnxruntime: {list(folders)} has no capi/libonnxruntime.so")


def _not_installed(what: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{what} needs onnxruntime, which is not installed: pip install 'penstock[onnx]'"
    )


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:500] if str(error).strip() else type(error).__name__
