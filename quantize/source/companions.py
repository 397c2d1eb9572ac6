"""Which files beside the weights belong to a model, and which stay where they are.

The first row of the table below that matches a name decides. A file that no row names travels if it
is small. Only folders that transformers reads, and those for a card's pictures, are searched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from bitknap.disk.manifest import MANIFEST
from bitknap.errors import FileError

# Reasons why files stay behind, and their names in lower case. All files of an adapter stay:
# transformers would look for its weights as soon as it sees its configuration.
_STAY: Mapping[str, tuple[str, ...]] = {
    "an adapter (merge it into the model to have it quantized)": (
        *("adapter_config.json", "adapter_model*", "adapters.*"),
    ),
    "a quantization of another tool": (
        *("hf_quant_config.json", "quantize_config.json", "quant_config.json"),
        *("quantization_config.json", "imatrix*", "*.imatrix"),
    ),
    "the state of a training": (
        *("trainer_state.json", "training_args.*", "optimizer*", "scheduler.*", "rng_state*"),
        *("random_states*", "*tfevents*", "zero_to_fp32.py", "latest", "*.distcp", "*.log"),
    ),
    "weights that the model does not read": ("*.safetensors", "*.safetensors.index.json"),
    "another framework's": (
        *("*.index.json", "consolidated*", "params.json", "openvino*", "genai_config.json"),
        *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.joblib", "*.npz", "*.npy", "*.ckpt"),
        *("*.h5", "*.hdf5", "*.keras", "*.msgpack", "*.ot", "*.tflite", "*.pb", "*.nemo"),
        *("*.onnx", "*.onnx_data*", "*.onnx.data", "*.ort", "*.engine", "*.plan", "*.mar"),
        *("*.gguf", "*.ggml", "*.llamafile", "*.mlmodel", "*.mlpackage", "*.mlmodelc", "*.pte"),
    ),
    "a packed checkpoint's own": ("bitknap*", "modeling_bitknap.py", "source_readme.md"),
    "hidden, temporary or a copy": (
        *(".*", "*.tmp", "*.temp", "*.lock", "*.incomplete", "*.part", "*.partial", "*.aria2"),
        *("*~", "*.bak", "*.orig", "*.swp", "*.pyc"),
    ),
    "an archive or a data set": (
        *("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.gz", "*.bz2", "*.xz", "*.zst", "*.7z"),
        *("*.parquet", "*.arrow", "*.csv", "*.jsonl"),
    ),
}
# Names of configurations, tokenizers, processors, templates, code and cards.
_KNOWN = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.vocab", "*.bpe", "*.codes"),
    *("*.tokenizer", "*.spm", "*.md", "*.py", "*.yaml", "*.yml", "license*", "notice*"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.pdf", "*.ttf", "*.otf"),
)
# The largest known vocabularies take some 50 MB.
_MOST_KNOWN, _MOST_UNKNOWN = 1 << 29, 1 << 24
# transformers reads templates, generation code, and a processor's other tokenizers; libraries for
# embeddings read folders such as 1_Pooling, and the model's card shows pictures.
_FOLDERS = (
    *("additional_chat_templates", "custom_generate", "*tokenizer*", "[0-9]_*", "licenses"),
    *("assets", "figures", "figs", "images", "imgs", "img", "media"),
)
_FOLDER = "a folder that transformers does not read"
_DEEPEST = 3
_POINTER = b"version https://git-lfs.github.com/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """The files beside a model's configuration and weights, by names relative to its folder.

    Attributes:
        travel: those that belong to the model, sorted.
        left: reason to stay behind, to the names of such files, sorted; a folder's name ends in
            "/".
    """

    travel: tuple[str, ...]
    left: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, folder: Path, weights: Collection[str]) -> Companions:
        """Look through a model's folder.

        Args:
            folder: the model's folder.
            weights: names, relative to it, of the files of weights that are read and their index.

        Raises:
            FileError: a file that belongs to the model is a link to nothing or a pointer to
                something that Git LFS has not fetched.
        """
        travel: list[str] = []
        left: defaultdict[str, list[str]] = defaultdict(list)
        try:
            for path in sorted(folder.iterdir()):
                _sort_top(path, weights, travel, left)
        except OSError as error:
            raise FileError(f"{error.filename}: cannot be read ({error.strerror})") from None
        return cls(travel=tuple(travel), left={why: tuple(names) for why, names in left.items()})


def reason_to_stay(name: str, size: int = 0) -> str:
    """Return why a file beside the weights does not belong to the model; "" if it does.

    Args:
        name: relative to the model's folder.
        size: its size in bytes.
    """
    *folders, last = name.lower().split("/")
    if folders and not _fits(folders[0], _FOLDERS):
        return _FOLDER
    most = _MOST_KNOWN if _fits(last, _KNOWN) else _MOST_UNKNOWN
    return _listed(last) or (f"larger than {most >> 20} MiB" if size > most else "")


def check_content(path: Path) -> None:
    """Raise FileError if a file is a link to nothing, cannot be read, or is a Git LFS pointer."""
    if path.is_symlink() and not path.exists():
        raise FileError(
            f"{path}: a link to {path.readlink()}, which does not exist; download the file again "
            "or remove the link"
        )
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    if begin == _POINTER:
        raise FileError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` there")


def _sort_top(
    path: Path, weights: Collection[str], travel: list[str], left: Mapping[str, list[str]]
) -> None:
    """Add a file to `travel` or `left`; for a folder, add all its files or the folder itself."""
    name = path.name
    if not path.is_dir():
        if name not in ("config.json", MANIFEST) and name not in weights:
            _sort(name, path, travel, left)
        return
    here = _below(path, name, weights)
    if _fits(name, _FOLDERS):
        for inner, file in here:
            _sort(inner, file, travel, left)
    elif any(True for _ in here):
        left[_listed(name) or _FOLDER].append(f"{name}/")


def _sort(name: str, path: Path, travel: list[str], left: Mapping[str, list[str]]) -> None:
    """Add one file to `travel` or `left`."""
    there = path.exists()
    why = reason_to_stay(name, path.stat().st_size if there else 0)
    if there and not path.is_file():
        left["not a file"].append(name)
    elif why:
        left[why].append(name)
    else:
        check_content(path)
        travel.append(name)


def _below(folder: Path, name: str, weights: Collection[str]) -> Iterator[tuple[str, Path]]:
    """Yield the files in a folder except the model's weights, with names relative to the model."""
    for path in sorted(folder.iterdir()):
        inner = f"{name}/{path.name}"
        if not path.is_dir():
            if inner not in weights:
                yield inner, path
        elif inner.count("/") < _DEEPEST:
            yield from _below(path, inner, weights)


def _listed(name: str) -> str:
    """Return why the table says that a file or folder stays; "" if it does not name it."""
    return next((why for why, patterns in _STAY.items() if _fits(name, patterns)), "")


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
