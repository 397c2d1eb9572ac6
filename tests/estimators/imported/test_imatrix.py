"""llama.cpp's importance matrices as a table of the model's matrices."""

import numpy as np
import pytest
import torch

import bitknap
from bitknap.allocation import Format
from bitknap.errors import FileError, InputError, MismatchError
from bitknap.quantization.gguf import imatrix, names
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.rounding.rtn import quantize
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import tiny_model

FORMATS = [Format(2, 8), Format(4, 8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Mixtral."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("mixtral").save_pretrained(folder)
    return folder


@pytest.fixture
def importances(model, tmp_path):
    """Write an importance matrix of the model; return the file and its numbers."""
    source = Checkpoint.open(model)
    units = walk_headers(source.config, source.shapes).units
    known: dict[str, np.ndarray] = {}
    for unit in (units.row(place) for place in range(len(units))):
        shape = (4, unit.cols)
        generator = np.random.default_rng(unit.layer * 7 + len(unit.projection))
        known[f"{names.of_unit(unit)}.weight"] = generator.random(shape, np.float32)
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(imatrix.content_of(known, "a text"))
    return path, known


def test_costs_are_squared_errors_of_outputs(model, importances, tmp_path):
    path, known = importances
    table = bitknap.import_costs(path, model=model, formats=FORMATS)
    assert table.formats == tuple(FORMATS)
    source = Checkpoint.open(model)
    layout = walk_headers(source.config, source.shapes)
    for place in (0, 5, len(layout.units) - 1):
        unit = layout.units.row(place)
        squares = torch.from_numpy(known[f"{names.of_unit(unit)}.weight"][unit.expert])
        matrix = source.read_matrix(layout.views[place]).float()
        for column, format in enumerate(FORMATS):
            error = quantize(matrix, format).dequantize() - matrix
            expected = float((error.square() * squares).sum())
            assert table.cost[place, column] == pytest.approx(expected, rel=1e-4)
    solution = bitknap.solve(bitknap.Problem(table, [bitknap.Budget.bits(7.0)]))
    bitknap.quantize(model, solution.plan, tmp_path / "out")


def test_what_is_refused(model, importances, tmp_path):
    path, _ = importances
    with pytest.raises(InputError, match="an importance matrix needs `model`"):
        bitknap.import_costs(path)
    with pytest.raises(MismatchError, match="has no importances of"):
        bitknap.import_costs(path, model=model, include=("attention",))
    (tmp_path / "measurement.json").write_text('{"measurement": {}}')
    with pytest.raises(InputError, match="leave `formats` out"):
        bitknap.import_costs(tmp_path / "measurement.json", formats=FORMATS)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FileError):
        bitknap.import_costs(path, model=model)
