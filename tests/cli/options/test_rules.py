"""Every rule of the table: refused in one line before anything is read, and no more than that."""

import re

import pytest

from bitknap.cli.options.rules import RULES, Asked, check
from bitknap.errors import InputError

# Nothing of these names exists: it is not even looked for.
MODEL, PLAN = ("nowhere",), ("--plan", "nowhere.json")
BUDGET = ("--budget", "4bpw")
SEVERAL = ("--text", "a.txt", "--text", "b.txt")
STUDY = ("study", "create", "s", "--storage", "journal:s.log", "--table", "nowhere.safetensors")
COMPARE = ("compare", *MODEL)
HQQ = ("--method", "hqq", "--estimator", "data-free")
WITH_PLAN = {
    "--row-blocks 2": "says what is done",
    "--permute": "says what is done",
    "--rotate": "says what is done",
    "--keep": "says what is done",
    "--include attention": "says what is done",
    "--formats 2,3": "says what is done",
    "--group-size 64": "says what is done",
    "--metadata fp16": "says what is done",
    "--profile free": "says what is done",
    "--pin layer=0=4": "says what is done",
    "--limit x.json": "says what is done",
    "--protect-bits 4": "says what is done",
    "--solver ilp": "nothing is solved",
    "--gap 0.1": "nothing is solved",
    "--time-limit 9": "nothing is solved",
    "--price": "nothing is solved",
    "--estimator moments": "nothing is estimated",
    "--calibrate 9": "nothing is estimated",
    "--check 9": "nothing is estimated",
    "--initial-router x": "nothing is estimated",
    "--robust worst": "nothing is estimated",
    "--risk 2": "nothing is estimated",
    "--journal x": "nothing is measured",
    "--samples x": "nothing is measured",
    "--measurements 30": "nothing is measured",
    "--thorough": "nothing is measured",
    "--measure-time 9s": "nothing is measured",
}
CASES = [
    (("estimate", *MODEL, *HQQ), "--method hqq: the costs of --estimator data-free are"),
    (
        ("estimate", *MODEL, "--method", "gptq", "--estimator", "calibrated,kurtosis"),
        "use --method rtn, or an estimator that charges gptq, such as calibrated, moments",
    ),
    (("quantize", *MODEL, *BUDGET, *HQQ), "such as calibrated, moments, fisher"),
    (("quantize", *MODEL, *BUDGET, *HQQ), "round in another way than they say with --force"),
    (("estimate", *MODEL, "--risk", "2"), "--risk: only --robust mean+sd takes it"),
    (
        ("estimate", *MODEL, *SEVERAL, "--estimator", "fuzzy", "--samples", "x"),
        "--samples: they are measured on one text; give one --text",
    ),
    (("estimate", *MODEL, "--initial-router", "x"), "only --estimator router-norm reads it"),
    (("estimate", *MODEL, "--permute"), "ask for at least 2 row blocks with --row-blocks"),
    (
        ("estimate", *MODEL, "--include", "attention", "--estimator", "fisher"),
        "--include: --estimator fisher covers routed experts only; use moments",
    ),
    (
        ("quantize", *MODEL, *BUDGET, "--include", "shared", "--estimator", "fuzzy"),
        "--include: --estimator fuzzy covers routed experts only",
    ),
    (("quantize", *MODEL), "give one of --plan, --budget and --fit"),
    (("quantize", *MODEL, *PLAN, *BUDGET), "give one of --plan, --budget and --fit"),
    (("quantize", *MODEL, *PLAN, "--refine", "2"), "give --budget, not --plan"),
    *((("quantize", *MODEL, *PLAN, *words.split()), said) for words, said in WITH_PLAN.items()),
    (
        ("quantize", *MODEL, *BUDGET, "--refine", "2", "--permute", "--row-blocks", "2"),
        "leave out --permute",
    ),
    (("quantize", *MODEL, *BUDGET, "--refine", "2", "--rotate"), "leave out --rotate"),
    (("quantize", *MODEL, *BUDGET, "--refine", "2", *SEVERAL), "give one --text"),
    (("quantize", *MODEL, *BUDGET, "--refine-driver", "tpe"), "only --refine N takes it"),
    (("quantize", *MODEL, *BUDGET, "--refine-tokens", "9"), "only --refine N takes it"),
    (("quantize", *MODEL, *BUDGET, "--method", "gptq", *SEVERAL), "gptq calibrates on one text"),
    (("quantize", *MODEL, *PLAN, "--force"), "say which with --method"),
    (
        ("estimate", *MODEL, "--target", "gguf", "--estimator", "data-free"),
        "--target gguf: it rounds otherwise, and the costs of --estimator data-free",
    ),
    (
        ("quantize", *MODEL, *BUDGET, "--method", "midtread"),
        "packed checkpoints have no grids with a code for zero",
    ),
    (("solve", "nowhere"), "give one of --budget, --fit and --frontier"),
    (("solve", "nowhere", "--frontier", "--solver", "ilp"), "does not take --solver"),
    (("solve", "nowhere", "--frontier", "--gap", "0.1"), "does not take --gap"),
    (("solve", "nowhere", "--frontier", "--time-limit", "1"), "does not take --time-limit"),
    (("solve", "nowhere", "--frontier", "--limit", "x"), "does not take --limit"),
    (("solve", "nowhere", "--frontier", "--price"), "does not take --price"),
    (("evaluate", *MODEL, "--uniform"), "--uniform needs --reference"),
    ((*COMPARE, "--task-path", "x"), "--task-path: only --tasks takes it"),
    ((*COMPARE, "--task-limit", "3"), "--task-limit: only --tasks takes it"),
    (
        (*COMPARE, "--text", "a.txt", "--evaluation-text", "./a.txt"),
        "--evaluation-text: a.txt is the calibration text (--text) too",
    ),
    (("show", "a.json", "--diff", "b.json", "--picture", "c.svg"), "pass only one"),
    (STUDY, "give either a budget or a range of budgets"),
    ((*STUDY, *BUDGET, "--sampler", "nsga2"), "--sampler tpe or cmaes with --budget"),
    (
        (*STUDY, "--budgets", "2bpw-4bpw", "--sampler", "tpe"),
        "--sampler tpe: searches at one size; give --budget, or --sampler nsga2 with --budgets",
    ),
    ((*STUDY, *BUDGET, "--knobs", "exponents"), "give at least one --feature TABLE"),
    (
        (*STUDY, *BUDGET, "--knobs", "tilts", "--feature", "x"),
        "--feature: only --knobs exponents uses it",
    ),
]


@pytest.mark.parametrize(("words", "said"), CASES)
def test_options_that_cannot_work_together(words, said, refused, tmp_path):
    out = () if words[0] in ("show", "evaluate", "study") else ("-o", tmp_path / "out")
    assert said in refused(*words, *out)


def test_every_rule_has_a_case(refused, tmp_path):
    lines = []
    for words, _ in CASES:
        out = () if words[0] in ("show", "evaluate", "study") else ("-o", tmp_path / "out")
        lines.append((words, refused(*words, *out)))
    for rule in RULES:
        said = re.compile(".*".join(map(re.escape, re.split(r"\{\w+\}", rule.message))))
        commands = [" ".join(words) for words, line in lines if said.search(line)]
        assert any(c.startswith(name) for c in commands for name in rule.commands), rule.message


@pytest.mark.parametrize(
    ("command", "values", "given"),
    [
        # Forced, the plan's costs may be those of another way of rounding.
        ("quantize", {"budget": "4bpw", "method": "hqq", "force": True}, {"force"}),
        ("quantize", {"plan": "p.json", "method": "gptq", "force": True}, {"text", "tokens"}),
        ("quantize", {"plan": "p.json"}, {"text", "tokens", "max_memory", "seed"}),
        ("quantize", {"budget": "4bpw", "refine": 4}, {"refine", "refine_driver"}),
    ],
)
def test_options_that_do_work_together(command, values, given):
    usual = {"estimator": "data-free", "text": ("builtin",), "row_blocks": 1, "include": ""}
    check(command, Asked(values=usual | values, given=frozenset(given)))


def test_costs_of_every_method_are_charged_by_these():
    for name in ("calibrated", "moments", "fisher", "weight-error", "measured-kl", "fuzzy"):
        values = {"estimator": name, "method": "hqq", "text": ("builtin",), "include": ""}
        check("estimate", Asked(values=values, given=frozenset({"method"})))
    for name in ("data-free", "router-norm", "kurtosis", "calibrated,random", "fuzzy,data-free"):
        with pytest.raises(InputError, match="rounding to nearest"):
            check("estimate", Asked(values=values | {"estimator": name}, given=frozenset()))
