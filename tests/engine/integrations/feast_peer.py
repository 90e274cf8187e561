"""Runs the real Feast for the tests, in an environment of its own: JSON requests in, as many answers out."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any


def apply(repo: str) -> None:
    from feast.repo_config import load_repo_config
    from feast.repo_operations import apply_total

    config = load_repo_config(Path(repo), Path(repo) / "feature_store.yaml")
    sys.path.insert(0, repo)
    with contextlib.chdir(repo):
        apply_total(config, Path(repo), skip_source_validation=False)


def store(repo: str) -> Any:
    from feast import FeatureStore

    return FeatureStore(repo_path=repo)


def features_of(made: Any, request: dict[str, Any]) -> Any:
    return made.get_feature_service(request["service"]) if "service" in request else request["features"]


def answer(request: dict[str, Any]) -> Any:
    op, repo = request["op"], request["repo"]
    if op == "apply":
        apply(repo)
        return None
    if op == "files":
        from feast.repo_operations import parse_repo

        sys.path.insert(0, repo)
        with contextlib.chdir(repo):
            return parse_repo(Path(repo).resolve()).to_registry_proto().SerializeToString().hex()
    made = store(repo)
    if op == "materialize":
        made.materialize(datetime.fromisoformat(request["start"]), datetime.fromisoformat(request["end"]))
        return None
    if op == "historical":
        import pandas as pd

        entities = pd.read_parquet(request["entities"], dtype_backend="numpy_nullable")
        for column in entities.columns:
            if entities[column].dtype == "Int64" and not entities[column].isna().any():
                entities[column] = entities[column].astype("int64")
        job = made.get_historical_features(
            entity_df=entities, features=features_of(made, request), full_feature_names=request["full"]
        )
        job.to_df().to_parquet(request["out"])
        return None
    if op == "online":
        result = made.get_online_features(
            features=features_of(made, request),
            entity_rows=request["rows"],
            full_feature_names=request["full"],
        )
        values = result.to_dict()
        names = list(result.proto.metadata.feature_names.val)
        statuses = {name: list(vector.statuses) for name, vector in zip(names, result.proto.results)}
        return {"values": json.loads(json.dumps(values, default=str)), "statuses": statuses}
    raise ValueError(op)


def main() -> None:
    requests = json.loads(sys.stdin.read())
    with contextlib.redirect_stdout(io.StringIO()):  # Feast prints
        found = [answer(request) for request in requests]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
