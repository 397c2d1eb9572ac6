"""transformers and packed checkpoints: it loads them, saves them, and never makes experts up."""

import copy
import inspect
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MixtralForCausalLM,
)

import bitknap
from bitknap.allocation import BitPlan, formats
from bitknap.errors import FileError, ModelError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.packed.folder import PLAN, roles_of
from bitknap.quantization.runtime import loading
from bitknap.quantization.runtime.layers import packed_weights
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks.row_blocks import block_units
from bitknap.testing import packed_checkpoint, random_plan, tiny_model
from bitknap.testing.comparing import IDS, logits, packed_tensors, same_tensors
from bitknap.transformers_hook import TABLE, install

GRIDS = formats(range(1, 9), (8, 32, "row"), (False, True), ("fp16", "compact"))
FAMILIES = ("mixtral", "gpt_oss", "nemotron_h", "llama4_text", "dbrx")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_what_the_dequantized_one_does(family, tmp_path):
    include = ("attention", "shared", "dense")
    folder = packed_checkpoint(tmp_path, family, include)
    expected = loading.load(folder)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert type(found) is type(expected)
    assert not found.training
    assert torch.equal(logits(found), logits(expected))
    units = walk(expected, roles_of(BitPlan.load(folder / PLAN).units)).units
    packed = sum(weight.shape[-2] * weight.shape[-1] for weight in packed_weights(found))
    assert 0 < packed <= units.numel.sum()
    found.save_pretrained(tmp_path / "again")
    assert same_tensors(folder, tmp_path / "again")
    assert torch.equal(logits(loading.load(tmp_path / "again")), logits(expected))


@pytest.mark.slow
def test_experts_that_are_modules_of_their_own(tmp_path):
    folder = packed_checkpoint(tmp_path, "switch_transformers", ("attention", "dense"))
    found = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert torch.equal(logits(found), logits(loading.load(folder)))
    found.save_pretrained(tmp_path / "again")
    assert same_tensors(folder, tmp_path / "again")


def test_experts_beside_which_others_are_stored_cannot_stay_packed(tmp_path):
    folder = packed_checkpoint(tmp_path, "longcat_flash")
    with pytest.raises(ModelError, match=r"gate_up_proj: only 1\d+ .* bitknap.load\(folder\)"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert loading.load(folder) is not None


@pytest.mark.slow
def test_blocks_of_rows(tmp_path):
    source, out = tmp_path / "source", tmp_path / "packed"
    tiny_model("gpt_oss").save_pretrained(source)
    checkpoint = Checkpoint.open(source)
    units, _ = block_units(walk_headers(checkpoint.config, checkpoint.shapes).units, 3)
    bitknap.quantize(source, random_plan(units, GRIDS, model=checkpoint.fingerprint), out)
    assert torch.equal(logits(loading.load(out, packed=True)), logits(loading.load(out)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype, packed):
    found = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
    expected = loading.load(packed, dtype)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(logits(found), logits(expected))
    # Streams stay what they are, whatever dtype they are read in.
    assert {b.dtype for n, b in found.named_buffers() if "bitknap" in n} == {torch.uint8}


@pytest.mark.slow
def test_of_a_bf16_source(tmp_path):
    folder = packed_checkpoint(tmp_path, dtype=torch.bfloat16)
    found = loading.load(folder, packed=True)
    assert found.dtype == torch.bfloat16
    assert torch.equal(logits(found), logits(loading.load(folder)))


def test_parameters_that_stay_float32(packed, monkeypatch):
    monkeypatch.setattr(MixtralForCausalLM, "_keep_in_fp32_modules", ["q_proj"])
    found, expected = (
        load(packed, dtype=torch.float16)
        for load in (AutoModelForCausalLM.from_pretrained, loading.load)
    )
    for name, dtype in (("q_proj", torch.float32), ("k_proj", torch.float16)):
        ours, theirs = (
            m.model.layers[0].self_attn.get_submodule(name).weight for m in (found, expected)
        )
        assert ours.dtype == theirs.dtype == dtype
        assert torch.equal(ours, theirs)


def test_changing_the_dtype_later(packed, exact):
    found = AutoModelForCausalLM.from_pretrained(packed)
    logits(found)
    expected = copy.deepcopy(exact).to(torch.bfloat16)
    assert torch.equal(logits(found.to(torch.bfloat16)), logits(expected))


def test_generate(packed, exact):
    found = AutoModelForCausalLM.from_pretrained(packed)
    tokens = [
        m.generate(IDS, max_new_tokens=6, do_sample=False, min_new_tokens=6) for m in (found, exact)
    ]
    assert torch.equal(*tokens)
    assert tokens[0].shape == (2, 14)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_way_to_run_experts(implementation, packed):
    options = {"experts_implementation": implementation}
    found = AutoModelForCausalLM.from_pretrained(packed, **options)
    expected = loading.load(packed)
    expected.set_experts_implementation(implementation)
    assert torch.equal(logits(found), logits(expected))


def test_on_a_device(packed, exact):
    pytest.importorskip("accelerate")
    for where in ("cpu", {"": "cpu"}):
        found = AutoModelForCausalLM.from_pretrained(packed, device_map=where)
        assert torch.equal(logits(found), logits(exact))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(packed, exact):
    pytest.importorskip("accelerate")
    found = AutoModelForCausalLM.from_pretrained(packed, device_map={"": 0})
    with torch.no_grad():
        there = found(input_ids=IDS.cuda()).logits.cpu()
    torch.testing.assert_close(there, logits(exact), rtol=1e-3, atol=1e-4)
    moved = loading.load(packed, packed=True).cuda()
    for one, other in zip(packed_weights(found), packed_weights(moved), strict=True):
        assert torch.equal(one.whole(), other.whole())


def drop_stream(folder):
    tensors = packed_tensors(folder)
    tensors.pop("bitknap.1.routed.up")
    save_file(tensors, folder / "bitknap.safetensors", metadata={"format": "pt"})


def truncate(folder):
    file = folder / "bitknap.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def drop_plan(folder):
    (folder / PLAN).unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (drop_stream, FileError, "tensor bitknap.1.routed.up is missing"),
        (truncate, Exception, None),  # transformers reads headers first, and says so its own way
        (drop_plan, FileError, f"{PLAN}: missing"),
    ],
)
def test_damage_is_reported_by_transformers_too(damage, error, message, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "packed")
    damage(folder)
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(FileError):
        loading.load(folder, packed=True)


def test_a_state_dict_is_not_a_packed_checkpoint(packed, exact):
    config = AutoConfig.from_pretrained(packed)
    with pytest.raises(ModelError, match="from its folder"):
        MixtralForCausalLM.from_pretrained(None, config=config, state_dict=exact.state_dict())


def run(code, **environment):
    """Run `code` in a fresh interpreter; return its output."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return done.stdout.split()


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError) as error:
        print("import_bitknap" if "import bitknap" in str(error) else error)
assert "bitknap" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, type(model.model.layers[0].mlp.experts).__name__)
"""


@pytest.mark.slow
def test_without_bitknap_no_experts_are_made_up(packed, tmp_path):
    renamed = shutil.copytree(packed, tmp_path / "renamed")
    (renamed / "bitknap.safetensors").rename(renamed / "model.safetensors")
    code = WITHOUT.replace("sys.argv[1:]", repr([str(packed), str(renamed)]))
    code = code.replace("sys.argv[1]", repr(str(packed)))
    found = run(code, HF_HOME=str(tmp_path / "hub"))
    assert found[:2] == ["import_bitknap", "import_bitknap"]
    # Where code of checkpoints may run, the checkpoint imports Bitknap itself.
    assert found[2:] == ["MixtralForCausalLM", "PackedMixtralExperts"]


WITH = """
import sys
import bitknap
print([m for m in ("torch", "transformers", "bitknap.quantize") if m in sys.modules])
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(FOLDER)
print(type(model.model.layers[0].mlp.experts).__name__)
"""


@pytest.mark.slow
def test_importing_bitknap_is_enough(packed):
    assert run(WITH.replace("FOLDER", repr(str(packed)))) == ["[]", "PackedMixtralExperts"]


DIRECT = """
import bitknap.quantization.runtime.transformers_plugin as plugin
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["bitknap"] is plugin.BitknapQuantizer)
"""


@pytest.mark.slow
def test_the_plug_in_can_be_imported_before_transformers():
    assert run(DIRECT) == ["True"]


def test_the_hook_is_there_once():
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before
    assert sys.modules[TABLE].AUTO_QUANTIZER_MAPPING["bitknap"].__name__ == "BitknapQuantizer"
    # Whoever looks for the source of that module finds it, as without the hook.
    assert str(inspect.getsourcefile(sys.modules[TABLE])).endswith("auto.py")


@pytest.mark.slow
def test_loading_may_be_the_first_to_import_transformers():
    # The plug-in's own import runs the hook, which must not meet it half made.
    code = """
import bitknap.quantization.runtime.loading
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("bitknap" in AUTO_QUANTIZER_MAPPING)
"""
    assert run(code) == ["True"]
