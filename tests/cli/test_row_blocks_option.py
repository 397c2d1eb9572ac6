"""`--row-blocks`, `--permute`, `--rotate`: from a table to a checkpoint of the same function."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitknap
from bitknap.allocation import BitPlan, CostTable, Format
from bitknap.cli import main
from bitknap.errors import FileError, InputError, MismatchError
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.transforms.transformed_model import Recipe, Sorting, make, planned

TEXT = ("--text", str(Path(__file__).parent.parent.parent / "LICENSE"))  # short: quick to tokenize
FAST = ("--formats", "2,4", "--group-size", "8,row", "--tokens", "128", *TEXT)
WAYS = {
    "blocks": ("--row-blocks", "3"),
    "both": ("--rotate", "--row-blocks", "2", "--permute"),
}


def logits(model):
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_in_one_go_and_step_by_step_are_the_same(way, made, tmp_path, document):
    table, plan, steps, once = (tmp_path / x for x in ("t.safetensors", "p.json", "a", "b"))
    main(["estimate", str(made.model), *FAST, *WAYS[way], "-o", str(table)])
    main(["solve", str(table), "--budget", "4bpw", "-o", str(plan)])
    main(["quantize", str(made.model), "--plan", str(plan), "-o", str(steps)])
    budget = ("--budget", "4bpw", *FAST, *WAYS[way])
    sizes = document("quantize", made.model, *budget, "-o", once)
    assert sizes["bytes_predicted"] == sizes["bytes_on_disk"]
    for file in steps.iterdir():
        assert (once / file.name).read_bytes() == file.read_bytes(), file.name
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "b", "p.json", "t.safetensors"]
    packed = bitknap.load(once, torch.float32, packed=True)
    torch.testing.assert_close(logits(packed), logits(bitknap.load(once, torch.float32)))
    shown = [document("show", path)[key] for path, key in ((plan, "header"), (table, "provenance"))]
    for said in (one["rewritten"] for one in shown if "rewritten" in one):
        assert said["order"] in (None, {"blocks": 2})
    card = (once / "README.md").read_text()
    assert ("neurons of experts sorted" in card) == (way == "both")
    blocks = BitPlan.load(plan).units.block.max() + 1
    assert blocks == {"blocks": 3, "both": 2}[way]


@pytest.mark.slow
def test_a_budget_of_the_whole_checkpoint_counts_the_order(made, tmp_path, document):
    out = tmp_path / "out"
    budget = ("--budget", "950kB", *FAST, "--row-blocks", "200", "--permute")
    document("quantize", made.model, *budget, "-o", out)
    assert sum(file.stat().st_size for file in out.iterdir()) <= 950_000


@pytest.mark.slow
def test_eight_bits_of_a_transformed_model_compute_what_the_model_does(made, tmp_path):
    words = ("--formats", "8", "--group-size", "8", "--tokens", "128", *TEXT, *WAYS["both"])
    out = tmp_path / "out"
    main(["quantize", str(made.model), "--budget", "12bpw", *words, "-o", str(out)])
    theirs = logits(bitknap.load(made.model, torch.float32))
    ours = logits(bitknap.load(out, torch.float32))
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
    assert Checkpoint.open(out).config["bitknap_rewritten"]["by"].startswith("neurons ")


@pytest.mark.slow
def test_blocks_of_one_format_share_the_cost_of_their_matrix(made, tmp_path):
    table = tmp_path / "t.safetensors"
    main(["estimate", str(made.model), *FAST, "--row-blocks", "3", "-o", str(table)])
    cut, whole = CostTable.load(table), CostTable.load(made.table)
    assert len(cut.units) == 3 * len(whole.units)
    assert np.array_equal(cut.units.rows.reshape(-1, 3).sum(1), whole.units.rows)
    # Pooling of what rose with the width happens block by block; little does.
    summed = cut.cost.reshape(len(whole.units), 3, -1).sum(1)
    assert np.allclose(summed, whole.cost, rtol=0.3)
    assert np.median(np.abs(summed / whole.cost - 1)) < 1e-9


@pytest.mark.slow
def test_without_a_text_rows_share_by_their_squared_error(made, tmp_path):
    table = tmp_path / "t.safetensors"
    words = ("--estimator", "weight-error", "--row-blocks", "2", "--permute")
    main(["estimate", str(made.model), *FAST, *words, "-o", str(table)])
    cost = CostTable.load(table)
    gate = cost.units.matches("proj=gate,block=0")
    rest = cost.units.matches("proj=gate,block=1")
    assert (cost.cost[gate][:, 0] > cost.cost[rest][:, 0]).mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--permute",), "permute: sorts neurons for row blocks; ask for at least 2"),
        (("--row-blocks", "0"), "row blocks: 0 is not from 1 to 256"),
        (("--row-blocks", "257"), "row blocks: 257 is not from 1 to 256"),
        (("--row-blocks", "many"), "many"),
    ],
)
def test_bad_words(arguments, words, made, tmp_path, refused):
    out = ("-o", tmp_path / "t.safetensors")
    assert words in refused("estimate", made.model, *FAST, *arguments, *out)


def test_a_plan_says_what_is_done_by_itself(made, tmp_path, refused):
    words = ("--plan", made.plan, "-o", tmp_path / "out")
    assert "--rotate: the plan says" in refused("quantize", made.model, *words, "--rotate")
    assert "--row-blocks: the plan" in refused("quantize", made.model, *words, "--row-blocks", "2")


def test_a_model_that_cannot_be_rotated_leaves_nothing(saved, tmp_path, refused):
    model = saved(tmp_path / "model", "granitemoe")
    out = ("-o", tmp_path / "t.safetensors")
    assert "models of this type cannot be rotated" in refused(
        "estimate", model, *FAST, "--rotate", *out
    )


@pytest.mark.slow
def test_plans_of_transformed_models_are_refused_elsewhere(made, saved, tmp_path, refused):
    table, plan = tmp_path / "t.safetensors", tmp_path / "p.json"
    main(["estimate", str(made.model), *FAST, "--rotate", "-o", str(table)])
    main(["solve", str(table), "--budget", "4bpw", "-o", str(plan)])
    other = saved(tmp_path / "other", seed=1)
    line = refused("quantize", other, "--plan", plan, "-o", tmp_path / "out")
    assert "rotated or sorted copy of model" in line
    known = BitPlan.load(plan)
    with pytest.raises(MismatchError, match="the plan is for model"):
        bitknap.quantize(other, BitPlan.load(made.plan), tmp_path / "out")
    origin = Checkpoint.open(made.model)
    header = {**known.header, "rewritten": {**known.header["rewritten"], "rotation": 8}}
    with pytest.raises(MismatchError, match="its rewritten turns"):
        planned(origin, header, known.model, tmp_path / "twin")
    header["rewritten"] = {**known.header["rewritten"], "rotation": "much"}
    with pytest.raises(FileError, match="not a seed"):
        planned(origin, header, known.model, tmp_path / "twin")
    header["rewritten"] = {**known.header["rewritten"], "order": {"blocks": 2}}
    with pytest.raises(FileError, match="order: damaged"):
        planned(origin, header, known.model, tmp_path / "twin")


def test_a_transformed_model_is_made_again_when_its_model_changed(made, tmp_path):
    folder = shutil.copytree(made.model, tmp_path / "model")
    first = make(Checkpoint.open(folder), Recipe(rotation=1), tmp_path / "twin")
    before = first.checksum()
    made_at = (tmp_path / "twin" / "rotated").stat().st_mtime_ns
    make(Checkpoint.open(folder), Recipe(rotation=1), tmp_path / "twin")
    assert (tmp_path / "twin" / "rotated").stat().st_mtime_ns == made_at
    tensors = load_file(folder / "model.safetensors")
    tensors[max(tensors, key=lambda n: tensors[n].numel())][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    again = make(Checkpoint.open(folder), Recipe(rotation=1), tmp_path / "twin")
    assert again.checksum() != before


@pytest.mark.parametrize("blocks", [2, 3, 4, 5, 200, 256])
def test_sortings_round_trip(blocks):
    score = np.random.default_rng(0).random((3, 250))
    found = Sorting.by_score({1: score, 4: -score}, blocks)
    again = Sorting.from_dict(json.loads(json.dumps(found.to_dict())))
    assert all(np.array_equal(again.block[n], found.block[n]) for n in (1, 4))
    order = found.permutation.order[1]
    sizes = np.bincount(found.block[1][0], minlength=min(blocks, 250))
    assert sizes.max() - sizes.min() <= 1
    cuts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    means = np.add.reduceat(np.take_along_axis(score, order, 1), cuts, axis=1) / sizes
    assert (np.diff(means, axis=1) < 0).all()


@pytest.mark.slow
def test_row_blocks_in_python(made):
    text = TEXT[1]
    grids = [Format.parse("int2-g8-asym"), Format.parse("int4-g8-asym")]
    table = bitknap.estimate(
        made.model,
        formats=bitknap.Formats(options=grids, row_blocks=2, permute=True),
        calibration=bitknap.Calibration(text=text, tokens=128),
    )
    assert table.provenance["row_blocks"] == 2
    assert table.provenance["model"] != Checkpoint.open(made.model).fingerprint
    with pytest.raises(InputError, match="row blocks"):
        bitknap.estimate(made.model, formats=bitknap.Formats(row_blocks=1000))
