"""What is damaged, and the commands that read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitknap.benchmarks.robustness.materials import BY_LAYER, COMPARE, COMPARING, FAST
from bitknap.benchmarks.robustness.mutate import (
    BYTES,
    Edit,
    damaged_bytes,
    damaged_json,
    damaged_lines,
)
from bitknap.benchmarks.robustness.mutate_database import damaged_database
from bitknap.benchmarks.robustness.mutate_tensors import damaged_tensors

_TEXT = ("--text", "text.txt")
# Values are damaged more often than bytes, which mostly end at the JSON reader.
# An edit that is none of the content: the file is made a link.
LINK = "link"
_JSON = (*("value",) * 11, LINK, *BYTES)
_NAMED = (*("value",) * 6, *("path",) * 6, LINK, *BYTES)
_LINES = (*("value",) * 8, *("line",) * 4, *BYTES)
_NAMED_LINES = (*("value",) * 4, *("path",) * 4, *("line",) * 4, LINK, *BYTES)
_TENSORS = (*("header", "text", "number", "shape") * 3, "length", LINK, *BYTES)
_ROWS = (*("value",) * 8, *("row", "table") * 3, LINK, *BYTES)


# Most commands take far less.
SECONDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A file that is damaged.

    Attributes:
        name: name of the kind of input.
        file: its path among the materials, or a pattern of several.
        damage: gives the damaged content.
        kinds: kinds of edits.
        commands: that read it; each case runs one of them.
        needs: other materials that the commands read.
        share: of all cases, in parts.
        mended: an unfinished last line may be cut off the file.
        seconds: of the processor's time, after which a command counts as hanging.
    """

    name: str
    file: str
    damage: Callable[[bytes, Sequence[Edit]], bytes]
    kinds: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    share: int = 4
    mended: bool = False
    seconds: int = SECONDS


_INSPECT = ("inspect", "model")
_DATA_FREE = ("estimate", "model", "--estimator", "data-free", *FAST, "-o", "out.safetensors")
_QUANTIZE = ("quantize", "model", "--plan", "plan.json", "-o", "out")
_EVALUATE = ("evaluate", "model", "--tokens", "64", *_TEXT)
_MOMENTS = ("estimate", "model", "--estimator", "moments", *FAST, *_TEXT, "-o", "out.safetensors")
_FUZZY = (
    *("estimate", "model", "--estimator", "fuzzy", "--samples", "samples.safetensors"),
    *(*FAST, *_TEXT, "-o", "out.safetensors"),
)
_MEASURED = (
    *("estimate", "model", "--estimator", "measured-kl", *FAST, *_TEXT, "-o", "out.safetensors"),
)
_STUDIED = (
    *("study", "create", "t", "--storage", "journal:out.log"),
    *("--table", "table.safetensors", "--budget", "4bpw"),
)
_OVER = ("quantize", "model", "--plan", "other.json", "-o", "packed", "--overwrite")
_ON_PACKED = (
    ("convert", "packed", "--layout", "tiles", "-o", "out"),
    ("show", "packed"),
    ("evaluate", "packed", "--tokens", "64", *_TEXT),
)
_SHARDED = tuple(
    tuple("sharded" if word == "model" else word for word in words)
    for words in (_INSPECT, _DATA_FREE, _QUANTIZE)
)
_SOLVE = ("solve", "table.safetensors", "--budget", "4bpw", "-o", "out.json")

SUBJECTS = (
    Subject(
        name="cost table",
        file="table.safetensors",
        damage=damaged_tensors,
        kinds=_TENSORS,
        commands=(
            ("show", "table.safetensors"),
            _SOLVE,
            (*_SOLVE, "--price"),
            _STUDIED,
        ),
        share=16,
    ),
    Subject(
        name="plan",
        file="plan.json",
        damage=damaged_json,
        kinds=_NAMED,
        commands=(("show", "plan.json"), ("show", "other.json", "--diff", "plan.json"), _QUANTIZE),
        needs=("other.json", "model"),
        share=14,
    ),
    Subject(
        name="frontier",
        file="frontier.json",
        damage=damaged_json,
        kinds=_JSON,
        commands=(("show", "frontier.json"),),
        share=10,
    ),
    Subject(
        name="limit file",
        file="limits.json",
        damage=damaged_json,
        kinds=_JSON,
        commands=((*_SOLVE, "--limit", "limits.json"),),
        needs=("table.safetensors", "matrix.npy"),
        share=14,
    ),
    Subject(
        name="array of a limit",
        file="matrix.npy",
        damage=damaged_bytes,
        kinds=BYTES,
        commands=((*_SOLVE, "--limit", "limits.json"),),
        needs=("table.safetensors", "limits.json"),
        share=4,
    ),
    Subject(
        name="samples",
        file="samples.safetensors",
        damage=damaged_tensors,
        kinds=_TENSORS,
        commands=(_FUZZY,),
        needs=("model", "text.txt"),
        share=3,
    ),
    Subject(
        name="journal of readings",
        file="out.safetensors.journal",
        damage=damaged_lines,
        kinds=_LINES,
        commands=(_MEASURED,),
        needs=("model", "text.txt"),
        share=3,
    ),
    Subject(
        name="journal of a checkpoint",
        file=".out.partial/journal.jsonl",
        damage=damaged_lines,
        kinds=_NAMED_LINES,
        commands=(_QUANTIZE,),
        needs=("model", "plan.json", ".out.partial"),
        share=4,
    ),
    Subject(
        name="header of weights",
        file="model/model.safetensors",
        damage=damaged_tensors,
        kinds=("header", "header", "length", "number", "shape", *BYTES),
        commands=(_INSPECT, _DATA_FREE, _QUANTIZE, _EVALUATE),
        needs=("model", "plan.json", "text.txt"),
        share=16,
    ),
    Subject(
        name="index of weights",
        file="sharded/model.safetensors.index.json",
        damage=damaged_json,
        kinds=_NAMED,
        commands=_SHARDED,
        needs=("sharded", "plan.json", "model"),
        share=10,
    ),
    Subject(
        name="configuration",
        file="model/config.json",
        damage=damaged_json,
        kinds=_JSON,
        commands=(_INSPECT, _DATA_FREE, _QUANTIZE, _EVALUATE),
        needs=("model", "plan.json", "text.txt"),
        share=14,
    ),
    *(
        Subject(
            name=name,
            file=f"packed/{file}",
            damage=damaged_tensors if file.endswith("s") else damaged_json,
            kinds=_TENSORS if file.endswith("s") else _NAMED,
            commands=_ON_PACKED,
            needs=("packed", "text.txt"),
            share=share,
        )
        for name, file, share in (
            ("packed configuration", "config.json", 8),
            ("packed plan", "bitknap_plan.json", 8),
            ("packed source", "bitknap_source.json", 8),
            ("packed streams", "bitknap.safetensors", 8),
        )
    ),
    Subject(
        name="packed index",
        file="packed-shards/bitknap.safetensors.index.json",
        damage=damaged_json,
        kinds=_NAMED,
        commands=(("convert", "packed-shards", "--layout", "tiles", "-o", "out"),),
        needs=("packed-shards",),
    ),
    *(
        Subject(
            name=file,
            file=f"model/{file}",
            damage=damaged_json,
            kinds=_JSON,
            commands=(_MOMENTS, _EVALUATE, _QUANTIZE),
            needs=("model", "plan.json", "text.txt"),
        )
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    ),
    Subject(
        name="text",
        file="text.txt",
        damage=damaged_bytes,
        kinds=BYTES,
        commands=(_MOMENTS, _EVALUATE),
        needs=("model",),
        share=2,
    ),
    Subject(
        name="list of files",
        file="packed/bitknap_files.json",
        damage=damaged_json,
        kinds=_NAMED,
        commands=(_OVER,),
        needs=("packed", "model", "other.json"),
        share=6,
    ),
    *(
        Subject(
            name=name,
            file=f"layered.safetensors.journal{file}",
            damage=damaged_tensors if file else damaged_lines,
            kinds=_TENSORS if file else _NAMED_LINES,
            commands=(BY_LAYER,),
            needs=(
                "model",
                "text.txt",
                "layered.safetensors.journal",
                "layered.safetensors.journal.files",
            ),
            share=3,
        )
        for name, file in (("journal of layers", ""), ("finished layers", ".files/*"))
    ),
    *(
        Subject(
            name=f"compare: {name}",
            file=f"{COMPARING}/.work/{file}",
            damage=damage,
            kinds=kinds,
            commands=(COMPARE,),
            needs=("model", "text.txt", COMPARING),
            share=1,
            seconds=60,
        )
        for name, file, damage, kinds in (
            ("journal", "journal", damaged_lines, _NAMED_LINES),
            ("table", "tables/*.safetensors", damaged_tensors, _TENSORS),
            ("plan", "*.json", damaged_json, _NAMED),
            ("readings", "refine*.journal", damaged_lines, _LINES),
        )
    ),
    *(
        Subject(
            name=name,
            file=file,
            damage=damage,
            kinds=kinds,
            commands=(
                ("study", "show", "s", "--storage", url),
                ("study", "best", "s", "--storage", url, "-o", "out.json"),
                ("study", "show", "s", "--storage", url, "-o", "out.html"),
            ),
            needs=("table.safetensors",),
            share=share,
            mended=mended,
        )
        for name, file, url, damage, kinds, share, mended in (
            ("study log", "study.log", "journal:study.log", damaged_lines, _LINES, 4, True),
            ("study file", "study.db", "sqlite:///study.db", damaged_database, _ROWS, 6, False),
        )
    ),
)
