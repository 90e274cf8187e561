"""The online store: rows come back whole, under their own view and tag, from a file that can be trusted."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import StoreError
from penstock.features import online
from penstock.features.online import OnlineStore, ViewHeader, check_file

IDENTITY = b"i" * 16
WORDS = 3


def rows_of(keys: np.ndarray, salt: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A row and meta that follow from the key, so that a mix-up shows."""
    base = keys[:, 0] * np.uint64(31) + keys[:, 1] + np.uint64(salt)
    rows = base[:, None] * np.arange(1, WORDS + 1, dtype=np.uint64)
    meta = (base[:, None] + np.arange(4, dtype=np.uint64)).view(np.int64)
    return rows, meta


def keys_of(*numbers: int) -> np.ndarray:
    return np.array([(n, n * 7) for n in numbers], np.uint64).reshape(-1, 2)


def put(store: OnlineStore, view: int, keys: np.ndarray, salt: int = 0, tag: str = "t") -> None:
    store.put_many(view, keys, *rows_of(keys, salt), ViewHeader(tag, WORDS, 0), replace=True)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with_store = OnlineStore(tmp_path / "online", IDENTITY)
    yield with_store
    with_store.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(1, 3),
            st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3)), min_size=1, max_size=40),
            st.integers(0, 9),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_it_is_a_dict_of_view_and_key(tmp_path_factory: pytest.TempPathFactory, steps: Any) -> None:
    found = OnlineStore(tmp_path_factory.mktemp("o"), IDENTITY)
    expected: dict[tuple[int, int, int], tuple[bytes, bytes]] = {}
    asked = {(1, 5, 5)}
    for view, pairs, salt, delete in steps:
        keys = np.unique(np.array(pairs, np.uint64), axis=0)
        rows, meta = rows_of(keys, salt)
        asked |= {(view, int(lo), int(hi)) for lo, hi in keys}
        if delete:
            found.delete_many(view, keys)
            for lo, hi in keys.tolist():
                expected.pop((view, lo, hi), None)
        else:
            found.put_many(view, keys, rows, meta, ViewHeader("t", WORDS, 0), replace=True)
            for i, (lo, hi) in enumerate(keys.tolist()):
                expected[view, lo, hi] = rows[i].tobytes(), meta[i].tobytes()
    for view in (1, 2, 3):
        keys = np.array([(lo, hi) for v, lo, hi in asked if v == view], np.uint64).reshape(-1, 2)
        rows, meta, there = found.get_many(view, "t", keys, WORDS)
        for i, (lo, hi) in enumerate(keys.tolist()):
            want = expected.get((view, lo, hi))
            assert there[i] == (want is not None)
            assert (rows[i].tobytes(), meta[i].tobytes()) == (want or (bytes(8 * WORDS), bytes(32)))
        scanned = {(view, int(lo), int(hi)) for part, _ in found.scan(view) for lo, hi in part}
        assert scanned == {key for key in expected if key[0] == view}
    found.close()


def test_rows_of_another_tag_are_not_found(store: OnlineStore) -> None:
    keys = keys_of(1, 2)
    put(store, 1, keys)
    assert store.get_many(1, "t", keys, WORDS)[2].all()
    assert not store.get_many(1, "u", keys, WORDS)[2].any()
    assert not store.get_many(2, "t", keys, WORDS)[2].any()
    store.put_header(1, ViewHeader("", WORDS, 0))
    assert not store.get_many(1, "t", keys, WORDS)[2].any()


def test_scan_in_parts_and_delete_a_view(store: OnlineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "_CHUNK", 3)
    keys = keys_of(*range(10))
    put(store, 1, keys)
    put(store, 2, keys, salt=5)
    parts = list(store.scan(1))
    assert [len(part) for part, _ in parts] == [3, 3, 3, 1]
    order = np.argsort(np.concatenate([part[:, 0] for part, _ in parts]))
    assert (np.concatenate([meta for _, meta in parts])[order] == rows_of(keys)[1]).all()
    assert set(store.headers()) == {1, 2}
    store.delete_view(1)
    assert (set(store.headers()), store.header(1), list(store.scan(1))) == ({2}, None, [])
    assert store.get_many(2, "t", keys, WORDS)[2].all()


def test_the_stamp_grows_with_every_write(store: OnlineStore) -> None:
    before = store.stamp()
    put(store, 1, keys_of(1))
    assert store.stamp() == before + 1


def test_a_read_sees_what_the_stamp_names_while_another_process_commits(store: OnlineStore) -> None:
    """A commit that waits for the disk has written its number already."""
    program = """
import sys
from pathlib import Path
from penstock.features.online import OnlineStore, ViewHeader
store = OnlineStore(Path(sys.argv[1]), b"i" * 16)
for i in range(300):
    store.put_header(1, ViewHeader("t", 3, i))
"""
    writer = subprocess.Popen([sys.executable, "-c", program, str(store._path)])
    behind = 0
    while writer.poll() is None:
        for _ in range(100):
            stamp = store.stamp()
            with store.transaction() as txn:
                behind += txn.id() < stamp
    assert (writer.wait(), behind) == (0, 0)


def test_the_map_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "_FIRST_MAP", 1 << 16)
    store = OnlineStore(tmp_path, IDENTITY)
    keys = keys_of(*range(5000))
    put(store, 1, keys)
    rows, _, found = store.get_many(1, "t", keys, WORDS)
    assert found.all()
    assert (rows == rows_of(keys)[0]).all()
    assert (tmp_path / "data.mdb").stat().st_size > 1 << 17
    store.close()


def test_the_map_grows_under_readers_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "_FIRST_MAP", 1 << 16)
    store = OnlineStore(tmp_path, IDENTITY)
    keys = keys_of(*range(200))
    put(store, 1, keys)
    done = threading.Event()
    faults: list[BaseException] = []

    def read() -> None:
        try:
            while not done.is_set():
                rows, _, found = store.get_many(1, "t", keys, WORDS)
                assert found.all()
                assert (rows == rows_of(keys)[0]).all()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(12):
        put(store, 2, keys_of(*range(1000 * i, 1000 * (i + 1))))
    done.set()
    for thread in threads:
        thread.join()
    store.close()
    assert not faults


def test_another_process_writes_and_grows_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "_FIRST_MAP", 1 << 16)
    store = OnlineStore(tmp_path, IDENTITY)
    put(store, 1, keys_of(1))
    program = """
import sys, numpy as np
from pathlib import Path
from penstock.features.online import OnlineStore, ViewHeader
store = OnlineStore(Path(sys.argv[1]), b"i" * 16)
keys = np.array([(n, n * 7) for n in range(20000)], np.uint64)
rows = np.tile(keys[:, :1], (1, 3))
store.put_many(1, keys, rows, np.zeros((len(keys), 4), np.int64), ViewHeader("t", 3, 5), replace=True)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    keys = keys_of(*range(20000))
    rows, _, found = store.get_many(1, "t", keys, WORDS)
    assert found.all()
    assert (rows[:, 2] == keys[:, 0]).all()
    put(store, 2, keys_of(3))
    store.close()


def test_handles_on_one_path_share_the_environment(tmp_path: Path) -> None:
    one = OnlineStore(tmp_path / "a", IDENTITY)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    two = OnlineStore(tmp_path / "link", IDENTITY)
    put(one, 1, keys_of(1))
    assert two.get_many(1, "t", keys_of(1), WORDS)[2].all()
    one.close()
    one.close()
    assert two.get_many(1, "t", keys_of(1), WORDS)[2].all()
    with pytest.raises(StoreError, match="is closed"):
        one.stamp()
    two.close()
    three = OnlineStore(tmp_path / "a", IDENTITY)
    assert three.header(1) == ViewHeader("t", WORDS, 0)
    three.close()


def test_a_store_of_another_registry(tmp_path: Path) -> None:
    OnlineStore(tmp_path, IDENTITY).close()
    with pytest.raises(StoreError, match="under another registry"):
        OnlineStore(tmp_path, b"j" * 16)
    OnlineStore(tmp_path, IDENTITY).close()  # the failed handle let go


def test_a_row_of_another_length(store: OnlineStore) -> None:
    put(store, 1, keys_of(1))
    with pytest.raises(StoreError, match="a row of view 1 has 64 bytes, not 72"):
        store.get_many(1, "t", keys_of(1), WORDS + 1)


def _filled(path: Path) -> bytes:
    store = OnlineStore(path, IDENTITY)
    put(store, 1, keys_of(*range(2000)))
    store.close()
    return (path / "data.mdb").read_bytes()


def test_a_file_cut_short_is_an_error_or_lacks_nothing(tmp_path: Path) -> None:
    data = _filled(tmp_path)
    last = max(int.from_bytes(data[at + 136 : at + 144], "little") for at in (0, 4096))
    assert last > 10
    file = tmp_path / "data.mdb"
    for size in [0, 1, 40, 4095, 4096, 8191, 8192, 12288, last * 4096, last * 4096 + 100]:
        file.write_bytes(data[:size])
        with pytest.raises(StoreError, match=r"is cut short"):
            OnlineStore(tmp_path, IDENTITY)
        assert file.stat().st_size == size
    file.write_bytes(data[: (last + 1) * 4096])
    store = OnlineStore(tmp_path, IDENTITY)
    assert store.get_many(1, "t", keys_of(*range(2000)), WORDS)[2].all()
    put(store, 1, keys_of(*range(4000)))
    store.close()


def test_a_file_cut_short_while_it_is_open(tmp_path: Path) -> None:
    data = _filled(tmp_path)
    store = OnlineStore(tmp_path, IDENTITY)
    os.truncate(tmp_path / "data.mdb", 8192)
    with pytest.raises(StoreError, match="is cut short"):
        store.get_many(1, "t", keys_of(1), WORDS)
    with pytest.raises(StoreError, match="is cut short"):
        put(store, 1, keys_of(1))
    (tmp_path / "data.mdb").write_bytes(data)
    assert store.get_many(1, "t", keys_of(1), WORDS)[2].all()
    store.close()


@pytest.mark.parametrize("at", [16, 20, 40, 128, 4096 + 16, 4096 + 128])
def test_a_meta_page_overwritten(tmp_path: Path, at: int) -> None:
    data = bytearray(_filled(tmp_path))
    data[at : at + 4] = b"\x17\x23\x42\x7f"
    (tmp_path / "data.mdb").write_bytes(data)
    with pytest.raises(StoreError, match=r"is corrupt|cut short or no LMDB file"):
        OnlineStore(tmp_path, IDENTITY)


def test_a_text_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_text("hello\n" * 4000)
    with pytest.raises(StoreError, match="no LMDB file"):
        check_file(tmp_path / "data.mdb")


def test_a_store_that_was_being_made_when_its_process_died(tmp_path: Path) -> None:
    (tmp_path / ".new-1-1").mkdir()
    (tmp_path / ".new-1-1" / "data.mdb").write_bytes(b"")
    store = OnlineStore(tmp_path, IDENTITY)
    put(store, 1, keys_of(1))
    store.close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        OnlineStore(tmp_path / "file" / "online", IDENTITY)


def test_a_disk_too_full_to_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "_FIRST_MAP", 1 << 16)
    store = OnlineStore(tmp_path, IDENTITY)
    keys = keys_of(*range(100))
    put(store, 1, keys)

    def full(file: Path, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(online, "_lengthen", full)
    with pytest.raises(StoreError, match=r"cannot grow: .*No space left"):
        put(store, 1, keys_of(*range(5000)), salt=9)
    monkeypatch.undo()
    rows, _, found = store.get_many(1, "t", keys, WORDS)
    assert found.all()
    assert (rows == rows_of(keys)[0]).all()
    assert not store.get_many(1, "t", keys_of(4999), WORDS)[2].any()
    put(store, 1, keys_of(*range(5000)), salt=9)
    store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_at_commit(small_disk: Path) -> None:
    store = OnlineStore(small_disk, IDENTITY)
    keys = keys_of(*range(100))
    put(store, 1, keys)
    with pytest.raises(StoreError, match="cannot be written"):
        put(store, 1, keys_of(*range(16_000)), salt=9)
    rows, _, found = store.get_many(1, "t", keys, WORDS)
    assert found.all()
    assert (rows == rows_of(keys)[0]).all()
    assert not store.get_many(1, "t", keys_of(15_999), WORDS)[2].any()
    put(store, 1, keys, salt=3)
    store.close()
    again = OnlineStore(small_disk, IDENTITY)
    assert (again.get_many(1, "t", keys, WORDS)[0] == rows_of(keys, 3)[0]).all()
    again.close()
