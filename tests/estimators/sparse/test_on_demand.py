"""Samples on demand: measured once, kept, used again, and refused where they do not belong."""

from dataclasses import replace

import numpy as np
import pytest

from bitknap.allocation import formats
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.estimators.sparse.on_demand import Sampled
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.quantization.models.live_model import walk
from bitknap.testing import tiny_model
from bitknap.testing.evidence import lopsided_case

FORMATS = formats((2, 3, 4), "row", symmetric=True, metadata="fp16")


@pytest.fixture(scope="module")
def evidence():
    found = lopsided_case(windows=4).evidence
    return replace(found, provenance={**found.provenance, "model": "abc"})


@pytest.mark.slow
def test_what_is_measured_is_kept_and_used_again(evidence, tmp_path):
    told = []
    file = tmp_path / "s.safetensors"
    ours = Sampled(
        file=file,
        measurements=24,
        base=SecondMoments(),
        progress=lambda *what: told.append(what),
    )
    assert ours.needs == {"moments", "kl"}
    table = ours.estimate(evidence, FORMATS)
    samples = LossSamples.load(file)
    assert 20 <= len(samples) <= 24
    assert len(told) == len(samples)
    assert samples.provenance["model"] == "abc"
    assert samples.provenance["text"] == evidence.provenance["text"]
    assert samples.provenance["held_out"] == 10
    assert table.provenance["measurements"] == len(samples)
    assert table.provenance["estimator"] == "fuzzy(moments)"
    assert table.spread is not None
    offline = replace(evidence, replay=None)
    again = replace(ours, progress=None)
    assert again.needs == {"moments"}
    assert np.array_equal(again.estimate(offline, FORMATS).cost, table.cost)
    assert len(told) == len(samples)


@pytest.mark.slow
def test_the_same_seed_measures_the_same_cells(evidence, tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file in files:
        Sampled(file=file, measurements=20, base=None).estimate(evidence, FORMATS)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_experts_without_tokens_are_not_measured(evidence, tmp_path):
    file = tmp_path / "s.safetensors"
    Sampled(file=file, measurements=1000, base=None).estimate(evidence, FORMATS)
    samples = LossSamples.load(file)
    assert set(samples.units.expert[samples.unit].tolist()) == {0, 1, 2, 3}


def test_samples_of_another_origin_are_refused(evidence, tmp_path):
    ours = Sampled(file=tmp_path / "s.safetensors", measurements=20, base=SecondMoments())
    ours.estimate(evidence, FORMATS)
    other = replace(evidence, provenance={**evidence.provenance, "model": "def"})
    with pytest.raises(
        MismatchError,
        match=r"s\.safetensors: samples: measured with model abc, used with def; measure them "
        "again, or name another file",
    ):
        ours.estimate(other, FORMATS)
    with pytest.raises(MismatchError, match="int8-row-sym was not measured"):
        ours.estimate(evidence, formats(8, "row", symmetric=True, metadata="fp16"))


def test_too_few_to_learn_from(evidence):
    with pytest.raises(
        InputError, match="measurements: 19 is below 20, of which half are held out"
    ):
        Sampled(measurements=19)
    small = tiny_model("mixtral", num_local_experts=2, num_experts=2, num_hidden_layers=1)
    seen = calibrate(small, walk(small), evidence.replay.windows)
    with pytest.raises(InputError, match="samples: 6 cells can be measured, 20 are needed; add"):
        Sampled(base=None).estimate(seen, FORMATS[:1])
    with pytest.raises(InputError, match="KL needs the live model"):
        Sampled(base=None).estimate(replace(evidence, replay=None), FORMATS)


def test_the_usual_base_is_that_of_the_rules():
    assert Sampled().base == Fisher(space="output")
    assert Sampled(base=None).name == "fuzzy"
