"""Files beside the weights: which travel, which stay behind and why, and which cannot be copied."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bitknap
from bitknap.allocation import BitPlan, formats
from bitknap.errors import FileError, InputError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.quantization.source.companions import Companions, reason_to_stay
from bitknap.quantization.transforms import transformed_model
from bitknap.testing import tiny_model

TRAVEL = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "dict.txt", "bpe.codes", "emoji.json"),
    *("tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model"),
    *("qwen.tiktoken", "tekken.json", "prophetnet.tokenizer", "source.spm"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "audio_tokenizer_config.json", "modelcard.json"),
    *("1_Pooling/config.json", "qformer_tokenizer/tokenizer.json", "custom_generate/generate.py"),
    *("modeling_some.py", "configuration_some.py", "requirements.txt"),
    *("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "README.md"),
    *("logo.png", "assets/figure.svg", "Images/Deep/Figure.JPG", "something.else"),
)
STAY = {
    "an adapter (merge it into the model to have it quantized)": (
        *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    ),
    "a quantization of another tool": ("hf_quant_config.json", "quantize_config.json"),
    "the state of a training": (
        *("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt"),
        *("rng_state.pth", "rng_state_0.pth", "events.out.tfevents.1700000000.host.1.0"),
    ),
    "weights that the model does not read": (
        *("mtp.safetensors", "model.fp16.safetensors", "consolidated.safetensors"),
        "consolidated.safetensors.index.json",
    ),
    "another framework's": (
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "rust_model.ot"),
        *("flax_model.msgpack", "flax_model.msgpack.index.json", "model.onnx", "model.onnx_data"),
        *("last.ckpt", "old.pth", "model.Q4_K_M.gguf", "openvino_model.xml", "params.json"),
        "Model.mlpackage/",
    ),
    "hidden, temporary or a copy": (".gitattributes", ".git/", ".cache/", "a.lock", "b.tmp"),
    "a folder that transformers does not read": ("original/", "onnx/", "checkpoint-500/"),
}


def make(folder, names, content="{}"):
    for name in names:
        path = folder / name if not name.endswith("/") else folder / name / "inside.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def folder(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def eight_bits(folder):
    source = Checkpoint.open(folder)
    units = walk_headers(source.config, source.shapes).units
    choice = np.zeros(len(units), dtype=np.int64)
    return BitPlan.from_choice(units, formats(8, 8), choice, model=source.fingerprint)


def names_in(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_what_belongs_to_the_model_travels_and_the_rest_is_named(folder, tmp_path):
    make(folder, (*TRAVEL, *(name for names in STAY.values() for name in names)))
    (folder / "empty").mkdir()
    sizes = bitknap.quantize(folder, eight_bits(folder), tmp_path / "out")
    ours = {"config.json", "bitknap.safetensors", "bitknap_plan.json", "bitknap_source.json"}
    ours |= {"modeling_bitknap.py", "SOURCE_README.md", "bitknap_files.json"}
    assert names_in(tmp_path / "out") == ours | set(TRAVEL)
    assert sizes["left_out"] == {why: sorted(names) for why, names in STAY.items()}
    total = sum((tmp_path / "out" / name).stat().st_size for name in names_in(tmp_path / "out"))
    assert sizes["checkpoint"] == total


def test_a_folder_of_weights_alone_leaves_nothing(folder):
    assert Checkpoint.open(folder).companions == Companions(
        travel=("generation_config.json",), left={}
    )


def test_only_what_belongs_to_the_model_counts_as_its_bytes(folder):
    make(folder, ("tokenizer.json",))
    before = Checkpoint.open(folder).folder_bytes
    assert before == sum(file.stat().st_size for file in folder.iterdir())
    make(folder, ("tf_model.h5", "original/params.json"))
    assert Checkpoint.open(folder).folder_bytes == before


def test_a_rotated_copy_has_what_the_model_has(folder, tmp_path):
    make(folder, ("tokenizer.json", "additional_chat_templates/rag.jinja", "model.onnx"))
    made = transformed_model.make(
        Checkpoint.open(folder), transformed_model.Recipe(rotation=1), tmp_path / "twin"
    )
    wanted = ("additional_chat_templates/rag.jinja", "generation_config.json", "tokenizer.json")
    assert made.companions == Companions(travel=wanted, left={})


def test_links_are_copied_as_what_they_point_to(folder, tmp_path):
    make(tmp_path / "elsewhere", ("a.json", "templates/rag.jinja"), "content")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere" / "a.json")
    templates = folder / "additional_chat_templates"
    templates.symlink_to(tmp_path / "elsewhere" / "templates", target_is_directory=True)
    bitknap.quantize(folder, eight_bits(folder), tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    shutil.rmtree(tmp_path / "elsewhere")
    for name in ("tokenizer.json", "additional_chat_templates/rag.jinja"):
        assert (tmp_path / "out" / name).read_text() == "content"


def test_a_folder_that_holds_itself_ends(folder):
    (folder / "assets").symlink_to(folder, target_is_directory=True)
    assert "assets/config.json" in Checkpoint.open(folder).companions.travel


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/a.jinja"])
def test_a_link_to_nothing_is_refused_before_any_work(name, folder, tmp_path):
    plan = eight_bits(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "nowhere")
    for command in (
        lambda: bitknap.quantize(folder, plan, tmp_path / "out"),
        lambda: bitknap.estimate(folder),
    ):
        with pytest.raises(FileError, match=rf"{name}: a link to .*nowhere, which does not exist"):
            command()
    assert not (tmp_path / "out").exists()


def test_a_link_to_nothing_that_would_stay_does_not_matter(folder, tmp_path):
    (folder / "model.onnx").symlink_to(tmp_path / "nowhere")
    assert Checkpoint.open(folder).companions.left == {"another framework's": ("model.onnx",)}


def test_what_git_has_not_fetched_is_refused(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "tokenizer.json").write_text(pointer)
    with pytest.raises(FileError, match=r"tokenizer\.json: a Git LFS pointer"):
        Checkpoint.open(folder).check_companions()
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(FileError, match=r"model\.safetensors: a Git LFS pointer"):
        Checkpoint.open(folder)


def test_large_files_of_no_known_kind_stay():
    assert reason_to_stay("tokenizer.json", 100 << 20) == ""
    assert reason_to_stay("LICENSE", 100 << 20) == ""
    assert reason_to_stay("states", 100 << 20) == "larger than 16 MiB"
    assert reason_to_stay("dump.json", 1 << 30) == "larger than 512 MiB"


def test_an_adapter_is_left_out_of_measuring_and_of_the_result(folder, tmp_path):
    plan, before = eight_bits(folder), bitknap.load(folder).state_dict()
    make(folder, ("adapter_config.json",), '{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    save_file({"lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    sizes = bitknap.quantize(folder, plan, tmp_path / "out")
    (names,) = sizes["left_out"].values()
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    model = bitknap.load(folder)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert bitknap.load(tmp_path / "out").state_dict().keys() == before.keys()


def test_an_adapter_alone_is_no_model(tmp_path):
    make(tmp_path, ("adapter_config.json",))
    with pytest.raises(InputError, match="an adapter without its model; merge it into the model"):
        resolve(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"max_new_tokens": -1}'])
def test_settings_for_generating_that_are_wrong_are_one_line(content, folder):
    make(folder, ("generation_config.json",), content)
    with pytest.raises(FileError, match=r"generation_config\.json: transformers cannot read it"):
        bitknap.load(folder)


def test_settings_for_generating_are_loaded_again(folder, tmp_path):
    make(folder, ("generation_config.json",), '{"temperature": 0.25, "do_sample": true}')
    bitknap.quantize(folder, eight_bits(folder), tmp_path / "out")
    for packed in (False, True):
        model = bitknap.load(tmp_path / "out", packed=packed)
        assert model.generation_config.temperature == 0.25
