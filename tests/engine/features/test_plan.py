"""Plans: what a feature list is compiled to, its names, its fingerprint, and its errors."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest

import penstock as d
from penstock import _core
from penstock.errors import (
    DefinitionError,
    FeatureNameCollisionError,
    InvalidArgumentError,
    NotFoundError,
)
from penstock.features.compute import ViewComputer
from penstock.features.expressions import col, now, percentile_rank
from penstock.features.plan import compile_plan
from penstock.features.program import Distribution
from penstock.features.sources import SourceColumn, SourceTable

SEED = bytes(16)
DAY = 86_400_000_000
REQUEST = d.RequestSource("tx", {"amount": "float64", "country": "string"})
USER, ITEM = d.Entity("user", ["user_id"]), d.Entity("item", ["item_id"])
RANKS = {col("price").fingerprint(): Distribution.fit([1.0, 2.0, 3.0])}


def source_table(texts=("a", "b")):
    def column(dtype, values, dictionary=None):
        return SourceColumn(dtype, np.array(values), None, dictionary)

    columns = {
        "user_id": column("int64", [1, 2]),
        "item_id": column("string", [0, 1], ["x", "y"]),
        "t": column("timestamp", [0, 0]),
        "price": column("float64", [2.0, 3.0]),
        "kind": column("string", [0, 1], list(texts)),
    }
    return SourceTable(columns, 2, columns["t"].values, columns["t"].values)


def make_view(name, entities, features, ttl=None):
    return d.FeatureView(
        name, entities=entities, source=d.ParquetSource("e.parquet", "t"), features=features, ttl=ttl
    )


def make(texts=("a", "b"), ranks=RANKS, ttl=None):
    views = {
        "user": make_view("user", [USER], {"n": d.count(window="1d"), "age": (now() - col("t")).days()}, ttl),
        "pair": make_view("pair", [ITEM, USER], {
            "price": col("price"), "rank": percentile_rank(col("price")),
            "late_rank": percentile_rank(col("price")) * (now() - col("t")).days(), "kind": col("kind"),
        }),
    }  # fmt: skip
    computers = {n: ViewComputer(v, source_table(texts), SEED, ranks) for n, v in views.items()}
    return views, computers


def plan_of(refs, request=None, name="s", made=None, **more):
    views, computers = made or make()
    return compile_plan(name, refs, views, computers, request, **more)


ALL = ["pair:rank", "tx:amount", "user:age", "pair:late_rank", "user:n"]


def test_a_plan_lists_views_entities_and_inputs_in_first_mention_order():
    plan = plan_of(ALL, REQUEST)
    assert plan.refs == tuple(ALL)
    assert plan.output_names == ("rank", "amount", "age", "late_rank", "n")
    assert plan.output_dtypes == ("float64", "float64", "float64", "float64", "int64")
    assert [v.name for v in plan.views] == ["pair", "user"]
    assert plan.entities == (("item_id", "string"), ("user_id", "int64"))
    assert plan.view_keys == ((0, 1), (1,))
    assert plan.inputs == (("amount", "float64"),)
    assert (plan.name, plan.on_missing, plan.request_name) == ("s", "nan", "tx")


def test_program_inputs_are_stored_columns_request_inputs_and_now():
    program = _core.FeatureProgram(plan_of(ALL, REQUEST).program)
    assert [name for name, _ in program.inputs] == [
        "pair:__column_price", "pair:__column_t", "pair:rank", "tx:amount", "user:__column_t", "user:n",
        "now",
    ]  # fmt: skip
    assert [name for name, _ in program.outputs] == ["rank", "amount", "age", "late_rank", "n"]


def test_request_time_features_use_the_distribution_of_the_source_argument():
    plan = plan_of(["pair:late_rank"])
    columns = {
        "pair:__column_price": (np.array([2.0, 3.0]), None),
        "pair:__column_t": (np.array([0, DAY]), None),
    }
    ((values, valid),) = plan.evaluate(columns, (np.array([2 * DAY, 2 * DAY]), None))
    assert values.tolist() == [0.5 * 2, 2.5 / 3 * 1] and valid.all()


def test_a_request_time_feature_of_a_missing_row_reads_nulls():
    plan = plan_of(["user:age"])
    none = (np.zeros(1, np.int64), np.zeros(1, bool))
    ((_, valid),) = plan.evaluate({"user:__column_t": none}, (np.array([5]), None))
    assert not valid.any()


def test_full_names_hold_the_view():
    plan = plan_of(["user:n", "pair:price", "tx:amount"], REQUEST, full_feature_names=True)
    assert plan.output_names == ("user__n", "pair__price", "tx__amount")
    assert plan.fingerprint == plan_of(["user:n", "pair:price", "tx:amount"], REQUEST).fingerprint


def test_two_features_of_one_name_collide_unless_names_are_full():
    views, computers = make()
    views["other"] = make_view("other", [USER], {"n": d.count(window="2d")})
    computers["other"] = ViewComputer(views["other"], source_table(), SEED)
    refs = ["user:n", "other:n"]
    with pytest.raises(FeatureNameCollisionError, match="'user:n' and 'other:n' would both be named 'n'"):
        plan_of(refs, made=(views, computers))
    names = plan_of(refs, made=(views, computers), full_feature_names=True).output_names
    assert names == ("user__n", "other__n")
    with pytest.raises(FeatureNameCollisionError, match="listed twice"):
        plan_of(["user:n", "user:n"], full_feature_names=True)


@pytest.mark.parametrize(
    "refs, message",
    [
        (["usr:n"], "no such view 'usr'; did you mean 'user'?"),
        (["zzzz:n"], "no such view 'zzzz'; expected one of pair, tx, user"),
        (["pair:prize"], "'pair:prize': no such feature 'prize'; did you mean 'price'?"),
        (["tx:amonut"], "no such request input; did you mean 'amount'?"),
        (["user:__column_t"], "no such feature '__column_t'"),
    ],
)
def test_an_unknown_name_is_an_error_that_suggests(refs, message):
    with pytest.raises(NotFoundError) as caught:
        plan_of(refs, REQUEST)
    assert message in str(caught.value) and isinstance(caught.value, LookupError)


@pytest.mark.parametrize("refs", [[], "user:n", ["user"], ["user:n:m"], [":n"], [7]])
def test_a_malformed_feature_list_is_an_error(refs):
    with pytest.raises(InvalidArgumentError, match="expected"):
        plan_of(refs)


def test_a_request_source_named_as_a_view_is_an_error():
    with pytest.raises(DefinitionError, match="has the name of a view"):
        plan_of(["user:n"], d.RequestSource("user", {"n": "int64"}))


def test_one_join_key_of_two_dtypes_is_an_error():
    views, computers = make()
    views["odd"] = make_view("odd", [d.Entity("odd", ["user_id"])], {"x": col("price")})
    table = source_table()
    table.columns["user_id"] = table.columns["item_id"]
    computers["odd"] = ViewComputer(views["odd"], table, SEED)
    with pytest.raises(DefinitionError, match="'user_id' is string in view 'odd' but int64"):
        plan_of(["user:n", "odd:x"], made=(views, computers))


def test_a_service_may_name_request_inputs_only_of_its_request():
    d.FeatureService("s", ["user:n", "tx:amount"], request=REQUEST)
    with pytest.raises(DefinitionError, match="'tx:amonut' is no request input; expected one of amount"):
        d.FeatureService("s", ["user:n", "tx:amonut"], request=REQUEST)


def test_the_fingerprint_changes_with_all_that_decides_values():
    refs = ["user:n", "pair:kind", "pair:rank"]
    other = {col("price").fingerprint(): Distribution.fit([1.0, 2.0])}
    prints = [
        plan_of(refs).fingerprint,
        plan_of(refs[::-1]).fingerprint,
        plan_of(refs, name="other").fingerprint,
        plan_of(refs, on_missing="error").fingerprint,
        plan_of(refs, made=make(texts=("b", "a"))).fingerprint,
        plan_of(refs, made=make(ranks=other)).fingerprint,
        plan_of(refs, made=make(ttl=timedelta(days=1))).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert plan_of(refs).fingerprint == prints[0]
    # A dictionary that the plan does not read does not count.
    assert plan_of(["user:n"]).fingerprint == plan_of(["user:n"], made=make(texts=("b", "a"))).fingerprint
