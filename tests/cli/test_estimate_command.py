"""`bitknap estimate`: names of estimators, equal runs, one line for every bad word."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitknap.allocation import CostTable
from bitknap.cli import main
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.sparse.measured_cells import LossSamples

TEXT = ("--text", str(Path(__file__).parent.parent.parent / "LICENSE"))  # short: quick to tokenize
FAST = ("--formats", "2,4", "--group-size", "8,row", "--tokens", "128", *TEXT)


@pytest.mark.slow
def test_identical_runs_write_identical_tables(made, tmp_path):
    main(["estimate", str(made.model), *FAST, "-o", str(tmp_path / "table.safetensors")])
    assert (tmp_path / "table.safetensors").read_bytes() == made.table.read_bytes()


@pytest.mark.slow
def test_random_numbers_elsewhere_do_not_matter(made, tmp_path):
    torch.manual_seed(123)
    main(["estimate", str(made.model), *FAST, "-o", str(tmp_path / "t.safetensors")])
    assert (tmp_path / "t.safetensors").read_bytes() == made.table.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("moments", "moments"),
        ("fisher", "fisher"),
        ("fisher-output", "fisher-output"),
        ("weight-error", "weight-error"),
        ("data-free", "data-free"),
        ("measured-layer", "measured-layer"),
        ("kurtosis", "scored(kurtosis)"),
        ("router-norm", "scored(router-norm)"),
        ("calibrated,fisher", "calibrated(fisher)"),
        ("calibrated,moments,kurtosis,max-var", "calibrated(moments, kurtosis, max-var)"),
    ],
)
def test_every_estimator_has_a_name(name, expected, made, tmp_path):
    path = tmp_path / "table.safetensors"
    main(["estimate", str(made.model), *FAST, "--estimator", name, "-o", str(path)])
    assert CostTable.load(path).provenance["estimator"] == expected


@pytest.mark.slow
def test_fewer_measurements_read_fewer_widths(made, tmp_path):
    path = tmp_path / "table.safetensors"
    main(["estimate", str(made.model), *FAST, "--calibrate", "6", "-o", str(path)])
    provenance = CostTable.load(path).provenance
    assert (provenance["estimator"], provenance["measurements"]) == ("calibrated(moments)", 6)


@pytest.mark.slow
def test_dense_profiling_goes_on_from_its_journal(made, tmp_path):
    journal, paths = tmp_path / "measured.journal", [tmp_path / f"{n}.safetensors" for n in "ab"]
    words = ("--estimator", "measured-kl", "--journal", str(journal))
    main(["estimate", str(made.model), *FAST, *words, "-o", str(paths[0])])
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[: len(lines) // 2]) + "\n" + lines[-1][:20])
    main(["estimate", str(made.model), *FAST, *words, "-o", str(paths[1])])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(journal.read_text().splitlines()) == sorted(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--formats", "two"), "widths are numbers"),
        (("--formats", "9"), "whole number from 1 to 8"),
        (("--formats", "2.5"), "widths are numbers"),
        (("--group-size", "12"), "multiple of 8"),
        (("--group-size", "many"), "not a number or 'row'"),
        (("--metadata", "none"), "metadata 'none' is unknown; one of fp16, compact"),
        (("--estimator", "guess"), "give one of alphaq, autoround, channel, data-free"),
        (("--journal", "x.journal"), "only measured-kl, measured-layer"),
        (("--samples", "x.safetensors"), "--samples: only --estimator fuzzy takes it"),
        (("--measurements", "30"), "--measurements: only --estimator fuzzy takes it"),
        (
            ("--estimator", "fuzzy", "--measurements", "5"),
            "5 is below 20, of which half are held out",
        ),
        (
            ("--estimator", "fuzzy", "--check", "5"),
            "belong to its base, and none is named; write --estimator fuzzy,calibrated,fisher",
        ),
        (("--estimator", "fuzzy,guess"), "--estimator 'guess': give one of alphaq"),
        (
            ("--check", "2"),
            "check: 2 is below 3, the fewest plans that can be ranked; give 3 or more, or 0",
        ),
        (("--estimator", "fisher", "--check", "5"), "write --estimator calibrated,fisher"),
        (("--initial-router", "x"), "--initial-router: only --estimator router-norm reads it"),
        (("--protect-bits", "-1"), "protect: -1 is not a whole number of at least 0"),
        (("--robust", "best"), "'best' is unknown; one of mean, worst, mean+sd"),
        (("--risk", "2"), "--risk: only --robust mean+sd takes it"),
        (("--max-memory", "much"), "--max-memory 'much': write a size, such as 12GiB or 800MB"),
        (("--max-memory", "2bpw"), "--max-memory '2bpw': write a size"),
        (("--calibrate", "0"), "measurements: 0 leaves none to scale the costs; give at least 1"),
        (
            ("--measure-time", "soon"),
            "--measure-time 'soon': write a time, such as 90s, 30min or 2h",
        ),
        (("--estimator", "moments,fisher"), "name one base, then the signals"),
        (("--estimator", "moments,kurtosis"), "name one base, then the signals whose exponents"),
        (("--estimator", "moments,moments"), "give one of"),
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
def test_bad_words_to_estimate(arguments, words, made, tmp_path, refused):
    out = ("-o", tmp_path / "t.safetensors")
    assert words in refused("estimate", made.model, *arguments, *out)


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\x00", b"a few words"])
def test_unusable_texts(content, made, tmp_path, refused):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    for command in (
        ("estimate", made.model, *FAST, "-o", tmp_path / "t.safetensors"),
        ("quantize", made.model, "--budget", "4bpw", *FAST, "-o", tmp_path / "out"),
        ("evaluate", made.model, "--tokens", "64"),
    ):
        line = refused(*command, "--text", text)
        assert "text" in line


# super experts


@pytest.fixture(scope="module")
def large(saved, tmp_path_factory):
    """Save a tiny model of which one expert puts out 60 times as much as it did."""
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path_factory.mktemp("large"), num_local_experts=8, num_experts=8)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (down,) = (name for name in tensors if "layers.1." in name and "experts.3.w2" in name)
    tensors[down] *= 60
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_super_experts_are_protected_and_listed(large, tmp_path, capsys, refused):
    path = tmp_path / "t.safetensors"
    words = (*FAST, "--estimator", "moments", "--overwrite", "-o", str(path))
    main(["estimate", str(large), *words])
    told = " ".join(capsys.readouterr().out.split())
    assert "super experts, output far above the layer's median: layer/expert (times) 1/3 (" in told
    assert "the model cannot do without them: their 3 units get no grid below 4 bits" in told
    main(["show", str(path)])
    assert told.endswith(" ".join(capsys.readouterr().out.split())[-300:])
    assert CostTable.load(path).provenance["protected"] == {"bits": 4, "units": 3}
    # 2.89 bits are the smallest format's, 4.89 those of three of 48 units.
    out = ("-o", tmp_path / "plan.json")
    line = refused("solve", path, "--budget", "2.95bpw", *out)
    assert line.endswith(
        "limit is 6.637 KiB; raise the limit or add a narrower format, or estimate with "
        "--protect-bits 0: 3 units of super experts are held to 4 bits"
    )
    assert refused("solve", path, "--budget", "2bpw", *out).endswith("add a narrower format")
    main(["estimate", str(large), *words, "--protect-bits", "0"])
    assert "and they are not protected (--protect-bits)" in " ".join(
        capsys.readouterr().out.split()
    )
    main(["solve", str(path), "--budget", "2.95bpw", "-o", str(tmp_path / "plan.json")])


@pytest.mark.slow
def test_json_of_a_protected_table_is_json(large, tmp_path, document):
    path = tmp_path / "t.safetensors"
    found = document("estimate", large, *FAST, "--estimator", "moments", "-o", path)
    narrow = found["formats"]["int2-row-sym"]
    assert narrow["forbidden"] == 3
    assert 0 < narrow["cost"] < float("inf")
    assert "forbidden" not in found["formats"]["int4-row-sym"]
    assert document("show", path)["formats"] == found["formats"]


# several texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    words, folder = Path(TEXT[1]).read_text(), tmp_path_factory.mktemp("texts")
    files = [folder / "a.txt", folder / "b.txt"]
    for file, part in zip(files, (words[:5000], words[-5000:]), strict=True):
        file.write_text(part)
    return files


@pytest.mark.slow
def test_several_texts_make_one_table(made, texts, tmp_path):
    words = ("estimate", str(made.model), *FAST[:-2], "--estimator", "moments")
    single = [tmp_path / f"{file.stem}.safetensors" for file in texts]
    for file, path in zip(texts, single, strict=True):
        main([*words, "--text", str(file), "-o", str(path)])
    tables = [CostTable.load(path) for path in single]
    both = [word for file in texts for word in ("--text", str(file))]
    for rule, expected in {
        "mean": (tables[0].cost + tables[1].cost) / 2,
        "worst": torch.maximum(*(torch.tensor(t.cost) for t in tables)).numpy(),
    }.items():
        path = tmp_path / f"{rule}.safetensors"
        main([*words, *both, "--robust", rule, "-o", str(path)])
        found = CostTable.load(path)
        assert found.cost == pytest.approx(expected)
        assert found.spread is not None
        assert found.provenance["rule"] == rule
        assert found.provenance["texts"] == [t.provenance["text"] for t in tables]
    main([*words, *both, "-o", str(tmp_path / "again.safetensors")])
    again = (tmp_path / "again.safetensors").read_bytes()
    assert again == (tmp_path / "mean.safetensors").read_bytes()
    least: dict[tuple[int, int], int] = {}
    for layer, expert, seen in (row for t in tables for row in t.provenance["coverage"]):
        least[layer, expert] = min(seen, least.get((layer, expert), seen))
    listed = found.provenance["coverage"]
    assert listed == [[layer, expert, seen] for (layer, expert), seen in sorted(least.items())]


def test_one_text_is_not_several(made, texts, tmp_path, refused):
    words = ("estimate", made.model, *FAST[:-2], "-o", tmp_path / "t.safetensors")
    once = ("--text", texts[0])
    line = refused(*words, *once, "--robust", "worst")
    assert line == (
        "bitknap: calibration sets: 1 is below 2; "
        "calibrate on two or more texts (--text A --text B)"
    )
    assert "all 2 have the same text" in refused(*words, *once, *once)
    both = (*once, "--text", texts[1])
    line = refused(*words, *both, "--estimator", "data-free")
    assert line == "bitknap: data-free reads no text, so several texts change nothing; give one"
    line = refused(*words, *both, "--estimator", "fuzzy", "--samples", tmp_path / "s.safetensors")
    assert line == "bitknap: --samples: they are measured on one text; give one --text"
    line = refused(*words, *both, "--robust", "mean+sd", "--risk", "-1")
    assert line == "bitknap: risk: -1.0 is not at least 0"


# measured samples, checks, fallbacks


@pytest.mark.slow
def test_samples_are_measured_once_and_only_for_one_model(made, large, tmp_path, refused, capsys):
    file = tmp_path / "samples.safetensors"
    words = (*FAST, "--estimator", "fuzzy,moments", "--samples", str(file))
    tables = [tmp_path / f"{name}.safetensors" for name in "ab"]
    main(["estimate", str(made.model), *words, "--measurements", "20", "-o", str(tables[0])])
    kept = file.read_bytes()
    assert len(LossSamples.load(file)) == 20
    main(["estimate", str(made.model), *words, "-o", str(tables[1])])
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert file.read_bytes() == kept
    assert "rules from 20 measured cells" in capsys.readouterr().out
    ours, theirs = (CostTable.load(tables[0]).provenance["model"], fingerprint(large))
    line = refused("estimate", large, *words, "-o", tmp_path / "t.safetensors")
    assert line == (
        f"bitknap: {file}: samples: measured with model {ours}, used with {theirs}; "
        "measure them again, or name another file"
    )
    other = LossSamples.load(file)
    replace(other, provenance={**other.provenance, "method": "gptq"}).save(file)
    line = refused("estimate", made.model, *words, "-o", tmp_path / "t.safetensors")
    assert line == (
        f"bitknap: {file}: samples: measured with method gptq, used with rtn; "
        "measure them again, or name another file"
    )


def fingerprint(folder):
    from bitknap.quantization.source.checkpoint import Checkpoint

    return Checkpoint.open(folder).fingerprint


@pytest.mark.slow
def test_held_out_plans_are_reported(made, tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    main(["estimate", str(made.model), *FAST, "--check", "3", "-o", str(path)])
    assert "3 held-out plans at" in capsys.readouterr().out
    provenance = CostTable.load(path).provenance
    assert (provenance["check"]["plans"], provenance["check_measurements"]) == (3, 3)


@pytest.mark.slow
def test_constant_signals_are_left_out_and_reported(made, tmp_path, capsys):
    name = "calibrated,moments,uniform"
    path = str(tmp_path / "t.safetensors")
    main(["estimate", str(made.model), *FAST, "--estimator", name, "-o", path])
    told = capsys.readouterr().out
    assert "exponents fitted on halves of groups: none" in told
    assert "the same for all units, so left out: uniform" in told


@pytest.mark.slow
def test_routers(made, large, tmp_path, capsys, refused):
    words = (*FAST, "--estimator", "router-norm", "-o", tmp_path / "t.safetensors")
    line = refused("estimate", made.model, *words, "--initial-router", large)
    assert line == (
        "bitknap: router norms: layer 0 has 4 final and 8 initial ones; "
        "read both from one architecture"
    )
    line = refused("estimate", made.model, *words, "--initial-router", tmp_path / "none")
    assert "none" in line
    main(["estimate", str(made.model), *map(str, words)])
    assert "no initial router: final norms alone rank experts" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator", [Fisher(), Fisher("output"), Measured()], ids=lambda x: x.name
)
def test_memory_is_kept_within_bounds(estimator, made, tmp_path, refused):
    words = (*FAST, "--estimator", estimator.name)
    line = refused(
        "estimate", made.model, *words, "--max-memory", "1MiB", "-o", tmp_path / "t.safetensors"
    )
    assert line.startswith("bitknap: memory: calibrating takes about ")
    assert line.endswith(
        "limit is 1 MiB; raise the limit, take fewer tokens, or use an estimator of weights alone, "
        "such as data-free"
    )
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    between = str(between_passes(made.model, estimator.needs))
    main(["estimate", str(made.model), *words, "-o", str(paths[0])])
    main(["estimate", str(made.model), *words, "--max-memory", between, "-o", str(paths[1])])
    tables = [CostTable.load(path) for path in paths]
    close = 1e-3 if "kl" in estimator.needs else 1e-5  # KL of one unit is near float32's rounding
    assert tables[1].cost == pytest.approx(tables[0].cost, rel=close)


def between_passes(folder, needs):
    """Return a size that suffices layer by layer only."""
    from bitknap.estimators.sweep.peak_memory import layer_bytes, peak_bytes
    from bitknap.quantization.models.headers_only import walk_headers
    from bitknap.quantization.source.checkpoint import Checkpoint

    source = Checkpoint.open(folder)
    layout = walk_headers(source.config, source.shapes, ())
    least, most = (of(source, layout, 128, needs) for of in (layer_bytes, peak_bytes))
    assert least < most
    return f"{(least + most) // 2}B"
