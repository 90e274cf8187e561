"""FastAPI and onnxruntime under uvicorn (uvloop, httptools), raw float32 bodies, a row a request."""

from __future__ import annotations

import argparse
import os

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from session import FEATURES, open_session, score

app = FastAPI()
session = open_session(os.environ["PEER_MODEL"]) if "PEER_MODEL" in os.environ else None


@app.post("/predict")
async def predict(request: Request) -> Response:
    rows = np.frombuffer(await request.body(), np.float32).reshape(-1, FEATURES)
    return Response(score(session, rows).tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    os.environ["PEER_MODEL"] = given.model
    uvicorn.run(
        "serve_fastapi:app",
        host="127.0.0.1",
        port=given.port,
        workers=given.workers,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
