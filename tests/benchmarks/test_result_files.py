"""Benchmarks replace what a benchmark wrote, and nothing else; they say so before any work."""

import importlib
import json
from pathlib import Path

import pytest

from bitknap.benchmarks.result_files import (
    check_results,
    read_results,
    write_report,
    write_results,
)
from bitknap.disk.manifest import is_ours
from bitknap.errors import FileError, InputError

PROGRAMS = {
    "kernels.__main__": "kernels.md",
    "kernels.variants": "kernel_variants.json",
    "profiling.__main__": "profiling.json",
    "published.__main__": "published.md",
    "published.founding_claims": "founding_claims.md",
    "quantize.__main__": "quantize.json",
    "questions.both_models": "compare.mixtral.rtn.json",
    "questions.cheaper_costs": "cheaper_costs.json",
    "questions.llama_recipes": "llama_recipes.md",
    "questions.refine": "refine.md",
    "questions.row_blocks": "row_blocks.json",
    "questions.uniform": "uniform.md",
    "robustness.__main__": "robustness.json",
    "runtimes.__main__": "runtimes.md",
    "runtimes.rates": "rounding_rates.md",
    "solvers.__main__": "solvers.svg",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_file_of_somebody_else_stops_a_benchmark_before_its_work(
    program, tmp_path, monkeypatch, capsys
):
    module = importlib.import_module(f"bitknap.benchmarks.{program}")
    file = tmp_path / PROGRAMS[program]
    file.write_text("years of work")
    monkeypatch.setattr("sys.argv", [program, "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        module.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert file.name in said and "was not written by Bitknap" in said
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == "years of work"


@pytest.mark.parametrize("program", ["questions.both_models_report", "questions.idle_experts"])
def test_reports_on_results_that_are_not_there_say_so(program, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"bitknap.benchmarks.{program}")
    where = tmp_path if program.endswith("report") else tmp_path / "uniform.json"
    monkeypatch.setattr("sys.argv", [program, str(where)])
    with pytest.raises(SystemExit):
        module.main()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(where) in said
    assert list(tmp_path.iterdir()) == []


def test_results_are_known_again(tmp_path):
    write_results(tmp_path / "a.json", {"rows": [1]})
    write_report(tmp_path / "a.md", "# A\n")
    assert read_results(tmp_path / "a.json") == {"rows": [1]}
    assert read_results(tmp_path / "b.json") == {}
    check_results(tmp_path, "a.json", "a.md", "b.json")
    assert json.loads((tmp_path / "a.json").read_text())["format"] == "bitknap.results"


def test_another_file_of_ours_is_no_results(tmp_path):
    (tmp_path / "a.json").write_text('{"format": "bitknap.plan", "version": "1.0"}')
    with pytest.raises(FileError, match=r"'bitknap.plan' is not 'bitknap.results'"):
        check_results(tmp_path, "a.json")


def test_links_and_folders_are_not_replaced(tmp_path):
    (tmp_path / "a.json").symlink_to(tmp_path / "b.json")
    (tmp_path / "a.md").mkdir()
    for name in ("a.json", "a.md"):
        with pytest.raises(InputError, match=name):
            check_results(tmp_path, name)


def test_committed_results_can_be_replaced():
    folder = Path(__file__).parent.parent.parent / "benchmarks" / "results"
    assert [file.name for file in folder.iterdir() if not is_ours(file)] == []
