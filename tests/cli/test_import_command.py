"""`bitknap import`: other tools' files to tables, and what is refused."""

import json

from bitknap.allocation import CostTable
from bitknap.cli import main

BLOCK = [{"accuracy": 0.9, "total_bits": 800}, {"accuracy": 0.99, "total_bits": 2400}]


def test_a_measurement_is_solved(tmp_path, document):
    file, table = tmp_path / "measurement.json", tmp_path / "table.safetensors"
    names = [f"model.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn", "mlp")]
    file.write_text(json.dumps({"measurement": dict.fromkeys(names, BLOCK)}))
    said = document("import", file, "-o", table)
    assert (said["units"], said["formats"]) == (4, 2)
    assert "relative output error" in said["unit_of_costs"]
    assert CostTable.load(table).nbytes.tolist() == [[100, 300]] * 4
    main(["solve", str(table), "--budget", "800B", "-o", str(tmp_path / "plan.json")])
    chosen = [unit["format"] for unit in json.loads((tmp_path / "plan.json").read_text())["units"]]
    assert sorted(chosen) == ["option-0", "option-0", "option-1", "option-1"]


def test_what_is_refused_leaves_nothing(tmp_path, refused):
    file = tmp_path / "scores.json"
    file.write_text('{"layer_scores": {"a": [4, 1.0]}, "version": 1}')
    table = tmp_path / "table.safetensors"
    assert "only version 1 with scores per_op" in refused("import", file, "-o", table)
    whole = {"score_granularity": "per_op", "layer_scores": {"a": [4, 1.0]}, "version": 1}
    scheme = {"bits": 4, "group_size": 8, "sym": True, "data_type": "int"}
    file.write_text(json.dumps(whole | {"scheme": scheme}))
    assert "need --model, the model that was scored" in refused("import", file, "-o", table)
