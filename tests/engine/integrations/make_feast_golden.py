"""Writes what `test_feast_golden.py` reads: a registry and Redis hashes that the real Feast has made.

Run by an interpreter that has `feast[redis]` and `pyarrow`, with redis-server on the PATH:
python make_feast_golden.py
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "support")]

OTHER_SOURCES = """
from datetime import timedelta
from feast import BigQuerySource, Entity, FeatureService, FeatureView, Field, FileSource, KafkaSource
from feast.data_format import DeltaFormat, JsonFormat
from feast.types import Float32, Int64, Map

user = Entity(name="user", join_keys=["user_id"])
a = BigQuerySource(name="warehouse", table="t.users", timestamp_field="at")
fields = [Field(name="x", dtype=Float32)]
of_bigquery = FeatureView(name="of_bigquery", entities=[user], source=a, schema=fields)
of_delta = FeatureView(name="of_delta", entities=[user], schema=fields,
    source=FileSource(path="t", timestamp_field="at", file_format=DeltaFormat()))
of_bucket = FeatureView(name="of_bucket", entities=[user], schema=fields,
    source=FileSource(path="s3://bucket/t.parquet", timestamp_field="at"))
untimed = FeatureView(name="untimed", entities=[user], schema=fields, source=FileSource(path="t.parquet"))
maps = FeatureView(name="maps", entities=[user], schema=[Field(name="x", dtype=Map)],
    source=FileSource(path="t.parquet", timestamp_field="at"))
streamed = FeatureView(name="streamed", entities=[user], schema=fields, source=KafkaSource(
    name="topic", kafka_bootstrap_servers="k:1", topic="t", timestamp_field="at",
    message_format=JsonFormat("x float"), batch_source=FileSource(path="t.parquet", timestamp_field="at")))
s = FeatureService(name="s", features=[of_bigquery.with_name("other")])
"""


def main() -> None:
    import redis
    from feast_peer import answer
    from feast_repo import HOUR, T, write_feast_repo
    from feast_twin_definitions import TWIN_DEFINITIONS

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""], stdout=subprocess.DEVNULL
    )
    try:
        client = redis.Redis(port=port)
        for _ in range(100):
            with contextlib.suppress(redis.exceptions.ConnectionError):
                client.ping()
                break
            time.sleep(0.1)
        with tempfile.TemporaryDirectory() as scratch:
            repo = write_feast_repo(
                Path(scratch) / "repo", f'{{type: redis, connection_string: "127.0.0.1:{port}"}}'
            )
            answer({"op": "apply", "repo": str(repo)})
            answer({"op": "materialize", "repo": str(repo), "start": (T - 100 * HOUR).isoformat(),
                    "end": (T + timedelta(hours=2)).isoformat()})  # fmt: skip
            hashes = {
                key.hex(): {field.hex(): value.hex() for field, value in sorted(client.hgetall(key).items())}
                for key in sorted(client.keys())
            }
            (HERE / "golden" / "feast_redis.json").write_text(json.dumps(hashes, indent=1) + "\n")
            shutil.copy(repo / "data" / "registry.db", HERE / "golden" / "feast_registry.db")
            other = Path(scratch) / "other"
            other.mkdir()
            (other / "other_sources.py").write_text(OTHER_SOURCES)
            made = bytes.fromhex(answer({"op": "files", "repo": str(other)}))
            (HERE / "golden" / "feast_other_sources.db").write_bytes(made)
            twin = Path(scratch) / "twin"
            twin.mkdir()
            (twin / "twin.py").write_text(TWIN_DEFINITIONS)
            made = bytes.fromhex(answer({"op": "files", "repo": str(twin)}))
            (HERE / "golden" / "feast_twin.db").write_bytes(made)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
