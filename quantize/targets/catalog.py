"""The table of targets: the runtimes that a plan can be made and written for."""

from __future__ import annotations

from collections.abc import Iterable

from bitknap.allocation.problem.units import Units
from bitknap.names import Catalog, Entry
from bitknap.quantization.targets.target import Fit, Target

_ROOM = "bitknap.quantization.targets"
TARGETS = Catalog(
    what="target",
    group="bitknap.targets",
    rows=(
        Entry(name="vllm", place=f"{_ROOM}.vllm:Vllm"),
        Entry(name="gguf", place=f"{_ROOM}.gguf:Gguf"),
        Entry(name="mlx", place=f"{_ROOM}.mlx:Mlx"),
        Entry(name="compressed-tensors", place=f"{_ROOM}.compressed_tensors:CompressedTensors"),
        Entry(name="gptq", place=f"{_ROOM}.gptq:Gptq"),
        Entry(name="gptqmodel", place=f"{_ROOM}.gptqmodel:GptqModel"),
        Entry(name="autoround", place=f"{_ROOM}.autoround:AutoRound"),
        Entry(name="llm-compressor", place=f"{_ROOM}.llm_compressor:LlmCompressor"),
        Entry(name="modelopt", place=f"{_ROOM}.modelopt:ModelOpt"),
        Entry(name="torchao", place=f"{_ROOM}.torchao:TorchAo"),
    ),
)
# Other names by which people know a target.
_ALSO = {"llama.cpp": "gguf"}


def target_of(name: str | Target) -> Target:
    """Return a target, looked up by its name if `name` is a string.

    Raises:
        InputError: no target has that name, or the package that offers it cannot be imported.
    """
    if not isinstance(name, str):
        return name
    target: Target = TARGETS.find(_ALSO.get(name, name))()
    return target


def targets() -> tuple[Target, ...]:
    """Return every target, in the order of lists."""
    return tuple(target_of(name) for name in TARGETS.names())


def fits(units: Units, judged: Iterable[Target] | None = None) -> tuple[Fit, ...]:
    """Return how all units together fit each target; every one of the table if none are given."""
    return tuple(target.fit(units) for target in (targets() if judged is None else judged))
