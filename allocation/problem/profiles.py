"""Profiles: rules for which units a runtime forces to share one format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from bitknap.allocation.problem.arrays import Ints, numbered
from bitknap.allocation.problem.units import ROLES, Units
from bitknap.names import check_name

# The two halves of a fused gate-up matrix, as canonical and checkpoint names.
_GATE_UP = frozenset({"gate", "up", "gate_proj", "up_proj", "w1", "w3", "wi_0", "wi_1"})
# The three parts of a fused attention input.
_QKV = frozenset({"q", "k", "v", "q_proj", "k_proj", "v_proj"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """An equality rule over units.

    Attributes:
        name: the key in `PROFILES`.
        about: one-sentence description for lists.
        layer_wide: whether all routed experts of a layer share a format; otherwise each has its
            own.
        joins: projections of an expert that share a format: "none", "gate_up", or "all".
        joins_qkv: whether q, k and v of one attention block share a format, since the runtime fuses
            them.
    """

    name: str
    about: str = ""
    layer_wide: bool
    joins: Literal["none", "gate_up", "all"]
    joins_qkv: bool = False

    def labels(self, units: Units) -> Ints:
        """Return a group number for each unit, int32[U]; equal numbers must share a format.

        Only experts are tied across projections, and only routed experts across a layer. Shared
        experts follow `joins` in the per-expert profiles. Gate is tied to up in shared experts
        under layer-wide profiles, and in dense MLPs under every profile, since runtimes fuse the
        two. `joins_qkv` ties q, k and v of a layer; the rest of attention, embedding and head stay
        free, and `free` ties nothing at all. Row blocks of a matrix keep separate formats only
        where its projections are not all joined, its experts are not tied, and q, k and v are not
        tied.
        """
        if self.name == "free":
            return np.arange(len(units), dtype=np.int32)
        routed = units.role == ROLES.index("routed")
        expert = routed | ((units.role == ROLES.index("shared")) & (not self.layer_wide))
        mlp = expert | np.isin(units.role, [ROLES.index("shared"), ROLES.index("dense")])
        gate_up = np.array([name in _GATE_UP for name in units.projections])[units.projection]
        qkv = np.array([name in _QKV for name in units.projections])[units.projection]
        qkv &= self.joins_qkv & (units.role == ROLES.index("attention"))
        # -1 stands for gate-and-up, -2 for all projections, -3 for q, k and v.
        projection = units.projection.astype(np.int32)
        projection[mlp & gate_up & ~(expert & (self.joins == "none"))] = -1
        projection[expert & (self.joins == "all")] = -2
        projection[qkv] = -3
        wide = routed & self.layer_wide
        number = np.where(wide, -2, units.expert)
        block = np.where(wide | qkv | (expert & (self.joins == "all")), 0, units.block)
        return numbered(units.layer, units.role, number, projection, block)


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Profile(
                name="free",
                about="Every matrix may have its own format.",
                layer_wide=False,
                joins="none",
            ),
            Profile(
                name="gate_eq_up",
                about="Gate and up of an expert share a format: Bitknap's own kernels, GPTQModel.",
                layer_wide=False,
                joins="gate_up",
            ),
            Profile(
                name="expert",
                about="All matrices of an expert share a format.",
                layer_wide=False,
                joins="all",
            ),
            Profile(
                name="layer_proj",
                about="One format for all experts' gates of a layer, one for their ups, one for "
                "their downs: llama.cpp, MLX.",
                layer_wide=True,
                joins="none",
            ),
            Profile(
                name="layer_gateup_down",
                about="As layer_proj, with gate equal to up: torchao, GGUF in transformers, EXL3.",
                layer_wide=True,
                joins="gate_up",
            ),
            # Shards of vLLM's fused q, k, v must agree.
            Profile(
                name="layer",
                about="One format for all experts of a layer; q, k and v share one: vLLM, "
                "ModelOpt, AutoRound, TensorRT-LLM.",
                layer_wide=True,
                joins="all",
                joins_qkv=True,
            ),
        )
    }
)


def implies(rule: Profile, other: Profile, units: Units) -> bool:
    """Return whether units that must share a format under `other` must under `rule` as well."""
    ours, theirs = rule.labels(units), other.labels(units)
    first = np.unique(theirs, return_index=True)[1][theirs]
    return bool((ours == ours[first]).all())


def profile(name: str) -> Profile:
    """Return the profile with that name.

    Raises:
        InputError: the name is unknown.
    """
    check_name("profile", name, PROFILES)
    return PROFILES[name]
