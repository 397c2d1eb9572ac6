"""What the library says names arguments; only the command line names options."""

import ast
import re
from pathlib import Path

import pytest

from bitknap.cli.argument_names import in_options

ROOT = Path(__file__).parent.parent
FOLDERS = ("allocation", "estimators", "quantize", "src/bitknap/api", "src/bitknap/disk")
# Commands on purpose: `Step.name` of a dry run, what the table of published rules says, and lines
# for pip, for llama-quantize and of a model card.
COMMANDS = {
    "estimate --estimator data-free",
    "quantize --method ",
    "mutation by level switches, selection in stages; `--strategies evolution`",
    " --upgrade",
    "The same types by llama.cpp's own tools, from a GGUF file of the source model in 16 or 32 "
    "bits:\n\n    llama-quantize --imatrix ",
    " --tensor-type-file ",
    " --target {} --budget ",
}
OPTION = re.compile(r"(^|[\s(\"'`])--[a-z]")


def strings(file):
    """Return the strings of a module, without its docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_library_names_no_option(folder):
    said = [
        f"{file.relative_to(ROOT)}: {text}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        if file.name != "listing.py"  # says which option takes the names that it lists
        for text in strings(file)
        if OPTION.search(text) and text not in COMMANDS
    ]
    assert said == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("out exists; pass `overwrite=True`", "out exists; pass --overwrite"),
        ("raise `max_memory`, or less", "raise --max-memory, or less"),
        ("use `estimator=DataFree()`", "use --estimator data-free"),
        ("`estimator` 'a,b': no", "--estimator 'a,b': no"),
        ("use `rounding=Hqq()` or `rounding=gptq`", "use --method hqq or --method gptq"),
        ("pass `include=('attention', 'dense')`", "pass --include attention,dense"),
        ("lower `calibration.tokens`", "lower --tokens"),
        ("lower `refinement.tokens`", "lower --refine-tokens"),
        ("give two (`text=TextSets([A, B])`)", "give two (--text A --text B)"),
        ("`protect` and `options`", "--protect-bits and --formats"),
        ("a file named `x` and a ` alone", "a file named `x` and a ` alone"),
    ],
)
def test_the_command_line_writes_arguments_as_options(message, expected):
    assert in_options(message) == expected


def test_every_argument_in_a_message_is_known_to_the_command_line():
    quoted = re.compile(r"`([a-z_.]+)(=[^`]*)?`")
    unknown = {
        found[0]
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        if "published" not in file.parts  # names functions of the papers' own code
        for text in strings(file)
        for found in quoted.finditer(text)
        if "--" not in in_options(found[0])
    }
    assert unknown <= {"`calibration`", "`bitknap_plan.json`"}
