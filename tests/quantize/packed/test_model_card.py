"""The model card: what it says, that it stays small, and that the source's own is not lost."""

import re

import pytest

from bitknap.allocation import BitPlan, Format, formats
from bitknap.errors import FileError
from bitknap.quantization.packed import model_card
from bitknap.testing import random_plan, routed_units

README = (
    "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\ntags:\n- a\n---\n# Theirs\n"
)
SIZES = {"quantized weights": 1234567, "source": 2**30}


def make_plan(layers=3, experts=4, header=None, seed=0):
    units = routed_units(layers, experts, ("gate", "up", "down"), rows=16, cols=64)
    return random_plan(units, formats((2, 4), 32), seed, model="f" * 32, header=header)


def test_what_a_card_says():
    header = {
        "solver": "knapsack",
        "profile": "expert",
        "estimator": "fisher",
        "method": "rtn",
        "objective": 0.02,
        "bound": 0.019,
        "limits": {"bytes": 900},
    }
    plan = make_plan(header=header)
    losses = {"perplexity": 12.3456, "kl": 0.0123, "kl_se": 0.0004, "top1": 0.912}
    text = model_card.card(plan, SIZES, losses, name="org/Model-8x7B")
    for wanted in (
        "base_model: org/Model-8x7B\nbase_model_relation: quantized\nlibrary_name: transformers\n",
        "- mixture-of-experts\n",
        f"# Model-8x7B, {plan.bpw:.4g} bits per weight",
        "36 matrices of `org/Model-8x7B`",
        "import bitknap  # tells",
        "| quantized weights | 1,234,567 | 1.177 MiB |",
        "| source | 1,073,741,824 | 1 GiB |",
        "| perplexity | 12.346 |",
        "| KL from the source, nats per token | 0.01230 ± 0.00040 |",
        "| same most likely token | 91.20 % |",
        "- solver: knapsack\n- grouping rule: expert\n- costs estimated by: fisher\n",
        "- rounding: rtn\n",
        "- expected loss: 0.02\n- no plan can be below: 0.019 (gap 0.05)\n- limit on bytes: 900\n",
        f"fingerprint `{'f' * 32}`",
        "| layer | routed gate | routed up | routed down | all |",
    ):
        assert wanted in text, wanted
    # The import stands before the model is loaded.
    assert text.index("import bitknap") < text.index("from_pretrained")


def test_a_card_says_how_each_runtime_serves_it():
    plan = make_plan()
    text = model_card.card(plan, {}, name="org/Model")
    bits = f"{plan.bpw:.4g}bpw"
    assert "then `vllm serve` this folder or its hub id |" in text
    for target in ("gguf", "mlx"):
        assert f"`bitknap quantize org/Model --target {target} --budget {bits} -o OUT`" in text
    assert "quantize SOURCE --target gguf" in model_card.card(plan, {})


def test_tags_are_added_to_the_front_matter_once():
    text = model_card.card(make_plan(), {})
    more = model_card.tagged(text, ["mine", "bitknap", "mine"])
    assert more == text.replace("- mixture-of-experts\n", "- mixture-of-experts\n- mine\n", 1)
    assert model_card.tagged(text, []) == text


def test_figures_of_layers():
    plan = make_plan(layers=2)
    text = model_card.card(plan, {})
    gate = (plan.units.layer == 1) & (plan.units.projection == 0)
    bits = 8 * plan.nbytes[gate].sum() / plan.units.numel[gate].sum()
    row = next(line for line in text.splitlines() if line.startswith("| 1 |"))
    assert row.split("|")[2].strip() == f"{bits:.3f}"
    uniform = BitPlan.uniform(plan.units, Format(4, 32))
    assert "| 0-1 | 5.000 | 5.000 | 5.000 | 5.000 |" in model_card.card(uniform, {})
    assert "| int4-g32-asym | 24 | 100.0 % | 15,360 |" in model_card.card(uniform, {})


def test_a_card_says_neither_when_nor_where(tmp_path):
    plan = make_plan()
    texts = []
    for name in ("one", "two"):
        (tmp_path / name / "source").mkdir(parents=True)
        model_card.write(tmp_path / name, plan, source=tmp_path / name / "source", sizes=SIZES)
        texts.append((tmp_path / name / "README.md").read_text())
        assert not (tmp_path / name / "SOURCE_README.md").exists()
    assert texts[0] == texts[1]
    assert str(tmp_path) not in texts[0]
    assert not re.search(r"\b20\d\d-\d\d", texts[0])
    assert "base_model:" not in texts[0]
    assert "SOURCE_README" not in texts[0]
    assert "Not measured; measure it with `bitknap evaluate`." in texts[0]


def test_it_stays_small():
    header = {
        "solver": "x" * 9000,
        "limits": {f"limit {'é' * 500} {n}": "9" * 900 for n in range(50)},
    }
    many = [
        Format(b, g, symmetric=s)
        for b in range(1, 9)
        for g in (8, 16, 24, 32, 40)
        for s in (False, True)
    ]
    plan = make_plan(layers=700, experts=8)
    plan = random_plan(plan.units, many, header=header)
    license = dict.fromkeys(("license", "license_name", "license_link"), "y" * 200)
    text = model_card.card(
        plan, SIZES, {"perplexity": 1e300}, name="o/" + "n" * 90, license=license
    )
    assert len(text.encode()) <= model_card.MOST_BYTES
    assert re.search(r"\nand \d+ more\.\n$", text)
    assert f"| {len(many) - 32} others |" in text


def test_the_sources_card_is_kept_and_its_licence_carried_over(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "README.md").write_text(README)
    model_card.write(out, make_plan(), source=source, sizes=SIZES)
    assert (out / "SOURCE_README.md").read_text() == README
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n")
    assert "described in `SOURCE_README.md`" in text
    assert "# Theirs" not in text


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        (README, {"license": "other", "license_name": "mine", "license_link": "LICENSE"}),
        ("---\r\nlicense: mit\r\n---\r\ntext", {"license": "mit"}),
        ("---\nlicense: |\n  long\n---\n", {}),
        ("license: mit\n", {}),
        ("# Title\n\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\nlicense:\n- mit\n---\n", {}),
        ("", {}),
    ],
)
def test_licence(readme, found):
    assert model_card.licence(readme) == found


def test_hub_id(tmp_path):
    cache = tmp_path / "hub" / "models--mistralai--Mixtral-8x7B-v0.1" / "snapshots" / "fc7ac94"
    assert model_card.hub_id(cache) == "mistralai/Mixtral-8x7B-v0.1"
    assert model_card.hub_id(tmp_path / "my models" / "private") == ""


def test_measured_later(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    model_card.write(tmp_path / "out", make_plan(), source=source, sizes=SIZES)
    path = tmp_path / "out" / "README.md"
    before = path.read_text()
    model_card.measured(tmp_path / "out", {"kl": 0.25})
    model_card.measured(tmp_path / "out", {"kl": 0.5})
    assert path.read_text() == model_card.card(make_plan(), SIZES, {"kl": 0.5})
    assert before == model_card.card(make_plan(), SIZES)
    (tmp_path / "README.md").write_text("# other\n")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileError, match="not a card of a packed checkpoint"):
            model_card.measured(folder, {"kl": 1.0})
