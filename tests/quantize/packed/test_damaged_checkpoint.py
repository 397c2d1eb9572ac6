"""A packed checkpoint of which anything is damaged: one line, and no model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitknap
from bitknap.allocation import BitPlan
from bitknap.errors import BitknapError, FileError
from bitknap.quantization.packed.folder import PLAN, SOURCE
from bitknap.testing import packed_checkpoint


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder, change):
    tensors = load_file(folder / "bitknap.safetensors")
    change(tensors)
    save_file(tensors, folder / "bitknap.safetensors", metadata={"format": "pt"})


def first_stream(tensors):
    return min(name for name in tensors if name.startswith("bitknap."))


def drop_stream(folder):
    edit_tensors(folder, lambda t: t.pop(first_stream(t)))


def shorten_stream(folder):
    edit_tensors(folder, lambda t: t.update({first_stream(t): t[first_stream(t)][:-1].clone()}))


def lengthen_stream(folder):
    edit_tensors(
        folder,
        lambda t: t.update(
            {first_stream(t): torch.cat([t[first_stream(t)], torch.zeros(1).byte()])}
        ),
    )


def retype_stream(folder):
    edit_tensors(folder, lambda t: t.update({first_stream(t): t[first_stream(t)].float()}))


def truncate_shard(folder):
    file = folder / "bitknap.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def remove_shard(folder):
    (folder / "bitknap.safetensors").unlink()


def truncate_plan(folder):
    file = folder / PLAN
    file.write_bytes(file.read_bytes()[:-40])


def other_bytes_in_plan(folder):
    edit_json(folder / PLAN, lambda plan: plan["units"][0].update(bytes=1))


def other_format_in_plan(folder):
    plan = BitPlan.load(folder / PLAN)
    choice = plan.choice.copy()
    choice[1] = (choice[1] + 1) % len(plan.formats)
    BitPlan.from_choice(plan.units, plan.formats, choice, model=plan.model).save(folder / PLAN)


def other_model_in_plan(folder):
    edit_json(folder / PLAN, lambda plan: plan.update(model="0" * 32))


def unit_less_in_plan(folder):
    def change(plan):
        plan["totals"]["bytes"] -= plan["units"][-1]["bytes"]
        plan["totals"]["weights"] -= plan["units"][-1]["rows"] * plan["units"][-1]["cols"]
        plan["units"].pop()
        totals = plan["totals"]
        totals["bits_per_weight"] = 8 * totals["bytes"] / totals["weights"]

    edit_json(folder / PLAN, change)


def newer_source(folder):
    edit_json(folder / SOURCE, lambda source: source.update(version="2.0"))


def source_without_tensors(folder):
    edit_json(folder / SOURCE, lambda source: source.pop("tensors"))


def source_with_bad_shape(folder):
    edit_json(
        folder / SOURCE,
        lambda source: source["tensors"].update(dict.fromkeys(source["tensors"], 7)),
    )


def source_with_infinite_shape(folder):
    def change(source):
        source["tensors"] |= {name: ["F32", [float("inf")]] for name in source["tensors"]}

    edit_json(folder / SOURCE, change)


def source_as_list(folder):
    (folder / SOURCE).write_text("[]")


def remove_source(folder):
    (folder / SOURCE).unlink()


def remove_plan(folder):
    (folder / PLAN).unlink()


def empty_config(folder):
    (folder / "config.json").write_text("{}")


def unknown_model_type(folder):
    edit_json(folder / "config.json", lambda config: config.update(model_type="unheard"))


def unknown_class(folder):
    edit_json(folder / "config.json", lambda config: config.update(architectures=["Unheard"]))


def drop_kept_tensor(folder):
    edit_tensors(folder, lambda t: t.pop("model.norm.weight"))


DAMAGE = (
    drop_stream,
    shorten_stream,
    lengthen_stream,
    retype_stream,
    truncate_shard,
    remove_shard,
    truncate_plan,
    other_bytes_in_plan,
    other_format_in_plan,
    other_model_in_plan,
    unit_less_in_plan,
    newer_source,
    source_without_tensors,
    source_with_bad_shape,
    source_with_infinite_shape,
    source_as_list,
    remove_source,
    remove_plan,
    empty_config,
    unknown_model_type,
    unknown_class,
    drop_kept_tensor,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed checkpoint; read only."""
    return packed_checkpoint(tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_is_one_line(damage, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "packed")
    damage(folder)
    with pytest.raises(BitknapError) as error:
        bitknap.load(folder)
    assert "\n" not in str(error.value)
    if damage in (drop_stream, shorten_stream, truncate_shard, truncate_plan, remove_source):
        assert isinstance(error.value, FileError)
