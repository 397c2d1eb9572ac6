"""The command line, in process: one line for every bad input, and the main job end to end."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitknap.allocation import BitPlan, CostTable
from bitknap.cli import main
from bitknap.testing import tiny_model

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "benchmarks" / "reference" / "mixtral"
TEXT = ("--text", str(ROOT / "LICENSE"))  # short: quick to tokenize
COMMANDS = ("inspect", "estimate", "solve", "quantize", "evaluate", "show")
FAST = ("--formats", "2,4", "--group-size", "8,row", "--tokens", "128", *TEXT)


def saved(folder, family="mixtral", **changes):
    """Save a tiny model with the tokenizer of the bundled ones."""
    model = tiny_model(family, vocab_size=4096, **changes)
    model.save_pretrained(folder)
    for file in REFERENCE.glob("tokenizer*.json"):
        shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model folder, a table, a plan and a packed checkpoint, all made by the command line."""
    root = tmp_path_factory.mktemp("cli")
    model = saved(root / "model")
    table, plan, out = root / "table.safetensors", root / "plan.json", root / "out"
    main(["estimate", str(model), *FAST, "-o", str(table)])
    main(["solve", str(table), "--budget", "4bpw", "-o", str(plan)])
    main(["quantize", str(model), "--plan", str(plan), "-o", str(out)])
    return SimpleNamespace(root=root, model=model, table=table, plan=plan, out=out)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(capsys, folder, *arguments):
    """Run a command that must fail: one line on stderr, status 2, and no file more or less."""
    before = listing(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("bitknap: ")
    assert "Traceback" not in lines[0]
    assert listing(folder) == before
    return lines[0]


def document(capsys, *arguments):
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


# Help and output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    main([command, "--help"])
    text = capsys.readouterr().out
    assert f"Example: bitknap {command}" in text
    assert "--json" in text


def test_help_names_every_command(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert "Example: bitknap quantize" in text
    assert all(command in text for command in COMMANDS)


def test_end_to_end_in_steps_and_in_one_go(made, capsys, tmp_path):
    plan = BitPlan.load(made.plan)
    assert 2 < plan.bpw <= 4
    losses = document(
        capsys, "evaluate", made.out, "--reference", made.model, "--tokens", 256, *TEXT
    )
    assert losses["original"]["kl"] == 0
    assert losses["ours"]["kl"] > 0
    assert losses["ours"]["bytes"] == plan.total_bytes
    assert losses["ours"]["perplexity"] > 1
    shown = document(capsys, "show", made.out)
    assert shown == document(capsys, "show", made.plan)
    assert shown["totals"]["bytes"] == plan.total_bytes
    assert sum(shown["formats"].values()) == len(plan.units) == 24

    whole = tmp_path / "out"
    sizes = document(capsys, "quantize", made.model, "--budget", "4bpw", *FAST, "-o", whole)
    assert sizes["bytes_predicted"] == sizes["bytes_on_disk"] == plan.total_bytes
    assert sizes["status"] == "OPTIMAL"
    assert (whole / "bitknap_plan.json").read_bytes() == made.plan.read_bytes()
    for file in made.out.iterdir():
        assert (whole / file.name).read_bytes() == file.read_bytes(), file.name


def test_uniform_recipes_beside_ours(made, capsys):
    rows = document(
        capsys, "evaluate", made.out, "--reference", made.model, "--uniform", "--tokens", 64, *TEXT
    )
    assert [name.split()[0] for name in rows] == ["original", "ours", "uniform"]
    assert {"kl_gain", "kl_gain_se"} <= rows["ours"].keys()


def test_every_command_has_one_json_document(made, capsys, tmp_path):
    report = document(capsys, "inspect", made.model)
    assert report["units"] == 24
    assert report["least_bpw"] < report["most_bpw"]
    table = document(
        capsys, "estimate", made.model, *FAST, "--estimator", "data-free", "-o", tmp_path / "t"
    )
    assert table["units"] == 24
    found = document(capsys, "show", made.table)
    assert found["provenance"]["model"] == table["provenance"]["model"]
    solved = document(capsys, "solve", made.table, "--budget", "4bpw", "-o", tmp_path / "p.json")
    assert solved["gap"] >= 0
    alone = document(capsys, "evaluate", made.model, "--tokens", 64, *TEXT)
    assert alone[str(made.model)]["kl"] == 0


def test_tables_for_people(made, capsys):
    for arguments in (
        ("inspect", made.model),
        ("show", made.table),
        ("show", made.plan),
        ("evaluate", made.out, "--tokens", "64", *TEXT),
    ):
        main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert len(captured.out.splitlines()) > 3
        assert captured.err == ""


def test_a_budget_of_the_whole_checkpoint_is_kept(made, capsys, tmp_path):
    least = document(capsys, "inspect", made.model)["smallest_checkpoint_bytes"]
    budget = ("--budget", f"{least + 5000}B")
    main(["solve", str(made.table), *budget, "-o", str(tmp_path / "plan.json")])
    out = tmp_path / "out"
    main(["quantize", str(made.model), "--plan", str(tmp_path / "plan.json"), "-o", str(out)])
    assert sum(file.stat().st_size for file in out.iterdir()) <= least + 5000


def test_pins_and_profiles_are_kept(made, tmp_path):
    path = tmp_path / "plan.json"
    pins = ("--pin", "layer=0=4", "--pin", "proj=down,layer=1,expert=2=2")
    main(
        [
            "solve",
            str(made.table),
            "--budget",
            "5bpw",
            "--profile",
            "expert",
            *pins[:2],
            "-o",
            str(path),
        ]
    )
    plan = BitPlan.load(path)
    assert {plan.format_of(i).bits for i in range(12)} == {4}
    main(["solve", str(made.table), "--budget", "5bpw", *pins, "-o", str(path), "--overwrite"])
    plan = BitPlan.load(path)
    (unit,) = plan.units.matches("proj=down,layer=1,expert=2").nonzero()[0]
    assert plan.format_of(int(unit)).bits == 2


def test_identical_runs_write_identical_tables(made, tmp_path):
    main(["estimate", str(made.model), *FAST, "-o", str(tmp_path / "table.safetensors")])
    assert (tmp_path / "table.safetensors").read_bytes() == made.table.read_bytes()


@pytest.mark.parametrize(
    "name", ["moments", "fisher", "weight-error", "data-free", "calibrated,fisher"]
)
def test_every_estimator_has_a_name(name, made, tmp_path):
    path = tmp_path / "table.safetensors"
    main(["estimate", str(made.model), *FAST, "--estimator", name, "-o", str(path)])
    expected = name.replace("calibrated,fisher", "calibrated(fisher)")
    assert CostTable.load(path).provenance["estimator"] == expected


def test_a_group_size_that_does_not_divide_the_row_is_counted_and_said(made, capsys, tmp_path):
    # Rows of 16 (gate, up) and 24 (down): in groups of 32 each row is 16 or 8 weights short.
    report = document(capsys, "inspect", made.model)
    short = 2 * 4 * (24 * 16 + 24 * 16 + 16 * 8)
    assert f"g32: {short:,}" in report["short_of_a_whole_last_group"]
    out = tmp_path / "out"
    sizes = document(
        capsys,
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


# Bad models


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


ON_A_MODEL = (
    ("inspect",),
    ("estimate", *FAST, "-o", "t.safetensors"),
    ("estimate", *FAST, "--estimator", "data-free", "-o", "t.safetensors"),
    ("quantize", "--budget", "4bpw", *FAST, "-o", "out"),
    ("evaluate", "--tokens", "64", *TEXT),
)


def on_a_model(model, root, command):
    name, *rest = command
    rest = [
        str(root / a) if before == "-o" else a for before, a in zip(command, rest, strict=False)
    ]
    return (name, model, *rest)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.model, tmp_path / "model")


@pytest.mark.parametrize("command", ON_A_MODEL, ids=lambda c: f"{c[0]}{len(c)}")
def test_missing_shard(command, copy, capsys, tmp_path):
    tiny_model("mixtral", vocab_size=4096).save_pretrained(copy, max_shard_size="300KB")
    (copy / "model.safetensors").unlink(missing_ok=True)
    lost = sorted(copy.glob("model-*.safetensors"))[0]
    lost.unlink()
    assert lost.name in refused(capsys, tmp_path, *on_a_model(copy, tmp_path, command))


@pytest.mark.parametrize("command", ON_A_MODEL, ids=lambda c: f"{c[0]}{len(c)}")
def test_truncated_shard(command, copy, capsys, tmp_path):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refused(capsys, tmp_path, *on_a_model(copy, tmp_path, command))


@pytest.mark.parametrize("tensor", ["experts", "self_attn", "embed_tokens", "gate"])
@pytest.mark.parametrize(
    "command", (ON_A_MODEL[1], *ON_A_MODEL[3:]), ids=lambda c: f"{c[0]}{len(c)}"
)
def test_nan_or_infinite_weight(command, tensor, copy, capsys, tmp_path):
    names = []

    def change(tensors):
        names.append(sorted(n for n in tensors if f".{tensor}." in n)[-1])
        tensors[names[0]][-1, -1] = float("inf" if tensor == "gate" else "nan")

    edit(copy, change)
    line = refused(capsys, tmp_path, *on_a_model(copy, tmp_path, command))
    assert "NaN or infinite weight" in line
    assert tensor in line


def test_nan_found_when_quantizing_by_plan(made, copy, capsys, tmp_path):
    edit(copy, lambda t: t[sorted(n for n in t if ".experts." in n)[0]][-1].fill_(float("nan")))
    arguments = ("quantize", copy, "--plan", made.plan, "-o", tmp_path / "out")
    assert "NaN or infinite weight" in refused(capsys, tmp_path, *arguments)


@pytest.mark.parametrize("command", ON_A_MODEL[:4], ids=lambda c: f"{c[0]}{len(c)}")
def test_a_model_without_experts(command, capsys, tmp_path):
    model = saved(tmp_path / "llama", "llama")
    line = refused(capsys, tmp_path, *on_a_model(model, tmp_path, command))
    assert "no routed experts" in line


@pytest.mark.parametrize("command", ON_A_MODEL[1:], ids=lambda c: f"{c[0]}{len(c)}")
@pytest.mark.parametrize("key", ["model_type", "architectures"])
def test_an_unknown_architecture(command, key, copy, capsys, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    config[key] = "unheard" if key == "model_type" else ["Unheard"]
    (copy / "config.json").write_text(json.dumps(config))
    if "data-free" in command:  # names and shapes of tensors are enough for it
        main([str(a) for a in on_a_model(copy, tmp_path, command)])
        return
    line = refused(capsys, tmp_path, *on_a_model(copy, tmp_path, command))
    assert "unheard" in line.lower()


def test_experts_stored_in_an_unknown_way(capsys, tmp_path):
    model = saved(tmp_path / "jetmoe", "jetmoe")
    for command in ON_A_MODEL[:4]:
        line = refused(capsys, tmp_path, *on_a_model(model, tmp_path, command))
        assert "do not make experts" in line or "not known" in line


def test_experts_that_cannot_be_watched(capsys, tmp_path):
    model = saved(tmp_path / "llama4", "llama4_text")
    line = refused(capsys, tmp_path, *on_a_model(model, tmp_path, ON_A_MODEL[1]))
    assert "--estimator data-free" in line
    main([str(a) for a in on_a_model(model, tmp_path, ON_A_MODEL[2])])


@pytest.mark.parametrize("command", ON_A_MODEL, ids=lambda c: f"{c[0]}{len(c)}")
def test_no_model_at_all(command, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(
        capsys, tmp_path, *on_a_model(tmp_path / "empty", tmp_path, command)
    )
    line = refused(capsys, tmp_path, *on_a_model("reference:none", tmp_path, command))
    assert "reference:mixtral" in line


def test_an_encoder_decoder_has_no_such_losses(capsys, tmp_path):
    model = saved(tmp_path / "switch", "switch_transformers")
    line = refused(capsys, tmp_path, *on_a_model(model, tmp_path, ON_A_MODEL[4]))
    assert "encoder-decoder" in line


def test_no_tokenizer(copy, capsys, tmp_path):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    for command in (ON_A_MODEL[1], ON_A_MODEL[4]):
        assert "tokenizer" in refused(capsys, tmp_path, *on_a_model(copy, tmp_path, command))


# Bad words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--formats", "two"), "widths are numbers"),
        (("--formats", "9"), "whole number from 1 to 8"),
        (("--formats", "2.5"), "widths are numbers"),
        (("--group-size", "12"), "multiple of 8"),
        (("--group-size", "many"), "not a number or 'row'"),
        (("--metadata", "none"), "not one of fp16, compact"),
        (("--estimator", "guess"), "moments, fisher, weight-error, data-free"),
        (("--estimator", "moments,fisher"), "give one of"),
        (("--estimator", ""), "give one of"),
        (("--include", "everything"), "everything"),
        (("--tokens", "many"), "many"),
        (("--tokens", "-1"), "at least 2"),
        (("--tokens", "0"), "at least 2"),
        (("--tokens", "100000000"), "were asked for"),
        (("--text", "missing.txt"), "No such file"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_bad_words_to_estimate(arguments, words, made, capsys, tmp_path):
    out = ("-o", tmp_path / "t.safetensors")
    assert words in refused(capsys, tmp_path, "estimate", made.model, *arguments, *out)


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\x00", b"a few words"])
def test_unusable_texts(content, made, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    for command in (ON_A_MODEL[1], ON_A_MODEL[3], ON_A_MODEL[4]):
        arguments = on_a_model(made.model, tmp_path, command)
        line = refused(capsys, tmp_path, *arguments, "--text", text)
        assert "text" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", "lots"), "examples: 2.5bpw"),
        (("--budget", "0bpw"), "must be above 0"),
        (("--budget", "3bpw", "--pin", "layer=0"), "PATTERN=BITS"),
        (("--budget", "3bpw", "--pin", "layer=0=x"), "PATTERN=BITS"),
        (("--budget", "3bpw", "--pin", "layer=9=4"), "matches no unit"),
        (("--budget", "3bpw", "--pin", "layer=0=5"), "no format has 5 bits"),
        (("--budget", "3bpw", "--pin", "colour=red=4"), "colour"),
        (("--budget", "3bpw", "--profile", "mine"), "gate_eq_up"),
        (("--budget", "3bpw", "--solver", "guess"), "knapsack"),
        ((), "--budget"),
        (("--budget", "3bpw", "--nonsense"), "--nonsense"),
    ],
)
def test_bad_words_to_solve(arguments, words, made, capsys, tmp_path):
    out = ("-o", tmp_path / "plan.json")
    assert words in refused(capsys, tmp_path, "solve", made.table, *arguments, *out)


@pytest.mark.parametrize("budget", ["0.5bpw", "1kB", "1%"])
def test_a_budget_below_the_minimum(budget, made, capsys, tmp_path):
    out = ("-o", tmp_path / "plan.json")
    line = refused(capsys, tmp_path, "solve", made.table, "--budget", budget, *out)
    assert "limit is" in line
    if budget == "0.5bpw":
        table = CostTable.load(made.table)
        assert f"{table.nbytes.min(1).sum() / 1024:.4g} KiB" in line
    rest = ("--budget", budget, *FAST, "-o", tmp_path / "out")
    assert "limit is" in refused(capsys, tmp_path, "quantize", made.model, *rest)


def test_an_existing_output_needs_overwrite(made, capsys, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for command in (
        ("estimate", made.model, *FAST, "-o", file),
        ("solve", made.table, "--budget", "4bpw", "-o", file),
        ("quantize", made.model, "--plan", made.plan, "-o", there),
        ("quantize", made.model, "--budget", "4bpw", *FAST, "-o", there),
    ):
        assert "--overwrite" in refused(capsys, tmp_path, *command)
    assert file.read_text() == (there / "mine").read_text() == "mine"
    main(["quantize", str(made.model), "--plan", str(made.plan), "-o", str(there), "--overwrite"])
    assert listing(there) == listing(made.out)


def test_a_plan_for_another_model(made, capsys, tmp_path):
    other = saved(tmp_path / "other", seed=1)
    line = refused(capsys, tmp_path, "quantize", other, "--plan", made.plan, "-o", tmp_path / "out")
    assert BitPlan.load(made.plan).model in line


def test_a_reference_of_another_tokenizer(made, capsys, tmp_path):
    other = shutil.copytree(made.model, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(content))
    line = refused(
        capsys, tmp_path, "evaluate", made.out, "--reference", other, "--tokens", 64, *TEXT
    )
    assert "split the text differently" in line


def test_what_excludes_each_other(made, capsys, tmp_path):
    both = ("--plan", made.plan, "--budget", "4bpw")
    for options in (both, ()):
        arguments = ("quantize", made.model, *options, "-o", tmp_path / "out")
        assert "--plan or --budget" in refused(capsys, tmp_path, *arguments)
    assert "--reference" in refused(capsys, tmp_path, "evaluate", made.out, "--uniform")
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
    assert "not a packed checkpoint" in refused(capsys, tmp_path, *arguments)


def test_files_that_are_not_what_they_should_be(made, capsys, tmp_path):
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk")
    text = tmp_path / "junk.json"
    text.write_text("{}")
    missing = tmp_path / "missing.safetensors"
    out = tmp_path / "out"
    for command in (
        ("solve", junk, "--budget", "4bpw", "-o", out),
        ("solve", missing, "--budget", "4bpw", "-o", out),
        ("solve", made.plan, "--budget", "4bpw", "-o", out),
        ("quantize", made.model, "--plan", text, "-o", out),
        ("quantize", made.model, "--plan", tmp_path / "missing.json", "-o", out),
        ("quantize", made.model, "--plan", made.table, "-o", out),
        ("quantize", made.plan, "--budget", "4bpw", "-o", out),
        ("show", junk),
        ("show", text),
        ("show", missing),
        ("show", tmp_path / "missing"),
        ("show", tmp_path),
        ("show", made.model),
    ):
        refused(capsys, tmp_path, *command)


def test_unknown_commands_and_missing_arguments(capsys, tmp_path):
    assert "nonsense" in refused(capsys, tmp_path, "nonsense")
    for command in COMMANDS:
        refused(capsys, tmp_path, command)


def test_a_folder_that_cannot_be_written(made, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for command in (
        ("quantize", made.model, "--plan", made.plan, "-o", tmp_path / "file" / "out"),
        ("solve", made.table, "--budget", "4bpw", "-o", tmp_path / "file" / "plan.json"),
    ):
        refused(capsys, tmp_path, *command)


def test_a_damaged_packed_checkpoint(made, capsys, tmp_path):
    folder = shutil.copytree(made.out, tmp_path / "packed")
    file = folder / "bitknap.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated" in refused(capsys, tmp_path, "evaluate", folder, "--tokens", 64, *TEXT)


def test_quantizing_what_is_packed_already(made, capsys, tmp_path):
    arguments = ("quantize", made.out, "--budget", "4bpw", *FAST, "-o", tmp_path / "again")
    refused(capsys, tmp_path, *arguments)
    refused(capsys, tmp_path, "inspect", made.out)


def test_random_numbers_elsewhere_do_not_matter(made, tmp_path):
    torch.manual_seed(123)
    main(["estimate", str(made.model), *FAST, "-o", str(tmp_path / "t.safetensors")])
    assert (tmp_path / "t.safetensors").read_bytes() == made.table.read_bytes()
