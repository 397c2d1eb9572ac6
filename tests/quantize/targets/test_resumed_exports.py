"""Exports that were stopped go on from their finished pieces, and end with the same bytes."""

import pytest

from bitknap.allocation import BitPlan
from bitknap.api.exporting import export
from bitknap.api.requests import Calibration, Resume
from bitknap.errors import MismatchError

# Target, and the name of the output, which decides what is written for llama.cpp.
WAYS = [
    *(("mlx", "out"), ("compressed-tensors", "out"), ("gptq", "out")),
    *(("gguf", "out.gguf"), ("gguf", "out")),
]


@pytest.fixture(scope="module")
def model(saved, tmp_path_factory):
    """A model with rows that every target takes, and a tokenizer."""
    folder = tmp_path_factory.mktemp("resumed") / "model"
    return saved(folder, hidden_size=64, intermediate_size=96, head_dim=32)


def written(model, plan, target, out, *, at=None, overwrite=False):
    """Export a plan, and stop after some pieces; return what progress said."""
    said = []

    def progress(what, done, of):
        said.append((what, done, of))
        if what == "export" and done == at:
            raise KeyboardInterrupt

    asked = Calibration(text=["a text for calibration, long enough " * 40], tokens=64)
    resume = Resume(overwrite=overwrite)
    export(plan, model, target, out, calibration=asked, resume=resume, progress=progress)
    return [(done, of) for what, done, of in said if what == "export"]


@pytest.mark.parametrize(("target", "name"), WAYS)
def test_a_stopped_export_goes_on_where_it_was(target, name, model, mixed, tmp_path, contents):
    plan = mixed(model, target)
    written(model, plan, target, tmp_path / "whole" / name)
    out = tmp_path / "stopped" / name
    with pytest.raises(KeyboardInterrupt) as stop:
        written(model, plan, target, out, at=12)
    partial = out.parent / f".{name}.partial"
    assert str(stop.value).endswith(f"kept in {partial}, and the same command goes on from there")
    assert not out.exists()
    said = written(model, plan, target, out)
    assert said[0][0] >= 12
    assert len(said) <= said[0][1] - 12
    assert contents(out.parent) == contents(tmp_path / "whole")
    assert [file.name for file in out.parent.iterdir()] == [name]


def test_unfinished_files_of_another_plan_are_refused(model, mixed, tmp_path):
    out, plan, other = tmp_path / "out", mixed(model, "gptq"), mixed(model, "gptq", seed=1)
    with pytest.raises(KeyboardInterrupt):
        written(model, plan, "gptq", out, at=12)
    with pytest.raises(MismatchError, match="belongs to another layout, plan, texts; give"):
        written(model, other, "gptq", out)
    written(model, other, "gptq", out, overwrite=True)
    found = BitPlan.load(out / "bitknap_plan.json")
    assert [found.format_of(n) for n in range(9)] == [other.format_of(n) for n in range(9)]
