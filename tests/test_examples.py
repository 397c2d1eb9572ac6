"""Every file in `examples/` runs, and shows what it says it shows."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"


def load(name):
    """Load an example in this process."""
    spec = spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name):
    """Load an example and run its `main`."""
    module = load(name)
    return module, module.main()


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_own_")}
    assert tested == {path.stem for path in FOLDER.glob("*.py")}


def test_own_solver():
    module, (ours, best) = run("own_solver")
    assert ours.solver == module.StepDown.name
    assert best.cost < ours.cost < 1.1 * best.cost
    assert ours.plan.total_bytes <= 80_000


def test_own_limit():
    _, (free, bound) = run("own_limit")
    assert free.cost < bound.cost
    assert list(bound.used) == ["memory", "decode time"]


@pytest.mark.slow
def test_own_estimator():
    module, solution = run("own_estimator")
    assert 2.9 < solution.plan.bpw <= 3
    assert solution.cost > 0
    assert module.SquaredError.needs == frozenset()


def test_own_signal():
    _, means = run("own_signal")
    assert list(means) == [0, 1, 2, 3]
    assert all(2 <= mean <= 4 for mean in means.values())


def test_own_rounding(capsys):
    _, errors = run("own_rounding")
    assert errors["rtn"] < errors["min-max"] < 2 * errors["rtn"]
    assert "packed by min-max" in capsys.readouterr().out


@pytest.mark.parametrize("metadata", ["fp16", "compact", "compact6"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_rounding_of_the_example_suits_every_grid(metadata, symmetric):
    import torch

    import bitknap

    weights = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    format = bitknap.Format(4, 32, symmetric=symmetric, metadata=metadata)
    rounded = load("own_rounding").MinMax().quantize(weights, format).dequantize().view_as(weights)
    assert (rounded - weights).abs().max() < 0.5


def test_own_source():
    _, solution = run("own_source")
    assert len(solution.plan.units) == 24
    # Experts with larger weights, which come last, get more bits.
    assert solution.choice[-3:].mean() > solution.choice[:3].mean()


def test_own_target():
    _, written = run("own_target")
    assert written.files == ("tiles.json",)
    assert written.checks == ("96 units have a width",)
