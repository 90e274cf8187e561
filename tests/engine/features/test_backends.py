"""Random typed programs: oracle, numpy, C++, numba and Triton give the same bits; each broken op is seen."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_programs import SCHEMA, SIZES, Case

from penstock import _core
from penstock.errors import DefinitionError
from penstock.features import oracle
from penstock.features.backends import columns, numpy_backend
from penstock.features.backends.numpy_backend import NumpyProgram
from penstock.features.expressions import col, now
from penstock.features.program import OPS, SIGNATURES, lower

QUICK = 3000  # programs; those of the mutation check too
SUPPORT = str(Path(__file__).parents[2] / "support")


def program_of(case: Case):
    return lower(case.outputs, SCHEMA, case.distributions)


def check(case: Case) -> None:
    program = program_of(case)
    assert (found := case.differs(NumpyProgram(program))) is None, f"numpy: {found}"
    assert (found := case.differs(_core.FeatureProgram(program.to_bytes()))) is None, f"C++: {found}"


def test_numpy_and_core_equal_the_oracle() -> None:
    seen: set[str] = set()
    for seed in range(QUICK):
        case = Case(seed)
        seen |= {step.op for step in program_of(case).code}
        check(case)
    for seed, rows in enumerate(SIZES * 8):
        check(Case(10_000 + seed, rows=rows))
    assert seen == set(SIGNATURES)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(4))
def test_many_programs_equal_the_oracle(part: int) -> None:
    for seed in range(100_000 + part * 25_000, 100_000 + (part + 1) * 25_000):
        check(Case(seed))


LEVELS = """
import sys
sys.path.insert(0, sys.argv[1])
from feature_programs import Case, SCHEMA
from penstock import _core
from penstock.features.program import lower
for level in (2, 1, 0):
    if _core.force_cpu_level(level) != level:
        continue
    for seed in range(400):
        case = Case(seed, rows=(1, 64, 9)[seed % 3])
        program = lower(case.outputs, SCHEMA, case.distributions)
        found = case.differs(_core.FeatureProgram(program.to_bytes()))
        assert found is None, f"level {level}: {found}"
print("ok")
"""


def run_script(text: str, *args: str, **env: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", text, SUPPORT, *args],
        capture_output=True, text=True, env={**os.environ, **env}, timeout=280,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def test_every_instruction_set_gives_the_same_bits() -> None:
    assert run_script(LEVELS).strip() == "ok"


GENERATED = """
import os, sys, json
sys.path.insert(0, sys.argv[1])
kind, first, last, outputs, depth = sys.argv[2], *map(int, sys.argv[3:7])
from feature_programs import Case, SCHEMA, SIZES, covering_programs
from penstock.features.program import lower
from importlib import import_module
compile = getattr(import_module(f"penstock.features.backends.{kind}_backend"), f"{kind.title()}Program")
ops = set()
if outputs:
    cases = (Case(n, outputs, depth, SIZES[n % len(SIZES)]) for n in range(first, last))
else:
    cases = (Case(first, rows=r, program=p) for p in covering_programs(first, 12) for r in (64, 65, 2, 0))
for case in cases:
    program = lower(case.outputs, SCHEMA, case.distributions)
    ops |= {step.op for step in program.code}
    found = case.differs(compile(program))
    assert found is None, found
assert "torch" not in sys.modules
print(json.dumps(sorted(ops)))
"""


def generated(kind: str, first: int, last: int, outputs: int, depth: int, cache: Path) -> set[str]:
    text = run_script(
        GENERATED, kind, *map(str, (first, last, outputs, depth)),
        TRITON_INTERPRET="1", PENSTOCK_CODE_CACHE=str(cache),
    )  # fmt: skip
    return set(json.loads(text))


def test_triton_equals_the_oracle_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert len(generated("triton", 0, 150, 4, 2, tmp_path)) > 60


def test_numba_equals_the_oracle_in_every_operation(tmp_path: Path) -> None:
    assert generated("numba", 0, 0, 0, 0, tmp_path) == set(SIGNATURES)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_triton_equals_the_oracle_in_many_programs(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert generated("triton", 200, 1000, 3, 3, tmp_path) == set(SIGNATURES)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_numba_equals_the_oracle_in_larger_programs(tmp_path: Path) -> None:
    assert len(generated("numba", 3, 12, 20, 2, tmp_path)) > 50


AOT = r"""
import json, random, re, sys
sys.path.insert(0, sys.argv[1])
from feature_programs import SCHEMA, random_program
from penstock.features.backends.triton_backend import BLOCK, kernel
from penstock.features.program import SIGNATURES, lower
from penstock_kernels.gpu import aot
every = sys.argv[2] == "all"
wanted = set(SIGNATURES) if every else {"exp", "mod_f", "rank", "isin_i", "mul_f", "add_f", "div_f"}
outputs, ranks, seen, seed = [], {}, set(), 0
while not wanted <= seen:
    made, fitted = random_program(random.Random(seed), 1, 2)
    seed += 1
    ops = {step.op for step in lower(made, SCHEMA, fitted).code}
    if (ops & wanted) - seen and (every or ops <= wanted | {"int_to_f"}):
        seen |= ops
        outputs.append((f"o{len(outputs)}", made[0][1]))
        ranks |= fitted
found = {}
for capability in aot.CAPABILITIES:
    cubin = aot.compile_kernel(kernel(lower(outputs, SCHEMA, ranks)), capability, {"BLOCK": BLOCK})
    counts = [len(re.findall(rf"\b{name}", cubin.ptx)) for name in (r"fma\.", r"mul\.rn\.f64")]
    found[capability] = [cubin.image[:4].hex(), *counts]
print(json.dumps(found))
"""


@pytest.mark.parametrize("operations", ["few", pytest.param("all", marks=pytest.mark.long)])
def test_a_fused_kernel_compiles_to_cubins_without_fma(operations: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    env = {"TRITON_INTERPRET": "0", "PENSTOCK_CODE_CACHE": str(tmp_path)}
    found = json.loads(run_script(AOT, operations, **env))
    assert set(found) == {"80", "90"}
    for image, fused, products in found.values():
        assert image == "7f454c46"
        assert fused == 0
        assert products > 0


def _broken(function: Callable[..., Any]) -> Callable[..., Any]:
    """A result that is off by little, in the last place of a float; a bool turned round."""

    def wrong(*args: Any) -> Any:
        found = np.asarray(function(*args))
        if found.dtype == np.bool_:
            return ~found
        if found.dtype == np.float64:
            return np.where(np.isnan(found), 0.0, np.nextafter(found, np.where(found > 0, -np.inf, np.inf)))
        return np.where((found == 0) | (found == 1), 1 - found, found + 2)

    return wrong


@pytest.fixture(scope="module")
def cases_by_op() -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for seed in range(QUICK):
        case = Case(seed)
        for op in {step.op for step in program_of(case).code}:
            found.setdefault(op, []).append(case)
    return found


@pytest.mark.parametrize("op", sorted(SIGNATURES))
def test_a_broken_numpy_operation_is_caught(op: str, cases_by_op, monkeypatch) -> None:
    name = columns.function_name(op)
    for function in (name, f"{name}_ok"):
        if function not in numpy_backend.FUNCTIONS:
            continue
        with monkeypatch.context() as patch:
            patch.setitem(numpy_backend.FUNCTIONS, function, _broken(numpy_backend.FUNCTIONS[function]))
            assert any(case.differs(NumpyProgram(program_of(case))) for case in cases_by_op[op]), function


ORACLE_OPS = sorted(
    {
        "abs", "add", "and", "bucketize", "cast", "ceil", "code", "day", "day_of_year", "div", "eq", "exp",
        "exp2", "expm1", "fill_null", "floor", "floor_div", "hash_bucket", "hour", "in_unit", "is_nan",
        "is_null", "isin", "le", "lit", "log", "log10", "log1p", "log2", "lt", "maximum", "minimum", "minute",
        "mod", "month", "mul", "neg", "not", "or", "percentile_rank", "pow", "round", "second", "sign",
        "sqrt", "sub", "tanh", "text_in", "truncate", "weekday", "where", "year",
    }
)  # fmt: skip


@pytest.mark.parametrize("op", ORACLE_OPS)
def test_a_broken_oracle_operation_is_caught(op: str, monkeypatch) -> None:
    right = oracle._meaning

    def wrong(node, args, types, setting):
        found = right(node, args, types, setting)
        if node.op != op or found is None:
            return found
        if isinstance(found, bool):
            return not found
        return found ^ 1 if isinstance(found, int) else (0.0 if found != found else found + 1.0)

    for seed in range(QUICK):
        rng_case = Case(seed)
        if op not in rng_case.operations():
            continue
        with monkeypatch.context() as patch:
            patch.setattr(oracle, "_meaning", wrong)
            broken = Case(seed)
        if broken.differs(NumpyProgram(program_of(broken))):
            return
    raise AssertionError(f"no program noticed a broken '{op}'")


def test_the_oracle_check_covers_every_operation() -> None:
    seen: set[str] = set()
    for seed in range(600):
        seen |= Case(seed).operations()
    assert seen - {"col", "now"} == set(ORACLE_OPS)


def test_operation_numbers_stay() -> None:
    named = [OPS[name] for name in ("add_f", "rank", "floor_div_f", "pow", "bucket_of")]
    assert named == [0, 45, 46, 61, 75]


def test_one_row_equals_a_column_of_one() -> None:
    for seed in range(300):
        case = Case(seed, rows=1)
        program = _core.FeatureProgram(program_of(case).to_bytes())
        row = [None if v is not None and not v[0] else a[0].item() for a, v in case.arrays]
        want = [v.item() if k.item() else None for v, k in program.run(case.arrays, rows=1)]
        names = [name for name, _ in program.inputs]
        for given in (row, tuple(row), dict(zip(names, row))):
            found = program.run_row(given)
            assert [repr(v) for v in found] == [
                repr(bool(w)) if dtype == "bool" and w is not None else repr(w)
                for w, (_, dtype) in zip(want, program.outputs)
            ]


def test_wrong_rows_are_named() -> None:
    outputs = [("x", col("f") + col("i"))]
    program = _core.FeatureProgram(lower(outputs, SCHEMA).to_bytes())
    assert program.run_row([np.float64(1.5), np.int64(2)]) == (3.5,)
    for row, match in [
        ([1.0], "row has 1 values; expected 2"),
        (["x", 1], "'f' is 'x'; expected a number"),
        ([1.0, 1.5], "'i' is 1.5; expected an int64"),
        ([1.0, 2**63], "'i' is 9223372036854775808"),
        ({"f": 1.0}, "'i' is not in the row"),
    ]:
        with pytest.raises(ValueError, match=match):
            program.run_row(row)
    with pytest.raises(TypeError, match="list, tuple or dict"):
        program.run_row(3)
    assert program.run_row([1.0, 2]) == (3.0,)


def test_a_value_that_calls_back_does_not_disturb_the_row() -> None:
    program = _core.FeatureProgram(lower([("x", col("f") - col("g"))], SCHEMA).to_bytes())

    class Calls:
        def __float__(self) -> float:
            assert program.run_row((100.0, 1.0)) == (99.0,)
            return 2.0

    assert program.run_row((5.0, Calls())) == (3.0,)


def test_columns_of_another_kind_are_refused_by_numpy() -> None:
    program = numpy_backend.compile([("x", col("f") + col("g")), ("t", now())], SCHEMA)
    assert [name for name, _ in program.inputs] == ["f", "g", "now"]
    good, times = (np.zeros(2), None), (np.zeros(2, np.int64), None)
    for bad, match in [
        ((np.zeros(2, np.int64), None), "'g'.*float64"),
        ((np.zeros(3), None), "'g' has 3 rows"),
        ((np.zeros(2), np.ones(1, bool)), "'g': validity"),
    ]:
        with pytest.raises(ValueError, match=match):
            program.run([good, bad, times])
    with pytest.raises(ValueError, match="got 1 columns; expected 3"):
        program.run([good])


def test_generated_modules_are_kept_and_repaired(tmp_path: Path, monkeypatch) -> None:
    from penstock.features.backends import generated as modules

    monkeypatch.setenv("PENSTOCK_CODE_CACHE", str(tmp_path / "code"))
    unique = f"VALUE = {random.random()!r}\n"
    module = modules.load("sample", unique)
    path = Path(str(module.__file__))
    assert path.parent == tmp_path / "code"
    assert path.parent.stat().st_mode & 0o077 == 0
    assert modules.load("sample", unique) is module
    path.write_text("VALUE = 'another'\n")
    monkeypatch.delitem(sys.modules, module.__name__)
    assert modules.load("sample", unique).VALUE == module.VALUE
    path.parent.chmod(0o777)
    open_to_all = modules.folder()
    monkeypatch.setenv("PENSTOCK_CODE_CACHE", "/proc/no/such")
    assert open_to_all == modules.folder() != path.parent
    assert modules.folder().stat().st_mode & 0o077 == 0


def test_a_back_end_refuses_a_udf() -> None:
    from penstock.features.backends import numba_backend
    from penstock.features.expressions import udf

    @udf(returns="float64")
    def twice(x):
        return x * 2

    with pytest.raises(DefinitionError, match=r"udf 'twice'.*test_backends.py:\d+"):
        numba_backend.compile([("x", twice(col("f")))], SCHEMA)
