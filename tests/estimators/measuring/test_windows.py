"""Which part of a window is read, and which is predicted."""

import pytest
import torch

from bitknap.errors import InputError, ModelError
from bitknap.estimators.measuring.windows import Windows, labels_of, logits_of, predicted, seen
from bitknap.testing import tiny_model

WINDOWS = torch.randint(2, 64, (3, 9), generator=torch.Generator().manual_seed(0))


def test_a_decoder_predicts_every_token_but_the_first():
    model = tiny_model("mixtral")
    assert predicted(model, 9) == 8
    assert torch.equal(labels_of(model, WINDOWS), WINDOWS[:, 1:])
    with torch.no_grad():
        expected = model(input_ids=WINDOWS).logits[:, :-1].flatten(0, 1)
        torch.testing.assert_close(logits_of(model, WINDOWS), expected, rtol=1e-4, atol=1e-4)


def test_an_encoder_decoder_predicts_the_second_half_from_the_first():
    model = tiny_model("switch_transformers", decoder_start_token_id=1)
    assert predicted(model, 9) == 4  # the last token of an odd window is left out
    assert torch.equal(labels_of(model, WINDOWS), WINDOWS[:, 4:8])
    with torch.no_grad():
        found = logits_of(model, WINDOWS)
        # The model's own way from labels to what its decoder reads.
        expected = model(input_ids=WINDOWS[:, :4], labels=WINDOWS[:, 4:8].contiguous()).logits
    assert torch.equal(found, expected.flatten(0, 1))


def test_a_decoder_starts_from_padding_by_default():
    model = tiny_model("switch_transformers", pad_token_id=3)
    with torch.no_grad():
        padded = logits_of(model, WINDOWS)
        model.config.decoder_start_token_id = 3
        assert torch.equal(logits_of(model, WINDOWS), padded)
        model.config.decoder_start_token_id = 5
        assert not torch.equal(logits_of(model, WINDOWS), padded)
        model.config.decoder_start_token_id = model.config.pad_token_id = None
        with pytest.raises(ModelError) as error:
            logits_of(model, WINDOWS)
    assert str(error.value) == (
        "config.json: decoder_start_token_id and pad_token_id are both missing; set "
        "decoder_start_token_id"
    )


@pytest.mark.parametrize(("prefix", "first"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_a_decoder_is_asked_for_text_alone(prefix, first):
    model, windows = tiny_model("mixtral"), Windows(ids=WINDOWS, prefix=prefix)
    assert torch.equal(labels_of(model, windows), WINDOWS[:, first:])
    assert predicted(model, 9, prefix) == 9 - first
    assert seen(model, 9) == 8
    with torch.no_grad():
        expected = model(input_ids=WINDOWS).logits[:, first - 1 : -1].flatten(0, 1)
        torch.testing.assert_close(logits_of(model, windows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [1, 2])
def test_both_halves_of_an_encoder_decoder_begin_as_texts_do(prefix):
    model = tiny_model("switch_transformers", decoder_start_token_id=1)
    windows = Windows(ids=WINDOWS, prefix=prefix)
    target = torch.cat((WINDOWS[:, :prefix], WINDOWS[:, 4 : 8 - prefix]), dim=1)
    assert torch.equal(labels_of(model, windows), target[:, prefix:])
    assert (seen(model, 9), predicted(model, 9, prefix)) == (4, 4 - prefix)
    with torch.no_grad():
        expected = model(input_ids=WINDOWS[:, :4], labels=target.contiguous()).logits[:, prefix:]
        assert torch.equal(logits_of(model, windows), expected.flatten(0, 1))


def test_windows_without_text_to_predict():
    for family, length, prefix in (("mixtral", 2, 2), ("switch_transformers", 4, 2)):
        with pytest.raises(InputError, match=f"windows of {length} tokens, {prefix} of them spec"):
            predicted(tiny_model(family), length, prefix)
