"""Load a checkpoint, packed or plain, as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers.quantizers.auto  # noqa: F401 - whose import registers the plug-in, so it is first

from bitknap.errors import FileError
from bitknap.quantization.packed.buildable import check
from bitknap.quantization.packed.config import to_plain
from bitknap.quantization.packed.folder import is_packed
from bitknap.quantization.packed.opened import (
    check_decoded,
    open_packed,
    read_packed,
    source_shapes,
)
from bitknap.quantization.runtime.dequantized_cache import CACHE_BYTES
from bitknap.quantization.source.architecture import (
    align_experts,
    architecture_of,
    config_of,
)
from bitknap.quantization.source.checkpoint import DTYPES, Checkpoint
from bitknap.quantization.source.source_config import computes, forget_quantization
from bitknap.quantization.source.transformers_calls import calling_transformers
from bitknap.quantization.source.weight_files import has_metadata


def load(
    folder: Path,
    dtype: torch.dtype | str = "auto",
    *,
    device: torch.device | str = "cpu",
    packed: bool | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Any:
    """Return the transformers model of a packed or of a plain checkpoint, in evaluation mode.

    An adapter beside plain weights is not loaded, as it is not quantized either.

    Args:
        folder: the checkpoint.
        dtype: "auto" is the one in config.json; quantized weights are rounded to it once.
        device: device of the model.
        packed: keep the weights of a packed checkpoint packed in memory, in about the bytes that
            they have on disk; by default only on a CUDA device. There kernels run its experts;
            elsewhere a matrix is dequantized when it is used, which is slower than an ordinary
            model unless the matrix is cached. `save_pretrained` then writes a packed checkpoint.
            Otherwise the model is an ordinary one.
        cache_bytes: maximum bytes of cached dequantized matrices, if packed.

    Raises:
        FileError: a file is damaged, or the model needs tensors that are not there.
        ModelError: transformers does not know the architecture, or cannot keep it packed.
    """
    check(folder)
    config = config_of(folder)
    architecture = architecture_of(folder, config)
    generation = _generation(folder)
    where_to = torch.device(device)
    wanted = where_to.type == "cuda" if packed is None else packed
    packed = wanted and is_packed(folder)
    where: dict[str, Any] = {"pretrained_model_name_or_path": folder}
    if is_packed(folder) and dtype == "auto":
        dtype = _own_dtype(folder, config)
    if packed:
        # A hook imports the plug-in after transformers; it must not be imported first.
        from bitknap.quantization.runtime.transformers_plugin import register

        register()
        check_decoded(open_packed(folder))
    elif is_packed(folder):
        where = {"pretrained_model_name_or_path": None, "config": to_plain(config)}
        where["state_dict"] = read_packed(folder)[1]
    elif not _reads_alike(source := Checkpoint.open(folder)):  # opened, and so checked, either way
        forget_quantization(config)
        tensors = {name: source.read(name).contiguous() for name in source.headers}
        where = {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}
    with calling_transformers(f"{folder}: transformers cannot load the model"):
        model, report = architecture.from_pretrained(**where, dtype=dtype, output_loading_info=True)
    if generation and where["pretrained_model_name_or_path"] is None and model.can_generate():
        model.generation_config = generation
    if missing := sorted(report["missing_keys"]):
        raise FileError(f"{folder}: {len(missing)} tensors are missing, such as {missing[0]}")
    if packed:
        model.hf_quantizer.cache.limit = cache_bytes
    align_experts(model)
    return model.eval().to(where_to)


def _reads_alike(source: Checkpoint) -> bool:
    """Return whether transformers, given the folder, loads what `Checkpoint.read` reads.

    transformers does not decode all low-bit weights, adds an adapter in the folder, and refuses an
    index without metadata or a dtype that models do not compute in.
    """
    adapter = (source.folder / "adapter_config.json").is_file()
    bare = source.index and not has_metadata(source.folder / source.index)
    dtype = source.config.get("dtype") or source.config.get("torch_dtype")
    return computes(dtype) and not (source.low_bit or adapter or bare)


def _generation(folder: Path) -> Any:
    """Return a folder's generation settings, None if transformers has none to read.

    Raises:
        FileError: transformers refuses them.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None
    except (TypeError, ValueError) as error:
        path, reason = folder / "generation_config.json", next(iter(str(error).splitlines()), "")
        raise FileError(f"{path}: transformers cannot read it ({reason})") from None


def _own_dtype(folder: Path, config: Any) -> torch.dtype:
    """Return the dtype that config.json names, or else that of the replaced tensors."""
    if config.dtype is not None:
        dtype: torch.dtype = config.dtype
        return dtype
    return DTYPES[next(iter(source_shapes(folder).values()))[0]]
