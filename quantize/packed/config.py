"""What `config.json` says about a packed checkpoint, and how transformers uses it.

quantization_config   "bitknap", the version, how streams are laid out, whether a matrix has an
                      exponent, and which file holds the weights; `plugin` reads it
transformers_weights  a sentence. transformers takes it for the name of the weights' file and
                      refuses with a message that ends in it; with Bitknap imported, the
                      plug-in puts the name there. Without this a packed checkpoint that
                      somebody renamed to model.safetensors would load with a warning and
                      with experts made up at random.
auto_map              where transformers may run code of checkpoints (trust_remote_code), a
                      file of a few lines that imports Bitknap; for causal language models
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitknap.disk.atomic import check_version
from bitknap.disk.json_shapes import fits
from bitknap.errors import FileError
from bitknap.names import check_name
from bitknap.quantization.source.source_config import METHOD, unquantized

VERSION = "1.0"
# Byte layouts of streams, and their version: see `plain_bytes` and `tiled_bytes`. Version 2 is
# written if a matrix has an exponent (`kernels.layout.exponents`), otherwise version 1.
LAYOUTS, LAYOUT_VERSION, WITH_EXPONENTS = ("plain", "tiles"), 1, 2
WEIGHTS = "bitknap.safetensors"
REFUSAL = "these weights are packed: run `import bitknap` before from_pretrained"
STUB = "modeling_bitknap.py"
_AUTO = "AutoModelForCausalLM"


def packed_config(
    source: Mapping[str, Any], weights: str = WEIGHTS, **others: Any
) -> dict[str, Any]:
    """Return the `config.json` of a packed checkpoint.

    Args:
        source: the source's `config.json`.
        weights: the file that holds all tensors, or the index of the shards that do.
        others: further entries of `quantization_config`, such as the layout of streams that are not
            plain.
    """
    ours = {**others, "quant_method": METHOD, "weights": weights}
    ours.setdefault("version", VERSION)
    config = {**unquantized(source), "quantization_config": ours, "transformers_weights": REFUSAL}
    if name := _causal_class(source):
        stub = f"{STUB.removesuffix('.py')}.{name}"
        config["auto_map"] = {**_auto_map(source), _AUTO: stub}
    return config


def lies(layout: str, exponents: bool) -> dict[str, Any]:
    """Return the entries of `quantization_config` that describe the layout of streams.

    Args:
        layout: one of LAYOUTS.
        exponents: whether a matrix has an exponent.
    """
    if exponents:
        return {"layout": layout, "layout_version": WITH_EXPONENTS, "exponents": True}
    return {"layout": layout, "layout_version": LAYOUT_VERSION}


def plain_config(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `packed_config`."""
    added = ("quantization_config", "transformers_weights", "auto_map")
    config = {key: value for key, value in packed.items() if key not in added}
    others = _auto_map(packed)
    if kept := {k: v for k, v in others.items() if not str(v).startswith("modeling_bitknap.")}:
        config["auto_map"] = kept
    return config


def stub(source: Mapping[str, Any]) -> str | None:
    """Return the text of `STUB`, or None for models that `auto_map` does not name."""
    name = _causal_class(source)
    if name is None:
        return None
    return (
        '"""Loads this packed checkpoint: from_pretrained(..., trust_remote_code=True)."""\n\n'
        "import bitknap  # tells transformers how to read it\n"
        f"from transformers import {name} as _Model\n\n\n"
        f"class {name}(_Model):\n"
        '    """The model of transformers, unchanged."""\n'
    )


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the classes that a `config.json` names; none where the value is no list of names."""
    names: Any = config.get("architectures")
    return list(names) if fits(names, [str]) else []


def _auto_map(config: Mapping[str, Any]) -> Mapping[str, Any]:
    entries = config.get("auto_map")
    return entries if isinstance(entries, Mapping) else {}


def _causal_class(source: Mapping[str, Any]) -> str | None:
    """Return the class that `auto_map` may name; None if there is none or another is named."""
    names = architectures(source) or [""]
    known = re.fullmatch(r"[A-Za-z_]\w*ForCausalLM", names[0])
    others = _auto_map(source)
    if known is None or not str(others.get(_AUTO, STUB)).startswith("modeling_bitknap."):
        return None
    return known[0]


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Check that `config.json` is that of a packed checkpoint, of a version known here.

    Raises:
        FileError: it names another method, or a newer major version.
    """
    path = folder / "config.json"
    ours = config.get("quantization_config")
    if not isinstance(ours, Mapping):
        raise FileError(f"{path}: quantization_config: missing; write the checkpoint again")
    # The same rule as for other files, which call this key "format".
    check_version({**ours, "format": ours.get("quant_method")}, METHOD, VERSION, path)


def layout_of(config: Mapping[str, Any], folder: Path) -> str:
    """Return the byte layout of a packed checkpoint's streams: "plain" or "tiles".

    Args:
        config: its parsed `config.json`; the layout is plain if it names none.
        folder: named in messages.

    Raises:
        FileError: the layout is unknown, or of a newer version.
    """
    ours = config.get("quantization_config")
    if not isinstance(ours, Mapping) or ours.get("quant_method") != "bitknap":
        raise FileError(f"{folder}: config.json does not say that this is a packed checkpoint")
    layout, version = ours.get("layout", LAYOUTS[0]), ours.get("layout_version", LAYOUT_VERSION)
    check_name(f"{folder}: config.json: layout", layout, LAYOUTS, FileError)
    known = WITH_EXPONENTS if ours.get("exponents") is True else LAYOUT_VERSION
    if type(version) is not int or not 1 <= version <= known:
        raise FileError(
            f"{folder}: config.json: layout_version: {version!r} cannot be read by this library "
            f"({known})"
        )
    return str(layout)


def to_plain(config: Any) -> Any:
    """Remove a packed checkpoint's own entries from its configuration, in place."""
    plain = plain_config(vars(config))
    for name in set(vars(config)) - set(plain):
        delattr(config, name)
    if "auto_map" in plain:
        config.auto_map = plain["auto_map"]
    return config
