"""`bitknap evaluate`: recipes beside ours, and what cannot be compared."""

import json
import re
import shutil
from pathlib import Path

import pytest

from bitknap.estimators.judging.memory import judging_layer_bytes
from bitknap.quantization.packed.opened import open_weights

TEXT = ("--text", str(Path(__file__).parent.parent.parent / "LICENSE"))  # short: quick to tokenize


@pytest.mark.slow
def test_uniform_recipes_beside_ours(made, document):
    rows = document(
        "evaluate", made.out, "--reference", made.model, "--uniform", "--tokens", 64, *TEXT
    )
    assert [name.split()[0] for name in rows] == ["original", "ours", "uniform"]
    assert {"kl_gain", "kl_gain_se"} <= rows["ours"].keys()


@pytest.mark.slow
def test_the_same_rows_layer_by_layer(made, document, refused, tmp_path):
    sources = [open_weights(folder) for folder in (made.model, made.out)]
    words = ("evaluate", made.out, "--reference", made.model, "--uniform", "--tokens", 64, *TEXT)
    least = judging_layer_bytes(sources, 64, {"kl"})
    known = document(*words)
    found = document(*words, "--max-memory", f"{least}B")
    assert found.keys() == known.keys()
    for name, row in known.items():
        assert found[name] == pytest.approx(row, rel=1e-4, abs=1e-8, nan_ok=True)
    alone = document("evaluate", made.out, "--tokens", 64, *TEXT, "--max-memory", f"{least}B")
    assert alone[str(made.out)]["kl"] == 0
    assert alone[str(made.out)]["perplexity"] == pytest.approx(known["ours"]["perplexity"])
    line = refused(*words, "--max-memory", f"{least // 2}B")
    assert re.search(r"measuring takes about .* limit is .*; raise --max-memory, or take", line)


@pytest.mark.slow
def test_a_reference_of_another_tokenizer(made, tmp_path, refused):
    other = shutil.copytree(made.model, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(content))
    line = refused("evaluate", made.out, "--reference", other, "--tokens", 64, *TEXT)
    assert "split the text differently" in line


def test_what_excludes_each_other(made, tmp_path, refused):
    both = ("--plan", made.plan, "--budget", "4bpw")
    for options in (both, ()):
        arguments = ("quantize", made.model, *options, "-o", tmp_path / "out")
        assert "give one of --plan, --budget and --fit" in refused(*arguments)
    assert "--reference" in refused("evaluate", made.out, "--uniform")
    arguments = (
        "evaluate",
        made.model,
        "--reference",
        made.model,
        "--uniform",
        "--tokens",
        64,
        *TEXT,
    )
    assert "not a packed checkpoint" in refused(*arguments)


def test_a_damaged_packed_checkpoint(made, tmp_path, refused):
    folder = shutil.copytree(made.out, tmp_path / "packed")
    file = folder / "bitknap.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated" in refused("evaluate", folder, "--tokens", 64, *TEXT)
