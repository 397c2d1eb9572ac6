"""What devices hold of a layer's experts adds up to the layer."""

from typing import Any, Literal

import numpy as np
import pytest
import torch

from bitknap.errors import InputError, ModelError
from bitknap.kernels import reference
from bitknap.kernels.experts import Experts
from bitknap.quantization.packed.convert_layout import convert
from bitknap.quantization.packed.opened import open_packed
from bitknap.quantization.vllm.routed_layers import RoutedLayer, Share
from bitknap.testing import packed_checkpoint

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
EXPERTS = 4
ROW: tuple[Literal["row"]] = ("row",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed Mixtral whose down projections have groups of 32 in 64 columns; read only."""
    root = tmp_path_factory.mktemp("mixtral")
    return packed_checkpoint(root, group_sizes=(32, "row"), intermediate_size=64)


def layer_of(folder, number=0):
    layer = RoutedLayer.of(open_packed(folder), number)
    assert layer is not None
    return layer


def output(layer, share, x, index, weights):
    """Return what one device computes of the experts' weighted outputs."""
    tables = layer.tables(share, CPU)
    experts = Experts(gate=tables["gate"], up=tables["up"], down=tables["down"], activation="silu")
    return reference.moe(x, index, weights, experts)


@pytest.fixture
def tokens():
    """Activations, and the experts of each token with their weights."""
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(6)])
    return torch.randn(6, 16, generator=generator), index, torch.rand(6, 2, generator=generator)


@pytest.mark.parametrize("layout", ["plain", "tiles"])
def test_devices_that_share_each_expert_add_up(folder, tokens, layout, tmp_path):
    if layout == "tiles":
        convert(folder, layout, tmp_path / "tiled")
        folder = tmp_path / "tiled"
    layer, everyone = layer_of(folder), range(EXPERTS)
    whole = output(layer, Share(experts=everyone), *tokens)
    parts = [output(layer, Share(experts=everyone, rank=rank, of=2), *tokens) for rank in (0, 1)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


def test_devices_that_share_out_the_experts_add_up(folder, tokens):
    layer, (x, index, weights) = layer_of(folder), tokens
    whole = output(layer, Share(experts=range(EXPERTS)), *tokens)
    parts = []
    for experts in ((2, 0), (1, 3)):
        local = torch.full((EXPERTS,), len(experts))
        local[list(experts)] = torch.arange(len(experts))
        parts.append(output(layer, Share(experts=experts), x, local[index], weights))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of", [1, 2, 4])
def test_row_blocks_are_shared_too(of, tokens, tmp_path):
    sizes: dict[str, Any] = {"intermediate_size": 64}
    layer = layer_of(packed_checkpoint(tmp_path, group_sizes=ROW, row_blocks=2, **sizes))
    everyone = range(EXPERTS)
    whole = output(layer, Share(experts=everyone), *tokens)
    parts = [output(layer, Share(experts=everyone, rank=r, of=of), *tokens) for r in range(of)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


def test_a_part_that_ends_inside_a_group_is_refused(folder):
    layer = layer_of(folder)
    with pytest.raises(ModelError) as refused:
        layer.check_share(Share(experts=range(EXPERTS), of=4))
    message = str(refused.value)
    assert "proj=down: int" in message
    assert "cannot be divided among 4 devices: column 16 is inside a group of 32" in message
    assert "expert parallelism" in message and "\n" not in message
    layer.check_share(Share(experts=(0, 1)))


def test_row_blocks_of_several_lengths_are_refused(tmp_path):
    layer = layer_of(packed_checkpoint(tmp_path, row_blocks=3, group_sizes=ROW))
    with pytest.raises(ModelError, match=r"layer 0 gate: .* row blocks of .* rows"):
        layer.check_share(Share(experts=range(EXPERTS), of=2))


def test_only_layers_with_packed_experts_are_there(tmp_path):
    sizes: dict[str, Any] = {"hidden_size": 32, "moe_intermediate_size": 32}
    packed = open_packed(
        packed_checkpoint(tmp_path, "deepseek_v2", ("dense", "attention"), **sizes)
    )
    assert RoutedLayer.of(packed, 0) is None  # its first layer is dense
    layer = RoutedLayer.of(packed, 1)
    assert layer is not None
    units = packed.plan.units
    found = [unit for of_all in layer.units.values() for some in of_all.values() for unit in some]
    routed = [u for u in range(len(units)) if units.row(u).role == "routed"]
    assert np.array_equal(sorted(found), routed)


def test_what_kernels_cannot_run_is_said(tmp_path):
    with pytest.raises(InputError, match="group size 8: kernels take multiples of 32"):
        layer_of(packed_checkpoint(tmp_path, group_sizes=(8,))).check_kernels()
