"""AutoRound's scheme scores as a table of the model's matrices."""

import json

import pytest

import bitknap
from bitknap.allocation import CostTable, Format
from bitknap.errors import FileError, InputError, MismatchError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import tiny_model

SCHEME = {"bits": 4, "group_size": 8, "sym": True, "data_type": "int", "act_bits": 16}
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Mixtral, whose hub names differ from those that AutoRound sees."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("mixtral").save_pretrained(folder)
    return folder


@pytest.fixture
def scored(model, tmp_path):
    """Write the scores of one scheme; each unit's loss is its number times a factor."""
    source = Checkpoint.open(model)
    units = walk_headers(source.config, source.shapes).units

    def write(number=0, factor=1.0, drop=0, extra=(), **changes):
        losses = {}
        for unit in range(drop, len(units)):
            one = units.row(unit)
            name = f"model.layers.{one.layer}.mlp.experts.{one.expert}.{NAMES[one.projection]}"
            losses[name] = [4 * one.numel, factor * unit]
        losses |= {name: [64, 1.0] for name in extra}
        content = {
            "version": 1,
            "score_granularity": "per_op",
            "cache_config": {"model_name": "m", "dataset": "d", "nsamples": 8},
            "scheme": SCHEME,
            "layer_scores": losses,
        }
        path = tmp_path / f"scheme_{number:02d}_0123456789abcdef.json"
        path.write_text(json.dumps(content | changes))
        return path

    return write


TWO = SCHEME | {"bits": 2, "group_size": -1, "sym": False}


def test_schemes_become_formats(model, scored, tmp_path):
    files = scored(0, 1.0, extra=["lm_head"]), scored(1, 5.0, extra=["lm_head"], scheme=TWO)
    table = bitknap.import_costs(*files, model=model)
    assert table.formats == (Format(4, 8, symmetric=True), Format(2, 0, symmetric=False))
    count = len(table.units)
    assert table.cost[:, 0].tolist() == list(range(count))
    assert table.cost[:, 1].tolist() == [5.0 * unit for unit in range(count)]
    assert table.provenance["left_out"] == ["lm_head"]
    # The plan is one of this model: it is packed, and it is exported to other runtimes.
    solution = bitknap.solve(bitknap.Problem(table, [bitknap.Budget.bits(5.0)]))
    bitknap.quantize(model, solution.plan, tmp_path / "out")
    table.save(tmp_path / "table.safetensors")
    assert CostTable.load(tmp_path / "table.safetensors").formats == table.formats


def test_files_of_other_runs(model, scored):
    first = scored(0)
    for changes, message in (
        ({"cache_config": {"model_name": "m", "dataset": "e", "nsamples": 8}}, "dataset 'e'"),
        ({}, "has the scheme of"),
        ({"drop": 1, "scheme": TWO}, "is not scored in both"),
    ):
        with pytest.raises((InputError, MismatchError), match=message):
            bitknap.import_costs(first, scored(1, **changes), model=model)


def test_another_model(model, scored):
    with pytest.raises(MismatchError, match=r"23 of 24 routed matrices are scored; layer=0 "):
        bitknap.import_costs(scored(drop=1), model=model)
    with pytest.raises(MismatchError, match=r"none of its 1 modules, such as h\.0\.a, is a"):
        bitknap.import_costs(scored(layer_scores={"h.0.a": [4, 1.0]}), model=model)
    with pytest.raises(InputError, match="need `model`"):
        bitknap.import_costs(scored())


@pytest.mark.parametrize(
    "scheme",
    [
        *({"data_type": "mx_fp"}, {"act_bits": 8}, {"super_bits": 6}, {"group_size": 0}),
        *({"group_size": 20}, {"bits": 16}),
    ],
)
def test_schemes_that_are_no_format(scheme, model, scored):
    with pytest.raises(InputError, match="scheme"):
        bitknap.import_costs(scored(scheme=SCHEME | scheme), model=model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, scores 'per_op': only version 1"),
        ({"scheme": {"preset": "W4A16"}}, "scheme: must have bits"),
        ({"layer_scores": {}}, "layer_scores: must be an object"),
        ({"layer_scores": {"a": [4, -1.0]}}, "layer_scores.a: must be bits, and a loss"),
    ],
)
def test_damaged_scores(changes, message, model, scored):
    with pytest.raises(FileError, match=message):
        bitknap.import_costs(scored(**changes), model=model)
