"""Target gguf: what it offers, and what it writes from a plan, in one file or in a folder."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bitknap.allocation import BitPlan, Format, Units
from bitknap.api.exporting import coarsen, export
from bitknap.api.requests import Calibration, Resume
from bitknap.errors import InputError, MismatchError, ModelError
from bitknap.quantization.ggml import container, library
from bitknap.quantization.gguf import imatrix
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks.reading import read_stored
from bitknap.quantization.targets.catalog import target_of

GGUF = target_of("gguf")
MENU = tuple(map(Format.ggml, ("q8_0", "q5_1", "iq4_nl")))
TEXT = ["a text for calibration, long enough " * 40]


def write(plan, folder, out, *, to="gguf", overwrite=False):
    return export(
        plan,
        folder,
        to,
        out,
        calibration=Calibration(text=TEXT, tokens=64),
        resume=Resume(overwrite=overwrite),
    )


def units(*cols):
    return Units.build(
        layer=list(range(len(cols))),
        role=["routed"] * len(cols),
        expert=[0] * len(cols),
        projection=["up"] * len(cols),
        rows=[8] * len(cols),
        cols=list(cols),
    )


@pytest.fixture(scope="module")
def tiny(saved, tmp_path_factory):
    """A model whose rows are multiples of 32, and a plan of ggml's types for it."""
    folder = tmp_path_factory.mktemp("gguf") / "model"
    saved(folder, hidden_size=64, intermediate_size=96)
    return SimpleNamespace(folder=folder, plan=plan_of(folder))


def plan_of(folder, menu=MENU, **header):
    source = Checkpoint.open(folder)
    of = walk_headers(source.config, source.shapes).units
    choice = (of.layer + of.projection) % len(menu)
    return BitPlan.from_choice(
        of, menu, choice, model=source.fingerprint, header={"method": "ggml", **header}
    )


def test_types_with_blocks_of_32_are_offered_only_where_rows_need_them():
    wide = [one.source for one in GGUF.menu(units(256, 512))]
    assert wide == [
        *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k"),
        *("iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
    ]
    narrow = [one.source for one in GGUF.menu(units(192))]
    assert narrow == ["mxfp4", "iq4_nl", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
    assert {*wide, *narrow} == {one.source for one in GGUF.menu(units(256, 192))}


def test_a_type_holds_rows_that_its_block_divides():
    held = GGUF.holds(Format.ggml("q4_k"), 8, [256, 192, 512])
    assert held.tolist() == [True, False, True]
    assert GGUF.holds(Format.keep("bf16"), 8, [7]).all()
    assert not GGUF.holds(Format.keep("fp8"), 8, [256]).any()
    assert not GGUF.holds(Format(4), 8, [256]).any()


def test_a_file_holds_the_plan(tiny, tmp_path):
    out = tmp_path / "tiny.gguf"
    written = write(tiny.plan, tiny.folder, out)
    assert written.files == ("tiny.gguf",)
    assert written.nbytes == out.stat().st_size
    assert written.unit_bytes == tiny.plan.total_bytes
    held = container.read(out)
    for at in range(len(tiny.plan.units)):
        unit = tiny.plan.units.row(at)
        entry = held.entries[f"blk.{unit.layer}.ffn_{unit.projection}_exps.weight"]
        assert entry.type == tiny.plan.format_of(at).source


def test_a_folder_holds_the_file_and_the_recipe_for_it(tiny, tmp_path):
    written = write(tiny.plan, tiny.folder, tmp_path / "out", to="llama.cpp")
    assert set(written.files) >= {"model.gguf", "tensor-types.txt", "imatrix.gguf", "README.md"}
    held = container.read(tmp_path / "out" / "model.gguf")
    lines = (tmp_path / "out" / "tensor-types.txt").read_text().splitlines()
    assert len(lines) == 2 * 3
    for line in lines:
        pattern, _, type = line.rpartition("=")
        (name,) = [one for one in held.entries if re.search(pattern, one)]
        assert held.entries[name].type == type


def test_the_importances_beside_it_give_the_same_blocks(tiny, tmp_path):
    """What llama-quantize makes of tensor-types.txt and imatrix.gguf is the file itself."""
    out = tmp_path / "out"
    write(tiny.plan, tiny.folder, out)
    known, held = imatrix.read(out / "imatrix.gguf"), container.read(out / "model.gguf")
    source = Checkpoint.open(tiny.folder)
    layout = walk_headers(source.config, source.shapes)
    for name, one in known.items():
        layer, projection = int(name.split(".")[1]), name.split("_")[1]
        run = [
            at
            for at in range(len(layout.units))
            if (layout.units.row(at).layer, layout.units.row(at).projection) == (layer, projection)
        ]
        weights = read_stored(layout, np.array(run), source).numpy()
        blocks = [
            library.quantize(matrix, held.entries[name].type, row)
            for matrix, row in zip(weights, one.squares, strict=True)
        ]
        np.testing.assert_array_equal(held.data(name), np.concatenate(blocks).reshape(-1))


@pytest.mark.slow
def test_an_importance_matrix_stands_for_a_text(tiny, tmp_path, document):
    """The importance matrix beside a file makes that file again, and no model is run."""
    first = tmp_path / "out"
    write(tiny.plan, tiny.folder, first)
    tiny.plan.save(tmp_path / "plan.json")
    words = ("export", tmp_path / "plan.json", "--model", tiny.folder, "--to", "gguf")
    again = tmp_path / "a.gguf"
    document(*words, "--imatrix", first / "imatrix.gguf", "-o", again)
    assert again.read_bytes() == (first / "model.gguf").read_bytes()


@pytest.mark.slow
def test_importance_matrices_that_do_not_fit_are_refused(tiny, saved, tmp_path, refused):
    other = saved(tmp_path / "other", hidden_size=32, intermediate_size=96)
    write(plan_of(other), other, tmp_path / "out")
    tiny.plan.save(tmp_path / "plan.json")
    grids = plan_of(tiny.folder, (Format(4, 32),), method="gptq")
    grids.save(tmp_path / "grids.json")
    known = ("--model", tiny.folder, "--imatrix", tmp_path / "out" / "imatrix.gguf")
    words = ("export", tmp_path / "plan.json", *known, "--to", "gguf", "-o", tmp_path / "a.gguf")
    assert "make it with this model" in refused(*words)
    said = refused(
        *("export", tmp_path / "grids.json", *known, "--to", "vllm", "-o", tmp_path / "b")
    )
    assert "--imatrix: gptq needs more than mean squares" in said
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "out" / "imatrix.gguf").read_bytes()[:200])
    cut = ("--model", tiny.folder, "--imatrix", tmp_path / "cut.gguf", "--to", "gguf")
    out = tmp_path / "a.gguf"
    assert "cut short" in refused("export", tmp_path / "plan.json", *cut, "-o", out)


def test_another_architecture_gets_the_recipe_alone(saved, tmp_path):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96}
    folder = saved(tmp_path / "model", "glm4_moe", **sizes)
    plan = plan_of(folder)
    with pytest.raises(ModelError, match="model_type glm4_moe: GGUF files are written for"):
        write(plan, folder, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    written = write(plan, folder, tmp_path / "out")
    assert written.unit_bytes is None
    assert "model.gguf" not in written.files
    assert "model_type glm4_moe" in written.warnings[-1]
    assert imatrix.read(tmp_path / "out" / "imatrix.gguf").keys() == {
        f"blk.1.ffn_{name}_exps.weight" for name in ("gate", "up", "down")
    }


def test_what_cannot_be_written_is_refused_before_anything_is_measured(saved, tmp_path, refused):
    folder = saved(tmp_path / "model", "glm4_moe", hidden_size=64, moe_intermediate_size=32)
    words = ("quantize", folder, "--target", "gguf", "--budget", "5bpw")
    assert "model_type glm4_moe" in refused(*words, "-o", tmp_path / "a.gguf")


def test_a_damaged_model_gets_no_folder(saved, tmp_path):
    folder = saved(tmp_path / "model", hidden_size=64, intermediate_size=96)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    plan = plan_of(folder)
    with pytest.raises(ModelError, match="NaN"):
        write(plan, folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_only_its_own_files_are_replaced(tiny, tmp_path):
    out = tmp_path / "a.gguf"
    out.write_bytes(container.head({"general.architecture": "llama"}, []))
    with pytest.raises(InputError, match="not written by Bitknap"):
        write(tiny.plan, tiny.folder, out, overwrite=True)
    out.unlink()
    write(tiny.plan, tiny.folder, out)
    first = out.read_bytes()
    with pytest.raises(InputError, match="exists"):
        write(tiny.plan, tiny.folder, out)
    write(tiny.plan, tiny.folder, out, overwrite=True)
    assert out.read_bytes() == first


def test_plans_that_it_cannot_hold_are_refused(tiny, tmp_path):
    grids = plan_of(tiny.folder, (Format(4, 32), Format(8, 32)), method="rtn")
    with pytest.raises(MismatchError, match="gguf cannot hold int4-g32-asym for"):
        write(grids, tiny.folder, tmp_path / "a.gguf")
    units = tiny.plan.units
    free = BitPlan.from_choice(
        units, MENU, units.expert % 2, model=tiny.plan.model, header={"method": "ggml"}
    )
    with pytest.raises(MismatchError, match=r"gguf stores one format for .* `coarsen`"):
        write(free, tiny.folder, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
    wider = coarsen(free, "gguf")
    assert (wider.nbytes >= free.nbytes).all()
    write(wider, tiny.folder, tmp_path / "a.gguf")


def test_our_own_checkpoints_refuse_its_types(tiny, tmp_path):
    with pytest.raises(MismatchError, match=r"ggml-\w+"):
        write(tiny.plan, tiny.folder, tmp_path / "out", to="vllm")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_any_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    library._library.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'bitknap\[gguf\]'"):
        write(tiny.plan, tiny.folder, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
    library._library.cache_clear()
