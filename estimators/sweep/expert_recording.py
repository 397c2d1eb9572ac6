"""Record routed experts during a forward pass, by replacing their forward.

Under transformers' `grouped_mm` no hook on a linear layer fires, so the recorder replaces the
experts' forward and computes each expert that has tokens in turn. For curvature, gradients are
caught on each projection's output; per-token squares are then a matrix product,
(dL/dz)²ᵀ x², so nothing is squared after summing over tokens.

For traces, the experts' inputs and routing are kept token by token, and with gradients also
dL/d(output). Forward and backward pass may be two runs: `catching` keeps the sums of the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitknap.errors import ModelError
from bitknap.estimators.evidence.evidence import LayerTrace, zeros
from bitknap.estimators.measuring.expert_forward import Experts, experts_at
from bitknap.estimators.measuring.float_range import added, second_moments, squares_product
from bitknap.quantization.models.matrix_views import ExpertLayer, Layout
from bitknap.quantization.source.devices import CPU

# Attributes of `LayerSums` that `finished` returns and `restore` takes under their own names.
_SUMS = (
    *("count", "gate_sum", "gate_square", "output_square", "output_max"),
    *("input_square", "middle_square", "input_full", "middle_full"),
)


class LayerSums:
    """Running sums over the tokens routed to each expert of one layer, and its trace.

    While the layer runs they are on its device, traces on the CPU. Whole matrices are allocated
    when the first tokens come: those of all layers at once would take as much memory as the model.

    Args:
        layer: the layer that is recorded.
        full: keep whole second-moment matrices.
        curvature: keep squared gradients of every weight.
        trace_tokens: number of first tokens whose inputs are kept; 0 for none.
        gradients: keep gradients at the output of those tokens too.
        copies: number of rows of every token in a call.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        *,
        full: bool,
        curvature: bool,
        trace_tokens: int = 0,
        gradients: bool = False,
        copies: int = 1,
    ) -> None:
        self.layer, self.curved, self.graded = layer, curvature, gradients
        self.summing = True  # whether a call adds to the sums
        self.tracing, self.trace_tokens = trace_tokens > 0, trace_tokens
        self.copies, self.full = copies, full
        self.clear()

    def clear(self) -> None:
        """Begin anew, as if nothing had been recorded."""
        layer = self.layer
        e, h, i = layer.experts, layer.hidden, layer.intermediate
        # Tokens of which the trace has room for inputs.
        self.room = self.trace_tokens
        self.kept: list[tuple[Tensor, ...]] = []
        self.calls = self.tokens = 0
        self.count = torch.zeros(e, dtype=torch.int64)
        self.gate_sum, self.gate_square, self.output_square = zeros(e), zeros(e), zeros(1)
        self.output_max = zeros(e)
        self.input_square, self.middle_square = zeros(e, h), zeros(e, i)
        names = ("gate", "up") if layer.gated else ("up",)
        self.slopes = {name: zeros(e, i) for name in names}
        self.input_full: Tensor | None = None
        self.middle_full: Tensor | None = None
        self.clear_caught()

    def clear_caught(self) -> None:
        """Begin anew with gradients."""
        self.asked = 0  # tokens of which the trace has asked for gradients
        self.gradients: dict[int, Tensor] = {}  # by place in the trace
        self.curvature: dict[str, Tensor] = {}

    def move(self, device: torch.device) -> None:
        """Move the sums to a device."""
        if self.count.device == device:
            return
        for name in _SUMS:
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).to(device))
        self.slopes = {name: slope.to(device) for name, slope in self.slopes.items()}
        self.curvature = {name: squares.to(device) for name, squares in self.curvature.items()}

    def first_projections(self, z: Tensor) -> dict[str, Tensor]:
        """Split the output of a fused gate_up [tokens, 2I] (or of up) by projection."""
        if not self.layer.gated:
            return {"up": z}
        if self.layer.interleaved:
            return {"gate": z[:, ::2], "up": z[:, 1::2]}
        return {"gate": z[:, : self.layer.intermediate], "up": z[:, self.layer.intermediate :]}

    def add(self, expert: int, x: Tensor, a: Tensor, h: Tensor, slope: Tensor) -> None:
        """Add one expert's tokens: input [n, H], routing weights [n], middle [n, I], dh/dz."""
        square = a.double().square()
        self.count[expert] += len(x)
        self.gate_sum[expert] += a.double().sum()
        self.gate_square[expert] += square.sum()
        self.input_square[expert] += square @ x.double().square()
        self.middle_square[expert] += square @ h.double().square()
        for name, part in self.first_projections(slope).items():
            self.slopes[name][expert] += square @ part.double().square()
        if self.full:
            weighted = x.float() * a.float()[:, None]
            self.input_full = self._added(self.input_full, expert, second_moments(weighted))
            weighted = h.float() * a.float()[:, None]
            self.middle_full = self._added(self.middle_full, expert, second_moments(weighted))

    def _added(self, total: Tensor | None, expert: int, part: Tensor) -> Tensor:
        """Return sums [E, rows, cols] with one expert's part [rows, cols] added."""
        if total is None:
            total = torch.zeros(self.layer.experts, *part.shape, device=part.device)
        return added(total, expert, part)

    def keep(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Keep the inputs [T, H] and the routing [T, k] of one call, as long as there is room."""
        rows = self._rows_of_tokens(index)[: self.room]
        self.room -= len(rows)
        copied = hidden[rows].float(), index[rows].long(), weights[rows].float()
        self.kept.append(tuple(part.detach().cpu() for part in copied))

    def _rows_of_tokens(self, index: Tensor) -> Tensor:
        """Return the one row of each token that goes to an expert, in the order of tokens."""
        if self.copies == 1:
            return torch.arange(len(index), device=index.device)
        tokens = len(index) // self.copies
        rows = index[:, 0].ge(0).nonzero()[:, 0]
        if len(rows) > tokens:
            raise ModelError(
                f"layer {self.layer.layer}: each expert scales its own input, and a token has "
                f"{len(rows) / tokens:g} of them, but a trace keeps one; use an estimator without "
                "traces, such as moments"
            )
        return rows[(rows % tokens).argsort()]

    def catch_output(self, output: Tensor, index: Tensor) -> None:
        """Keep the gradient at the output [T, H] of one call, for the tokens in the trace."""
        place = self.asked
        rows = self._rows_of_tokens(index)[: self.trace_tokens - place]
        self.asked += len(rows)

        def caught(gradient: Tensor) -> None:
            self.gradients[place] = gradient[rows].detach().float().cpu()

        if len(rows):
            output.register_hook(caught)

    def trace(self) -> LayerTrace | None:
        """Return the trace; None if none was asked for."""
        kept = [parts for parts in self.kept if len(parts[0])]
        if not kept:
            return None
        hidden, index, weights = (_joined([parts[i] for parts in kept]) for i in range(3))
        gradients = [self.gradients[place] for place in sorted(self.gradients)]
        gradient = _joined(gradients) if self.graded and gradients else None
        return LayerTrace(hidden=hidden, index=index, weights=weights, gradient=gradient)

    def finished(self) -> dict[str, Tensor]:
        """Return everything except gradients, by name, for `restore`."""
        self.move(CPU)
        tensors = {name: getattr(self, name) for name in _SUMS if getattr(self, name) is not None}
        tensors |= {f"slopes.{name}": slope for name, slope in self.slopes.items()}
        trace = self.trace()
        if trace is not None:
            kept = {"hidden": trace.hidden, "index": trace.index, "weights": trace.weights}
            tensors |= {f"trace.{name}": tensor for name, tensor in kept.items()}
        return tensors | {"seen": torch.tensor([self.calls, self.tokens])}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the present sums by those that `finished` returned."""
        for name in _SUMS:
            if name in tensors:
                setattr(self, name, tensors[name])
        self.kept.clear()
        if "trace.hidden" in tensors:
            self.kept.append(tuple(tensors[f"trace.{x}"] for x in ("hidden", "index", "weights")))
        self.slopes = {name: tensors[f"slopes.{name}"] for name in self.slopes}
        self.calls, self.tokens = tensors["seen"].tolist()

    def caught(self) -> dict[str, Tensor]:
        """Return the gradients, by name, for `restore_caught`."""
        self.move(CPU)
        tensors = {f"curvature.{name}": squares for name, squares in self.curvature.items()}
        if self.gradients:
            places = sorted(self.gradients)
            tensors["gradient"] = _joined([self.gradients[place] for place in places])
        return tensors

    def restore_caught(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the present gradients by those that `caught` returned."""
        start = "curvature."
        self.curvature = {n.removeprefix(start): x for n, x in tensors.items() if start in n}
        self.gradients = {0: tensors["gradient"]} if "gradient" in tensors else {}

    def catch(self, expert: int, name: str, z: Tensor, x: Tensor) -> None:
        """Add squared gradients of a projection, once backward reaches its output z [n, out]."""
        inputs = x.detach().float()

        def caught(gradient: Tensor) -> None:
            split = self.first_projections(gradient) if name == "first" else {name: gradient}
            for part, g in split.items():
                squares = squares_product(g.float(), inputs)
                self.curvature[part] = self._added(self.curvature.get(part), expert, squares)

        z.register_hook(caught)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts; a single part is not copied, since it may be in a file."""
    return torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]


def _recorded(experts: Experts, sums: LayerSums, *args: Tensor) -> Tensor:
    """Compute the output of the experts' forward one expert at a time, recording into `sums`."""
    hidden, index, weights = experts.routed(*args)
    sums.move(hidden.device)
    if sums.summing and sums.tracing:
        sums.keep(hidden, index, weights)
    output = torch.zeros_like(hidden)
    for expert in range(sums.layer.experts):
        token, place = torch.where(index == expert)
        if len(token) == 0:
            continue
        added = _added(experts, sums, expert, hidden[token], weights[token, place])
        output.index_add_(0, token, added.to(output.dtype))
    if experts.identity:
        share = (weights * (index >= sums.layer.experts)).sum(1, keepdim=True)
        output = output + hidden * share.to(hidden.dtype)
    if sums.summing:
        sums.calls += 1
        sums.tokens += len(hidden) // experts.copies
        sums.output_square += experts.summed(output.detach()).double().square().sum()
    if sums.graded and output.requires_grad:
        sums.catch_output(output, index)
    return output.view(args[0].shape)


def _added(experts: Experts, sums: LayerSums, expert: int, x: Tensor, a: Tensor) -> Tensor:
    """Return one expert's contribution to its tokens [n, H], from its input and routing weights."""
    first, last = experts.weights(expert)
    first_bias, last_bias = experts.biases(expert)
    z = nn.functional.linear(x, first, first_bias)
    h = experts.activate(z)
    down = experts.finish(nn.functional.linear(h, last, last_bias))
    if sums.curved and z.requires_grad:
        sums.catch(expert, "first", z, x)
        sums.catch(expert, "down", down, h)
    added = down * a[:, None]
    if sums.summing:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(experts.activate(leaf).sum(), leaf)
        sums.add(expert, x.detach(), a.detach(), h.detach(), slope)
        highest = added.detach().double().abs().max()
        sums.output_max[expert] = torch.maximum(sums.output_max[expert], highest)
    return added


@contextlib.contextmanager
def catching(sums: Mapping[int, LayerSums]) -> Iterator[None]:
    """Let calls catch gradients and add to no sums while the block runs."""
    for layer in sums.values():
        layer.summing = False
    try:
        yield
    finally:
        for layer in sums.values():
            layer.summing = True


@contextlib.contextmanager
def recording(
    model: Any,
    layout: Layout,
    *,
    full: bool = False,
    curvature: bool = False,
    trace_tokens: int = 0,
    gradients: bool = False,
) -> Iterator[dict[int, LayerSums]]:
    """Record every routed expert of `model` while the block runs; then restore the model.

    Args:
        model: a live transformers model.
        layout: its units and MoE layers.
        full: keep whole second-moment matrices, not only their diagonals.
        curvature: keep squared gradients; the block must then call backward.
        trace_tokens: number of first tokens whose expert inputs and routing are kept.
        gradients: keep the gradients at the experts' output for those tokens; also needs backward.

    Raises:
        ModelError: an MoE layer has an experts class that cannot be recorded.
    """
    sums, forwards = {}, []
    for layer in layout.layers:
        experts = experts_at(model, layer)
        sums[layer.layer] = LayerSums(
            layer,
            full=full,
            curvature=curvature,
            trace_tokens=trace_tokens,
            gradients=gradients and trace_tokens > 0,
            copies=experts.copies,
        )
        forwards.append((experts.module, partial(_recorded, experts, sums[layer.layer])))
    with contextlib.ExitStack() as stack:
        for module, forward in forwards:
            stack.enter_context(_calling(module, forward))
        yield sums


@contextlib.contextmanager
def _calling(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the forward of `module` while the block runs."""
    before = vars(module).get("forward")  # an instance attribute if accelerate has set one
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def check_seen(sums: dict[int, LayerSums]) -> None:
    """Raise ModelError for a layer whose experts were never called."""
    for number, layer in sums.items():
        if layer.calls == 0 or int(layer.count.sum()) == 0:
            raise ModelError(
                f"layer {number} ({layer.layer.module}): calibration saw no call of its experts, "
                "so nothing was written; use `estimator=DataFree()`"
            )
