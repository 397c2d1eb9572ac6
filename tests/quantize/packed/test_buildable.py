"""What transformers could not load is refused before any work, and says which part is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitknap
from bitknap.api.inspection import inspect
from bitknap.errors import BitknapError, ModelError
from bitknap.quantization.packed.buildable import check_loadable, check_source
from bitknap.quantization.source.architecture import config_of, hollow
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.transformers_calls import calling_transformers
from bitknap.testing import FAMILIES, packed_checkpoint, tiny_model
from bitknap.testing.wrapped import WRAPPED, wrapped_model

# LLaMA has no experts and JetMoE none that Bitknap knows.
WITH_EXPERTS = [family for family in FAMILIES if family not in ("llama", "jetmoe")]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buildable") / "model"
    tiny_model("mixtral", num_hidden_layers=3).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(mixtral, tmp_path):
    return shutil.copytree(mixtral, tmp_path / "model")


def edited(folder, change=None, **values):
    """Change tensors and values of config.json; None takes a value out."""
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads((folder / "config.json").read_text()), **values}
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("family", [*WITH_EXPERTS, *WRAPPED])
def test_every_family_is_buildable(family, tmp_path):
    make = wrapped_model if family in WRAPPED else tiny_model
    make(family).save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    assert check_source(source).layers
    check_loadable(source, reads_text=True)


def expert_too_many(tensors):
    for name in [n for n in tensors if ".layers.1." in n and ".experts.3." in n]:
        tensors[name.replace("experts.3.", "experts.4.")] = tensors[name].clone()


def expert_too_few(tensors):
    for name in [n for n in tensors if ".layers.1." in n and ".experts.3." in n]:
        del tensors[name]


def expert_with_a_gap(tensors):
    for name in [n for n in tensors if ".layers.1." in n and ".experts.1." in n]:
        del tensors[name]


def one_matrix_missing(tensors):
    del tensors[next(n for n in sorted(tensors) if ".experts.1.w2" in n)]


def one_matrix_wider(tensors):
    name = next(n for n in sorted(tensors) if ".experts.1.w2" in n)
    tensors[name] = torch.ones(16, 25)


def layer_without_experts(tensors):
    for name in [n for n in tensors if ".layers.1." in n and ".experts." in n]:
        del tensors[name]


def no_norm(tensors):
    del tensors["model.norm.weight"]


def no_head(tensors):
    del tensors["lm_head.weight"]


def wider_norm(tensors):
    tensors["model.norm.weight"] = torch.ones(17)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (expert_too_many, "experts"),
        (expert_too_few, "experts"),
        (expert_with_a_gap, "expert"),
        (one_matrix_missing, "expert"),
        (one_matrix_wider, "expert"),
        (layer_without_experts, "layer 1"),
        (no_norm, "model.norm.weight"),
        (no_head, "lm_head.weight"),
        (wider_norm, "model.norm.weight"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_weights_that_are_not_the_configs(damage, part, copy):
    with pytest.raises(ModelError, match=part):
        check_source(edited(copy, damage))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"num_local_experts": 6}, "experts"),
        ({"num_hidden_layers": 4}, "layer 3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_local_experts": 10**6}, "num_local_experts: 1000000, but the weights have only"),
        ({"num_local_experts": 2e12}, "num_local_experts"),
        ({"num_local_experts": 0}, "config.json describes a model without the 36 matrices"),
        ({"head_dim": 10**9}, "head_dim: 1000000000"),
        ({"vision_config": {"depth": 10**9}}, "vision_config.depth"),
        ({"hidden_size": 32}, "hidden"),
        ({"intermediate_size": 40}, "intermediate"),
        ({"vocab_size": 80}, "embed_tokens|lm_head"),
        ({"num_attention_heads": 4}, "self_attn"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_hidden_layers": "three"}, "config.json"),
        ({"hidden_act": "unheard"}, "unheard"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "qwen3_moe"}, "config.json|experts"),
        ({"architectures": "MixtralForCausalLM"}, "architectures"),
        ({"architectures": ["MixtralConfig"]}, "architectures"),
        ({"architectures": ["AutoModelForCausalLM"]}, "architectures"),
        ({"architectures": [3]}, "architectures"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
    ids=str,
)
def test_configurations_that_are_not_the_weights(values, part, copy):
    with pytest.raises(ModelError, match=part) as caught:
        check_source(edited(copy, **values))
    assert "\n" not in str(caught.value)


def test_a_type_of_the_language_model_inside_that_is_no_name(tmp_path):
    wrapped_model("llama4").save_pretrained(tmp_path)
    inside = json.loads((tmp_path / "config.json").read_text())["text_config"]
    with pytest.raises(ModelError, match="transformers cannot"):
        check_source(edited(tmp_path, text_config={**inside, "model_type": [1]}))


def test_what_transformers_can_run_is_left_alone(copy):
    assert len(check_source(edited(copy, architectures=None)).layers) == 3
    assert len(check_source(edited(copy, num_hidden_layers=2)).layers) == 2
    assert len(check_source(edited(copy, no_head, tie_word_embeddings=True)).layers) == 2


def test_an_architecture_that_nobody_knows_decides_nothing_for_data_free(copy):
    source = edited(copy, architectures=["Unheard"])
    assert check_source(source, known=False).layers
    for known, reads_text in ((True, False), (False, True)):
        with pytest.raises(ModelError, match="Unheard"):
            check_source(source, known=known, reads_text=reads_text)


@pytest.mark.parametrize(
    "kind", ["MixtralModel", "MixtralForSequenceClassification", "MixtralForTokenClassification"]
)
def test_models_without_a_language_model_head(kind, tmp_path):
    import transformers

    from bitknap.testing import SIZES, filled

    filled(getattr(transformers, kind), transformers.MixtralConfig(**SIZES)).save_pretrained(
        tmp_path
    )
    source = Checkpoint.open(tmp_path)
    assert check_source(source).layers
    with pytest.raises(ModelError, match=f"{kind} has no language-model head"):
        check_source(source, reads_text=True)


def test_what_is_packed_already_is_called_so(tmp_path):
    packed = packed_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="already a packed checkpoint"):
        inspect(packed)
    with pytest.raises(ModelError, match="already a packed checkpoint"):
        bitknap.estimate(packed)


@pytest.mark.parametrize("what", ["norm", "config"])
def test_a_packed_checkpoint_is_held_against_its_config(what, tmp_path):
    packed = packed_checkpoint(tmp_path)
    if what == "norm":
        stored = load_file(packed / "bitknap.safetensors")
        del stored["model.norm.weight"]
        save_file(stored, packed / "bitknap.safetensors", metadata={"format": "pt"})
    else:
        path = packed / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_local_experts": 5}))
    for keep_packed in (False, True):
        with pytest.raises(BitknapError, match=r"model.norm.weight" if what == "norm" else "5"):
            bitknap.load(packed, packed=keep_packed)


@pytest.mark.slow
@pytest.mark.parametrize("family", WRAPPED)
def test_wrapped_models_are_loaded_in_every_way(family, tmp_path):
    import transformers

    from bitknap.allocation import BitPlan, formats

    source, out = tmp_path / "source", tmp_path / "packed"
    wrapped_model(family).save_pretrained(source)
    checkpoint = Checkpoint.open(source)
    units = check_source(checkpoint).units
    choice = torch.arange(len(units)).remainder(2).numpy()
    plan = BitPlan.from_choice(
        units, formats((2, 8), ("row",)), choice, model=checkpoint.fingerprint
    )
    bitknap.quantize(source, plan, out)
    plain = bitknap.load(out, torch.float32).state_dict()
    kind = json.loads((out / "config.json").read_text())["architectures"][0]
    live = getattr(transformers, kind).from_pretrained(out)
    live.save_pretrained(tmp_path / "again")
    again = bitknap.load(tmp_path / "again", torch.float32).state_dict()
    assert plain.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())


def test_defects_of_our_own_are_not_hidden(mixtral, monkeypatch):
    model = hollow(mixtral, config_of(mixtral))

    def broken(*args, **kwargs):
        raise KeyError("a defect")

    model.model.register_forward_pre_hook(broken)
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with pytest.raises(KeyError), calling_transformers("cannot"):
        model(ids)
    monkeypatch.setitem(globals(), "__name__", "transformers.somewhere")
    with pytest.raises(ModelError, match="a defect"), calling_transformers("cannot"):
        model(ids)
