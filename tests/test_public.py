"""The public face: what importing loads, what is exported, and the contract's examples."""

import inspect
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import bitknap
from bitknap.testing import tiny_model

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "triton", "scipy", "rich", "click")


def run(code):
    """Run `code` in a fresh interpreter; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_importing_loads_nothing_heavy():
    code = (
        f"import sys, bitknap, bitknap.cli; print([m for m in {HEAVY[:3]!r} if m in sys.modules])"
    )
    assert run(code) == "[]"
    assert run(f"import sys, bitknap; print([m for m in {HEAVY!r} if m in sys.modules])") == "[]"


@pytest.mark.slow
def test_loading_may_be_the_first_that_is_asked_for():
    said = run("import bitknap; from bitknap.api import calibration; print(bitknap.load.__name__)")
    assert said == "load"


SOLVER_ALONE = """
import sys
import bitknap
import numpy as np
cost = np.array([[9.0, 4.0, 1.0], [5.0, 3.0, 2.0]])
nbytes = np.array([[1, 2, 4], [1, 2, 4]])
weight = np.array([[0, 0, 1], [0, 0, 1]])
bound = 1
table    = bitknap.CostTable.from_arrays(cost, nbytes)
solution = bitknap.solve(
    bitknap.Problem(table, [bitknap.Budget.bytes(6), bitknap.Limit("reads", weight, bound)])
)
assert solution.choice.tolist() == [2, 1]
assert (solution.cost, solution.bound, solution.gap) == (4.0, 4.0, 0.0)
print([m for m in ("torch", "transformers") if m in sys.modules])
"""


@pytest.mark.slow
def test_the_solver_alone_needs_no_torch():
    assert run(SOLVER_ALONE) == "[]"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_model("mixtral", vocab_size=4096).save_pretrained(folder)
    for file in (ROOT / "benchmarks" / "reference" / "mixtral").glob("tokenizer*.json"):
        shutil.copy(file, folder / file.name)
    return folder


def test_the_main_example(model, tmp_path):
    table = bitknap.estimate(
        model,
        estimator=bitknap.Fisher(),
        formats=bitknap.formats(bits=(2, 3, 4, 8), group_size=64),
        text=str(ROOT / "LICENSE"),
        calibration=bitknap.Calibration(tokens=256),
    )
    table = table.tie(bitknap.profile("expert")).pin("layer=0", bits=8)
    weight = table.nbytes * (table.units.layer == 1)[:, None]
    bound = 0.6 * weight.max(1).sum()
    limits: list[bitknap.Limit | bitknap.Budget]
    limits = [bitknap.Budget.bits(9), bitknap.Limit("rank0 bytes", weight, bound)]
    problem = bitknap.Problem(table, limits)
    solution = bitknap.solve(problem, bitknap.Knapsack())
    assert solution.cost >= solution.bound
    assert solution.gap >= 0
    assert solution.seconds > 0
    plan = solution.plan
    assert {plan.format_of(int(i)).bits for i in np.flatnonzero(plan.units.layer == 0)} == {8}
    assert plan.nbytes[plan.units.layer == 1].sum() <= bound
    sizes = bitknap.quantize(model, plan, tmp_path / "out")
    assert sizes["predicted"] == sizes["written"]
    packed = bitknap.load(tmp_path / "out")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.isfinite(packed(input_ids=ids).logits).all()
    losses = bitknap.evaluate(tmp_path / "out", model, text=str(ROOT / "LICENSE"), tokens=128)
    assert losses.kl.mean() > 0
    assert losses.perplexity > 1


def test_everything_exported_is_there():
    assert sorted(bitknap.__all__) == bitknap.__all__
    for name in bitknap.__all__:
        assert getattr(bitknap, name) is not None
        assert name in dir(bitknap)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bitknap.nonsense
    assert bitknap.__version__.count(".") == 2


def test_every_public_name_is_what_it_says():
    import bitknap.quantization

    assert isinstance(bitknap.quantize, types.FunctionType)
    assert list(inspect.signature(bitknap.quantize).parameters)[:3] == ["model", "plan", "out"]
    assert isinstance(bitknap.quantization, types.ModuleType)
    assert not callable(bitknap.quantization)
    for name in bitknap.__all__:
        assert not isinstance(getattr(bitknap, name), types.ModuleType), name


def test_errors_have_one_root():
    from bitknap import errors

    for name in ("InputError", "FileError", "ModelError", "MismatchError", "InfeasibleError"):
        assert issubclass(getattr(errors, name), bitknap.BitknapError)
