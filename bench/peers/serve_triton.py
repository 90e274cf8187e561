"""Triton through PyTriton: its dynamic batcher, and onnxruntime called in its Python backend (the package has
no onnxruntime backend). JSON bodies, which were faster than binary ones here."""

from __future__ import annotations

import argparse

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from session import FEATURES, open_session, score

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    session = open_session(given.model)

    @batch
    def infer(x: np.ndarray) -> list[np.ndarray]:
        return [score(session, x).reshape(-1, 1)]

    settings = TritonConfig(
        http_address="127.0.0.1",
        http_port=given.port,
        allow_grpc=False,
        allow_metrics=False,
        log_verbose=0,
    )
    with Triton(config=settings) as triton:
        triton.bind(
            model_name="forest",
            infer_func=infer,
            inputs=[Tensor(name="x", dtype=np.float32, shape=(FEATURES,))],
            outputs=[Tensor(name="score", dtype=np.float32, shape=(1,))],
            config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)),
        )
        triton.serve()
