"""`bitknap quantize`: bytes as promised, and plans that do not fit the model."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from bitknap.allocation import BitPlan
from bitknap.api import estimation
from bitknap.cli import main
from bitknap.quantization.packed.work_pieces import Rounded, Work
from bitknap.report.table_facts import left_out_note

TEXT = ("--text", str(Path(__file__).parent.parent.parent / "LICENSE"))  # short: quick to tokenize
FAST = ("--formats", "2,4", "--group-size", "8,row", "--tokens", "128", *TEXT)


def test_a_budget_of_the_whole_checkpoint_is_kept(made, tmp_path, document):
    least = document("inspect", made.model)["smallest_checkpoint_bytes"]
    budget = ("--budget", f"{least + 5000}B")
    main(["solve", str(made.table), *budget, "-o", str(tmp_path / "plan.json")])
    out = tmp_path / "out"
    main(["quantize", str(made.model), "--plan", str(tmp_path / "plan.json"), "-o", str(out)])
    assert sum(file.stat().st_size for file in out.iterdir()) <= least + 5000


@pytest.mark.slow
def test_a_group_size_that_does_not_divide_the_row_is_counted_and_said(made, tmp_path, document):
    # Rows of 16 (gate, up) and 24 (down): in groups of 32 each row is 16 or 8 weights short.
    report = document("inspect", made.model)
    short = 2 * 4 * (24 * 16 + 24 * 16 + 16 * 8)
    assert f"g32: {short:,}" in report["short_of_a_whole_last_group"]
    out = tmp_path / "out"
    sizes = document(
        "quantize",
        made.model,
        "--budget",
        "4bpw",
        "--formats",
        "2,3",
        "--group-size",
        16,
        *TEXT,
        "--tokens",
        64,
        "-o",
        out,
    )
    assert sizes["bytes_predicted"] == sizes["bytes_on_disk"]


@pytest.mark.slow
def test_nan_found_when_quantizing_by_plan(made, tmp_path, capsys):
    copy = shutil.copytree(made.model, tmp_path / "model")
    tensors = load_file(copy / "model.safetensors")
    tensors[sorted(n for n in tensors if ".experts." in n)[0]][-1].fill_(float("nan"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as exit:
        main(["quantize", str(copy), "--plan", str(made.plan), "-o", str(tmp_path / "out")])
    line = capsys.readouterr().err
    assert exit.value.code == 2
    assert line.startswith("bitknap: ")
    assert "NaN or infinite weight" in line
    assert line.endswith("the same command goes on from there\n")
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_not_copied_is_said_once(made, tmp_path, capsys, document):
    copy = shutil.copytree(made.model, tmp_path / "model")
    names = ["a[b].onnx", "tf_model.h5"]
    for name in names:
        (copy / name).write_bytes(b"x")
    words = ("quantize", copy, "--plan", made.plan, "-o", tmp_path / "out")
    assert document(*words)["left_out"] == {"another framework's": names}
    main([*map(str, words), "--overwrite"])
    said = capsys.readouterr()
    assert said.out.count("not copied, another framework's: a[b].onnx, tf_model.h5") == 1
    assert said.err == ""
    shutil.rmtree(tmp_path / "out")
    assert "left_out" not in document(*words[:1], made.model, *words[2:])
    assert left_out_note({"why": ["a\udcff"]}) == r"not copied, why: a\udcff"


def test_files_of_a_chosen_size(made, tmp_path, document):
    out = tmp_path / "out"
    more = ("--max-shard-size", "100kB", "-o", out)
    sizes = document("quantize", made.model, "--plan", made.plan, *more)
    assert sizes["bytes_predicted"] == sizes["bytes_on_disk"]
    index = json.loads((out / "bitknap.safetensors.index.json").read_text())
    files = {file.name for file in out.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) > 2
    assert document("show", out) == document("show", made.out)


def test_another_file_size_does_not_go_on_from_a_stopped_run(
    made, tmp_path, refused, capsys, monkeypatch
):
    words = ("quantize", made.model, "--plan", made.plan, "-o", tmp_path / "out")
    stop = SimpleNamespace(make=Work.make)

    def interrupted(work, piece, given):
        if isinstance(piece, Rounded):
            raise KeyboardInterrupt
        return stop.make(work, piece, given)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "make", interrupted)
        with pytest.raises(SystemExit) as exit:
            main([str(word) for word in words])
    assert exit.value.code == 130
    assert "pieces are kept in" in capsys.readouterr().err
    line = refused(*words, "--max-shard-size", "100kB")
    assert "the journal belongs to another layout, max_shard_size; give the inputs" in line
    assert "pass --overwrite or delete" in line
    main([str(word) for word in words])
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(
        f.name for f in made.out.iterdir()
    )


def test_a_plan_for_another_model(made, tmp_path, refused, saved):
    other = saved(tmp_path / "other", seed=1)
    line = refused("quantize", other, "--plan", made.plan, "-o", tmp_path / "out")
    assert BitPlan.load(made.plan).model in line


def test_quantizing_what_is_packed_already(made, tmp_path, refused):
    arguments = ("quantize", made.out, "--budget", "4bpw", *FAST, "-o", tmp_path / "again")
    refused(*arguments)
    refused("inspect", made.out)


@pytest.mark.slow
def test_the_options_of_solve_are_taken(made, document, tmp_path):
    limits = tmp_path / "limits.json"
    share = {"kind": "share_at_most", "share": 0.5, "bits": 2}
    limits.write_text(json.dumps({"format": "bitknap.limits", "version": "1.0", "limits": [share]}))
    options = ("--solver", "greedy", "--limit", limits, "--price", "--pin", "layer=0=int4-row-sym")
    out = tmp_path / "out"
    found = document("quantize", made.model, "--budget", "5bpw", *options, *FAST, "-o", out)
    assert found["solver"] == "greedy"
    assert [row["profile"] for row in found["price"] if row["chosen"]] == ["gate_eq_up"]
    plan = BitPlan.load(out / "bitknap_plan.json")
    assert {plan.format_of(unit).name for unit in range(12)} == {"int4-row-sym"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--limit", "missing.json"), "cannot be read"),
        (("--solver", "greedy", "--gap", "0.1"), "greedy does not take it"),
        (("--frontier",), "--frontier"),
        (("--pin", "layer=0"), "PATTERN=BITS"),
        (("--profile", "mine"), "gate_eq_up"),
        (("--max-shard-size", "5 apples"), "5 apples"),
    ],
)
def test_bad_words_are_refused_before_estimating(arguments, words, refused, tmp_path):
    # No such model: it is not even looked for.
    line = refused("quantize", "nowhere", "--budget", "4bpw", *arguments, "-o", tmp_path / "out")
    assert words in line


@pytest.mark.parametrize("command", ["quantize", "estimate"])
def test_a_full_disk_is_said_before_anything_is_measured(command, refused, tmp_path, monkeypatch):
    words = ["reference:mixtral", "--formats", "2,3", "-o", tmp_path / "out"]
    words += ["--budget", "3bpw"] if command == "quantize" else []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(estimation, "gather", None)
    line = refused(command, *words)
    assert re.search(r"out\S*: needs [\d,]+ bytes, the disk has 1,000 free; free some or", line)
    assert not list(tmp_path.iterdir())
