"""Whole families, end to end: text to costs to plan to files to a model, exact to the bit."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import bitknap
from bitknap.allocation import ROLES, Format, formats
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.runtime import loading
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks.apply import apply
from bitknap.testing.comparing import logits

TEXT = str(Path(__file__).parent.parent.parent.parent / "LICENSE")  # short: quick to tokenize
TOKENS = 128
OPTIONS = (*formats((2, 3, 4, 8), (8, "row"), (False, True)), Format.keep("fp32"))
NAMED = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "deepseek_v2",
    "deepseek_v3",
    "olmoe",
    "gpt_oss",
    "glm4_moe",
    "minimax",
    "granitemoe",
)
# Their experts have a forward of their own; so the gain of every group is measured too.
OWN_FORWARD = ("llama4_text", "switch_transformers", "dbrx", "longcat_flash")
ALL = ("attention", "dense", "shared")


def computed(model):
    # Products of matrices at other addresses may round differently: a copy is always aligned.
    return logits(deepcopy(model), use_cache=False)


def stream_bytes(folder):
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if name.startswith("bitknap.")]  # noqa: SIM118
            total += sum(opened.get_slice(name).get_shape()[0] for name in names)
    return total


def check_reloaded(folder, plan, out, include):
    """Quantize; what is loaded is the model in memory with the same plan, exact to the bit."""
    sizes = bitknap.quantize(folder, plan, out)
    assert sizes["predicted"] == sizes["written"] == plan.total_bytes == stream_bytes(out)
    assert sizes["checkpoint"] == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    expected = loading.load(folder)
    original = computed(expected)
    apply(expected, walk(expected, include), plan)
    found = bitknap.load(out)
    assert type(found) is type(expected)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert torch.equal(computed(found), computed(expected))
    assert not torch.equal(computed(found), original)


def planned(folder, estimator, include, bits=4.0):
    """Return a table from a calibration text, and the best plan of a budget that mixes formats."""
    table = bitknap.estimate(
        folder,
        estimator,
        bitknap.Formats(options=OPTIONS, protect=0),
        calibration=bitknap.Calibration(text=TEXT, tokens=TOKENS, include=include),
    )
    assert np.isfinite(table.cost).all()
    assert (table.cost[:, :-1] > 0).all()
    assert not table.cost[:, -1].any()
    plan = bitknap.solve(bitknap.Problem(table, bitknap.Budget.bits(bits))).plan
    assert 8 * plan.total_bytes <= bits * plan.units.numel.sum()
    assert len(np.unique(plan.choice)) > 1
    return table, plan


@pytest.mark.slow
@pytest.mark.parametrize("family", [*NAMED, *OWN_FORWARD])
def test_a_family_from_text_to_files_and_back(family, tmp_path, saved):
    folder = saved(tmp_path / "model", family)
    measured = family in OWN_FORWARD
    table, plan = planned(folder, bitknap.Calibrated() if measured else bitknap.SecondMoments(), ())
    layout = walk(loading.load(folder))
    assert len(table.units) == len(layout.units)
    assert table.provenance["model"] == Checkpoint.open(folder).fingerprint
    assert table.provenance["unit"] == "nats/token"
    assert ("measurements" in table.provenance) == measured
    seen = {layer for layer, _, _ in table.provenance["coverage"]}
    assert seen <= {layer.layer for layer in layout.layers}
    check_reloaded(folder, plan, tmp_path / "out", ())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dense"),
    [("qwen3_next", False), ("deepseek_v3", True), ("llama4_text", True), ("dbrx", False)],
)
def test_every_role(family, dense, tmp_path, saved):
    folder = saved(tmp_path / "model", family)
    _, plan = planned(folder, bitknap.SecondMoments(), ALL)
    found = {ROLES[role] for role in plan.units.role}
    assert found >= {"routed", "attention"}
    assert ("dense" in found) == dense
    check_reloaded(folder, plan, tmp_path / "out", ALL)


@pytest.fixture(scope="module")
def dense(saved, tmp_path_factory):
    """A model without experts."""
    return saved(tmp_path_factory.mktemp("dense") / "model", "llama")


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [bitknap.SecondMoments(), bitknap.Calibrated()])
def test_a_model_without_experts(estimator, dense, tmp_path):
    roles = ("attention", "dense")
    table, plan = planned(dense, estimator, roles)
    assert {ROLES[role] for role in plan.units.role} == set(roles)
    assert len(plan.units) == 2 * (4 + 3)
    assert not table.provenance["coverage"]
    check_reloaded(dense, plan, tmp_path / "out", roles)


@pytest.mark.slow
def test_a_model_without_experts_at_the_command_line(dense, tmp_path, document):
    include = ("--include", "attention,dense")
    report = document("inspect", dense, *include)
    assert (report["moe_layers"], report["experts_per_layer"], report["units"]) == (0, 0, 14)
    table, plan, out = (tmp_path / name for name in ("t.safetensors", "plan.json", "out"))
    given = ("--text", TEXT, "--tokens", TOKENS, "--formats", "2,4", "--group-size", "8", *include)
    document("estimate", dense, *given, "-o", table)
    document("solve", table, "--budget", "5bpw", "-o", plan)
    sizes = document("quantize", dense, "--plan", plan, "-o", out)
    assert sizes["bytes_predicted"] == sizes["bytes_on_disk"] == stream_bytes(out)
    # In one go too, to the same bytes.
    sizes = document("quantize", dense, "--budget", "5bpw", *given, "-o", tmp_path / "again")
    assert sizes["bytes_on_disk"] == stream_bytes(out)
    found = bitknap.load(out)
    assert torch.equal(computed(found), computed(bitknap.load(tmp_path / "again")))
    losses = bitknap.evaluate(out, dense, text=TEXT, tokens=TOKENS)
    assert 0 < losses.kl.mean() < 5


@pytest.mark.parametrize("command", ["inspect", "estimate"])
def test_a_model_without_experts_names_the_way_out(command, dense, tmp_path, refused):
    extra = ("-o", tmp_path / "t.safetensors") if command == "estimate" else ()
    assert refused(command, dense, *extra) == (
        "bitknap: the model has no routed experts; pass --include attention,dense to plan the rest"
    )
