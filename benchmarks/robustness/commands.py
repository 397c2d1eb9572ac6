"""The long commands: what is killed, and what meets a full disk."""

from __future__ import annotations

from dataclasses import dataclass

from bitknap.benchmarks.robustness.materials import COMPARE, FAST

_TEXT = ("--text", "text.txt")
_LAYERS = ("--max-memory", "5600kB")
# How many trials a study is asked for.
TRIALS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Long:
    """A command that takes long on real models.

    Attributes:
        name: name of the case.
        words: words of the command, which is run beside the materials it needs.
        needs: those materials.
        old: a command whose result is there before; none when empty.
        storage: of a study, whose file the command goes on in; empty for commands with `-o`.
        times: files of the result that hold times, which no two runs share.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    old: tuple[str, ...] = ()
    storage: str = ""
    times: tuple[str, ...] = ()

    @property
    def out(self) -> str:
        """What the command writes."""
        if self.storage:
            return self.storage.rpartition("/")[2].rpartition(":")[2]
        return self.words[self.words.index("-o") + 1]


def _estimate(*words: str) -> tuple[str, ...]:
    return ("estimate", "model", *FAST, *_TEXT, *words, "-o", "out.safetensors")


def _quantize(*words: str) -> tuple[str, ...]:
    return ("quantize", "model", *FAST, *_TEXT, *words, "-o", "out")


def _packed(*words: str) -> tuple[str, ...]:
    return ("quantize", "model", *words, "-o", "out")


def _study(name: str, storage: str) -> Long:
    table = ("--table", "table.safetensors")
    where = ("s", "--storage", storage, *table)
    return Long(
        name=name,
        words=(
            *("study", "run", *where, "--model", "model", "--trials", str(TRIALS)),
            *("--tokens", "64", *_TEXT),
        ),
        needs=(*_MODEL, "table.safetensors"),
        old=("study", "create", *where, "--budget", "4bpw"),
        storage=storage,
    )


_MODEL = ("model", "text.txt")
_GPTQ = ("--method", "gptq")
_LAYERED = ("--estimator", "moments", *_LAYERS)
_GAINS = ("--group-size", "row", *_LAYERS)
# Every reading of this one is a line of a journal; one group size makes them few.
_KL = ("--estimator", "measured-kl", "--group-size", "row")
_SORTED = (*_KL, "--row-blocks", "2", "--permute")
_OVER = (*_KL, "--overwrite")
_BY_LAYER = ("--budget", "4bpw", *_LAYERED)
_CONVERT = ("convert", "packed-shards", "--layout", "tiles", "-o", "out")
_SHARDS = ("--plan", "plan.json", "--max-shard-size", "100KB")
_PLANNED_GPTQ = (*_GPTQ, "--force", "--tokens", "128", *_TEXT)
_PLANNED = (*_MODEL, "plan.json", "other.json")
_OLD = _packed("--plan", "other.json")
_WRITING = tuple(
    Long(name=name, words=words, needs=needs, old=old)
    for name, words, needs, old in (
        ("estimate, whole", _estimate(*_KL), _MODEL, ()),
        ("estimate, gptq", _estimate("--estimator", "moments", *_GPTQ), _MODEL, ()),
        ("estimate, by layer", _estimate(*_LAYERED), _MODEL, ()),
        ("estimate, gains by layer", _estimate(*_GAINS), _MODEL, ()),
        ("estimate, sorted rows", _estimate(*_SORTED), _MODEL, ()),
        ("estimate, over another", _estimate(*_OVER), _MODEL, _estimate("--estimator", "moments")),
        ("quantize by a plan", _packed(*_SHARDS), _PLANNED, ()),
        ("quantize by a plan, gptq", _packed(*_SHARDS, *_PLANNED_GPTQ), _PLANNED, ()),
        ("quantize over another", _packed(*_SHARDS, "--overwrite"), _PLANNED, _OLD),
        ("quantize to a budget", _quantize("--budget", "4bpw", *_KL), _MODEL, ()),
        ("quantize to a budget, by layer", _quantize(*_BY_LAYER), _MODEL, ()),
        ("quantize to a budget, by layer, gptq", _quantize(*_BY_LAYER, *_GPTQ), _MODEL, ()),
        ("convert", _CONVERT, ("packed-shards",), ()),
        ("convert over another", (*_CONVERT, "--overwrite"), ("packed-shards", *_PLANNED), _OLD),
    )
)
COMMANDS = (
    *_WRITING,
    Long(name="compare", words=COMPARE, needs=_MODEL, times=("times.json",)),
    _study("study run, journal", "journal:study.log"),
    _study("study run, sqlite", "sqlite:///study.db"),
)
