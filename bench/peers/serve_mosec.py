"""mosec with raw float32 bodies, its fastest codec here. --batch 1 has no wait; else batches wait for 1 ms.

mosec reads --address and --port itself. Its workers are spawned, so they take the rest from the environment.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
from mosec import Server, Worker
from session import FEATURES, open_session, score


class Forest(Worker):
    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        self.session = open_session(os.environ["PEER_MODEL"])

    def deserialize(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.float32)

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data):  # a row, or a list of rows where it batches
        if os.environ["PEER_BATCH"] == "1":
            return score(self.session, data.reshape(1, FEATURES)).tobytes()
        return [one.tobytes() for one in score(self.session, np.stack(data))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=64)
    given, _ = parser.parse_known_args()
    os.environ["PEER_MODEL"], os.environ["PEER_BATCH"] = given.model, str(given.batch)
    server = Server()
    server.append_worker(Forest, num=1, max_batch_size=given.batch, max_wait_time=1, route="/predict")
    server.run()
