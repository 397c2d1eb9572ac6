"""`--target` and `bitknap export`: from a menu of formats to the files of a runtime."""

import json

import numpy as np
import pytest

from bitknap.allocation import BitPlan, CostTable, Format, profile
from bitknap.cli import main
from bitknap.quantization.targets.catalog import TARGETS

FAST = ("--estimator", "data-free")


@pytest.fixture(scope="module")
def model(saved, tmp_path_factory):
    """A model whose rows are whole groups of 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 32}
    return saved(tmp_path_factory.mktemp("targets") / "model", **sizes)


@pytest.fixture(scope="module")
def free(model, tmp_path_factory):
    """A plan for the model that ties gate and up alone."""
    root = tmp_path_factory.mktemp("free")
    main(["estimate", str(model), *FAST, "--formats", "2,3,4", "-o", str(root / "t.safetensors")])
    words = [str(root / "t.safetensors"), "--budget", "4.3bpw", "-o", str(root / "plan.json")]
    main(["solve", *words])
    return root / "plan.json"


def test_a_table_for_a_target_has_its_formats(model, tmp_path):
    main(["estimate", str(model), *FAST, "--target", "mlx", "-o", str(tmp_path / "t.safetensors")])
    found = CostTable.load(tmp_path / "t.safetensors").formats
    assert set(found) == {Format(bits, 32) for bits in (2, 3, 4, 5, 6, 8)} | {
        Format(bits, 64) for bits in (2, 3, 4, 5, 6, 8)
    }
    some = tmp_path / "some.safetensors"
    main(["estimate", str(model), *FAST, "--target", "mlx", "--formats", "2,4", "-o", str(some)])
    assert {one.bits for one in CostTable.load(some).formats} == {2, 4}


def test_formats_of_other_files_are_asked_for_by_their_grids(model, tmp_path):
    some = tmp_path / "some.safetensors"
    asked = ("--formats", "3,4", "--group-size", "32")
    main(["estimate", str(model), *FAST, "--target", "gptq", *asked, "-o", str(some)])
    assert set(CostTable.load(some).formats) == {
        Format(bits, 32, symmetric=symmetric, metadata="gptq")
        for bits in (3, 4)
        for symmetric in (False, True)
    }


def test_a_plan_for_a_target_has_its_profile(made, tmp_path, refused):
    words = ["solve", str(made.table), "--budget", "5bpw", "--target", "vllm"]
    main([*words, "-o", str(tmp_path / "plan.json")])
    assert BitPlan.load(tmp_path / "plan.json").header["profile"] == "gate_eq_up"
    main([*words, "--profile", "layer", "-o", str(tmp_path / "layer.json")])
    plan = BitPlan.load(tmp_path / "layer.json")
    assert plan.header["profile"] == "layer"
    labels = profile("layer").labels(plan.units)
    assert (plan.choice == plan.choice[np.unique(labels, return_index=True)[1][labels]]).all()
    assert refused(*words, "--profile", "free", "-o", tmp_path / "free.json").endswith(
        "--profile free: vllm needs gate_eq_up, which ties units that this one leaves apart; "
        "leave it out"
    )


def test_a_table_without_formats_of_a_target_is_refused(made, tmp_path, refused):
    said = refused(
        *("solve", made.table, "--budget", "5bpw", "--target", "mlx", "-o", tmp_path / "plan.json")
    )
    assert "target mlx: it has none of the table's formats for layer=0" in said
    assert said.endswith("make a table with --target mlx")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--keep",), "--keep: mlx has no format for that; leave it out"),
        (("--row-blocks", "2"), "--row-blocks: mlx stores one format a matrix; leave it out"),
        (("--formats", "1"), "--formats: mlx has none of these formats for this model; leave"),
        (("--target", "mlxx"), "'mlxx' is unknown; one of vllm"),
    ],
)
def test_options_that_a_target_does_not_take(more, why, model, tmp_path, refused):
    words = ("estimate", model, *FAST, "--target", "mlx", *more, "-o", tmp_path / "t.safetensors")
    assert why in refused(*words)


def test_quantize_for_vllm_is_quantize(made, tmp_path, document):
    words = ("quantize", made.model, "--plan", made.plan)
    document(*words, "--target", "vllm", "-o", tmp_path / "one")
    document("export", made.plan, "--model", made.model, "--to", "vllm", "-o", tmp_path / "other")
    for name in ("bitknap.safetensors", "config.json", "bitknap_plan.json"):
        written = (made.out / name).read_bytes()
        assert written == (tmp_path / "one" / name).read_bytes()
        assert written == (tmp_path / "other" / name).read_bytes()


def test_an_export_says_what_it_wrote(made, tmp_path, document):
    out = tmp_path / "out"
    said = document("export", made.plan, "--model", made.model, "--to", "vllm", "-o", out)
    assert said["target"] == "vllm"
    assert said["bytes_predicted"] == said["bytes_on_disk"] == BitPlan.load(made.plan).total_bytes
    assert said["output_bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert sorted(said["files"]) == sorted(file.name for file in out.iterdir())
    assert said["checks"]


def test_a_plan_that_a_target_cannot_hold(model, free, tmp_path, refused):
    said = refused("export", free, "--model", model, "--to", "mlx", "-o", tmp_path / "out")
    assert "solve again with --target mlx (profile layer_proj), or --coarsen: " in said


def test_a_plan_of_another_model(model, made, tmp_path, refused):
    words = ("export", made.plan, "--model", model, "--to", "vllm", "-o", tmp_path / "out")
    assert "the plan is for model" in refused(*words)


def test_a_model_that_a_target_does_not_run_is_refused_before_measuring(saved, tmp_path, refused):
    model = saved(tmp_path / "model", "jamba")
    words = ("--target", "mlx", "--budget", "5bpw", "-o", tmp_path / "out")
    assert "mlx: model type 'jamba' was never run by mlx-lm here" in refused(
        "quantize", model, *words
    )


def test_an_output_of_others_is_not_replaced(made, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    words = ("export", made.plan, "--model", made.model, "--to", "vllm", "-o", tmp_path / "out")
    assert "exists; choose another name or pass --overwrite" in refused(*words)
    assert "mine.txt was not written by Bitknap" in refused(*words, "--overwrite")


@pytest.mark.slow
def test_quantize_ends_in_the_files_of_a_target(model, tmp_path, document):
    out = tmp_path / "out"
    words = ("quantize", model, *FAST, "--target", "mlx", "--budget", "5bpw", "-o", out)
    said = document(*words)
    assert said["bytes_predicted"] == said["bytes_on_disk"]
    assert said["checkpoint_bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert said["checks"]
    assert json.loads((out / "config.json").read_text())["quantization"]["mode"] == "affine"
    assert BitPlan.load(out / "bitknap_plan.json").header["profile"] == "layer_proj"
    assert document(*words, "--overwrite")["bytes_on_disk"] == said["bytes_on_disk"]


@pytest.mark.slow
def test_costs_are_of_the_rounding_of_a_target(model, tmp_path, document, refused):
    out = tmp_path / "out"
    said = refused("estimate", model, *FAST, "--target", "compressed-tensors", "-o", out)
    assert "--target compressed-tensors: it rounds otherwise" in said
    words = ("quantize", model, "--estimator", "weight-error", "--budget", "5bpw", "-o")
    said = document(*words, out, "--target", "compressed-tensors")
    assert said["method"] == "midtread"
    assert said["bytes_predicted"] == said["bytes_on_disk"]
    assert BitPlan.load(out / "bitknap_plan.json").header["method"] == "midtread"
    said = refused(*words, tmp_path / "other", "--target", "compressed-tensors", "--method", "hqq")
    assert said.endswith("--method hqq: compressed-tensors rounds by midtread; leave it out")
    said = refused(*words, tmp_path / "other", "--method", "midtread")
    assert said.endswith("give --target compressed-tensors")


def test_a_plan_is_raised_to_what_a_target_holds(model, free, tmp_path, document):
    words = ("export", free, "--model", model, "--to", "mlx", "--coarsen", "-o", tmp_path / "out")
    said = document(*words)
    more = said["bytes_on_disk"] - BitPlan.load(free).total_bytes
    assert said["coarsened_by_bytes"] == more > 0


def test_inspect_judges_every_target(made, document):
    assert set(document("inspect", made.model)["exports"]) == set(TARGETS.names())
