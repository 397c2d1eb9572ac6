"""ExLlamaV2's measurements and ModelOpt's search states as tables of their own options."""

import collections
import json
import os
import sys
import types

import numpy as np
import pytest
import torch

import bitknap
from bitknap.errors import FileError, InputError
from bitknap.estimators.imported import inert_pickle
from bitknap.estimators.imported.inert_pickle import Inert, load


@pytest.fixture
def measured(tmp_path):
    """Write a measurement; blocks have different numbers of options."""

    def write(**changes):
        options = [(0.90, 800), (0.97, 1601), (0.99, 2400)]
        blocks = {
            "model.layers.0.self_attn": options[:2],
            "model.layers.0.block_sparse_moe": options,
            "model.layers.1.parallel_decoder": {"attn": options, "mlp": options[1:]},
        }
        known = {
            name: {part: listed(some) for part, some in value.items()}
            if isinstance(value, dict)
            else listed(value)
            for name, value in blocks.items()
        }
        path = tmp_path / "measurement.json"
        path.write_text(json.dumps({"measurement": known | changes, "last_module_idx": 4}))
        return path

    def listed(options):
        return [{"accuracy": a, "total_bits": b, "q_proj": {"bits": [4]}} for a, b in options]

    return write


def test_blocks_of_exllamav2(measured):
    table = bitknap.import_costs(measured())
    labels = [table.units.row(unit) for unit in range(len(table.units))]
    assert [(u.layer, u.role, u.projection) for u in labels] == [
        (0, "attention", "self_attn"),
        (0, "routed", "block_sparse_moe"),
        (1, "attention", "parallel_decoder.attn"),
        (1, "dense", "parallel_decoder.mlp"),
    ]
    np.testing.assert_allclose(table.cost[1], [0.01, 0.0009, 0.0001], rtol=1e-6)
    assert table.nbytes[1].tolist() == [100, 201, 300]
    assert np.isinf(table.cost[0, 2]) and np.isfinite(table.cost[0, :2]).all()
    solution = bitknap.solve(bitknap.Problem(table, [bitknap.Budget.bytes(702)]))
    # The best of all combinations, by hand: one block takes its cheapest option.
    best = min(
        sum(table.cost[row, column] for row, column in enumerate(choice))
        for choice in np.ndindex(3, 3, 3, 3)
        if sum(table.nbytes[row, column] for row, column in enumerate(choice)) <= 702
    )
    assert solution.cost == pytest.approx(best)
    assert solution.gap == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.2.mlp": [{"accuracy": 0.5}]}, "model.layers.2.mlp: must be a list"),
        ({"model.layers.2.mlp": []}, "model.layers.2.mlp: must be a list of options"),
        ({"model.layers.2.mlp": [{"accuracy": 2, "total_bits": 8}]}, "accuracy 2 and"),
    ],
)
def test_damaged_measurements(changes, message, measured):
    with pytest.raises(FileError, match=message):
        bitknap.import_costs(measured(**changes))


def test_what_goes_together(measured, tmp_path):
    one = measured()
    with pytest.raises(InputError, match="pass one file"):
        bitknap.import_costs(one, one)
    with pytest.raises(InputError, match="leave `model` out"):
        bitknap.import_costs(one, model="reference:mixtral")
    with pytest.raises(InputError, match="files: none"):
        bitknap.import_costs()
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FileError, match="of no tool that is known"):
        bitknap.import_costs(tmp_path / "other.json")
    with pytest.raises(FileError, match="cannot be read"):
        bitknap.import_costs(tmp_path / "absent")


@pytest.fixture
def state(tmp_path, monkeypatch):
    """Save a search state as ModelOpt does, with a class of that name."""

    def save(groups, **others):
        name = "modelopt"
        module = types.ModuleType(name)
        recipe = type("QuantRecipe", (), {"__module__": name})
        module.QuantRecipe = recipe  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        made = {}
        for text in ("NVFP4_DEFAULT_CFG(effective-bits: 4.5)", "NONE(effective-bits: 16.0)"):
            made[text[:4]] = recipe()
            made[text[:4]]._str_repr = text
        known: dict[str, dict[str, object]] = collections.defaultdict(dict)
        for group, about in groups.items():
            known[group] = about | {"formats": [made[short] for short in about["formats"]]}
        path = tmp_path / "state.pth"
        torch.save({"candidate_stats": known, "method": "gradient", **others}, path)
        monkeypatch.delitem(sys.modules, name)
        return path

    return save


GROUP = {"formats": ["NVFP", "NONE"], "scores": [2.5, 0.0], "costs": [450.0, 1600.0]}


def test_groups_of_modelopt(state):
    path = state(
        {
            "model.layers.0.self_attn.q_proj.quant_recipe": GROUP | {"cost_weight": 1.0},
            "model.layers.0.mlp.experts.quant_recipe": GROUP | {"cost_weight": 0.5},
            "lm_head.quant_recipe": {"formats": ["NONE"], "scores": [0.0], "costs": [64.0]},
            "vision.quant_recipe": GROUP | {"cost_weight": 0.0},
        },
        calibrated=torch.ones(3),
    )
    table = bitknap.import_costs(path)
    rows = [table.units.row(unit) for unit in range(len(table.units))]
    assert [(u.layer, u.role, u.projection) for u in rows] == [
        (0, "attention", "self_attn.q_proj"),
        (0, "routed", "mlp.experts"),
        (-1, "head", "lm_head"),
    ]
    assert table.nbytes[:2].tolist() == [[900, 3200], [1800, 6400]]
    assert table.cost[0].tolist() == [2.5, 0.0]
    assert np.isinf(table.cost[2, 0]) and table.nbytes[2, 1] == 128
    assert table.provenance["options"] == ["NVFP4_DEFAULT_CFG", "NONE"]
    assert table.provenance["left_out"] == ["vision.quant_recipe"]
    assert table.provenance["unit"] == "score of ModelOpt's gradient"


def test_damaged_states(state, tmp_path):
    for broken in ({**GROUP, "scores": [1.0]}, {**GROUP, "scores": [-1.0, 0.0]}):
        with pytest.raises(FileError, match=r"candidate_stats\.x: .*(one length|at least 0)"):
            bitknap.import_costs(state({"x": broken}))
    with pytest.raises(FileError, match="not a search state"):
        bitknap.import_costs(state({}))
    path = state({"x": GROUP})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FileError, match="not a file that torch saved"):
        bitknap.import_costs(path)


def test_a_pickle_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"a": Evil(), "b": [1, {2}]}, tmp_path / "evil.pth")
    found = load(tmp_path / "evil.pth")
    assert isinstance(found["a"], Inert) and found["b"] == [1, {2}]
    assert not (tmp_path / "ran").exists()


def test_a_pickle_allocates_no_more_than_it_holds(tmp_path, monkeypatch):
    class Greedy:
        def __reduce__(self):
            return bytearray, (1 << 50,)

    torch.save({"a": Greedy()}, tmp_path / "greedy.pth")
    assert isinstance(load(tmp_path / "greedy.pth")["a"], Inert)
    monkeypatch.setattr(inert_pickle, "_MOST", 10)
    with pytest.raises(FileError, match=r"a pickle of \d+ bytes, more than 10"):
        load(tmp_path / "greedy.pth")
