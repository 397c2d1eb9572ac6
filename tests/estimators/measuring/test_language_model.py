"""A model's logits on text, also of a language model within something larger."""

import pytest
import torch
import transformers

from bitknap.errors import ModelError
from bitknap.estimators.measuring.kl_replay import compare
from bitknap.estimators.measuring.language_model import settle, token_logits
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.source.architecture import align_experts
from bitknap.testing import SIZES, filled, tiny_model
from bitknap.testing.wrapped import WRAPPED, wrapped_model

WINDOWS = torch.arange(64).view(4, 16).remainder(48) + 10


@pytest.mark.parametrize("family", WRAPPED)
def test_the_language_model_inside_answers(family):
    model = wrapped_model(family)
    align_experts(model)
    given = {"input_ids": WINDOWS}
    with torch.no_grad():
        found = token_logits(model, given)
        assert torch.equal(found, token_logits(model, given))
    assert found.shape == (4, 16, 64)
    layout = walk(model)
    evidence = calibrate(model, layout, WINDOWS)
    assert all(layer.tokens == 4 * 15 for layer in evidence.layers.values())
    assert compare(model, model, WINDOWS).kl.tolist() == [0] * 4


def test_llama4s_own_forward_fails_on_text():
    model = wrapped_model("llama4")
    align_experts(model)
    with torch.no_grad():
        inner = model.language_model(input_ids=WINDOWS, use_cache=False).logits
        assert torch.equal(token_logits(model, {"input_ids": WINDOWS}), inner)


@pytest.mark.parametrize(
    "kind",
    ["Qwen3MoeModel", "Qwen3MoeForSequenceClassification", "Qwen3MoeForTokenClassification"],
)
def test_other_heads_predict_no_text(kind):
    model = filled(getattr(transformers, kind), transformers.Qwen3MoeConfig(**SIZES))
    align_experts(model)
    with pytest.raises(ModelError, match=f"{kind}: no language-model head"):
        token_logits(model, {"input_ids": WINDOWS})


def test_what_transformers_raises_is_one_line():
    model = tiny_model("mixtral")
    with pytest.raises(ModelError, match="MixtralForCausalLM: transformers cannot run it") as error:
        token_logits(model, {"input_ids": WINDOWS + 1000})
    assert "\n" not in str(error.value)
    settle(model, WINDOWS + 1000)  # nothing to find out about a language model


def test_rows_that_are_no_multiple_of_16_bytes():
    model = tiny_model("mixtral", hidden_size=18, intermediate_size=10)
    align_experts(model)
    assert model.config._experts_implementation == "eager"
    assert calibrate(model, walk(model), WINDOWS).layers
    model = tiny_model("mixtral")
    before = model.config._experts_implementation
    align_experts(model)
    assert model.config._experts_implementation == before
