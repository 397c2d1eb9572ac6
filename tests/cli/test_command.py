"""The command line, in process: help, one JSON document each, the main job end to end."""

import warnings
from pathlib import Path

import pytest
import torch

from bitknap.allocation import BitPlan
from bitknap.cli import main
from bitknap.cli.terminal import quiet
from bitknap.errors import BitknapWarning
from bitknap.estimators.measuring import windows as reading
from bitknap.quantization.packed import writer

COMMANDS = ("inspect", "estimate", "solve", "quantize", "evaluate", "convert", "show")
TEXT = ("--text", str(Path(__file__).parent.parent.parent / "LICENSE"))  # short: quick to tokenize
FAST = ("--formats", "2,4", "--group-size", "8,row", "--tokens", "128", *TEXT)


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


def test_a_full_device_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(reading, "token_logits", _out_of_memory)
    command = ["evaluate", "reference:mixtral", *TEXT, "--tokens", "64", "--device", "cpu"]
    with pytest.raises(SystemExit):
        main(command)
    message = capsys.readouterr().err
    assert message.startswith(
        "bitknap: cpu: out of memory with one window of 64 tokens at a time; compute with "
        "--device cpu, or with --device-memory below what the whole model takes: one decoder layer "
        "at a time takes about "
    )
    assert message.count("\n") == 1
    # Weights are rounded there too, in pieces that no option makes smaller.
    monkeypatch.setattr(writer, "check_finite", _out_of_memory)
    with pytest.raises(SystemExit):
        main(command)
    assert capsys.readouterr().err == (
        "bitknap: the device is out of memory; free some of it, or compute with --device cpu\n"
    )


def _out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nAnd more.")


def test_what_a_caller_should_know_is_one_line(capsys):
    with quiet():
        warnings.warn("going on with 2 windows; see `max_memory`", BitknapWarning, stacklevel=1)
    line = "bitknap: going on with 2 windows; see --max-memory\n"
    assert capsys.readouterr().err == line


@pytest.mark.slow
def test_end_to_end_in_steps_and_in_one_go(made, tmp_path, document):
    plan = BitPlan.load(made.plan)
    assert 2 < plan.bpw <= 4
    losses = document("evaluate", made.out, "--reference", made.model, "--tokens", 256, *TEXT)
    assert losses["original"]["kl"] == 0
    assert losses["ours"]["kl"] > 0
    assert losses["ours"]["bytes"] == plan.total_bytes
    assert losses["ours"]["perplexity"] > 1
    shown = document("show", made.out)
    assert shown == document("show", made.plan)
    assert shown["totals"]["bytes"] == plan.total_bytes
    assert sum(shown["formats"].values()) == len(plan.units) == 24

    whole = tmp_path / "out"
    sizes = document("quantize", made.model, "--budget", "4bpw", *FAST, "-o", whole)
    assert sizes["bytes_predicted"] == sizes["bytes_on_disk"] == plan.total_bytes
    assert sizes["status"] == "OPTIMAL"
    assert (whole / "bitknap_plan.json").read_bytes() == made.plan.read_bytes()
    for file in made.out.iterdir():
        assert (whole / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_every_command_has_one_json_document(made, tmp_path, document):
    report = document("inspect", made.model)
    assert report["units"] == 24
    assert report["least_bpw"] < report["most_bpw"]
    table = document(
        "estimate", made.model, *FAST, "--estimator", "data-free", "-o", tmp_path / "t"
    )
    assert table["units"] == 24
    found = document("show", made.table)
    assert found["provenance"]["model"] == table["provenance"]["model"]
    solved = document("solve", made.table, "--budget", "4bpw", "-o", tmp_path / "p.json")
    assert solved["gap"] >= 0
    alone = document("evaluate", made.model, "--tokens", 64, *TEXT)
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


def test_an_existing_output_needs_overwrite(made, tmp_path, refused, listing):
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
        assert "--overwrite" in refused(*command)
        assert "Bitknap" in refused(*command, "--overwrite")
    assert file.read_text() == (there / "mine").read_text() == "mine"
    (there / "mine").unlink()
    main(["quantize", str(made.model), "--plan", str(made.plan), "-o", str(there), "--overwrite"])
    assert listing(there) == listing(made.out)


def test_files_that_are_not_what_they_should_be(made, tmp_path, refused):
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
        refused(*command)


def test_unknown_commands_and_missing_arguments(refused):
    assert "nonsense" in refused("nonsense")
    for command in COMMANDS:
        refused(command)


def test_a_folder_that_cannot_be_written(made, tmp_path, refused):
    (tmp_path / "file").write_text("in the way")
    for command in (
        ("quantize", made.model, "--plan", made.plan, "-o", tmp_path / "file" / "out"),
        ("solve", made.table, "--budget", "4bpw", "-o", tmp_path / "file" / "plan.json"),
    ):
        refused(*command)
