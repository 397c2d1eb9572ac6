"""Models on the hub, with a hub that is a folder: what is asked for, and nothing else."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    SafetensorsFileMetadata,
    SafetensorsRepoMetadata,
)
from huggingface_hub.utils import TensorInfo as RemoteInfo  # type: ignore[attr-defined]
from safetensors.torch import save_file

from bitknap.errors import FileError, InputError
from bitknap.quantization.source.checkpoint import Checkpoint, resolve

MODEL = "some/model"


class Hub:
    """The functions of huggingface_hub that are used, over two folders: the hub and the cache."""

    def __init__(self, root):
        self.there, self.cache = root / "there", root / "cache"
        self.there.mkdir()
        self.cache.mkdir()
        self.online = True
        self.fetched: list[str] = []
        self.headers_of: list[str] = []
        self.change = lambda name, entries: entries

    def _connect(self):
        if not self.online:
            raise OSError("offline\nand more")

    def model_info(self, model, *, files_metadata):
        self._connect()
        files = [
            SimpleNamespace(rfilename=str(path.relative_to(self.there)), size=path.stat().st_size)
            for path in sorted(self.there.rglob("*"))
            if path.is_file()
        ]
        return SimpleNamespace(siblings=files if files_metadata else None)

    def hf_hub_download(self, model, name):
        if not (self.cache / name).exists():
            self._connect()
            (self.cache / name).parent.mkdir(exist_ok=True)
            shutil.copy(self.there / name, self.cache / name)
            self.fetched.append(name)
        return str(self.cache / name)

    def snapshot_download(self, model, *, local_files_only):
        assert local_files_only
        if not any(self.cache.iterdir()):
            raise OSError("nothing cached")
        return str(self.cache)

    def get_safetensors_metadata(self, model):
        self._connect()
        found = {}
        for path in sorted(self.there.glob("model*.safetensors")):
            content = path.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            header.pop("__metadata__", None)
            header = self.change(path.name, header)
            tensors = {
                name: RemoteInfo(
                    dtype=entry["dtype"],
                    shape=entry["shape"],
                    data_offsets=tuple(entry["data_offsets"]),
                )
                for name, entry in header.items()
            }
            found[path.name] = SafetensorsFileMetadata(metadata={}, tensors=tensors)
            self.headers_of.append(path.name)
        if not found:
            raise NotASafetensorsRepoError(f"'{model}' is not a safetensors repo.\nmore")
        return SafetensorsRepoMetadata(
            metadata=None, sharded=True, weight_map={}, files_metadata=found
        )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    for name in ("model_info", "hf_hub_download", "snapshot_download", "get_safetensors_metadata"):
        monkeypatch.setattr(f"huggingface_hub.{name}", getattr(hub, name))
    return hub


@pytest.fixture
def sharded(hub):
    """A repository with two shards, and with much that nobody needs."""
    where = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for number, (name, file) in enumerate(where.items()):
        save_file({name: torch.full((3, 5), float(number))}, hub.there / file)
    files = {
        "config.json": '{"model_type": "mixtral"}',
        "model.safetensors.index.json": json.dumps({"weight_map": where}),
        "tokenizer.json": "{}",
        "README.md": "card",
        "consolidated.safetensors": "the same again",
        "pytorch_model.bin": "pickle",
        "modeling.py": "code",
        "original/params.json": "{}",
    }
    for name, text in files.items():
        (hub.there / name).parent.mkdir(exist_ok=True)
        (hub.there / name).write_text(text)
    return hub


WANTED = [
    "README.md",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
]


def test_only_files_that_are_needed_are_downloaded(sharded):
    folder = resolve(MODEL)
    assert folder == sharded.cache
    assert sorted(sharded.fetched) == WANTED
    assert Checkpoint.open(folder).read("b").eq(1).all()
    assert resolve(MODEL) == folder
    assert sorted(sharded.fetched) == WANTED


def test_a_download_goes_on_with_the_files_that_are_missing(sharded):
    resolve(MODEL)
    (sharded.cache / WANTED[3]).unlink()
    sharded.fetched.clear()
    resolve(MODEL)
    assert sharded.fetched == [WANTED[3]]


def test_without_a_connection_the_cache_will_do(sharded):
    resolve(MODEL)
    sharded.online = False
    assert resolve(MODEL) == sharded.cache
    assert Checkpoint.look(MODEL).read("b").eq(1).all()


def test_one_file_of_weights(hub):
    save_file({"a": torch.zeros(2)}, hub.there / "model.safetensors")
    (hub.there / "config.json").write_text("{}")
    assert Checkpoint.open(resolve(MODEL)).shapes == {"a": ("F32", (2,))}
    assert sorted(hub.fetched) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_is_downloaded_where_a_configuration_names_it(name, sharded):
    (sharded.there / name).write_text('{"auto_map": {"AutoConfig": "modeling.Config"}}')
    resolve(MODEL)
    assert set(sharded.fetched) == {*WANTED, name, "modeling.py"}


def test_folders_that_belong_to_the_model_are_downloaded(sharded):
    index = {"weight_map": {"a": WANTED[2], "b": "parts/b.safetensors"}}
    (sharded.there / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("parts/b.safetensors", "additional_chat_templates/rag.jinja"):
        (sharded.there / name).parent.mkdir()
        shutil.copy(sharded.there / WANTED[3], sharded.there / name)
    source = Checkpoint.open(resolve(MODEL))
    assert source.headers["b"].file == sharded.cache / "parts" / "b.safetensors"
    assert source.companions.travel == (
        *("README.md", "additional_chat_templates/rag.jinja", "tokenizer.json"),
    )
    assert WANTED[3] not in sharded.fetched


def test_a_look_fetches_headers_and_no_weights(sharded):
    source = Checkpoint.look(MODEL)
    assert sharded.fetched == ["config.json"]
    assert sharded.headers_of == WANTED[2:4]
    whole = Checkpoint.open(resolve(MODEL))
    assert source.shapes == whole.shapes
    assert source.nbytes == whole.nbytes
    assert source.config == whole.config
    beside = ("README.md", "tokenizer.json")
    assert source.elsewhere == sum((sharded.there / name).stat().st_size for name in beside)
    assert whole.elsewhere == 0


def test_a_look_at_a_model_in_the_cache_reads_that(sharded):
    resolve(MODEL)
    source = Checkpoint.look(MODEL)
    assert sharded.headers_of == []
    assert source.read("a").eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F17"}, "model-00001-of-00002.safetensors: a: dtype: 'F17' is not known"),
        (
            {"shape": [3, 6]},
            "model-00001-of-00002.safetensors: a: 60 bytes do not hold F32 [3, 6]",
        ),
        (
            {"data_offsets": [4, 64]},
            "model-00001-of-00002.safetensors: a: leaves a hole before it, at byte 4",
        ),
    ],
)
def test_headers_from_the_hub_are_not_trusted(change, message, sharded):
    sharded.change = lambda name, header: {
        tensor: entry | (change if tensor == "a" else {}) for tensor, entry in header.items()
    }
    with pytest.raises(FileError) as caught:
        Checkpoint.look(MODEL)
    assert str(caught.value) == f"{sharded.cache}/{message}"


def test_a_tensor_in_two_files_of_the_hub(sharded):
    sharded.change = lambda name, header: {"a": next(iter(header.values()))}
    assert Checkpoint.look(MODEL).headers["a"].file.name == WANTED[3]


def test_errors_of_the_hub_are_one_line(hub):
    hub.online = False
    for ask in (resolve, Checkpoint.look):
        with pytest.raises(InputError) as caught:
            ask(MODEL)
        assert str(caught.value) == (
            "some/model: no such folder, and it cannot be downloaded from the hub (offline)"
        )


def test_no_safetensors_on_the_hub(hub):
    (hub.there / "config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        Checkpoint.look(MODEL)
    assert str(caught.value) == (
        "some/model: no such folder, and it cannot be downloaded from the hub "
        "('some/model' is not a safetensors repo.)"
    )


def test_a_model_that_changes_meanwhile(sharded, tmp_path, monkeypatch):
    def download(model, name):
        place = tmp_path / ("old" if name == "config.json" else "new")
        place.mkdir(exist_ok=True)
        return str(shutil.copy(sharded.there / name, place / name))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(InputError, match="some/model: changed on the hub while it was downloaded"):
        resolve(MODEL)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": {}}'])
def test_an_index_on_the_hub_without_a_map(index, sharded):
    (sharded.there / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FileError, match=r"index\.json: weight_map: missing or empty"):
        resolve(MODEL)


def test_an_index_on_the_hub_that_points_outside(sharded):
    index = '{"weight_map": {"a": "../../secret.safetensors"}}'
    (sharded.there / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FileError, match=r"'\.\./\.\./secret\.safetensors' is not a file name"):
        resolve(MODEL)
