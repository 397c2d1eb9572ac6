"""Folders in GPTQ's format, loaded and run by GPTQModel: its logits are those of our weights.

Every matrix has a format of its own, gate and up projections of one expert too.
"""

from typing import Any

import pytest
import torch
from tests.runtimes.environments import ask

import bitknap
from bitknap.allocation import formats
from bitknap.benchmarks.runtimes.scripts import LOGITS
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.rounding.methods import method
from bitknap.quantization.stacks.apply import apply

pytestmark = pytest.mark.runtime

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 32}
# Family, further settings, roles besides routed experts, and whether all grids are symmetric.
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...], bool]] = {
    "mixtral": ({}, ("attention",), False),
    "qwen3_moe": ({}, ("attention",), True),
    "qwen2_moe": ({"shared_expert_intermediate_size": 64}, ("attention", "shared"), False),
    "olmoe": ({}, (), True),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory, saved, mixed):
    """Modules that GPTQModel loaded as quantized, its logits, the units, and our logits."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("gptq")
    tokens = list(range(3, 43))
    folders, known = {}, {}
    for family, (changes, include, symmetric) in MODELS.items():
        source = saved(root / f"{family}-32", family, **_SIZES, **changes)
        model = root / family
        # What is not quantized is loaded in 16 bits, and must not be rounded by that.
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).save_pretrained(model)
        for file in source.glob("tokenizer*.json"):
            (model / file.name).write_bytes(file.read_bytes())
        even = True if symmetric else (True, False)
        offered = formats((2, 3, 4, 8), 32, even, "gptq")
        plan = mixed(model, "gptq", include, offered=offered)
        bitknap.export(plan, model, "gptq", root / f"{family}-gptq")
        live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        apply(live, walk(live, include), plan, method("rtn"))
        with torch.no_grad():
            known[family] = len(plan.units), live(torch.tensor([tokens])).logits[0]
        folders[family] = str(root / f"{family}-gptq")
    found = ask("tools", LOGITS["gptq"], {"folders": folders, "tokens": tokens})
    return {
        family: (found[f"{family} modules"], found[family], *known[family]) for family in MODELS
    }


@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_our_weights(family, exports):
    modules, found, units, known = exports[family]
    assert modules == units
    assert known.abs().max() > 1
    assert (torch.tensor(found) - known).abs().max() < 1e-4
