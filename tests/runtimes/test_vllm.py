"""vLLM itself, in its build for CPUs, loads packed checkpoints and says what we say.

Bitknap is installed beside it from a wheel, and vLLM is told nothing but the folder. Experts are
run in both ways: decoded when they are loaded, as on a CPU, and packed by `bitknap::moe`, as on a
GPU, here with the operator's reference implementation.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from tests.runtimes.environments import ask, environment

from bitknap.benchmarks.runtimes.scripts import VLLM_VARIABLES
from bitknap.quantization.packed.folder import PLAN
from bitknap.quantization.runtime import loading
from bitknap.testing import packed_checkpoint
from bitknap.testing.fake_packages import install

pytestmark = pytest.mark.runtime

ROOT = Path(__file__).parents[2]
NEAR = 1e-4  # nats; the same models unquantized are up to 3e-5 apart
IDS = [1, *((7 * i) % 4000 + 3 for i in range(60))]
NEW = 8
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
# The one shape of latent attention for which vLLM has code on a CPU.
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 64,
}
MODELS = {
    "mixtral": ((), {}),
    "qwen3_moe": (("attention",), {}),
    "qwen2_moe": (("attention", "shared"), {}),
    "deepseek_v2": (("attention", "shared", "dense"), LATENT),
    "gpt_oss": (("attention",), {}),
    "olmoe": ((), {}),
}
HUB = "some/model"
# vLLM 0.32's own operator for positions is wrong on a CPU for latent attention of several heads,
# in models of any quantization; without it vLLM computes the same in torch.
SCRIPT = """
import gc
from vllm import LLM, SamplingParams
wanted = SamplingParams(max_tokens=question["new"], temperature=0, prompt_logprobs=1)

def said(folder, ids, **options):
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
        max_model_len=128,
        max_num_seqs=4,
        **options,
    )
    prompt = [{"prompt_token_ids": ids}]
    found = llm.generate(prompt, wanted)[0]
    logprobs = [at[i].logprob for at, i in zip(found.prompt_logprobs[1:], ids[1:])]
    return {"logprobs": logprobs, "tokens": list(found.outputs[0].token_ids)}, llm

def experts(llm):
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    methods = {type(layer.quant_method).__name__ for layer in layers}
    weights = [p for layer in layers for p in layer.parameters() if p.dim() == 3]  # no biases
    return sorted(methods), sum(weight.nbytes for weight in weights)

def refusal(folder):
    try:
        said(folder, question["ids"])
    except Exception as error:
        return str(error)

if __name__ == "__main__":
    everything = {}
    for folder in question["folders"]:
        everything[folder], llm = said(folder, question["ids"], **question["options"])
        if question["inside"]:
            everything[folder]["methods"], everything[folder]["bytes"] = experts(llm)
        del llm
        gc.collect()
    everything["refusals"] = {folder: refusal(folder) for folder in question["broken"]}
    answer(everything)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Packed checkpoints by family, each with a tokenizer."""
    found = {}
    for family, (include, sizes) in MODELS.items():
        root = tmp_path_factory.mktemp(family)
        found[family] = packed_checkpoint(
            root, family, include, group_sizes=(32, "row"), **(SIZES | sizes)
        )
        for file in (ROOT / "benchmarks" / "reference" / "mixtral").glob("tokenizer*.json"):
            shutil.copy(file, found[family])
    return found


@pytest.fixture(scope="module")
def packing(site, tmp_path_factory):
    """Return where Python finds Bitknap, and a package that keeps experts packed on a CPU."""
    code = (
        "def register():\n"
        "    from bitknap.quantization.vllm.quantization import BitknapQuantization\n"
        "    BitknapQuantization.anywhere = True\n"
    )
    folder = tmp_path_factory.mktemp("anywhere")
    install(folder, "anywhere", {"vllm.general_plugins": {"anywhere": "anywhere:register"}}, code)
    return f"{site}{os.pathsep}{folder}"


@pytest.fixture(scope="module")
def ours(folders):
    """What `bitknap.load` says: log-probabilities of the prompt, and greedy tokens."""
    found = {}
    for family, folder in folders.items():
        model, ids = loading.load(folder, torch.float32), torch.tensor([IDS])
        with torch.no_grad():
            logits = model(ids).logits[0].log_softmax(-1)
            more = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        logprobs = [float(logits[at, i]) for at, i in enumerate(IDS[1:])]
        found[family] = {"logprobs": logprobs, "tokens": more[0, len(IDS) :].tolist()}
    return found


def asked(folders, path, broken=(), home="", **options):
    """Return what vLLM says of checkpoints in one process; of several processes with options."""
    question = {"folders": list(map(str, folders)), "ids": IDS, "new": NEW}
    question |= {"options": options, "inside": not options, "broken": list(map(str, broken))}
    variables = VLLM_VARIABLES | {"PYTHONPATH": path} | ({"HF_HOME": str(home)} if home else {})
    if not options:
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return ask("vllm", SCRIPT, question, env=variables)


@pytest.fixture(scope="module")
def home(folders, tmp_path_factory):
    """A folder of the hub's library whose cache has one of the models."""
    home, commit = tmp_path_factory.mktemp("home"), "0" * 40
    cached = home / "hub" / f"models--{HUB.replace('/', '--')}"
    shutil.copytree(folders["mixtral"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    return home


@pytest.fixture(scope="module")
def broken(folders, tmp_path_factory):
    """A checkpoint whose plan is cut short."""
    folder = tmp_path_factory.mktemp("broken") / "packed"
    shutil.copytree(folders["mixtral"], folder)
    plan = folder / PLAN
    plan.write_bytes(plan.read_bytes()[:-100])
    return folder


@pytest.fixture(scope="module")
def decoded(folders, site, home, broken):
    """What vLLM says with experts that are decoded when they are loaded."""
    return asked([*folders.values(), HUB], str(site), [broken], home)


@pytest.fixture(scope="module")
def packed(folders, packing):
    """What vLLM says with experts that stay packed."""
    return asked(folders.values(), packing)


def agree(theirs, ours):
    apart = max(abs(a - b) for a, b in zip(theirs["logprobs"], ours["logprobs"], strict=True))
    assert apart < NEAR
    assert theirs["tokens"] == ours["tokens"]


@pytest.mark.parametrize("family", MODELS)
def test_decoded_experts(family, decoded, folders, ours):
    theirs = decoded[str(folders[family])]
    agree(theirs, ours[family])
    assert theirs["methods"] == ["UnquantizedFusedMoEMethod"]


def test_a_model_of_the_hub(decoded, ours):
    agree(decoded[HUB], ours["mixtral"])


def test_a_damaged_checkpoint_is_refused_in_one_line(decoded, broken):
    message = decoded["refusals"][str(broken)]
    assert message.startswith(f"{broken / PLAN}: not valid JSON") and "\n" not in message


@pytest.mark.parametrize("family", MODELS)
def test_packed_experts(family, packed, folders, ours):
    theirs = packed[str(folders[family])]
    agree(theirs, ours[family])
    assert theirs["methods"] == ["PackedExperts"]
    assert theirs["bytes"] == 0


@pytest.mark.parametrize("options", [{}, {"enable_expert_parallel": True}])
def test_two_devices(options, folders, packing, ours):
    folder = folders["qwen3_moe"]
    theirs = asked([folder], packing, tensor_parallel_size=2, **options)
    agree(theirs[str(folder)], ours["qwen3_moe"])


def test_serving_needs_no_option(folders, site, tmp_path):
    # `vllm serve` looks up the version of "vllm", and the build for CPUs has another name.
    about = tmp_path / "vllm-0.32.0+cpu.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    words = ["-m", "vllm.entrypoints.cli.main", "serve", str(folders["mixtral"])]
    server = subprocess.Popen(
        [environment("vllm"), *words, "--host", "127.0.0.1", "--port", str(port)],
        cwd="/",
        env=own
        | VLLM_VARIABLES
        | {"PYTHONPATH": f"{site}{os.pathsep}{tmp_path}", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        question = {"model": str(folders["mixtral"]), "prompt": "The", "max_tokens": 4}
        reply = answered(server, f"http://127.0.0.1:{port}/v1/completions", question)
        assert reply["usage"]["completion_tokens"] == 4
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=60)


def answered(server, address, question, seconds=900):
    """Return a server's answer, once it has started."""
    request = urllib.request.Request(
        address, json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    deadline = time.monotonic() + seconds
    while True:
        assert server.poll() is None, server.communicate()[0][-4000:].decode()
        assert time.monotonic() < deadline
        try:
            with urllib.request.urlopen(request, timeout=seconds) as reply:
                return json.loads(reply.read())
        except urllib.error.URLError:
            time.sleep(1)
