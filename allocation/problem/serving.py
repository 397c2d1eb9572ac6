"""What a model needs in memory beside its weights while it generates, as a table records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bitknap.disk.json_shapes import fits
from bitknap.errors import InputError

# Key of a table's provenance.
KEY = "serving"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayers:
    """What some alike layers keep of the tokens that they have seen.

    Attributes:
        kind: "grouped" (keys and values of each head or group of heads), "latent" (of
            multi-head latent attention), "window" (keys and values of the last tokens), or "state"
            (linear attention, convolutions and state spaces).
        layers: number of such layers.
        per_token: numbers that one layer keeps of each token.
        window: most tokens that are kept; None for all.
        state: numbers that one layer keeps of a sequence, whatever its length, in the dtype of
            the activations.
        state32: the same in float32.
    """

    kind: str
    layers: int
    per_token: int = 0
    window: int | None = None
    state: int = 0
    state32: int = 0

    def layer_bytes(self, tokens: int, itemsize: int) -> int:
        """Return the bytes that one layer keeps of a sequence.

        Args:
            tokens: length of the sequence.
            itemsize: bytes of a number of the activations.
        """
        kept = tokens if self.window is None else min(tokens, self.window)
        return itemsize * (self.per_token * kept + self.state) + 4 * self.state32


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What decides how much memory a model takes beside its weights; all numbers are counts.

    Attributes:
        family: the model's type in transformers.
        unknown: why the size of the cache is not known; "" if it is.
        itemsize: bytes of a number of the activations.
        longest: most tokens of a sequence; None if the configuration does not say.
        cache: the layers of the cache.
        hidden: width of the residual stream.
        vocabulary: number of tokens in the vocabulary.
        heads: numbers of a query of all heads.
        expanded: numbers of keys and values of all heads of one token, in one layer: what
            attention may make of the cache while it runs.
        scores: heads whose scores are held for each pair of tokens; 0 if never written out.
        middle: inner width of the widest part that every token goes through: a dense layer or the
            shared experts.
        routed: inner width of an expert × experts of a token.
        topk: experts of a token.
        experts: most experts of a layer.
        expert_weights: numbers of gate and up, or of up alone, of a layer's experts.
        dense_from: tokens × experts of a token from which kernels write out a layer's weights.
        tiles: bytes that a matrix takes in a GPU's memory beyond those on disk, by its shape, such
            as "256x192", and by format; 0 where it is not listed.
    """

    family: str
    unknown: str = ""
    itemsize: int = 2
    longest: int | None = None
    cache: tuple[CacheLayers, ...] = ()
    hidden: int = 0
    vocabulary: int = 0
    heads: int = 0
    expanded: int = 0
    scores: int = 0
    middle: int = 0
    routed: int = 0
    topk: int = 0
    experts: int = 0
    expert_weights: int = 0
    dense_from: int = 0
    tiles: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def cache_bytes(self, context: int, batch: int = 1) -> int:
        """Return the bytes of the cache.

        Args:
            context: tokens of each sequence.
            batch: number of sequences.
        """
        return batch * sum(x.layers * x.layer_bytes(context, self.itemsize) for x in self.cache)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values that `from_dict` reads."""
        return {**asdict(self), "cache": [asdict(one) for one in self.cache]}

    @classmethod
    def from_dict(cls, said: Any) -> Serving:
        """Undo `to_dict`; unknown keys are ignored, missing ones have their defaults.

        Raises:
            InputError: a value is not what `to_dict` writes.
        """
        if not fits(said, _SHAPE):
            raise InputError(f"provenance.{KEY}: is not what Bitknap writes there; estimate again")
        known = {key: value for key, value in said.items() if key in cls.__dataclass_fields__}
        layers = [
            {key: value for key, value in one.items() if key in CacheLayers.__dataclass_fields__}
            for one in said.get("cache", ())
        ]
        return cls(**{**known, "cache": tuple(CacheLayers(**layer) for layer in layers)})


_COUNTS = (
    *("hidden", "vocabulary", "heads", "expanded", "scores", "middle", "routed", "topk"),
    *("experts", "expert_weights", "dense_from", "itemsize"),
)
_LAYER = {f"{key}?": int for key in ("per_token", "state", "state32")}
_SHAPE: dict[str, Any] = {
    "family": str,
    "unknown?": str,
    "longest?": (int, None),
    "tiles?": {},
    "cache?": [{"kind": str, "layers": int, "window?": (int, None), **_LAYER}],
    **{f"{key}?": int for key in _COUNTS},
}
