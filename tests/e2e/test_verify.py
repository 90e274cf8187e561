"""`penstock features verify` over what a server has served."""

from __future__ import annotations

import json
import shutil

import pyarrow.compute as pc
import pyarrow.parquet as pq


def serve_all(served, shop, step=50):
    """Ask for every row at its own time, a few at a time, and return how many."""
    caller = served.raw()
    n = len(shop.columns["now_us"])
    for row in range(0, n, step):
        rows = slice(row, row + step)
        now = int(shop.columns["now_us"][rows].max())
        made = caller.call("predict", "buy", shop.entities(rows), shop.inputs(rows), {"now": now})
        assert "scores" in made, made
    return n


def verified(penstock, config, code):
    done = penstock("features", "verify", "--config", config, "--json")
    assert done.returncode == code, done.stderr
    (report,) = json.loads(done.stdout)
    return report


def test_what_was_served_is_made_again_and_a_changed_past_is_found(shop, serve, penstock, tmp_path):
    repo = tmp_path / "feature_repo"
    shutil.copytree(shop.folder / "feature_repo", repo)
    config = shop.config(
        tmp_path, feature_store={"repo_path": str(repo)}, monitoring={"skew": {"share": 1.0}}
    )
    served = serve(config)
    rows = serve_all(served, shop)
    counts = served.raw().call("stats")["models"]["buy"]
    assert counts["samples"] >= rows / 50 and counts["samples_dropped"] == 0
    assert served.stop() == 0
    report = verified(penstock, config, 0)
    assert (report["vectors"], report["mismatches"], report["other_definitions"]) == (rows, 0, 0)
    assert len(report["features"]) == shop.rows.shape[1]

    source = repo / "data" / "transactions.parquet"
    table = pq.read_table(source)
    column = table.column_names.index("amount")
    pq.write_table(table.set_column(column, "amount", pc.add(table["amount"], 1.0)), source)
    report = verified(penstock, config, 1)
    wrong = {name for name, found in report["features"].items() if found["mismatches"]}
    assert wrong and all("user_features" in name for name in wrong)
    text = penstock("features", "verify", "--config", config)
    assert text.returncode == 1 and f"{rows} vectors" in text.stdout and "made again" in text.stdout


def test_only_the_chosen_share_of_the_keys_is_looked_at(shop, serve, penstock, tmp_path):
    config = shop.config(tmp_path / "none", monitoring={"skew": {"share": 0}})
    served = serve(config)
    serve_all(served, shop)
    assert served.raw().call("stats")["models"]["buy"]["samples"] == 0
    assert served.stop() == 0
    done = penstock("features", "verify", "--config", config)
    assert done.returncode == 0 and "no vectors are logged" in done.stdout
    config = shop.config(tmp_path / "half", monitoring={"skew": {"share": 0.5}})
    served = serve(config)
    serve_all(served, shop, 1)
    first = served.raw().call("stats")["models"]["buy"]["samples"]
    serve_all(served, shop, 1)
    assert served.raw().call("stats")["models"]["buy"]["samples"] == 2 * first  # the same keys again
    n = len(shop.columns["now_us"])
    assert 0 < first < n
