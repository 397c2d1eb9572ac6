"""Train a reference model from scratch and save it as the package bundles it.

    python -m bitknap.benchmarks.reference.train mixtral --corpus CORPUS -o build/mixtral

CORPUS holds {books,code,speeches,wiki}.{train,valid}.txt. The valid files are read for
validation only. A run keeps a checkpoint beside its output and continues from it. The schedule is
warm-up, constant, linear decay over the last fifth, so that `--tokens` may change during training.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bitknap.arguments import add_output
from bitknap.benchmarks.reference.muon import StackedMuon
from bitknap.benchmarks.reference.recipe import CONTEXT, DOMAINS, RECIPES, VOCABULARY
from bitknap.names import one_of

WARMUP = 100  # steps
DECAY = 0.2  # share of the tokens


def train_tokenizer(corpus: Path) -> Tokenizer:
    """Return a byte-level BPE tokenizer of 4,096 entries, learned from the training texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(corpus / f"{d}.train.txt") for d in DOMAINS], trainer)
    return tokenizer


def tokens_of(tokenizer: Tokenizer, path: Path) -> np.ndarray:
    """Return the text's token ids, int64 [T]; each line is encoded separately."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return np.concatenate([np.array(e.ids, np.int64) for e in tokenizer.encode_batch(lines)])


def windows(tokens: np.ndarray) -> np.ndarray:
    """Cut a token stream into rows of CONTEXT + 1 that overlap by one token."""
    count = (len(tokens) - 1) // CONTEXT
    return np.stack([tokens[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)])


def batch_at(data: np.ndarray, step: int, rows: int, seed: int) -> torch.Tensor:
    """Return the rows of one step: a fresh permutation each epoch, a pure function of `step`."""
    per_epoch = len(data) // rows
    order = np.random.default_rng([seed, step // per_epoch]).permutation(len(data))
    at = (step % per_epoch) * rows
    return torch.from_numpy(data[order[at : at + rows]])


def loss_of(model: Any, batch: torch.Tensor, balance: float = 0.0) -> torch.Tensor:
    """Return the loss in nats per token, with a weight of the balancing loss added."""
    out = model(batch[:, :-1], use_cache=False, output_router_logits=balance > 0)
    logits = out.logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
    return loss + balance * out.aux_loss if balance else loss


@torch.inference_mode()
def validate(model: Any, valid: dict[str, np.ndarray], rows: int = 32) -> dict[str, float]:
    """Return the loss in nats per token on each domain's validation windows."""
    model.eval()
    losses = {}
    for domain, data in valid.items():
        parts = [torch.from_numpy(data[i : i + rows]) for i in range(0, len(data), rows)]
        total = sum(loss_of(model, p).item() * len(p) for p in parts)
        losses[domain] = total / len(data)
    model.train()
    return losses


def optimizers_of(model: Any) -> list[torch.optim.Optimizer]:
    """Return Muon for hidden matrices, and AdamW for embedding, routers and norms."""
    hidden: list[torch.nn.Parameter] = []
    fused: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, p in model.named_parameters():
        router = name.endswith(("mlp.gate.weight", "router.weight"))
        if p.ndim < 2 or "embed" in name or "lm_head" in name or router:
            rest.append(p)
        else:
            (fused if "gate_up_proj" in name else hidden).append(p)
    muon = StackedMuon([{"params": hidden}, {"params": fused, "halves": 2}], lr=0.02)
    return [muon, torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def rate_at(step: int, steps: int) -> float:
    """Return the share of the full learning rate: warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


def save_atomically(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_file = out / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(args.corpus).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    files = {d: tokens_of(tokenizer, args.corpus / f"{d}.train.txt") for d in DOMAINS}
    data = windows(np.concatenate([np.tile(files[d], n) for d, n in DOMAINS.items()]))
    valid = {d: windows(tokens_of(tokenizer, args.corpus / f"{d}.valid.txt"))[:64] for d in DOMAINS}
    recipe = RECIPES[args.model]
    config = getattr(transformers, recipe.config_class)(**recipe.settings)
    model = getattr(transformers, recipe.model_class)(config).train()
    model.set_experts_implementation("grouped_mm")
    forward = torch.compile(model) if args.compile else model
    initial = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("gate.weight")}
    optimizers = optimizers_of(model)
    full_rates = [[g["lr"] for g in o.param_groups] for o in optimizers]
    rows = args.batch // CONTEXT
    steps = math.ceil(args.tokens / (rows * CONTEXT))
    first, log = 0, []
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(optimizers, state["optimizers"], strict=True):
            o.load_state_dict(s)
        first, log, initial = state["step"], state["log"], state["initial"]
    start = time.monotonic()
    for step in range(first, steps):
        for o, rates in zip(optimizers, full_rates, strict=True):
            for g, rate in zip(o.param_groups, rates, strict=True):
                g["lr"] = rate * rate_at(step, steps)
        loss = loss_of(forward, batch_at(data, step, rows, args.seed), recipe.balance)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        if (step + 1) % args.every == 0 or step + 1 == steps:
            losses = validate(model, valid)
            mean = sum(losses.values()) / len(losses)
            entry = {"step": step + 1, "tokens": (step + 1) * rows * CONTEXT, "valid": losses}
            log.append(entry | {"mean": mean, "train": loss.item()})
            speed = (step + 1 - first) * rows * CONTEXT / (time.monotonic() - start)
            print(
                f"{step + 1}/{steps} train {loss.item():.3f} valid {mean:.4f} "
                f"ppl {math.exp(mean):.2f} {speed:.0f} tok/s",
                flush=True,
            )
            state = {"model": model.state_dict(), "step": step + 1, "log": log, "initial": initial}
            state["optimizers"] = [o.state_dict() for o in optimizers]
            save_atomically(state, checkpoint)
    finish(model, initial, out, log, args)


def finish(model: Any, initial: dict[str, Any], out: Path, log: list[Any], args: Any) -> None:
    """Write the trained model in bf16, its routers at initialisation, and the record of the run."""
    from safetensors.torch import save_file

    model.to(torch.bfloat16).save_pretrained(out)
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(out / "tokenizer.json"), eos_token="<|end|>", bos_token="<|end|>"
    ).save_pretrained(out)
    save_file({k: v.bfloat16() for k, v in initial.items()}, out / "initial_routers.safetensors")
    record = {
        "model": args.model,
        "seed": args.seed,
        "tokens": args.tokens,
        "batch_tokens": args.batch,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "log": log,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=one_of("model", RECIPES), help=", ".join(RECIPES))
    parser.add_argument("--corpus", type=Path, required=True)
    add_output(parser, "Folder to write.")
    parser.add_argument("--tokens", type=float, default=12e6)
    parser.add_argument("--batch", type=int, default=6144, help="tokens a step")
    parser.add_argument("--every", type=int, default=50, help="steps between validations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the model (1.1-1.3 times)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
