"""The benchmark of targets: what is measured before is kept, and the report shows it all."""

import json

import numpy as np
import pytest
import torch

from bitknap.benchmarks.runtimes import __main__ as program
from bitknap.benchmarks.runtimes.scripts import of_next


def row(name, **more):
    plans = [
        {"budget": 2.5, "least": 2.6},
        {"budget": 3.0, "bpw": 2.99, "kl": 0.1, "kl_se": 0.01},
        {"budget": 4.0, "bpw": 3.99, "kl": 0.02, "kl_se": 0.001},
    ]
    known = {"target": name, "profile": "layer", "weights": True, "plans": plans}
    return {**known, "checks": ["4 rules: each of 8 modules gets the plan's format"], **more}


def test_finished_targets_are_not_measured_again(tmp_path, monkeypatch):
    words = ["runtimes", "-o", str(tmp_path), "--targets", "mlx", "gptq"]
    monkeypatch.setattr("sys.argv", words)

    def measured(name, setting):
        if name == "gptq":
            raise KeyboardInterrupt
        return row(name, runtime="mlx-lm 1.0", apart=3e-6)

    monkeypatch.setattr(program, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        program.main()
    monkeypatch.setattr(program, "measured", lambda name, _: row(name, weights=False))
    program.main()
    rows = json.loads((tmp_path / "runtimes.json").read_text())["rows"]
    assert [one["weights"] for one in rows] == [True, False]
    report = (tmp_path / "runtimes.md").read_text()
    assert (
        "| `mlx` | `layer` | weights | read back, re-matched | mlx-lm 1.0 | 3.0e-06 | "
        "least 2.60 | 0.1000 ± 0.0100 | 0.0200 ± 0.0010 |"
    ) in report
    assert "| `gptq` | `layer` | settings | re-matched | no |" in report


def test_log_probabilities_are_those_of_the_next_token():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    known = logits.log_softmax(-1)[range(4), [2, 3, 0, 6]]
    np.testing.assert_allclose(of_next(logits.numpy(), [1, 2, 3, 0, 6]), known, atol=1e-6)
