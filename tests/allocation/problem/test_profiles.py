import pytest

from bitknap.allocation import PROFILES, Units, profile
from bitknap.errors import InputError

# One layer: two routed experts and a shared one of gate, up, down; a dense MLP; two of attention.
UNITS = Units.build(
    layer=[0] * 14,
    role=["routed"] * 6 + ["shared"] * 3 + ["dense"] * 3 + ["attention"] * 2,
    expert=[0, 0, 0, 1, 1, 1] + [-1] * 8,
    projection=["gate", "up", "down"] * 4 + ["q", "o"],
    rows=[8] * 14,
    cols=[8] * 14,
)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("free", "abc def ghi jkl mn"),
        ("gate_eq_up", "aab ccd eef ggh ij"),
        ("expert", "aaa bbb ccc dde fg"),
        ("layer_proj", "abc abc dde ffg hi"),
        ("layer_gateup_down", "aab aab ccd eef gh"),
        ("layer", "aaa aaa bbc dde fg"),
    ],
)
def test_who_shares_a_format(name, labels):
    expected = [ord(letter) - ord("a") for letter in labels.replace(" ", "")]
    assert profile(name).labels(UNITS).tolist() == expected


def test_layers_never_share():
    units = Units.build(
        layer=[0, 1],
        role=["routed"] * 2,
        expert=[0, 0],
        projection=["up"] * 2,
        rows=[8] * 2,
        cols=[8] * 2,
    )
    assert all(rule.labels(units).tolist() == [0, 1] for rule in PROFILES.values())


def test_an_unknown_profile_lists_the_known():
    with pytest.raises(InputError, match="profile 'vllm' is unknown; one of free, gate_eq_up"):
        profile("vllm")


def test_fused_attention_shares_where_the_runtime_fuses_it():
    units = Units.build(
        layer=[0] * 4 + [1] * 4,
        role=["attention"] * 8,
        expert=[-1] * 8,
        projection=["q", "k", "v", "o"] * 2,
        rows=[8] * 8,
        cols=[8] * 8,
    )
    assert profile("layer").labels(units).tolist() == [0, 0, 0, 1, 2, 2, 2, 3]
    for name in ("gate_eq_up", "expert", "layer_proj", "layer_gateup_down"):
        assert profile(name).labels(units).tolist() == list(range(8))
