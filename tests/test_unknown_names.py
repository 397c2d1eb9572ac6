"""Every table of names: an unknown name is refused with all that exist and the nearest one."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from bitknap.allocation import Format, Ilp, profile
from bitknap.allocation.catalog import solver_of
from bitknap.allocation.problem.unit_pattern import matching
from bitknap.allocation.problem.units import Units
from bitknap.allocation.published import Threshold
from bitknap.allocation.refinement.loop import Refine
from bitknap.allocation.search.optuna_trials import make_sampler
from bitknap.allocation.search.search_space import Knobs, check_groups
from bitknap.allocation.search.solver import Search
from bitknap.allocation.search.study_design import Sampler
from bitknap.api.listing import kind_of
from bitknap.api.requests import Calibration
from bitknap.benchmarks.models.shapes import shape_of
from bitknap.benchmarks.solvers.instances import instance, random_instance
from bitknap.cli.options.commands import Group
from bitknap.cli.options.declare import OneOf
from bitknap.errors import BitknapError
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.named import estimator_of, named
from bitknap.estimators.published.moqa import moqa_plan
from bitknap.estimators.published.rule import rule_of
from bitknap.estimators.signals.plain import RowVariance
from bitknap.estimators.sparse.fuzzy_rules import FuzzyRules
from bitknap.estimators.tables.several_texts import robust
from bitknap.names import one_of
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed.config import layout_of
from bitknap.quantization.packed.convert_layout import convert
from bitknap.quantization.rounding.methods import method
from bitknap.quantization.source.bundled import folder_of
from bitknap.testing.models import tiny_model
from bitknap.testing.wrapped import wrapped_model

GRIDS = Format(2, 64), Format(3, 64)
COLUMNS = {"proj": (np.zeros(1, np.int64), ("gate", "up", "down"))}
GROUP = Group("bitknap", homes={"quantize": ("", ""), "solve": ("", "")}, examples=())


def units_of(role):
    return Units.build(layer=[0], role=[role], expert=[0], projection=["up"], rows=[8], cols=[8])


def packed(layout):
    return {"quantization_config": {"quant_method": "bitknap", "layout": layout}}


def command(name):
    return GROUP.resolve_command(click.Context(GROUP), [name])


NO_MATERIAL: Any = None
NO_PARTS: Any = (None,)
# What looks a name up, a misspelled name, and the name that was meant.
TABLES: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "solver": (solver_of, "gredy", "greedy"),
    "ilp backend": (lambda x: Ilp(backend=x), "hihgs", "highs"),
    "profile": (profile, "gate_up", "gate_eq_up"),
    "role": (units_of, "shard", "shared"),
    "metadata": (lambda x: Format(3, 64, metadata=x), "compct", "compact"),
    "kept precision": (Format.keep, "bf6", "bf16"),
    "pattern's key": (lambda x: matching(f"{x}=up", {}, COLUMNS), "pro", "proj"),
    "projection": (lambda x: matching(f"proj={x}", {}, COLUMNS), "dwn", "down"),
    "threshold": (lambda x: Threshold(low=GRIDS[0], high=GRIDS[1], per=x), "weightt", "weight"),
    "driver": (lambda x: Refine(parts=NO_PARTS, driver=x), "tpee", "tpe"),
    "sampler": (lambda x: make_sampler(x, 0), "nsga", "nsga2"),
    "sampler of a search": (lambda x: Search(sampler=x), "cmae", "cmaes"),
    "sampler of a study": (lambda x: Sampler(kind=x), "cmas", "cmaes"),
    "knob": (lambda x: Knobs.from_dict({x: True}), "rsk", "risk"),
    "tilt": (lambda x: check_groups([x]), "layr", "layer"),
    "kind of list": (kind_of, "solver", "solvers"),
    "method": (method, "gtpq", "gptq"),
    "robust": (lambda x: Calibration(robust=x), "wrst", "worst"),
    "included role": (lambda x: walk_headers({}, {}, (x,)), "attentio", "attention"),
    "layout of a checkpoint": (lambda x: layout_of(packed(x), Path("m")), "tile", "tiles"),
    "layout": (lambda x: convert(Path("m"), x, Path("out")), "plainn", "plain"),
    "bundled model": (folder_of, "reference:mixtrl", "reference:mixtral"),
    "signal": (estimator_of, "kurtossis", "kurtosis"),
    "rule": (lambda x: rule_of(x, NO_MATERIAL), "alphq", "alphaq"),
    "measured kind": (lambda x: Measured(kind=x), "laier", "layer"),
    "space": (lambda x: Fisher(space=x), "outpt", "output"),
    "statistic": (RowVariance, "peek", "peak"),
    "fuzzy rules": (lambda x: FuzzyRules(kind=x), "tfr", "tfri"),
    "rule of several texts": (lambda x: robust([], x), "men", "mean"),
    "rule of MoQa": (lambda x: moqa_plan([], GRIDS, rule=x), "wrst", "worst"),
    "family": (tiny_model, "mixtrl", "mixtral"),
    "wrapped family": (wrapped_model, "lama4", "llama4"),
    "shape": (shape_of, "Mixtral-8x7", "Mixtral-8x7B"),
    "instance": (instance, "tny", "tiny"),
    "kind of instance": (lambda x: random_instance(x, 3), "wek", "weak"),
    "option": (lambda x: OneOf(("tpe", "cmaes")).convert(x, None, None), "cmae", "cmaes"),
    "command": (command, "quantise", "quantize"),
    "benchmark's argument": (one_of("part", ("quality", "speed")), "sped", "speed"),
}


@pytest.mark.parametrize("table", TABLES)
def test_an_unknown_name_lists_what_exists_and_the_nearest(table):
    look_up, name, meant = TABLES[table]
    with pytest.raises((BitknapError, click.UsageError, argparse.ArgumentTypeError)) as refusal:
        look_up(name)
    text = getattr(refusal.value, "message", str(refusal.value))
    found = re.search(rf"'{name}' is unknown; one of (.+); did you mean (\S+)\?$", text)
    assert found, text
    assert found[2] == meant
    assert meant in found[1].split(", ")


@pytest.mark.parametrize(
    ("look_up", "says"),
    [
        (lambda: Format.parse("int3-g64-symm"), "examples: .*; did you mean int3-g64-sym?"),
        (lambda: named(["calibrated", "fischer"]), "give one of .*; did you mean fisher?"),
    ],
)
def test_names_that_can_be_combined_are_explained_and_the_nearest_is_named(look_up, says):
    with pytest.raises(BitknapError, match=says.replace("?", r"\?")):
        look_up()
