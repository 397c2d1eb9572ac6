"""Loss samples: merged, checked, joined, saved and read back."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bitknap.allocation import Format, formats
from bitknap.errors import FileError, InputError, MismatchError
from bitknap.estimators.measuring.noise_floor import USUAL
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.testing import routed_units

ORIGIN = {"model": "abc", "method": "rtn", "text": "def", "tokens": 96, "seed": 0}
FORMATS = formats((2, 3, 4), 64)


def units(count=4, cols=64):
    return routed_units(1, count, ("up",), rows=8, cols=cols)


def samples(unit=(2, 0), column=(1, 0), loss=(0.5, 0.25), error=None, **changes):
    known = {"units": units(), "formats": FORMATS, "provenance": ORIGIN}
    return LossSamples(unit=unit, column=column, loss=loss, error=error, **{**known, **changes})


def test_samples_are_sorted_and_read_only():
    found = samples()
    assert found.unit.tolist() == [0, 2]
    assert found.column.tolist() == [0, 1]
    assert found.loss.tolist() == [0.25, 0.5]
    assert found.seen.tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match="read-only"):
        found.loss[0] = 1


def test_a_cell_measured_twice_is_its_mean():
    found = samples((1, 0, 1), (2, 0, 2), (1.0, 5.0, 3.0), (0.3, 0.1, 0.4))
    assert found.loss.tolist() == [5.0, 2.0]
    # The error of a mean of two: sqrt(0.3² + 0.4²) / 2.
    assert found.error == pytest.approx([0.1, 0.25])


def test_logarithms_have_a_floor():
    found = samples(loss=(-1e-12, 2.0), error=(1e-3, 0.5))
    assert found.logs == pytest.approx([np.log(2.0), np.log(USUAL)])
    assert found.log_errors == pytest.approx([0.25, 1.0])
    assert samples().log_errors.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": (0.1, np.nan)}, "loss[1]: nan is not a finite number; measure it again"),
        ({"unit": (0, 4)}, "unit[1]: 4 is not 0 to 3"),
        ({"column": (3, 0)}, "column[0]: 3 is not 0 to 2"),
        ({"error": (-1, 0)}, "error[0]: -1.0 is not a number of at least 0"),
        ({"column": (0,)}, "column: shape (1,), expected (2,)"),
        ({"loss": ()}, "loss: shape (0,), expected one entry per sample, at least one"),
        (
            {"provenance": {"model": "abc"}},
            "provenance: 'method' is missing; samples must record what they were measured on",
        ),
    ],
)
def test_bad_samples_are_refused(changes, message):
    with pytest.raises(InputError) as error:
        samples(**changes)
    assert str(error.value) == message


def test_joined_samples_are_merged():
    other = samples((0, 3), (0, 2), (0.75, 9.0), provenance={**ORIGIN, "seed": 7, "tokens": 96})
    found = samples().join(other)
    assert found.unit.tolist() == [0, 2, 3]
    assert found.loss.tolist() == [0.5, 0.5, 9.0]
    assert found.provenance == ORIGIN
    assert found.error is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"provenance": {**ORIGIN, "method": "gptq"}},
            "samples: method rtn cannot be joined with gptq; keep them apart",
        ),
        (
            {"provenance": {**ORIGIN, "model": "xyz"}},
            "samples: model abc cannot be joined with xyz; keep them apart",
        ),
        (
            {"formats": formats((2, 3, 8), 64)},
            "samples: those of different units or formats cannot be joined; keep them apart",
        ),
        (
            {"units": units(cols=128)},
            "samples: those of different units or formats cannot be joined; keep them apart",
        ),
    ],
)
def test_samples_of_another_kind_are_not_joined(changes, message):
    with pytest.raises(MismatchError) as error:
        samples().join(samples(**changes))
    assert str(error.value) == message


def test_samples_speak_of_one_model_only():
    found = samples()
    found.check(units(), FORMATS[1:], {})
    found.check(units(), (*FORMATS, Format.keep("bf16")), {"model": "abc", "method": "rtn"})
    with pytest.raises(MismatchError, match="measured with model abc, used with xyz; measure them"):
        found.check(units(), FORMATS, {"model": "xyz"})
    with pytest.raises(MismatchError, match="measured with method rtn, used with gptq"):
        found.check(units(), FORMATS, {"method": "gptq"})
    with pytest.raises(MismatchError, match="their 4 units differ from the 5"):
        found.check(units(5), FORMATS, {})
    with pytest.raises(MismatchError, match="int8-g64-asym was not measured"):
        found.check(units(), formats(8, 64), {})


@pytest.mark.parametrize("error", [None, (0.1, 0.2)])
def test_samples_survive_the_disk(error, tmp_path):
    before = samples(error=error)
    before.save(tmp_path / "a.safetensors")
    after = LossSamples.load(tmp_path / "a.safetensors")
    after.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert after.provenance == ORIGIN
    assert after.formats == FORMATS
    assert after.loss.tolist() == before.loss.tolist()
    assert after.units.label(2) == before.units.label(2)


def test_broken_files_are_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    samples().save(path)
    arrays = load_file(path)
    with pytest.raises(FileError, match="not a readable safetensors file"):
        LossSamples.load(tmp_path / "none.safetensors")
    save_file(arrays, path)
    with pytest.raises(FileError, match="no Bitknap header; not loss samples"):
        LossSamples.load(path)
    header = {
        "format": "bitknap.samples",
        "version": "1.0",
        "formats": [item.name for item in FORMATS],
        "projections": ["up"],
        "provenance": ORIGIN,
    }

    def written(arrays, **changes):
        save_file(arrays, path, metadata={"bitknap": json.dumps({**header, **changes})})
        return path

    LossSamples.load(written(arrays))
    for changes, message in (
        ({"format": "bitknap.table"}, "format: 'bitknap.table' is not 'bitknap.samples'"),
        ({"version": "2.0"}, "version: 2.0 cannot be read by this library"),
        ({"formats": None}, "formats: missing or not a list of names"),
        ({"provenance": []}, "provenance: missing or not a JSON object"),
        (
            {"provenance": {**ORIGIN, "spearman": "high"}},
            "provenance.spearman: .high. is not what Bitknap writes there",
        ),
        ({"formats": ["int2"]}, "format 'int2' is unknown"),
    ):
        with pytest.raises(FileError, match=message):
            LossSamples.load(written(arrays, **changes))
    with pytest.raises(FileError, match="loss: missing"):
        LossSamples.load(written({k: v for k, v in arrays.items() if k != "loss"}))
    with pytest.raises(FileError, match="loss: dtype float32, expected float64"):
        LossSamples.load(written({**arrays, "loss": arrays["loss"].astype(np.float32)}))
    with pytest.raises(FileError, match=r"loss\[0\]: inf is not a finite number"):
        LossSamples.load(written({**arrays, "loss": arrays["loss"] + np.inf}))
