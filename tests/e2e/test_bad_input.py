"""Bad input of every kind against a real server: the documented error, and everyone else is served on."""

from __future__ import annotations

import math
import resource
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

GIB = 1 << 30
INVALID, NOT_FOUND = "INVALID_ARGUMENT", "NOT_FOUND"
NAN, INF = math.nan, math.inf
USERS = {"user_id": [1, 2], "item_id": [3, 4]}
BASKET = {"basket_value": [10.0, 20.0]}
ROWS = np.ones((2, 3), np.float32).tobytes()
SPEND = ["user_features:weekly_spend"]


def assert_serves(served: Any, **options: Any) -> None:
    """Another peer gets its predictions from the server."""
    other = served.raw()
    made = other.call("predict", "buy", USERS, BASKET, options)
    assert len(made["scores"]) == 2, made
    other.close()


def predict(entities: Any = USERS, inputs: Any = BASKET, model: Any = "buy", **options: Any) -> tuple:
    return ("predict", model, entities, inputs, options)


@pytest.fixture
def raw(server) -> Iterator[Any]:
    """A peer of the module's server, which must be as well afterwards as before."""
    peer = server.raw()
    yield peer
    peer.close()
    assert server.process.poll() is None
    assert_serves(server)


@pytest.fixture
def refused(raw) -> Callable[..., None]:
    """Checks that a call fails with a code and words of its message, and leaves its connection usable."""

    def check(call: tuple, code: str, *words: str) -> None:
        found, message = raw.fault(*call)
        assert found == code, message
        for word in words:
            assert word in message
        assert raw.call("health")["ready"]

    return check


# Names


@pytest.mark.parametrize(
    "call",
    [
        predict(model="bye"),
        ("predict_vectors", "bear", ROWS, 2),
        ("drift", "bye"),
        ("promote", "bye", "1"),
        ("rollback", "bye"),
    ],
    ids=lambda call: call[0],
)
def test_unknown_model(refused, call):
    refused(call, NOT_FOUND, f"model '{call[1]}' is unknown; expected one of: ", "buy", "bare")


def test_unknown_version(refused):
    refused(("promote", "buy", "9"), NOT_FOUND, "model 'buy' has no version '9'; expected one of: 1")


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        (["user_features:weekly_spent"], "no such feature 'weekly_spent'; did you mean 'weekly_spend'?"),
        (["users:weekly_spend"], "no such view 'users'; expected one of item_features, user_features"),
        ("purchases", "service 'purchases' is unknown; the services are purchase"),
    ],
)
def test_unknown_feature(refused, refs, message):
    refused(("features", refs, {"user_id": [1]}), NOT_FOUND, message)


def test_unknown_column(refused):
    refused(
        predict({**USERS, "city": [1, 2]}), INVALID, "entities.city is unknown; expected columns: user_id"
    )
    refused(predict(inputs={**BASKET, "km": [1, 2]}), INVALID, "inputs.km is unknown", "basket_value")
    refused(("features", SPEND, {"user": [1]}), INVALID, "column 'user'", "expected user_id")
    refused(predict(zap=1), INVALID, "options.zap is unknown; expected deadline_ms")


def test_missing_column(refused):
    refused(predict({"user_id": [1, 2]}), INVALID, "entities.item_id is missing; expected int64")
    refused(predict(inputs=None), INVALID, "inputs.basket_value is missing; expected float64")
    refused(predict({}, {}), INVALID, "entities and inputs have no column")


def test_unknown_method(refused):
    refused(("predicts",), NOT_FOUND, 'method is "predicts"; expected one of: ', "predict_vectors")


# Types, lengths, nesting


@pytest.mark.parametrize(
    ("value", "shown"),
    [("x", '"x" (string)'), (2.0, "(float)"), (True, "true (bool)"), (b"x", "entities.user_id[1]")],
    ids=["string", "float", "bool", "bytes"],
)
def test_wrong_type_of_a_key(refused, value, shown):
    refused(
        predict({**USERS, "user_id": [1, value]}), INVALID, "entities.user_id[1]", shown, "expected int64"
    )


def test_wrong_type_of_an_input(refused):
    refused(predict(inputs={"basket_value": ["a", 2]}), INVALID, 'inputs.basket_value[0] is "a" (string)')
    refused(predict(inputs={"basket_value": [True, 2]}), INVALID, "is true (bool); expected a number")


def test_wrong_type_of_a_parameter(refused):
    refused(predict(model=3), INVALID, "model is 3 (int); expected a non-empty UTF-8 string")
    refused(predict(5), INVALID, "entities is 5 (int); expected a map of columns")
    refused(predict(inputs=[1.0]), INVALID, "inputs is of 1 values (list); expected a map")
    refused(("predict", "buy", USERS, BASKET, [1]), INVALID, "options is of 1 values (list)")
    refused(predict(priority="mid"), INVALID, 'options.priority is "mid"', '"high" or "low"')
    refused(predict(timings=3), INVALID, "options.timings is 3 (int); expected a bool")
    refused(("predict_vectors", "bare", [1.0, 2.0], 2), INVALID, "data is of 2 values (list)")
    refused(("predict_vectors", "bare", ROWS, 2.0), INVALID, "rows is 2 (float); expected uint32")
    refused(("features", 3, {"user_id": [1]}), INVALID, "features is 3; expected a service or a list")
    refused(("features", SPEND, {"user_id": ["x"]}), INVALID, "'user_id' has type string; expected int64")
    refused(("label", 1, 1), INVALID, "request_ids is 1; expected a list")
    refused(("label", [1], ["x"]), INVALID, "labels[0] is 'x'; expected 0 or 1")
    refused(("drift", None, "x"), INVALID, "window_s is 'x'; expected seconds")
    refused(("drift", ["bare"]), NOT_FOUND, "model '['bare']' is unknown")
    refused(("materialize", "x"), INVALID, "end is 'x'; expected a datetime or int microseconds UTC")
    refused(("materialize", None, 3), INVALID, "views is 3; expected a list of names")
    refused(("promote", ["buy"]), NOT_FOUND, "is unknown")


def test_wrong_length(refused):
    refused(predict({**USERS, "item_id": [1]}), INVALID, "item_id has 1 rows; expected 2")
    refused(predict(inputs={"basket_value": 1.0}), INVALID, "inputs.basket_value has 1 rows; expected 2")
    refused(predict(request_id=[1]), INVALID, "options.request_id has 1 values; expected 2, one per row")
    refused(
        ("predict_vectors", "bare", ROWS, 3), INVALID, "data is of 24 bytes; expected 3 rows of 3 float32"
    )
    refused(("predict_vectors", "bare", ROWS[:-1], 2), INVALID, "data is of 23 bytes")
    refused(("label", [1, 2], [1]), INVALID, "labels has 1 values; expected 2, one per row")
    refused(("label", [1], [1], [1, 2]), INVALID, "times has 2 values; expected 1, one per row")
    refused(("features", SPEND, {"user_id": [1], "z": [1, 2]}), INVALID, "2 rows")
    refused(("predict",), INVALID, "params is of 0 values (list); expected [model, entities, inputs?")
    refused((*predict(), 5), INVALID, "params is of 5 values (list)")
    refused(("promote",), INVALID, "promote has 0 params; expected 1 to 2")


def test_wrong_nesting(refused):
    refused(predict({**USERS, "user_id": [[1], [2]]}), INVALID, "user_id[0] is of 1 values (list)")
    refused(predict({"user_id": {"a": 1}, "item_id": 1}, {"basket_value": 1.0}), INVALID, "entities.user_id")
    refused(("features", SPEND, {"user_id": [[1]]}), INVALID, "entities.user_id[0] is [1] (list)")
    refused(("label", [[1]], [1]), INVALID, "request_ids[0] is [1]; expected a uint64")


def test_nesting_deeper_than_the_limit_ends_the_connection(raw):
    raw.socket.sendall(msgpack.packb([0, 1, "predict"])[:1] + b"\x91" * 100)
    error = raw.read()[2]
    assert error["code"] == INVALID and "nest" in error["message"]
    assert raw.read() is None


# NaN, infinite, empty, huge and negative


def test_nan_and_infinite_inputs_are_scored_as_the_library_does(shop, raw):
    asked = {"basket_value": [NAN, INF, -INF, 1e308]}
    made = raw.call("predict", "buy", {"user_id": [-1] * 4, "item_id": [-1] * 4}, asked)
    rows = np.full((4, 5), np.nan)
    rows[:, -1] = asked["basket_value"]
    np.testing.assert_allclose(made["scores"], shop.boosters["1"].predict(rows), rtol=0, atol=1e-6)


def test_nan_and_infinite_vectors_are_scored_as_the_library_does(shop, raw):
    rows = np.array([[NAN, 0.5, 0.5], [3e38, -3e38, 1e-45]], np.float32)
    made = raw.call("predict_vectors", "bare", rows.tobytes(), 2)
    scores = np.frombuffer(made["scores"], "<f4")
    np.testing.assert_allclose(scores[1], shop.forest.predict_proba(rows[1:])[0, 1], rtol=0, atol=1e-6)
    assert 0 <= scores[0] <= 1  # the forest has seen no NaN: scikit-learn says nothing of it
    made = raw.call("predict_vectors", "bare", np.full((1, 3), -INF, np.float32).tobytes(), 1)
    assert 0 <= np.frombuffer(made["scores"], "<f4")[0] <= 1


@pytest.mark.parametrize("value", [NAN, -INF, 0, -5, "5"])
def test_nan_negative_zero_or_text_deadline(refused, value):
    refused(predict(deadline_ms=value), INVALID, "options.deadline_ms is ", "expected a number above 0")


@pytest.mark.parametrize("value", [INF, 1e300, 2**63])
def test_huge_deadline_is_clamped(raw, value):
    assert len(raw.call(*predict(deadline_ms=value))["scores"]) == 2


@pytest.mark.parametrize("value", [NAN, INF, "x", -(2**63), 2**63 - 1, 2**63])
def test_nan_huge_or_negative_now(refused, value):
    refused(predict(now=value), INVALID, "options.now is ")
    if value != 2**63 - 1 and value != -(2**63):
        refused(("features", SPEND, {"user_id": [1]}, value), INVALID, "now is ")


@pytest.mark.parametrize("value", [-1, 1.5, NAN, "a"])
def test_negative_nan_or_text_request_id(refused, value):
    refused(predict(request_id=value), INVALID, "options.request_id is ", "expected uint64")
    refused(("label", [value], [1]), INVALID, "request_ids[0] is ", "expected a uint64")


def test_huge_request_id(raw):
    assert raw.call(*predict(request_id=[2**64 - 1, 2**63]))["request_ids"] == [2**64 - 1, 2**63]


def test_huge_and_negative_keys(refused, raw):
    made = raw.call(*predict({"user_id": [2**63 - 1, -(2**63)], "item_id": [-1, 2**63 - 1]}))
    assert made["status"] == [2, 2]
    refused(predict({**USERS, "user_id": [2**63, 1]}), INVALID, "user_id[0] is 9223372036854775808", "int64")
    refused(("features", SPEND, {"user_id": [2**63]}), INVALID, "'user_id'")


def test_empty_columns(refused, raw):
    refused(
        predict({"user_id": [], "item_id": []}, {"basket_value": []}), INVALID, "0 rows; expected at least 1"
    )
    refused(("predict_vectors", "bare", b"", 0), INVALID, "0 rows; expected at least 1")
    refused(("features", [], {"user_id": [1]}), INVALID, "features is []")
    refused(predict(model=""), INVALID, "expected a non-empty UTF-8 string")
    assert raw.call("label", [], [])["matched"] == 0


def test_more_rows_than_a_request_may_have(refused):
    n = 4097
    entities = {"user_id": [1] * n, "item_id": [1] * n}
    refused(predict(entities, {"basket_value": [1.0] * n}), INVALID, "4097 rows; expected at most 4096")


@pytest.mark.parametrize("rows", [-1, 2**32, 2**62])
def test_negative_or_huge_number_of_vectors(refused, rows):
    refused(("predict_vectors", "bare", ROWS, rows), INVALID, f"rows is {rows} (int); expected uint32")


@pytest.mark.parametrize("value", [2, -1, NAN, None])
def test_label_that_is_no_0_or_1(refused, value):
    refused(("label", [1], [value]), INVALID, "labels[0] is ", "expected 0 or 1")


@pytest.mark.parametrize("value", [NAN, INF, 2**64 - 1, -(2**63), -1, "x"])
def test_nan_huge_or_negative_label_time(refused, value):
    refused(("label", [1], [1], [value]), INVALID, "times[0] is ")


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0, -300, 1e300, 301])
def test_nan_huge_or_negative_drift_window(refused, value):
    refused(("drift", None, value), INVALID, "window_")


@pytest.mark.parametrize("value", [NAN, 2**64 - 1, -(2**63)])
def test_nan_huge_or_negative_end(refused, value):
    refused(("drift", None, None, value), INVALID, "end")
    refused(("materialize", value), INVALID, "end is ")


def test_refused_labels_do_not_come_back_after_a_restart(shop, serve, tmp_path):
    config = shop.config(tmp_path)
    served = serve(config)
    for times in ([2**64 - 1], [-(2**63)], [NAN]):
        assert served.raw().fault("label", [1], [1], times)[0] == INVALID
    served.kill()
    assert_serves(serve(config))
    assert all(not log.stat().st_size for log in (tmp_path / "data/log").glob("labels-*.log"))


# Peers that break the stream


@pytest.mark.parametrize("kind", [0xC6, 0xDB, 0xDD, 0xDF], ids=["bin", "str", "array", "map"])
@pytest.mark.parametrize("depth", ["message", "params"])
def test_a_header_that_announces_1_gib(raw, kind, depth):
    head = b"" if depth == "message" else b"\x94\x00\x01\xa7predict\x92\xa3buy"
    raw.socket.sendall(head + struct.pack(">BI", kind, GIB))
    error = raw.read()[2]
    assert error["code"] in (INVALID, "RESOURCE_EXHAUSTED") and error["message"]
    assert raw.read() is None


def test_bytes_that_are_no_messagepack(raw):
    raw.socket.sendall(b"\xc1")
    assert "0xc1" in raw.read()[2]["message"]
    assert raw.read() is None


def test_a_truncated_message(server, raw):
    whole = msgpack.packb([0, 1, *predict()[:1], list(predict()[1:])])
    for cut in range(1, len(whole), 7):
        peer = server.raw()
        peer.socket.sendall(whole[:cut])
        peer.socket.shutdown(socket.SHUT_WR)
        while (message := peer.read()) is not None:  # told so, or simply hung up on
            assert message[2]["code"] == INVALID
        peer.close()


def test_a_peer_that_sends_one_byte_at_a_time(raw):
    message = msgpack.packb([0, 9, "predict", list(predict()[1:])])
    for i in range(len(message)):
        raw.socket.sendall(message[i : i + 1])
    kind, msgid, error, result = raw.read()
    assert (kind, msgid, error) == (1, 9, None) and len(result["scores"]) == 2


def test_a_peer_that_never_reads(shop, serve, tmp_path):
    limits = {"limits": {"slow_reader_timeout": 0.5}}
    served = serve(shop.config(tmp_path, server=limits), f"unix://{tmp_path}/s")
    peer, other = served.raw(), served.raw()
    peer.socket.setblocking(False)
    params = ["buy", shop.entities(), shop.inputs()]
    data = memoryview(msgpack.packb([0, 1, "predict", params]) * 4000)
    sent = 0
    until = time.monotonic() + 60
    dropped = False
    while not dropped:  # it asks for as much as the server takes, and reads none of the answers
        try:
            sent += peer.socket.send(data[sent:])
        except BlockingIOError:
            assert_serves(served)
        except (BrokenPipeError, ConnectionResetError):
            dropped = True
        assert sent < len(data) and time.monotonic() < until
    stats = other.call("stats")["server"]
    assert stats["slow_readers"] >= 1 and stats["slow_readers_dropped"] == 1
    assert_serves(served)


# Files


def corrupt_at_the_middle(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize("file", ["trees.bin", "reference.arrow", "model.yaml"])
@pytest.mark.parametrize("fault", ["flipped", "cut", "gone"])
def test_a_corrupt_bundle(shop, tmp_path, file, fault):
    from penstock import Engine
    from penstock.errors import BundleError

    bundle = Path(shutil.copytree(shop.folder / "bundles/buy/1", tmp_path / "bundle"))
    broken = bundle / file
    if fault == "flipped":
        if file == "model.yaml":
            broken.write_text(broken.read_text().replace("sha256: ", "sha256: 0", 1))
        else:
            corrupt_at_the_middle(broken)
    elif fault == "cut":
        broken.write_bytes(broken.read_bytes()[:-100])
    else:
        broken.unlink()
    config = shop.config(tmp_path, models={"buy": {"path": str(bundle)}})
    with pytest.raises(BundleError, match=file.replace(".", r"\.") if fault != "flipped" else r"bundle"):
        Engine.from_config(config)
    assert not (tmp_path / "data/models/buy/1").exists()


def test_a_corrupt_bundle_ends_serve_with_1_and_its_name(shop, penstock, tmp_path):
    bundle = Path(shutil.copytree(shop.folder / "bundles/buy/1", tmp_path / "bundle"))
    corrupt_at_the_middle(bundle / "trees.bin")
    done = penstock("serve", shop.config(tmp_path, models={"buy": {"path": str(bundle)}}))
    assert done.returncode == 1
    assert "trees.bin: its sha256 is not the one in model.yaml" in done.stderr


def test_promoting_a_corrupt_bundle_keeps_the_champion(shop, serve, tmp_path):
    served = serve(shop.registry(tmp_path))
    corrupt_at_the_middle(tmp_path / "data/models/buy/2/trees.bin")
    raw = served.raw()
    code, message = raw.fault("promote", "buy", "2")
    assert code == "FAILED_PRECONDITION" and "trees.bin" in message
    assert raw.call("health")["models"]["buy"] == "1"
    assert_serves(served)


def test_a_corrupt_parquet_file_while_serving(shop, serve, tmp_path):
    repo = shop.copy_repo(tmp_path)
    served = serve(shop.config(tmp_path, feature_store={"repo_path": str(repo)}))
    raw = served.raw()
    now = int(shop.columns["now_us"].max())
    before = raw.call(*predict(shop.entities(), shop.inputs(), now=now))["scores"]
    source = repo / "data/transactions.parquet"
    whole = source.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"PAR1" + bytes(100) + b"PAR1"):
        source.write_bytes(broken)
        for method in ("materialize", "apply"):
            code, message = raw.fault(method)
            assert code == INVALID and "transactions.parquet" in message and "Parquet" in message
        after = raw.call(*predict(shop.entities(), shop.inputs(), now=now, no_cache=True))
        assert after["scores"] == before
    source.unlink()
    code, message = raw.fault("materialize")
    assert code == INVALID and "transactions.parquet" in message
    source.write_bytes(whole)
    assert raw.call("materialize", now)["rows"]["user_features"] > 0
    assert raw.call(*predict(shop.entities(), shop.inputs(), now=now))["scores"] == before


def test_a_corrupt_parquet_file_at_the_start(shop, penstock, tmp_path):
    repo = shop.copy_repo(tmp_path)
    corrupt = repo / "data/prices.parquet"
    corrupt.write_bytes(corrupt.read_bytes()[:-50])
    done = penstock("serve", shop.config(tmp_path, feature_store={"repo_path": str(repo)}))
    assert done.returncode == 1
    assert "prices.parquet" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def materialised(shop, tmp_path_factory) -> Path:
    """A data folder with an online store in it."""
    from penstock import FeatureStore

    folder = tmp_path_factory.mktemp("materialised")
    with FeatureStore(shop.folder / "feature_repo", data_dir=folder) as store:
        store.materialize_incremental(int(shop.columns["now_us"].max()))
    return folder


def cut_store(source: Path, folder: Path, keep: int) -> Path:
    (file,) = Path(shutil.copytree(source, folder / "data")).glob("online/**/data.mdb")
    with file.open("r+b") as stream:
        stream.truncate(keep)
    return file


@pytest.mark.parametrize("keep", [0, 100, 4096, 8192 + 5, 3 * 4096])
def test_an_lmdb_file_cut_short(shop, materialised, tmp_path, keep):
    from penstock import Engine
    from penstock.errors import StoreError

    file = cut_store(materialised, tmp_path, keep)
    with pytest.raises(StoreError, match=r"data\.mdb' is cut short"):
        Engine.from_config(shop.config(tmp_path))
    assert file.stat().st_size == keep


def test_an_lmdb_file_cut_short_ends_serve_with_1(shop, materialised, penstock, tmp_path):
    cut_store(materialised, tmp_path, 3 * 4096)
    done = penstock("serve", shop.config(tmp_path))
    assert done.returncode == 1
    assert "data.mdb' is cut short" in done.stderr and "Traceback" not in done.stderr


def test_a_config_with_three_errors(penstock, tmp_path):
    config = tmp_path / "inference-config.yaml"
    config.write_text(
        "serving:\n  max_batch_size: 65\n  max_latncy_ms: 5\nserver:\n  listen: ['port 7064']\n"
    )
    done = penstock("serve", config)
    assert done.returncode == 1
    assert "line 2: serving.max_batch_size is 65" in done.stderr
    assert 'line 3: unknown key serving.max_latncy_ms; did you mean "max_latency_ms"?' in done.stderr
    assert "line 5: server.listen" in done.stderr and "port 7064" in done.stderr
    assert len([line for line in done.stderr.splitlines() if "line " in line]) == 3


# The disk and the machine


def test_a_full_disk(shop, serve, tmp_path):
    config = shop.registry(tmp_path)
    served = serve(config)
    raw = served.raw()
    now = int(shop.columns["now_us"].max())
    made = raw.call(*predict(shop.entities(), shop.inputs(), now=now))
    ids = made["request_ids"]
    assert raw.call("label", ids[:10], [1] * 10)["matched"] == 10
    served.wait_logged()
    pid = served.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, limits[1]))  # every write to a file fails, as when full
    try:
        for call in (("label", ids[10:20], [0] * 10), ("materialize", now), ("promote", "buy", "2")):
            code, message = raw.fault(*call)
            assert code == "UNAVAILABLE", (call[0], message)
            assert "File too large" in message
        assert raw.call("health")["models"]["buy"] == "1"
        assert raw.call(*predict(shop.entities(), shop.inputs(), now=now))["scores"] == made["scores"]
        assert_serves(served, now=now)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    performance = raw.call("stats")["models"]["buy"]["performance"]
    assert performance["labelled"] == 10
    assert raw.call("label", ids[20:30], [0] * 10)["matched"] == 10
    assert raw.call("materialize", now)["rows"]["user_features"] > 0
    assert raw.call("promote", "buy", "2")["version"] == "2"
    assert not list((tmp_path / "data").rglob(".tmp-*"))
    assert served.stop() == 0
    again = serve(config)
    stats = again.raw().call("stats")
    assert stats["models"]["buy"]["version"] == "2"
    assert stats["models"]["buy"]["performance"]["labelled"] == 20
    assert_serves(again, now=now)


def test_two_servers_on_one_port(shop, server, penstock, tmp_path):
    for address in server.addresses:
        done = penstock("serve", shop.config(tmp_path), "--listen", address)
        assert done.returncode == 1
        assert f"cannot listen on {address}" in done.stderr
    assert_serves(server)


def test_two_servers_on_one_data_dir(server, penstock):
    done = penstock("serve", server.config, "--listen", "tcp://127.0.0.1:0")
    assert done.returncode == 1
    assert f"is in use by process {server.process.pid}" in done.stderr
    assert_serves(server)
