"""The loss whose gradients are the Fisher information: that of labels drawn from the model itself.

Labels are drawn by a race: of all words of a token the one with the least e / p wins, where e is
an exponential variate and p the word's probability. That is what `torch.multinomial` does for one
draw; here the variates of a whole batch are drawn at once and can wait in a file, so that logits
of one window at a time give the same labels as logits of the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bitknap.errors import ModelError


def drawn_labels(logits: Tensor, race: Tensor) -> Tensor:
    """Return labels drawn from the model's own distribution, int64 [tokens].

    Args:
        logits: logits of each token, [tokens, vocabulary].
        race: exponential variates of mean 1, of the same shape, on any device.

    Raises:
        ModelError: the model's output is NaN or infinite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            "calibration: the model's output is NaN or infinite on this text; repair its weights, "
            "or use `estimator=DataFree()`"
        )
    return (logits.detach().softmax(-1) / race.to(logits.device)).argmax(-1)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of labels, nats."""
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


@contextlib.contextmanager
def rooted(model: nn.Module) -> Iterator[Tensor]:
    """Let the model's graph start at its embeddings, and at no parameter, while the block runs.

    Yields:
        The root, a zero that is added to every embedding: differentiate with respect to it.
    """
    root = torch.zeros((), requires_grad=True)
    frozen = [p for p in model.parameters() if p.requires_grad]
    handles = [
        module.register_forward_hook(lambda module, args, output: output + root.to(output))
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield root
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
