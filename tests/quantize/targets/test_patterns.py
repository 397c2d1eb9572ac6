"""Patterns over names of modules: exact, anchored, and few."""

import re

import numpy as np
import pytest

from bitknap.allocation import Format
from bitknap.errors import MismatchError
from bitknap.quantization.targets.configs.patterns import (
    check_matches,
    first_matches,
    patterns,
)

FOUR, EIGHT = Format(4, 64), Format(8, 64)
LEAVES = ("gate_proj", "up_proj", "down_proj")
OTHERS = [
    "lm_head",
    "model.norm",
    "model.embed_tokens",
    *(f"model.layers.{n}.input_layernorm" for n in range(12)),
    *(f"model.layers.{n}.mlp.gate" for n in range(12)),
    *(f"model.layers.{n}.self_attn.{leaf}" for n in range(12) for leaf in ("q_proj", "k_proj")),
]


def name(layer, expert, leaf):
    return f"model.layers.{layer}.mlp.experts.{expert}.{leaf}"


def experts(layers, numbers=range(11), leaves=LEAVES):
    return [name(n, e, leaf) for n in layers for e in numbers for leaf in leaves]


EVERY = [*experts(range(12)), *OTHERS]


def test_numbers_that_go_together_are_joined():
    groups: dict[Format | None, list[str]]
    groups = {FOUR: experts((0, 5)), EIGHT: experts([n for n in range(12) if n not in (0, 5)])}
    made = patterns({**groups, None: OTHERS}, EVERY)
    by_format = {format: [one.regex for one in made if one.format == format] for format in groups}
    stem, end = r"^model\.layers\.", r"\.mlp\.experts\.\d+\.(?:down_proj|gate_proj|up_proj)$"
    assert by_format[FOUR] == [rf"{stem}(?:0|5){end}"]
    assert by_format[EIGHT] == [rf"{stem}(?:1|2|3|4|6|7|8|9|10|11){end}"]
    assert rf"{stem}\d+\.mlp\.gate$" in [one.regex for one in made if one.format is None]
    assert len(made) == 8


def test_all_layers_and_all_experts_are_one_pattern():
    (made,) = patterns({FOUR: experts(range(12), leaves=("down_proj",))}, EVERY)
    assert made.regex == r"^model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj$"


def test_some_experts_are_named():
    (made,) = patterns({FOUR: experts((3,), (1, 10), ("up_proj",))}, EVERY)
    assert made.regex == r"^model\.layers\.3\.mlp\.experts\.(?:1|10)\.up_proj$"


@pytest.mark.parametrize("seed", range(20))
def test_patterns_match_exactly_their_names(seed):
    rng = np.random.default_rng(seed)
    formats = [None, FOUR, EIGHT, Format(2, 32)]
    labels = rng.integers(4, size=(12, 11, 3))
    if seed % 2:
        labels = np.broadcast_to(labels[:, :1, :1], labels.shape)
    wanted = dict.fromkeys(OTHERS)
    for layer, expert, leaf in np.ndindex(12, 11, 3):
        wanted[name(layer, expert, LEAVES[leaf])] = formats[labels[layer, expert, leaf]]
    groups: dict[Format | None, list[str]] = {format: [] for format in formats}
    for one, format in wanted.items():
        groups[format].append(one)
    made = patterns(groups, wanted)
    for pattern in made:
        found = [one for one in wanted if re.match(pattern.regex, one)]
        assert found
        assert all(wanted[one] == pattern.format for one in found)
    given = first_matches([pattern.regex for pattern in made], wanted)
    assert given.keys() == wanted.keys()
    check_matches("t", wanted, {one: made[place].format for one, place in given.items()})


def test_the_first_pattern_that_matches_a_names_start_decides():
    names = ["a.1.b", "a.10.b", "a.2", "b|c", "x"]
    regexes = [r"^a\.1", r"^a\.\d+", r"^(?:x|b\|c)$", "^y|x"]
    tried = {
        one: next((place for place, regex in enumerate(regexes) if re.match(regex, one)), None)
        for one in names
    }
    assert (
        first_matches(regexes, names)
        == tried
        == {
            "a.1.b": 0,
            "a.10.b": 0,
            "a.2": 1,
            "b|c": 2,
            "x": 2,
        }
    )


def test_the_first_mismatch_is_named():
    wanted: dict[str, Format | None] = {"a": FOUR, "router": None}
    with pytest.raises(MismatchError) as error:
        check_matches("tool", wanted, {"a": FOUR, "router": EIGHT})
    assert str(error.value) == (
        "tool: its rules give router int8-g64-asym, the plan says no format; report this as a bug"
    )
