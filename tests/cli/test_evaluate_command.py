"""`bitknap evaluate`: recipes beside ours, and what cannot be compared."""

import json
import shutil
from pathlib import Path

TEXT = ("--text", str(Path(__file__).parent.parent.parent / "LICENSE"))  # short: quick to tokenize


def test_uniform_recipes_beside_ours(made, document):
    rows = document(
        "evaluate", made.out, "--reference", made.model, "--uniform", "--tokens", 64, *TEXT
    )
    assert [name.split()[0] for name in rows] == ["original", "ours", "uniform"]
    assert {"kl_gain", "kl_gain_se"} <= rows["ours"].keys()


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
        assert "--plan or --budget" in refused(*arguments)
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
