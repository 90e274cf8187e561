"""Feature repositories: what their folders declare, and errors that name the file and line."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from penstock.errors import ConfigError, DefinitionError
from penstock.features.repo import load_repo
from penstock.features.times import iso, to_us

VIEW = """
from penstock import Entity, FeatureView, ParquetSource, col
{entity} = Entity("{entity}", join_keys=["{entity}_id"])
{name} = FeatureView("{name}", [{entity}], ParquetSource("t.parquet", timestamp="t"), {{"f": col("x")}})
"""


def write(path: Path, config: str = "project: p\n", **files: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "feature_store.yaml").write_text(config)
    for name, text in files.items():
        file = path / (name.replace("__", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def test_it_collects_all_files_below_the_folder(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        a=VIEW.format(entity="user", name="v"),
        deep__down__b=VIEW.format(entity="item", name="w"),
        c="from penstock import *\ns = FeatureService('s', ['v:f'])\nr = RequestSource('r', {'x': 'bool'})\n",
    )
    (path / ".hidden").mkdir()
    (path / ".hidden" / "broken.py").write_text("1 / 0")
    repo = load_repo(path)
    assert (list(repo.views), list(repo.services), list(repo.requests)) == (["v", "w"], ["s"], ["r"])
    assert set(repo.entities) == {"user", "item"}
    assert (repo.project, repo.data_dir, repo.fit_until_us) == ("p", path.resolve() / ".penstock", None)


def test_files_import_each_other_and_leave_nothing_behind(tmp_path: Path) -> None:
    view = VIEW.format(entity="user", name="v").replace(
        'user = Entity("user", join_keys=["user_id"])', "from b_entities import user"
    )
    entities = 'from penstock import Entity\nuser = Entity("user", join_keys=["user_id"])\n'
    path = write(tmp_path, a_views=view, b_entities=entities)
    before, search = set(sys.modules), list(sys.path)
    repo = load_repo(path)
    assert repo.views["v"].entities[0] is repo.entities["user"]
    assert not {"a_views", "b_entities"} & (set(sys.modules) - before)
    assert sys.path == search
    assert not list(path.rglob("__pycache__"))
    (path / "b_entities.py").write_text(entities.replace("user_id", "uid"))
    assert load_repo(path).views["v"].join_keys == ["uid"]


def test_a_file_named_like_a_loaded_module(tmp_path: Path) -> None:
    path = write(tmp_path, json=VIEW.format(entity="user", name="v"))
    module = sys.modules["json"]
    assert list(load_repo(path).views) == ["v"]
    assert sys.modules["json"] is module


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("x = 1\ny = 1 / 0\n", r"a\.py:2: ZeroDivisionError"),
        (
            "from penstock import Entity\n\nEntity('1x', ['k'])\n",
            r"a\.py:3: DefinitionError: entity name is '1x'",
        ),
        ("x = (\n", r"a\.py:1: SyntaxError"),
        ("def f():\n    raise KeyError('k')\nf()\n", r"a\.py:2: KeyError"),
        ("import b\n", r"b\.py:2: NameError"),
        ("import nothing_of_that_name\n", r"a\.py:1: ModuleNotFoundError"),
    ],
)
def test_a_file_that_fails(tmp_path: Path, text: str, place: str) -> None:
    path = write(tmp_path, a=text, b="x = 1\nx.y = z\n" if "b" in text.split() else "")
    with pytest.raises(DefinitionError, match=place):
        load_repo(path)
    assert "a" not in sys.modules
    assert "b" not in sys.modules


def test_a_name_that_is_defined_twice(tmp_path: Path) -> None:
    text = VIEW.format(entity="user", name="v")
    with pytest.raises(DefinitionError, match=r"Entity 'user' is defined twice: in a\.py and in b\.py"):
        load_repo(write(tmp_path, a=text, b=text))
    other = text.replace('"user"', '"user2"').replace("user_id", "id2")
    with pytest.raises(DefinitionError, match=r"FeatureView 'v' is defined twice: in a\.py and in b\.py"):
        load_repo(write(tmp_path, a=text, b=other))
    twice = VIEW.format(entity="user", name="v") + "u2 = Entity('user', join_keys=['id2'])\n"
    with pytest.raises(DefinitionError, match=r"Entity 'user' is defined twice: both times in a\.py"):
        load_repo(write(tmp_path, a=twice, b=""))


def test_one_object_under_two_names(tmp_path: Path) -> None:
    path = write(tmp_path, a=VIEW.format(entity="user", name="v") + "same = v\n", b="from a import v\n")
    assert list(load_repo(path).views) == ["v"]


def test_an_entity_with_two_sets_of_join_keys(tmp_path: Path) -> None:
    text = VIEW.format(entity="user", name="v")
    hidden = text.replace("user = ", "users = [").replace('["user_id"])', '["other"])]').replace(
        "[user]", "users"
    ).replace('"v"', '"w"')  # fmt: skip
    with pytest.raises(DefinitionError, match="entity 'user' has the join keys"):
        load_repo(write(tmp_path, a=text, b=hidden))


def test_a_request_source_named_like_a_view(tmp_path: Path) -> None:
    text = VIEW.format(entity="user", name="v") + "from penstock import RequestSource\n"
    with pytest.raises(DefinitionError, match="request source 'v' has the name of a view"):
        load_repo(write(tmp_path, a=text + "r = RequestSource('v', {'x': 'int64'})\n"))


def test_settings(tmp_path: Path) -> None:
    repo = load_repo(write(tmp_path, "project: p\ndata_dir: ../data\nfit_until: 2013-05-01\n"))
    assert repo.data_dir == tmp_path.resolve() / "../data"
    assert repo.fit_until_us == to_us(datetime(2013, 5, 1, tzinfo=UTC), "t")
    again = load_repo(write(tmp_path, "project: p\nfit_until: 2013-05-01T02:00:00+02:00\n"))
    assert again.fit_until_us == repo.fit_until_us


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("project: p\nprojet: x\n", r'yaml:2: unknown key projet; did you mean "project"\?'),
        ("project: p\n\nzzz: x\n", r"yaml:3: unknown key zzz; known keys: project, data_dir, fit_until"),
        ("data_dir: x\n", r"yaml:1: project is missing"),
        ("project: 7\n", r"yaml:1: project is 7; expected a text"),
        ("project: p\nproject: q\n", r"yaml:2: project is given twice; first on line 1"),
        ("project: p\nfit_until: soon\n", r"yaml:2: fit_until is 'soon'; expected a time"),
        ("- project\n", r"yaml:1: is a list; expected a mapping"),
        ("", r"yaml:1: is a NoneType"),
        ("project: [\n", r"yaml:2: is not YAML"),
        ("project: p\nx: 1\ny: 2\n", r"yaml:2: unknown key x(.|\n)*yaml:3: unknown key y"),
        ("project: p\nfit_until: 2013-99-01\n", r"fit_until is '2013-99-01'|is not YAML"),
    ],
)
def test_wrong_settings(tmp_path: Path, config: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_repo(write(tmp_path, config))


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"feature_store\.yaml: no such file"):
            load_repo(path)
    (tmp_path / "feature_store.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_repo(tmp_path)


def test_iso_for_people() -> None:
    assert iso(0) == "1970-01-01T00:00:00+00:00"
    assert iso(-1) == "1969-12-31T23:59:59.999999+00:00"
    assert iso(2**62) == f"{2**62} us"


SOURCES = """
from penstock import DuckDBSource, Entity, FeatureView, ParquetSource, TableSource, col
import pyarrow as pa
user = Entity("user", join_keys=["user_id"])
one, two = pa.table({{"t": [1]}}), pa.table({{"t": [1]}})
v = FeatureView("v", [user], {first}, {{"f": col("x")}})
w = FeatureView("w", [user], {second}, {{"f": col("x")}})
"""


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        ('TableSource("s", one, "t")', 'TableSource("s", one, "t", "c")', None),
        ('TableSource("s", one, "t")', 'TableSource("s", two, "t")', "another table"),
        ('DuckDBSource("SELECT 1", "t", name="s")', 'DuckDBSource("SELECT 1", "t", "c", name="s")', None),
        (
            'DuckDBSource("SELECT 1", "t", name="s")',
            'DuckDBSource("SELECT 2", "t", name="s")',
            "another query",
        ),
        ('DuckDBSource("SELECT 1", "t", name="s")', 'TableSource("s", two, "t")', None),
        ('ParquetSource("s", "t")', 'ParquetSource("s", "u")', None),
    ],
)
def test_sources_of_one_name(tmp_path: Path, first: str, second: str, fault: str | None) -> None:
    path = write(tmp_path, a=SOURCES.format(first=first, second=second))
    if fault is None:
        assert len(load_repo(path).views) == 2
    else:
        with pytest.raises(DefinitionError, match=f"source 's' of view 'w' has {fault} than the source of"):
            load_repo(path)
