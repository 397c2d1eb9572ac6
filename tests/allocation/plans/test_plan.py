import json

import numpy as np
import pytest

from bitknap.allocation import BitPlan, Format, Units, formats
from bitknap.errors import FileError, InputError

FORMATS = formats(bits=(2, 3), group_size=32, keep="bf16")


def plan(positions: tuple[int, ...] = (0, 1, 2, 3)) -> BitPlan:
    order = np.array(positions)
    units = Units.build(
        layer=np.array([0, 0, 1, 1])[order],
        role=["routed"] * 4,
        expert=np.array([0, 1, 0, 1])[order],
        projection=["up"] * 4,
        rows=[64] * 4,
        cols=[32] * 4,
    )
    choice = np.array([0, 1, 2, 0])[order]
    return BitPlan.from_choice(units, FORMATS, choice, model="abc", header={"seed": 1, "b": None})


def test_bytes_and_totals():
    found = plan()
    assert found.nbytes.tolist() == [768, 1024, 4096, 768]
    assert found.totals == {"bytes": 6656, "weights": 8192, "bits_per_weight": 6.5}
    assert (found.total_bytes, found.bpw) == (6656, 6.5)
    assert found.format_of(2) == Format.keep("bf16")


def test_uniform():
    found = BitPlan.uniform(plan().units, FORMATS[1], model="abc")
    assert found.nbytes.tolist() == [1024] * 4


def test_a_choice_is_in_range_and_bytes_agree():
    units = plan().units
    with pytest.raises(InputError, match=r"choice\[3\]: 5 is outside 0 to 2"):
        BitPlan.from_choice(units, FORMATS, [0, 0, 0, 5])
    with pytest.raises(InputError, match="has 9; the format stores 768"):
        BitPlan.from_choice(units, FORMATS, [0, 0, 0, 0], nbytes=[768, 9, 768, 768])
    with pytest.raises(InputError, match="give nbytes"):
        BitPlan.uniform(units, Format.made_up(0))


def test_one_line_a_unit(tmp_path):
    plan().save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert lines[1:3] == [' "format": "bitknap.plan",', ' "version": "1.0",']
    assert (
        '  {"layer":0,"role":"routed","expert":1,"projection":"up","block":0,"rows":64,"cols":32,'
        '"format":"int3-g32-asym","bytes":1024},'
    ) in lines


def test_saving_and_loading(tmp_path):
    path = tmp_path / "plan.json"
    plan().save(path)
    again = BitPlan.load(path)
    assert again.choice.tolist() == plan().choice.tolist()
    assert (again.formats, again.model) == (FORMATS, "abc")
    assert dict(again.header) == {"seed": 1, "b": None}
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


def test_the_order_of_units_does_not_change_the_file(tmp_path):
    plan().save(tmp_path / "a.json")
    plan((3, 1, 0, 2)).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_plans_without_shapes_can_be_saved(tmp_path):
    units, options = Units.anonymous(2), [Format.made_up(0), Format.made_up(1)]
    BitPlan.from_choice(units, options, [1, 0], nbytes=[5, 6]).save(tmp_path / "plan.json")
    assert BitPlan.load(tmp_path / "plan.json").nbytes.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version="2.0"), "version: 2.0 cannot be read"),
        (
            lambda c: c["units"][1].update(format="int9"),
            "units[1].format 'int9' is unknown; one of int2",
        ),
        (lambda c: c["units"][1].pop("rows"), "units[1].rows: missing; make the plan again"),
        (lambda c: c["units"][3].update(layer=True), "units[3].layer: True is not a whole number"),
        (
            lambda c: c["units"][2].update(role="router"),
            "units[2].role 'router' is unknown; one of",
        ),
        (lambda c: c["units"].append(7), "units[4].layer: missing"),
        (
            lambda c: c["units"][0].update(bytes=1),
            "expert=0 proj=up int2-g32-asym has 1; the format",
        ),
        (lambda c: c["units"].append(c["units"][0]), "expert=0 proj=up appears twice"),
        (lambda c: c["totals"].update(bytes=3), "totals.bytes: 3, but the units add up to 6656"),
        (lambda c: c.update(formats=["a"]), "units[0].format"),
        (lambda c: c.pop("header"), "header: missing; make the plan again"),
        (lambda c: c.update(units=[]), "units: layer: shape (0,)"),
        (lambda c: c["units"][0].update(rows=2**70), "units:"),
    ],
)
def test_a_wrong_file_names_the_field(tmp_path, change, message):
    path = tmp_path / "plan.json"
    plan().save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(FileError) as error:
        BitPlan.load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_plans(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(FileError, match="cannot be read"):
        BitPlan.load(path)
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object, not a list"),
        ("{}", "format: None"),
    ):
        path.write_text(text)
        with pytest.raises(FileError, match=message):
            BitPlan.load(path)
