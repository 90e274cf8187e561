"""The log of sampled feature vectors: what was asked and what the model was given, to be made again offline.

Files `vectors-WORKER-NUMBER.log` under `data_dir/log`, one sequence a process. Not durable: a crash may lose
the last records. Bounded: the oldest segments are deleted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from penstock.monitoring.record_log import RecordLog, read_records

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from penstock import _core
    from penstock.models.bundle import ModelBundle

_SEGMENT = 4 << 20


@dataclass(frozen=True, eq=False)
class VectorSample:
    """Feature vectors of one request.

    Attributes:
        model, version, service: what served it.
        fingerprint, text_counts: of the service's definitions when the model was trained; see
            `ServicePlan.fits`.
        now_us: request time.
        made_us: wall clock when the vectors were made; what became known later is not in them.
        entities, inputs: columns of the request, scalars or lists.
        vectors: float32[n, F], NaN where missing.
    """

    model: str
    version: str
    service: str
    fingerprint: str
    now_us: int
    made_us: int
    entities: dict[str, Any]
    inputs: dict[str, Any]
    vectors: NDArray[np.float32]
    text_counts: Mapping[tuple[str, str], int] | None = None


class VectorLog:
    """The writer of one process.

    Attributes:
        records: requests written; lost: requests that the disk refused.
    """

    def __init__(self, folder: Path, worker: int, max_bytes: int) -> None:
        """Files of `max_bytes` at most, at least two segments."""
        segment = min(_SEGMENT, max(1, max_bytes // 2))
        self._log = RecordLog(
            folder, f"vectors-{worker}", segment_bytes=segment, max_segments=max(2, max_bytes // segment)
        )
        self.records = self.lost = 0

    def take(self, bundle: ModelBundle, served: _core.ServedModel) -> None:
        """Write what `served` has sampled since the last call. A disk error is counted, not raised."""
        samples = served.drain_samples()
        if not samples:
            return
        head = [bundle.name, bundle.version, bundle.service, bundle.fingerprint]
        counts = bundle.text_counts
        texts = None if counts is None else [[*key, count] for key, count in counts.items()]
        values = [
            [*head, now_us, made_us, params, vectors.tobytes(), texts]
            for now_us, made_us, params, vectors in samples
        ]
        try:
            self._log.append(values, durable=False)
            self.records += len(values)
        except OSError:
            self.lost += len(values)

    def close(self) -> None:
        self._log.close()


def read_samples(folder: Path) -> Iterator[VectorSample]:
    """The samples of all processes."""
    workers = {path.name.split("-")[1] for path in folder.glob("vectors-*-*.log")}
    for worker in sorted(workers):
        for record in read_records(folder, f"vectors-{worker}"):
            model, version, service, fingerprint, now_us, made_us, params, vectors, *added = record
            _, entities, *rest = msgpack.unpackb(params, timestamp=3)
            inputs = rest[0] if rest and rest[0] is not None else {}
            rows = next((len(v) for v in entities.values() if isinstance(v, list)), 1)
            made = np.frombuffer(vectors, "<f4").reshape(rows, -1)
            counts = None  # also of records of earlier builds
            if added and added[0] is not None:
                counts = {(source, column): count for source, column, count in added[0]}
            head = model, version, service, fingerprint, now_us, made_us
            yield VectorSample(*head, entities, inputs, made, counts)
