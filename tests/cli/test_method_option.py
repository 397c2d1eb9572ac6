"""`--method` from costs to checkpoint, and `bitknap convert` there and back."""

from pathlib import Path

import pytest

from bitknap.allocation import BitPlan
from bitknap.cli import main

TEXT = ("--text", str(Path(__file__).parent.parent.parent / "LICENSE"))
FAST = ("--formats", "2,3", "--group-size", "8", "--metadata", "fp16", "--tokens", "128", *TEXT)
BUDGET = ("--budget", "6bpw")


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hqq", "gptq"])
def test_a_method_goes_from_costs_to_the_checkpoint(method, made, tmp_path, document):
    table, plan, out = tmp_path / "table.safetensors", tmp_path / "plan.json", tmp_path / "out"
    estimator = ("--estimator", "moments", "--method", method)
    main(["estimate", str(made.model), *FAST, *estimator, "-o", str(table)])
    main(["solve", str(table), *BUDGET, "-o", str(plan)])
    assert BitPlan.load(plan).header["method"] == method
    words = ("--plan", plan, "--tokens", "32", *TEXT)
    sizes = document("quantize", made.model, *words, "-o", out)
    assert sizes["method"] == method  # the plan's, though nobody said it again
    assert sizes["bytes_predicted"] == sizes["bytes_on_disk"]
    again = tmp_path / "again"
    main(["quantize", str(made.model), *map(str, words), "--method", method, "-o", str(again)])
    assert files(again) == files(out)
    assert ("few_tokens" in sizes) == (method == "gptq")  # 32 are few for 16 columns


def test_a_plan_of_another_method_is_refused_unless_forced(made, tmp_path, refused):
    out = tmp_path / "out"
    words = ("quantize", made.model, "--plan", made.plan, "--method", "hqq", "-o", out)
    assert "the plan is made for rounding by rtn, not by hqq" in refused(*words)
    assert not out.exists()
    main([str(word) for word in (*words, "--force")])
    assert files(out)["bitknap.safetensors"] != files(made.out)["bitknap.safetensors"]


def test_gptq_reads_one_text(made, tmp_path, refused):
    other = tmp_path / "other.txt"
    other.write_text("Some other words, enough of them to fill a window. " * 40)
    words = ("quantize", made.model, *BUDGET, *FAST, "--text", other, "--method", "gptq")
    assert refused(*words, "-o", tmp_path / "out") == (
        "bitknap: --text: gptq calibrates on one text; give one"
    )


@pytest.mark.slow
def test_gptq_keeps_to_the_memory_it_is_given(made, tmp_path, refused, document):
    words = ("--plan", made.plan, "--method", "gptq", "--force", "--tokens", 64, *TEXT)
    out = ("-o", tmp_path / "out")
    line = refused("quantize", made.model, *words, "--max-memory", "1kB", *out)
    assert "memory: calibrating takes about" in line
    sizes = document("quantize", made.model, *words, "--max-memory", "6MB", *out)
    assert sizes["bytes_predicted"] == sizes["bytes_on_disk"]


def test_the_stored_precision_is_a_format(made, tmp_path, document):
    table = tmp_path / "table.safetensors"
    words = ("--estimator", "data-free", "--keep", "-o", table)
    main(["estimate", *map(str, (made.model, *FAST, *words))])
    assert "keep-fp32" in document("show", table)["formats"]


def test_convert_there_and_back(made, tmp_path, document, refused):
    tiles, back = tmp_path / "tiles", tmp_path / "back"
    sizes = document("convert", made.out, "--layout", "tiles", "-o", tiles)
    assert sizes["layout"] == "tiles"
    assert sizes["bytes_on_disk"] >= sizes["bytes_of_plan"]
    main(["convert", str(tiles), "--layout", "plain", "-o", str(back)])
    assert files(back) == files(made.out)
    assert "exists" in refused("convert", made.out, "--layout", "tiles", "-o", tiles)
    assert "config.json does not say" in refused(
        "convert", made.model, "--layout", "tiles", "-o", tmp_path / "no"
    )
