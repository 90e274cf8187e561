"""The main job, end to end: build features, train, serve, replay, compare, and show what came of it.

A run lives in one folder: `repo` (definitions and event tables, kept between runs), `models`, `data` (the
server's), `inference-config.yaml`, `server.log`. The last four are made anew by each run.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from penstock.errors import FailedPreconditionError
from penstock.examples.flights import data
from penstock.examples.flights.compare import Comparison, compare
from penstock.examples.flights.replay import Replay, Tally
from penstock.examples.flights.server import ServerProcess, write_config
from penstock.examples.flights.train import MODEL, Span, Trained, train

if TYPE_CHECKING:
    from penstock.features.store import FeatureStore

_MARK = ".penstock-demo"  # in each folder that a run has made, and may clear


@dataclass(frozen=True)
class Scenario:
    """Which days a run takes. `stride`: every n-th flight is trained on."""

    training: Span
    holdout: Span
    live: Span
    july: Span
    stride: int = 1


FULL = Scenario(Span.days(1, 1, 5, 1), Span.days(5, 1, 5, 16), Span.days(5, 16, 6, 1), Span.days(7, 1, 7, 8))
SHORT = Scenario(Span.days(2, 1, 5, 1), Span.days(5, 1, 5, 16), Span.days(5, 16, 5, 19), Span.days(7, 1, 7, 3), 2)


@dataclass
class Result:
    """What a run found. `live` and `july` are the server's own figures after each replay."""

    trained: Trained
    tally: Tally
    live: dict[str, Any] = field(default_factory=dict)
    july: dict[str, Any] = field(default_factory=dict)
    comparison: Comparison = field(default_factory=Comparison)
    never_labelled: int = 0
    server_exit: int = 0
