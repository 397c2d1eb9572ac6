"""What runtimes say of a text: the log-probability of each of its tokens after those before it.

Scripts run in a runtime's own environment (`environments`), on folders by name and token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.benchmarks.runtimes.environments import ask

# Each answers float logits [tokens, vocabulary] by folder.
LOGITS: Mapping[str, str] = {
    "mlx": """
import mlx.core as mx
from pathlib import Path
from mlx_lm.utils import load_model
found = {}
for name, folder in question["folders"].items():
    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    found[name] = model(mx.array([question["tokens"]])).tolist()[0]
answer(found)
""",
    # GPTQModel's plain torch kernel takes 16 bits only; the loaded model runs in 32, so that
    # nothing is rounded again. "NAME modules" is the number of quantized modules.
    "gptq": """
import torch
from gptqmodel import BACKEND, GPTQModel
found = {}
for name, folder in question["folders"].items():
    loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    kinds = [type(module).__name__ for module in loaded.model.modules()]
    with torch.no_grad():
        logits = loaded.model.float()(torch.tensor([question["tokens"]])).logits[0]
    found[name] = logits.tolist()
    found[f"{name} modules"] = kinds.count("TorchLinear")
answer(found)
""",
}
_VLLM = """
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    ids = question["tokens"]
    llm = LLM(question["folder"], dtype="float32", enforce_eager=True, max_model_len=256)
    wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    found = llm.generate([{"prompt_token_ids": ids}], wanted)[0]
    answer([at[i].logprob for at, i in zip(found.prompt_logprobs[1:], ids[1:])])
"""
# What vLLM's build for CPUs needs to start on a small machine.
VLLM_VARIABLES: dict[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


def by_logits(target: str, runtime: str, folder: Path, ids: Sequence[int]) -> np.ndarray:
    """Return what a runtime says that answers with logits, nats, float64 [tokens - 1].

    Args:
        target: the target, a name in `LOGITS`.
        runtime: the environment.
        folder: what was written for the target.
        ids: the text.
    """
    question = {"folders": {"one": str(folder)}, "tokens": list(ids)}
    return of_next(np.array(ask(runtime, LOGITS[target], question)["one"]), ids)


def by_vllm(folder: Path, ids: Sequence[int], site: Path) -> np.ndarray:
    """Return what vLLM says, nats, float64 [tokens - 1].

    Args:
        folder: a packed checkpoint.
        ids: the text.
        site: folder of the installed package, as of an unpacked wheel.
    """
    variables = {**VLLM_VARIABLES, "PYTHONPATH": str(site), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return np.array(ask("vllm", _VLLM, {"folder": str(folder), "tokens": list(ids)}, env=variables))


def by_llama_cpp(path: Path, ids: Sequence[int], vocabulary: int) -> np.ndarray:
    """Return what llama.cpp says, nats, float64 [tokens - 1]; NaN where it ends the text."""
    prompts = [list(ids[: end + 1]) for end in range(len(ids) - 1)]
    found = llama_distributions(path, prompts, vocabulary)
    return found[np.arange(len(prompts)), ids[1:]]


def llama_distributions(path: Path, prompts: Sequence[Any], vocabulary: int) -> np.ndarray:
    """Return llama.cpp's distribution of the token after each prompt, float64 [n, vocabulary].

    A row is NaN where llama.cpp's first choice ends the text, since it then returns none.
    """
    import xllamacpp as llama

    asked = llama.CommonParams()
    asked.model.path = str(path)
    asked.n_ctx = asked.n_batch = asked.n_ubatch = 256
    asked.n_parallel = asked.cpuparams.n_threads = 1
    asked.warmup, asked.verbosity = False, 0
    asked.cache_type_k = asked.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(asked)
    found = np.full((len(prompts), vocabulary), np.nan)
    for row, prompt in enumerate(prompts):
        question = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 0}
        reply = server.handle_completions({**question, "cache_prompt": False, "samplers": []})
        reply = json.loads(reply) if isinstance(reply, str | bytes) else reply
        reply = reply[0] if isinstance(reply, list) else reply
        said = reply["choices"][0].get("logprobs")
        for token in said["content"][0]["top_logprobs"] if said else ():
            found[row, token["id"]] = token["logprob"]
    return found


def of_next(logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Return the log-probability of each token after those before it, nats [tokens - 1].

    Args:
        logits: of every token, [tokens, vocabulary].
        ids: the text.
    """
    before = logits[:-1].astype(np.float64)
    top = before.max(axis=1, keepdims=True)
    said = before - top - np.log(np.exp(before - top).sum(axis=1, keepdims=True))
    chosen: np.ndarray = said[np.arange(len(before)), ids[1:]]
    return chosen
