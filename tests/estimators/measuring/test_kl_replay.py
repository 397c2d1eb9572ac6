"""Measuring a change from its layer on is measuring it at all."""

import numpy as np
import pytest
import torch

from bitknap.estimators.measuring.kl_replay import Replay, compare, decoder_layers, standard_error
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.stacks.apply import replaced
from bitknap.quantization.stacks.grouping import stacks
from bitknap.testing import tiny_model

WINDOWS = torch.randint(0, 64, (5, 13), generator=torch.Generator().manual_seed(0))
FAMILIES = (
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "nemotron_h",
    "llama4_text",
    "dbrx",
    "longcat_flash",
    "switch_transformers",
)


def doubled(weights):
    return weights * 1.5


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_remembered_prefix_changes_nothing(family):
    model = tiny_model(family)
    layout = walk(model)
    cached, whole = Replay(model, layout, WINDOWS), Replay(model, layout, WINDOWS, cache=False)
    for run in stacks(layout.units):
        layer = int(layout.units.layer[run[0]])
        with replaced(model, layout, run, doubled):
            found = cached.measure(layer)
            for other in (whole.measure(layer), cached.measure(), whole.measure()):
                assert np.array_equal(found.kl, other.kl)
                assert np.array_equal(found.nll, other.nll)
                assert np.array_equal(found.top1, other.top1)
            assert cached.kl(layer) == whole.kl(layer) == pytest.approx(found.kl.mean(), rel=1e-6)
            assert found.kl.mean() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unchanged_model_has_no_divergence(family):
    model = tiny_model(family)
    layout = walk(model)
    replay = Replay(model, layout, WINDOWS)
    for layer in (None, *(x.layer for x in layout.layers)):
        assert replay.kl(layer) == 0
        losses = replay.measure(layer)
        assert not losses.kl.any()
        assert (losses.top1 == 1).all()


def test_losses_are_those_of_the_definition():
    model, other = tiny_model("mixtral"), tiny_model("mixtral", seed=1)
    layout = walk(model)
    losses = compare(other, model, WINDOWS)
    with torch.no_grad():
        p, q = (
            m(input_ids=WINDOWS[:, :-1]).logits.double().log_softmax(-1) for m in (model, other)
        )
    kl = (p.exp() * (p - q)).sum(-1).mean(1).numpy()
    nll = -q.gather(2, WINDOWS[:, 1:, None])[..., 0].mean(1).numpy()
    np.testing.assert_allclose(losses.kl, kl, rtol=1e-4)
    np.testing.assert_allclose(losses.nll, nll, rtol=1e-4)
    np.testing.assert_allclose(losses.top1, (p.argmax(-1) == q.argmax(-1)).double().mean(1))
    assert losses.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    replay = Replay(model, layout, WINDOWS)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    np.testing.assert_allclose(replay.measure().kl, kl, rtol=1e-4)
    assert replay.kl() == pytest.approx(kl.mean(), rel=1e-4)


def test_batches_do_not_matter(monkeypatch):
    model, other = tiny_model("mixtral"), tiny_model("mixtral", seed=1)
    whole = compare(other, model, WINDOWS)
    monkeypatch.setattr("bitknap.estimators.measuring.kl_replay.BATCH_TOKENS", 26)
    parts = compare(other, model, WINDOWS)
    np.testing.assert_allclose(parts.kl, whole.kl, rtol=1e-4)
    assert len(parts.kl) == len(WINDOWS)


def test_layers_answer_for_themselves_again():
    model = tiny_model("mixtral")
    layout = walk(model)
    replay = Replay(model, layout, WINDOWS)
    replay.kl(1)
    layers, places = decoder_layers(model, layout)
    assert places == {0: 0, 1: 1}
    assert layers is not None
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in layers)

    def broken(*args):
        raise ZeroDivisionError

    handle = model.lm_head.register_forward_pre_hook(broken)
    for action in (lambda: replay.kl(1), lambda: Replay(model, layout, WINDOWS)):
        with pytest.raises(ZeroDivisionError):
            action()
        assert not any("forward" in vars(layer) or layer._forward_hooks for layer in layers)
    handle.remove()
    assert replay.kl(1) == 0


def test_layers_of_several_lists_are_not_skipped():
    model = tiny_model("switch_transformers")
    assert decoder_layers(model, walk(model)) == (None, {})


def test_a_standard_error_by_hand():
    # Mean 2, squared deviations 1 + 1 over n - 1 = 1: variance 2, over n = 2: 1.
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    assert np.isnan(standard_error(np.array([1.0])))
