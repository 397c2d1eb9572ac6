"""Models that several tests of this folder read."""

import pytest
import torch

from bitknap.quantization.runtime import loading
from bitknap.testing import packed_checkpoint, tiny_model


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """Write a tiny Qwen3-MoE with biases in 16 bits; read only."""
    sizes = {"hidden_size": 40, "moe_intermediate_size": 24, "attention_bias": True}
    folder = tmp_path_factory.mktemp("plain")
    model = tiny_model("qwen3_moe", num_hidden_layers=1, **sizes)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """A packed Mixtral, attention and all; read only."""
    return packed_checkpoint(tmp_path_factory.mktemp("mixtral"), include=("attention",))


@pytest.fixture(scope="module")
def exact(packed):
    """The packed model dequantized; each file of tests has its own, and its own `packed` counts."""
    return loading.load(packed)


@pytest.fixture(scope="session")
def contents():
    """Read the files below a folder, by their paths in it."""

    def read(folder):
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    return read
