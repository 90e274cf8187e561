"""What `penstock push` and `penstock apply` say of files and servers that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from push_repo import make_push_repo
from typer.testing import CliRunner

from penstock import Engine, cli
from penstock.errors import NotFoundError

HEAD = "at,user_id,shop,x,city\n"
GOOD = {"at": 1, "user_id": 1, "shop": "a", "x": 1.0, "city": "b"}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    make_push_repo(tmp_path / "repo")
    return lambda *args: CliRunner().invoke(
        cli.app, [*map(str, args), "--repo", str(tmp_path / "repo"), "--data-dir", str(tmp_path / "data")]
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("e.csv", HEAD.encode() + b"1,1,a,1.0,b\n2,1,a,abc,b\n", ("Row #3", "'abc'", "double")),
        ("e.csv", b"at,user\xbd,shop\n1,1,a\n", ("cannot be read", "utf-8")),
        ("e.csv", HEAD.encode() + b"1,1,\xbd,1.0,b\n", ("cannot be read", "UTF8")),
        ("e.csv", b"", ("cannot be read", "Empty CSV")),
        ("e.csv", HEAD.encode() + b"soon,1,a,1.0,b\n", ("column 'at' has 'soon'", "ISO 8601")),
        ("e.jsonl", json.dumps(GOOD).encode() + b"\n\n{bad\n", ("line 3 is no JSON",)),
        ("e.jsonl", json.dumps(GOOD).encode() + b"\n[1]\n", ("line 2 is [1]; expected an object",)),
        ("e.jsonl", b"\xb8\xff\n", ("line 1 is no JSON",)),
        (
            "e.jsonl",
            "\n".join(json.dumps({**GOOD, "user_id": key}) for key in (1, "x")).encode(),
            ("column 'user_id'", "'x'"),
        ),
        ("e.parquet", b"PAR1", ("cannot be read",)),
    ],
)
def test_a_file_that_does_not_fit(
    run: Any, tmp_path: Path, name: str, content: bytes, said: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    done = run("push", "events", tmp_path / name)
    assert done.exit_code == 1, done.exception
    assert done.output.startswith("penstock: ")
    for text in said:
        assert text in done.output


def test_a_file_that_is_missing(run: Any, tmp_path: Path) -> None:
    done = run("push", "events", tmp_path / "none.csv")
    assert (done.exit_code, "none.csv' cannot be read: it is no file" in done.output) == (1, True)


def test_where_rows_are_counted_from(run: Any, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(HEAD + "1,1,a,1.0,b\n2,2,a,1.0,b\n3,,a,1.0,b\n")
    done = run("push", "events", tmp_path / "e.csv", "--rows", 2)
    assert done.exit_code == 1
    assert "the first 2 events were taken in, the others not; rows are counted from there" in done.output
    assert "column 'user_id' is null in row 0" in done.output


class Peer:
    """A server on an engine, without the socket."""

    engine: Engine

    def __init__(self, addresses: Any, **credentials: Any) -> None:
        pass

    def __enter__(self) -> Engine:
        return self.engine

    def __exit__(self, *error: object) -> None:
        pass


def test_a_server_of_other_definitions(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import penstock.serving.client as client

    config = tmp_path / "inference-config.yaml"
    config.write_text(f"feature_store: {{repo_path: {tmp_path / 'repo'}}}\ndata_dir: {tmp_path / 'data'}\n")
    monkeypatch.setattr(client, "Client", Peer)
    file = tmp_path / "repo/features.py"
    (tmp_path / "e.csv").write_text(HEAD + "1,1,a,1.0,b\n")
    with Engine.from_config(config) as engine:
        assert engine.lock is not None
        engine.lock.announce(["tcp://127.0.0.1:9"])
        monkeypatch.setattr(Peer, "engine", engine, raising=False)
        done = run("apply", "--json")
        assert done.exit_code == 0, done.output
        assert "fingerprints" not in json.loads(done.output)
        file.write_text(file.read_text().replace('"pairs"', '"couples"').replace("pairs:", "couples:"))
        done = run("apply")
        assert done.exit_code == 1
        assert "applied the definitions that it started with" in done.output
        assert "view couples, view pairs" in done.output
        file.write_text(file.read_text().replace('"events"', '"clicks"'))
        done = run("push", "clicks", tmp_path / "e.csv")
        assert done.exit_code == 1
        assert "serves other definitions" in done.output
        assert "push source 'clicks' is unknown; the push sources are events" in done.output
        with pytest.raises(NotFoundError, match="give references as a list"):
            engine.features("pairs:seen", {"user_id": [1], "shop": ["a"]})
