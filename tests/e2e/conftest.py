"""A shop with trained models, built once a session, and real `penstock serve` processes over copies of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import yaml
from raw_peer import Raw

from penstock.serving.client import Client

_FEATURES = ("amount", "hour", "distance")
_PENSTOCK = [sys.executable, "-c", "from penstock.cli import main; main()"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@dataclass(frozen=True)
class Shop:
    """What the session built.

    Attributes:
        folder: holds `feature_repo` and `bundles` (buy 1 and 2 by feature service, bare 1 on vectors).
        columns: of the rows asked for: user_id, item_id, basket_value lists and now_us int64.
        rows: float32 [n, F], their features by the historical join.
        boosters: the LightGBM models by version; forest: the scikit-learn model of `bare`.
        vectors: float32 [n, 3], rows for `bare`.
    """

    folder: Path
    columns: Mapping[str, Any]
    rows: np.ndarray
    boosters: Mapping[str, Any]
    forest: Any
    vectors: np.ndarray

    def config(self, folder: Path, **sections: Any) -> Path:
        """Write a configuration with a data folder of its own into `folder`; return its path."""
        found: dict[str, Any] = {
            "serving": {"max_latency_ms": 2000, "allow_replay": True},  # a slow machine is no failure here
            "feature_store": {"repo_path": str(self.folder / "feature_repo")},
            "models": {
                "buy": {"path": str(self.folder / "bundles/buy/1")},
                "bare": {"path": str(self.folder / "bundles/bare/1")},
            },
            "caches": {"features": {"capacity": 4096}},
            "server": {"goaway_grace": 0.02},
            "data_dir": str(folder / "data"),
        }
        for name, section in sections.items():
            found[name] = {**found[name], **section} if section and name in found else section
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "inference-config.yaml"
        path.write_text(yaml.safe_dump(found), encoding="utf-8")
        return path

    def registry(self, folder: Path) -> Path:
        """As `config`, but `buy` 1 (the champion) and 2 come from the registry in the data folder."""
        from penstock.models.registry import ModelRegistry

        registry = ModelRegistry(folder / "data/models", folder / "data/registry")
        for name in ("buy/1", "buy/2", "bare/1"):
            registry.add(self.folder / "bundles" / name)
        return self.config(folder, models=None)

    def entities(self, rows: slice = slice(None)) -> dict[str, list[int]]:
        return {name: self.columns[name][rows] for name in ("user_id", "item_id")}

    def inputs(self, rows: slice = slice(None)) -> dict[str, list[float]]:
        return {"basket_value": self.columns["basket_value"][rows]}

    def copy_repo(self, folder: Path) -> Path:
        """A copy of the feature repository whose files a test may break."""
        return Path(shutil.copytree(self.folder / "feature_repo", folder / "feature_repo"))


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    import lightgbm
    import pyarrow as pa
    from sklearn.ensemble import RandomForestClassifier

    from penstock import FeatureStore
    from penstock.cli_features import write_example
    from penstock.models.bundle import save_bundle
    from penstock.models.rows import model_rows

    folder = tmp_path_factory.mktemp("shop") / "run"
    write_example("shop", folder)
    rng = np.random.default_rng(7)
    n = 400
    now_us = 1_772_323_200_000_000 + rng.integers(0, 20 * 86_400_000_000, n)  # March 2026
    columns = {
        "user_id": rng.integers(1, 501, n).tolist(),
        "item_id": rng.integers(1, 201, n).tolist(),
        "basket_value": np.round(rng.lognormal(3, 1, n), 2).tolist(),
        "now_us": now_us,
    }
    asked = {name: columns[name] for name in ("user_id", "item_id", "basket_value")}
    asked["event_timestamp"] = pa.array(now_us, pa.timestamp("us", "UTC"))
    boosters = {}
    with FeatureStore(folder / "feature_repo", data_dir=folder / "training") as store:
        joined = store.get_historical_features(pa.table(asked), features="purchase").to_arrow()
        plan = store.service_plan("purchase")
        names = list(plan.output_names)
        rows = model_rows(joined, names)
        chance = 1 / (1 + np.exp(3 - np.log(rows[:, -1]) - np.nan_to_num(rows[:, 0])))
        bought = (rng.random(n) < chance).astype(np.int64)
        for version, rate in (("1", 0.1), ("2", 0.3)):
            settings = {"objective": "binary", "num_leaves": 7, "learning_rate": rate, "verbosity": -1,
                        "num_threads": 1, "min_data_in_leaf": 5}  # fmt: skip
            data = lightgbm.Dataset(rows, label=bought, feature_name=names)
            boosters[version] = lightgbm.train(settings, data, num_boost_round=20)
            save_bundle(
                boosters[version],
                joined.append_column("bought", pa.array(bought)),
                name="buy",
                version=version,
                directory=folder / "bundles",
                label="bought",
                plan=plan,
            )
    vectors = rng.random((256, len(_FEATURES)), np.float32)
    forest = RandomForestClassifier(10, max_depth=4, random_state=1).fit(
        vectors, vectors[:, 0] > vectors[:, 1]
    )
    table = pa.table({name: vectors[:, i] for i, name in enumerate(_FEATURES)})
    save_bundle(forest, table, name="bare", directory=folder / "bundles", inputs=list(_FEATURES))
    return Shop(folder, columns, rows, boosters, forest, vectors)


class Caller(Raw):
    """A raw peer that makes calls, one at a time."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._msgid = 0

    def read(self) -> Any:
        """The next message; None at the end of the stream, however it came."""
        try:
            return super().read()
        except ConnectionResetError:
            return None

    def call(self, method: str, *params: Any) -> Any:
        """The result of a call, or its error map under "error"."""
        self._msgid += 1
        self.socket.sendall(msgpack.packb([0, self._msgid, method, list(params)]))
        kind, msgid, error, result = self.read()
        assert (kind, msgid) == (1, self._msgid)
        return result if error is None else {"error": error}

    def fault(self, method: str, *params: Any) -> tuple[str, str]:
        """Code and message of a call that must fail."""
        error = self.call(method, *params)["error"]
        return error["code"], error["message"]


class Served:
    """A `penstock serve` process and its addresses."""

    def __init__(self, config: Path, *options: str) -> None:
        self.config = config
        self.log = config.with_name("server.log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*_PENSTOCK, "serve", str(config), "--json", *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(),
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(60)
            raise RuntimeError(f"the server ended with {self.process.returncode}: {self.log.read_text()}")
        self.addresses: list[str] = json.loads(line)["addresses"]
        self.address = self.addresses[0]
        self._peers: list[Caller] = []

    def raw(self) -> Caller:
        """A new connection, closed before the server is stopped."""
        self._peers.append(Caller(self.address))
        return self._peers[-1]

    def client(self) -> Client:
        return Client(self.address)

    def wait_logged(self) -> None:
        """Return when every row served so far is in the log on disk (it may lag by `log_flush`)."""
        with self.client() as client:
            deadline = time.monotonic() + 30
            while client.stats()["served_log"]["pending"]:
                assert time.monotonic() < deadline

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        """Drain it with SIGTERM and return its exit status."""
        while self._peers:
            self._peers.pop().close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        return self.process.returncode


class Servers:
    """Starts servers and ends those that a test left running."""

    def __init__(self) -> None:
        self._made: list[Served] = []

    def __call__(self, config: Path, *listen: str) -> Served:
        addresses = [word for word in listen if "://" in word] or ["tcp://127.0.0.1:0"]
        options = [part for address in addresses for part in ("--listen", address)]
        options += [word for word in listen if word.startswith("--")]
        self._made.append(Served(config, *options))
        return self._made[-1]

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop what still runs; no server may have met an error that nobody expected."""
        for served in self._made:
            with contextlib.suppress(subprocess.TimeoutExpired):
                served.stop()
            served.kill()
        for served in self._made:
            assert "Traceback" not in (log := served.log.read_text()), log


@pytest.fixture
def serve() -> Iterator[Servers]:
    """Starts a server of a configuration, on the addresses given or a free port, with the options given."""
    with Servers() as servers:
        yield servers


@pytest.fixture(scope="session")
def servers() -> type[Servers]:
    """For fixtures whose servers outlive one test."""
    return Servers


@pytest.fixture(scope="module")
def server(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for the tests of a module that leave it as it was; on a Unix socket and on TCP."""
    folder = tmp_path_factory.mktemp("server")
    with Servers() as servers:
        made = servers(shop.config(folder), "tcp://127.0.0.1:0", f"unix://{folder}/s")
        yield made
        for model in made.raw().call("stats")["models"].values():
            for counts in (model["requests"], model["rows"]):  # whatever the tests did: one end for each
                assert counts["submitted"] == sum(counts.values()) - counts["submitted"]
                assert counts["in_flight"] == 0
        assert made.stop() == 0


@pytest.fixture(scope="session")
def penstock() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the `penstock` command in a process of its own."""

    def run(*args: Any) -> subprocess.CompletedProcess[str]:
        command = [*_PENSTOCK, *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, env=_environment(), timeout=60, check=False
        )

    return run
