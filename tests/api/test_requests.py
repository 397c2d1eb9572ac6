"""Requests: their checks, their former keywords, and the texts and models that they take."""

import inspect
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitknap
from bitknap.allocation import formats
from bitknap.api.calibration import readings_about
from bitknap.api.former_keywords import former_keywords, group
from bitknap.errors import InputError, ModelError
from bitknap.estimators.costs.data_free import DataFree
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.measuring.documents import Documents, TokenWindows, text_of
from bitknap.quantization.rounding.methods import Gptq, Rtn
from bitknap.quantization.source.checkpoint import Checkpoint

TEXT = Path(__file__).parent.parent.parent / "LICENSE"
GRIDS = formats((2, 4), "row")


@pytest.fixture(scope="module")
def model(saved, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "mixtral")


@pytest.fixture(scope="module")
def live(model):
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return bitknap.LiveModel(loaded, AutoTokenizer.from_pretrained(model))


@pytest.fixture(scope="module")
def table(model):
    asked = bitknap.Calibration(text=TEXT, tokens=256)
    return bitknap.estimate(model, SecondMoments(), GRIDS, calibration=asked)


def test_no_verb_takes_more_than_seven_arguments():
    for verb in (bitknap.estimate, bitknap.quantize, bitknap.refine, bitknap.evaluate):
        assert len(inspect.signature(verb).parameters) <= 7


def test_the_text_may_be_given_beside_the_calibration(model, table):
    asked = bitknap.Calibration(tokens=256)
    found = bitknap.estimate(model, SecondMoments(), GRIDS, text=str(TEXT), calibration=asked)
    assert np.array_equal(found.cost, table.cost)
    assert found.provenance == table.provenance
    with pytest.raises(InputError, match=r"^text: given twice"):
        bitknap.estimate(model, text=TEXT, calibration=bitknap.Calibration(text=TEXT))


def test_a_text_may_be_documents_in_memory(model, table):
    asked = bitknap.Calibration(text=["", TEXT.read_text()], tokens=256)
    found = bitknap.estimate(model, SecondMoments(), GRIDS, calibration=asked)
    assert np.array_equal(found.cost, table.cost)
    assert found.provenance == table.provenance
    halves = TEXT.read_text()[:4000], TEXT.read_text()[4000:]
    losses = bitknap.evaluate(model, text=halves, tokens=128)
    assert losses.perplexity > 1


@pytest.mark.slow
def test_a_text_may_be_token_windows(model, live):
    rows = [np.arange(start, start + 32) for start in range(8)]
    costs = [
        bitknap.estimate(model, SecondMoments(), GRIDS, text=text).cost
        for text in (rows, iter(rows), np.stack(rows), torch.from_numpy(np.stack(rows)))
    ]
    assert all(np.array_equal(cost, costs[0]) for cost in costs)
    assert len(bitknap.evaluate(model, text=rows, tokens=96).kl) == 3
    too_long = torch.zeros(1, live.model.config.max_position_embeddings + 1).long()
    with pytest.raises(InputError, match=r"^text: its windows have .* tokens, the model's context"):
        bitknap.evaluate(model, text=too_long)
    with pytest.raises(InputError, match=r"^text: has token 4096, .* has 4,096 rows"):
        bitknap.evaluate(model, text=[[0, 4096]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (3, "int is not a text; pass a path"),
        ([], "0 items are neither strings nor"),
        (["a", 1], "2 items are neither strings nor"),
        ([[1, 2], [3]], "2 items are neither strings nor"),
        (np.ones((2, 3)), r"token windows of torch.float64 and shape \[2, 3\]"),
        (np.zeros((0, 3), np.int64), r"shape \[0, 3\]"),
        ([[1, -1]], "token -1 is below 0"),
        (["", " "], "the text is empty"),
        (["a\0b"], "NUL"),
    ],
)
def test_what_is_no_text(text, message):
    with pytest.raises(InputError, match=message):
        bitknap.Calibration(text=text)


def test_text_of_keeps_what_it_made():
    for given in ("a.txt", Documents(("a",)), TokenWindows(torch.ones(1, 2).long())):
        assert text_of(given) is given
    assert text_of(Path("a.txt")) == "a.txt"


def test_several_texts(model, table):
    words = TEXT.read_text()
    sets = bitknap.TextSets([TEXT, [words[::-1]]])
    asked = bitknap.Calibration(text=sets, tokens=256, robust="worst")
    worst = bitknap.estimate(model, SecondMoments(), GRIDS, calibration=asked)
    assert (worst.cost >= table.cost).all()
    assert worst.provenance["rule"] == "worst"
    with pytest.raises(InputError, match="robust 'best' is unknown; one of mean, worst"):
        bitknap.Calibration(robust="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="2 sets are given; pass one text here"):
        _ = asked.only_text
    with pytest.raises(InputError, match="no calibration set"):
        bitknap.TextSets([])


@pytest.mark.slow
def test_former_keywords_of_estimate(model, table, tmp_path):
    old: dict[str, Any] = {"tokens": 256, "seed": 0, "row_blocks": 1}
    with pytest.warns(DeprecationWarning) as record:
        found = bitknap.estimate(model, SecondMoments(), GRIDS, text=str(TEXT), **old)
    assert [str(one.message) for one in record] == [
        "estimate(row_blocks=…, seed=…, tokens=…) is deprecated and goes away in the next version: "
        "use calibration=Calibration(tokens=…, seed=…), formats=Formats(row_blocks=…)"
    ]
    assert record[0].filename == __file__
    assert np.array_equal(found.cost, table.cost)
    (tmp_path / "b.txt").write_text(TEXT.read_text()[::-1])
    asked = bitknap.Calibration(tokens=256)
    with pytest.warns(DeprecationWarning, match="TextSets") as record:
        several = bitknap.estimate(
            model,
            SecondMoments(),
            GRIDS,
            text=[str(TEXT), str(tmp_path / "b.txt")],
            calibration=asked,
        )
    assert record[0].filename == __file__
    assert several.provenance["rule"] == "mean"


def test_former_keywords_of_evaluate(model):
    with pytest.warns(DeprecationWarning, match=r"use evaluation=Evaluation\(device=…\)"):
        old = bitknap.evaluate(model, text=TEXT, tokens=64, device="cpu")  # type: ignore[call-arg]
    asked = bitknap.Evaluation(text=TEXT, tokens=999, device="cpu")
    assert bitknap.evaluate(model, tokens=64, evaluation=asked).nll == pytest.approx(old.nll)


def test_tables_and_journals_say_the_dtype(model, tmp_path):
    made, menu = bitknap.SecondMoments(), bitknap.formats((2,), "row")
    asked = bitknap.Calibration(text=TEXT, tokens=64, device="cpu")
    rounded = replace(asked, dtype="bfloat16")
    tables = [bitknap.estimate(model, made, menu, calibration=one) for one in (asked, rounded)]
    assert [table.provenance["dtype"] for table in tables] == ["float32", "bfloat16"]
    assert not np.array_equal(tables[0].cost, tables[1].cost)
    source = Checkpoint.open(model)
    said = [readings_about(source, [one]) for one in (asked, rounded)]
    assert said[0] | {"dtype": "bfloat16"} == said[1]
    with pytest.raises(InputError, match=r"^dtype: 'fp16' is none of auto, float32 and bfloat16"):
        bitknap.Calibration(device="cpu", dtype="fp16")


def test_former_keywords_of_quantize(model, table, tmp_path):
    old: dict[str, Any] = {"max_shard_size": "1MB", "overwrite": True}
    plan = bitknap.solve(bitknap.Problem(table, bitknap.Budget.bits(4))).plan
    with pytest.warns(DeprecationWarning, match=r"packing=Packing\(max_shard_size=…\), resume="):
        bitknap.quantize(model, plan, tmp_path / "out", **old)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        bitknap.quantize(model, plan, tmp_path / "out", nonsense=1)  # type: ignore[call-arg]


def test_a_former_keyword_changes_the_request_that_is_given():
    old: dict[str, Any] = {"tokens": 5, "method": "gptq"}

    @former_keywords(calibration=group(bitknap.Calibration, "tokens", method="rounding"))
    def asked(calibration=None):
        return calibration

    with pytest.warns(DeprecationWarning):
        found = asked(bitknap.Calibration(seed=3), **old)
    assert (found.seed, found.tokens, found.rounding) == (3, 5, Gptq())
    assert found.rounding != Rtn()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked() is None


def test_formats_may_keep_what_is_stored(model):
    menu = bitknap.Formats(options=GRIDS, keep=True)
    table = bitknap.estimate(model, DataFree(), menu)
    assert [item.name for item in table.formats] == [*(item.name for item in GRIDS), "keep-fp32"]
    with pytest.raises(InputError, match="protect"):
        bitknap.Formats(protect=-1)


def test_a_live_model_is_its_folder(model, live, table, tmp_path):
    asked = bitknap.Calibration(text=TEXT, tokens=256)
    found = bitknap.estimate(live, SecondMoments(), GRIDS, calibration=asked)
    assert np.array_equal(found.cost, table.cost)
    assert found.provenance["model"] == table.provenance["model"]
    plan = bitknap.solve(bitknap.Problem(found, bitknap.Budget.bits(4))).plan
    bitknap.quantize(live, plan, tmp_path / "live")
    bitknap.quantize(model, plan, tmp_path / "folder")
    one, other = (
        (tmp_path / name / "bitknap.safetensors").read_bytes() for name in ("live", "folder")
    )
    assert one == other
    packed = bitknap.LiveModel(bitknap.load(tmp_path / "live", torch.float32), live.tokenizer)
    losses = bitknap.evaluate(packed, live, text=TEXT, tokens=128)
    expected = bitknap.evaluate(tmp_path / "folder", model, text=TEXT, tokens=128)
    assert np.array_equal(losses.kl, expected.kl)


def test_a_live_model_is_in_memory_already(live, model):
    limited = bitknap.Evaluation(text=TEXT, tokens=64, max_memory=1 << 40)
    for pair in ((live, model), (model, live)):
        with pytest.raises(InputError, match=r"^`max_memory`: a live model is in memory already"):
            bitknap.evaluate(*pair, evaluation=limited)


def test_a_live_model_keeps_its_mode(live):
    live.model.train()
    bitknap.evaluate(live, text=TEXT, tokens=64)
    assert live.model.training
    live.model.eval()


def test_live_models_that_cannot_be_used(live):
    for verb in (bitknap.estimate, bitknap.evaluate):
        with pytest.raises(
            InputError, match=r"MixtralForCausalLM is neither a folder .*LiveModel\("
        ):
            verb(live.model)
    weight = live.model.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = np.nan
    with pytest.raises(ModelError, match=r"lm_head\.weight: a weight is NaN or infinite"):
        bitknap.evaluate(live, text=TEXT, tokens=64)
    with torch.no_grad():
        weight.copy_(kept)
