"""What config.json says of a packed checkpoint, and what cannot be read."""

import shutil

import pytest
from transformers import (
    AutoModelForCausalLM,
)

from bitknap.errors import FileError
from bitknap.quantization.packed.config import (
    REFUSAL,
    check_config,
    packed_config,
    plain_config,
    stub,
)
from bitknap.quantization.runtime import loading
from bitknap.testing.comparing import change_quantization_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2.0"}, "version: 2.0 cannot be read by this library"),
        ({"version": "new"}, "version: 'new' is not of the form MAJOR.MINOR"),
        ({"layout": "swizzled"}, "layout 'swizzled' is unknown; one of plain, tiles"),
        ({"layout": "tiles", "layout_version": 99}, "layout_version: 99 cannot be read"),
    ],
)
def test_what_this_library_cannot_read(change, message, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "packed")
    change_quantization_config(folder, **change)
    for load in (AutoModelForCausalLM.from_pretrained, loading.load):
        with pytest.raises(FileError, match=message) as error:
            load(folder)
        assert "\n" not in str(error.value)
        assert "config.json" in str(error.value)


def test_config_there_and_back():
    source = {"architectures": ["MixtralForCausalLM"], "hidden_size": 4}
    config = packed_config(source, "bitknap.safetensors.index.json", layout="tiles")
    assert config["quantization_config"] == {
        "quant_method": "bitknap",
        "version": "1.0",
        "weights": "bitknap.safetensors.index.json",
        "layout": "tiles",
    }
    assert config["transformers_weights"] == REFUSAL
    assert plain_config(config) == source
    own = source | {"auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    assert packed_config(own)["auto_map"] == own["auto_map"]
    assert plain_config(packed_config(own)) == own
    assert stub(own) is None
    for names in (
        ["T5ForConditionalGeneration"],
        [],
        ["x; import osForCausalLM"],
        7,
        {"a": 1},
        [7],
    ):
        assert "auto_map" not in packed_config({"architectures": names})
        assert stub({"architectures": names}) is None
    assert plain_config(packed_config(source | {"auto_map": "mine"})) == source


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "quantization_config: missing; write the checkpoint again"),
        ({"quantization_config": {"quant_method": "gptq"}}, "format: 'gptq' is not 'bitknap'"),
    ],
)
def test_what_is_not_packed(config, message, tmp_path):
    with pytest.raises(FileError, match=message):
        check_config(config, tmp_path)
