"""`penstock bench` against real servers: what it prints, what it verifies, how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.loadgen import environment

_SHORT = ["--duration", "0.3", "--warmup", "0.05"]


@pytest.fixture
def bench(penstock):
    """Runs the command; returns its exit status, output and errors."""

    def run(*args):
        done = penstock("bench", *args)
        return done.returncode, done.stdout, done.stderr

    return run


def test_vectors_are_verified(bench, shop, server, tmp_path):
    np.save(tmp_path / "rows.npy", shop.vectors)
    np.save(tmp_path / "scores.npy", shop.forest.predict_proba(shop.vectors)[:, 1])
    files = ["--rows", tmp_path / "rows.npy", "--expect", tmp_path / "scores.npy"]
    status, out, err = bench("bare", "--to", server.address, *_SHORT, *files, "--json")
    made = json.loads(out)
    assert (status, err) == (0, "")
    assert made["outcomes"]["OK"]["count"] > 0 and made["failed"] == 0
    assert (made["model"], made["version"], made["verified"]) == ("bare", "1", True)

    table = pa.table({name: shop.vectors[:, i] for i, name in enumerate(("amount", "hour", "distance"))})
    pq.write_table(table, tmp_path / "rows.parquet")
    files = ["--rows", tmp_path / "rows.parquet", "--expect", tmp_path / "scores.npy"]
    many = ["--rows-per-request", "64", "--rate", "50"]
    status, out, _ = bench("bare", "--to", server.address, *_SHORT, *files, *many)
    assert status == 0
    assert (
        "50 requests/s fall due" in out and "64 rows a request, 4 distinct requests, answers verified" in out
    )
    assert "OK" in out and "p99.9" in out


def test_wrong_answers_fail(bench, shop, server, tmp_path):
    np.save(tmp_path / "rows.npy", shop.vectors)
    np.save(tmp_path / "scores.npy", np.zeros(len(shop.vectors)))
    files = ["--rows", tmp_path / "rows.npy", "--expect", tmp_path / "scores.npy"]
    status, out, _ = bench("bare", "--to", server.address, *_SHORT, *files)
    assert status == 1
    assert "WRONG_ANSWER" in out


def test_entities_are_asked_for_with_their_inputs(bench, shop, server, tmp_path):
    columns = {**shop.entities(), **shop.inputs()}
    pq.write_table(pa.table(columns), tmp_path / "entities.parquet")
    options = ["--entities", tmp_path / "entities.parquet", "--rows-per-request", "4", "--json"]
    status, out, err = bench("buy", "--to", server.address, *_SHORT, *options)
    assert (status, err) == (0, "")
    made = json.loads(out)
    assert set(made["outcomes"]) == {"OK"} and made["failed"] == 0


def test_random_rows_need_no_file(bench, server):
    status, out, _ = bench("bare", "--to", server.address, *_SHORT)
    assert status == 0
    assert "4096 distinct requests, answers not verified" in out


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (["bare", "--rows", "a", "--entities", "b"], 2, "--rows and --entities are both given"),
        (["bare", "--expect", "a"], 2, "--expect is given without"),
        (["bare", "--connections", "0"], 2, "connections"),
        (["bare", "--duration", "-1"], 1, "duration_s is -1"),
        (["bare", "--rows", "{tmp}/none.npy"], 1, "No such file"),
        (["bare", "--rows", "{tmp}/narrow.npy"], 1, "has the shape (8, 2); expected (rows, 3)"),
        (["bare", "--rows", "{tmp}/junk.npy"], 1, "expected an array of numbers"),
        (["bare", "--entities", "{tmp}/one.parquet"], 1, "has no entities; expected --rows"),
        (["buy", "--entities", "{tmp}/one.parquet"], 1, "lacks the column 'user_id'"),
        (["nobody"], 1, "model 'nobody' is unknown; expected one of: bare, buy"),
        ([], 1, "name one"),
    ],
)
def test_what_is_wrong_is_said(bench, server, tmp_path, options, status, text):
    np.save(tmp_path / "narrow.npy", np.zeros((8, 2), np.float32))
    (tmp_path / "junk.npy").write_bytes(b"junk")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "one.parquet")
    found = bench("--to", server.address, *(option.format(tmp=tmp_path) for option in options))
    assert found[0] == status
    assert text in " ".join(found[2].replace("│", " ").split())


def test_no_server_is_an_error(bench):
    status, out, _ = bench("--to", "tcp://127.0.0.1:1", "--json")
    assert status == 1
    assert json.loads(out)["error"]["code"] == "UNAVAILABLE"


def test_ctrl_c_shows_what_there_is(server):
    main = [sys.executable, "-c", "from penstock.cli import main; main()", "bench", "bare", "--json"]
    child = subprocess.Popen(
        [*main, "--to", server.address, "--duration", "600", "--connections", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    with server.client() as client:
        before = client.stats()["models"]["bare"]["requests"]["submitted"]
        while client.stats()["models"]["bare"]["requests"]["submitted"] == before:
            assert child.poll() is None
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "")
    assert json.loads(out)["stopped"] is True
