"""The packed checkpoint: exact bytes, exact weights, and whole or not at all."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitknap
from bitknap.allocation import BitPlan, Format, formats
from bitknap.disk.manifest import MANIFEST, sign
from bitknap.errors import BitknapError, InputError, MismatchError, ModelError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.folder import roles_of
from bitknap.quantization.runtime import loading
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks.apply import apply
from bitknap.testing import mixed_plan, tiny_model
from bitknap.testing.comparing import logits

OVER = bitknap.Resume(overwrite=True)
GRIDS = formats(range(1, 9), (8, 32, "row"), (False, True), ("fp16", "compact"))
FAMILIES = (
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "nemotron_h",
    "llama4_text",
    "switch_transformers",
    "qwen2_moe",
)


def keep_of(dtype):
    return Format.keep({torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])


def saved(folder, family="mixtral", dtype=torch.float32, **changes):
    tiny_model(family, **changes).to(dtype).save_pretrained(folder)
    return folder


def plan_for(folder, include=(), dtype=torch.float32, seed=0):
    """Return a plan that mixes all formats at random, kept precision among them."""
    source = Checkpoint.open(folder)
    units = walk_headers(source.config, source.shapes, include).units
    options = (*GRIDS, keep_of(dtype))
    return mixed_plan(units, options, seed, model=source.fingerprint)


def stream_bytes(folder):
    """Measure from the headers, read by hand."""
    total = 0
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        for name, entry in header.items():
            if name.startswith("bitknap."):
                assert entry["dtype"] == "U8"
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


def folder_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check(folder, plan, out, dtype=torch.float32):
    """Quantize, load back, and compare with the plan applied in memory."""
    sizes = bitknap.quantize(folder, plan, out)
    assert sizes["predicted"] == sizes["written"] == plan.total_bytes == stream_bytes(out)
    assert sizes["checkpoint"] == folder_bytes(out)
    source = Checkpoint.open(folder)
    roles = roles_of(plan.units)
    on_disk = walk_headers(source.config, source.shapes, roles)
    assert folder_bytes(out) <= writer.fixed_bytes(source, on_disk) + plan.total_bytes

    expected = loading.load(folder)
    assert expected.dtype == dtype
    original = logits(expected)
    apply(expected, walk(expected, roles), plan)
    found = bitknap.load(out)
    assert type(found) is type(expected)
    assert not found.training
    theirs = dict(expected.state_dict())
    ours = dict(found.state_dict())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(logits(found), logits(expected))
    assert not torch.equal(logits(found), original)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_model_is_the_one_in_memory(family, tmp_path):
    folder = saved(tmp_path / "source", family)
    check(folder, plan_for(folder), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_in_bf16_too(family, tmp_path):
    # torch's grouped product wants bf16 rows of a multiple of 16 bytes.
    changes = {"moe_intermediate_size": 16} if family == "qwen2_moe" else {}
    folder = saved(tmp_path / "source", family, torch.bfloat16, **changes)
    plan = plan_for(folder, dtype=torch.bfloat16)
    check(folder, plan, tmp_path / "out", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "llama4_text"])
def test_with_every_role(family, tmp_path):
    folder = saved(tmp_path / "source", family)
    plan = plan_for(folder, ("attention", "shared", "dense"))
    assert "attention" in roles_of(plan.units)
    check(folder, plan, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("format", GRIDS, ids=lambda f: f.name)
def test_predicted_bytes_are_written_in_every_format(format, tmp_path, mixtral):
    plan = BitPlan.uniform(mixtral.plan.units, format, mixtral.plan.model)
    sizes = bitknap.quantize(mixtral.folder, plan, tmp_path / "out")
    assert sizes["predicted"] == sizes["written"] == stream_bytes(tmp_path / "out")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A saved model with a plan, and a packed checkpoint; all read only."""
    root = tmp_path_factory.mktemp("mixtral")
    folder = saved(root / "source")
    plan = plan_for(folder)
    bitknap.quantize(folder, plan, root / "packed")
    return SimpleNamespace(folder=folder, plan=plan, packed=root / "packed")


def test_load_rounds_once_to_the_dtype_asked_for(mixtral):
    exact = bitknap.load(mixtral.packed, torch.float32).state_dict()
    half = bitknap.load(mixtral.packed, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name


def test_two_runs_write_the_same_bytes(mixtral, tmp_path, contents):
    bitknap.quantize(mixtral.folder, mixtral.plan, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(mixtral.packed)


def test_a_plan_from_its_file_writes_the_same_bytes(mixtral, tmp_path, contents):
    mixtral.plan.save(tmp_path / "plan.json")
    bitknap.quantize(mixtral.folder, BitPlan.load(tmp_path / "plan.json"), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(mixtral.packed)


def test_other_files_travel_along(mixtral, tmp_path):
    folder = shutil.copytree(mixtral.folder, tmp_path / "source")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "old.bin").write_bytes(b"1")
    bitknap.quantize(folder, mixtral.plan, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "old.bin").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitknap"


def test_shards_in_and_out(mixtral, tmp_path):
    folder = tmp_path / "source"
    tiny_model("mixtral").save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert Checkpoint.open(folder).fingerprint == mixtral.plan.model
    bitknap.quantize(folder, mixtral.plan, tmp_path / "out")
    assert torch.equal(logits(bitknap.load(tmp_path / "out")), logits(bitknap.load(mixtral.packed)))


def test_an_existing_folder_is_left_alone(mixtral, tmp_path, contents):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="exists"):
        bitknap.quantize(mixtral.folder, mixtral.plan, out)
    with pytest.raises(InputError, match=r"out: mine\.txt was not written by Bitknap"):
        bitknap.quantize(mixtral.folder, mixtral.plan, out, resume=OVER)
    assert contents(tmp_path) == {"out/mine.txt": b"keep me"}
    (out / "mine.txt").unlink()
    for _ in range(2):  # an empty folder, and one of its own
        bitknap.quantize(mixtral.folder, mixtral.plan, out, resume=OVER)
        assert contents(out) == contents(mixtral.packed)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def nothing_left(tmp_path, *known):
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(known)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.2.w2.weight", "model.layers.0.self_attn.q_proj.weight"]
)
def test_a_nan_leaves_what_was_there(mixtral, tmp_path, name, contents):
    folder = shutil.copytree(mixtral.folder, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    name = name if name in tensors else name.replace(".mlp.", ".block_sparse_moe.")
    tensors[name][-1, -1] = float("nan")  # beyond what the fingerprint samples
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN or infinite") as error:
        bitknap.quantize(folder, mixtral.plan, tmp_path / "out")
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    # What was there before stays when its replacement fails.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    sign(tmp_path / "out")
    with pytest.raises(ModelError):
        bitknap.quantize(folder, mixtral.plan, tmp_path / "out", resume=OVER)
    nothing_left(tmp_path, "source", "out", ".out.partial")
    assert contents(tmp_path / "out").keys() == {"old", MANIFEST}


def test_a_plan_for_another_model_is_refused(mixtral, tmp_path):
    other = saved(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match=f"the plan is for model {mixtral.plan.model}"):
        bitknap.quantize(other, mixtral.plan, tmp_path / "out")
    nameless = BitPlan.from_choice(mixtral.plan.units, mixtral.plan.formats, mixtral.plan.choice)
    with pytest.raises(MismatchError, match="model unknown"):
        bitknap.quantize(mixtral.folder, nameless, tmp_path / "out")
    nothing_left(tmp_path, "other")


def test_keeping_another_precision_than_the_sources_is_refused(mixtral, tmp_path):
    plan = BitPlan.uniform(mixtral.plan.units, Format.keep("bf16"), mixtral.plan.model)
    with pytest.raises(MismatchError, match=r"keep-bf16.*fp32"):
        bitknap.quantize(mixtral.folder, plan, tmp_path / "out")
    nothing_left(tmp_path)


def test_a_full_disk_keeps_what_is_done(mixtral, tmp_path, monkeypatch, contents):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_texts", full)
        with pytest.raises(
            BitknapError, match=r"out: no space left .*; (\d+) of \1 pieces are kept"
        ):
            bitknap.quantize(mixtral.folder, mixtral.plan, tmp_path / "out")
    nothing_left(tmp_path, ".out.partial")
    bitknap.quantize(mixtral.folder, mixtral.plan, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(mixtral.packed)
    nothing_left(tmp_path, "out")
