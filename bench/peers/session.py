"""The onnxruntime session that every peer calls: one thread, as one lane of Penstock has."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

FEATURES = 32


def open_session(path: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def score(session: Any, rows: np.ndarray) -> np.ndarray:
    """float32 [n]: the probability of class 1 for float32 [n, FEATURES]."""
    return session.run(["probabilities"], {"x": rows})[0][:, 1]
