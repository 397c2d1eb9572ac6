"""What a study is made with: its limit, its ties, its sampler, and what its trials turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bitknap.allocation.problem.budget import Budget
from bitknap.allocation.problem.profiles import PROFILES, Profile, profile
from bitknap.allocation.search.optuna_trials import SAMPLERS, make_sampler
from bitknap.allocation.search.search_space import Knobs
from bitknap.errors import InputError
from bitknap.names import check_name

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

_TRADES = "nsga2"


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler of Optuna.

    Attributes:
        kind: "tpe", "cmaes", or "nsga2", which trades bytes against loss.
        seed: Random seed of its draws.
    """

    kind: str = "tpe"
    seed: int = 0

    def __post_init__(self) -> None:
        check_name("sampler", self.kind, SAMPLERS)

    def make(self) -> BaseSampler:
        """Return Optuna's own sampler, whose draws in trial n depend on the seed and n alone."""
        return make_sampler(self.kind, self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """How a study searches.

    Attributes:
        budget: What every plan must keep; None with a range of budgets in the knobs.
        profile: Which units share a format.
        sampler: What draws the trials.
        knobs: What may be turned; tilts by layer and projection when not given.
    """

    budget: Budget | None = None
    profile: Profile = field(default_factory=lambda: PROFILES["gate_eq_up"])
    sampler: Sampler = Sampler()
    knobs: Knobs = field(default_factory=lambda: Knobs(tilts=("layer", "proj")))

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.knobs.budget is None):
            raise InputError("give either a budget or a range of budgets")
        if (self.sampler.kind == _TRADES) != (self.knobs.budget is not None):
            raise InputError(
                "nsga2 trades bytes against loss: it needs a range of budgets, and only it takes "
                "one"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, as a study keeps them in its storage."""
        return {
            "budget": None if self.budget is None else str(self.budget),
            "profile": self.profile.name,
            "knobs": self.knobs.to_dict(),
            "sampler": self.sampler.kind,
            "seed": self.sampler.seed,
        }

    @classmethod
    def from_dict(cls, about: Mapping[str, Any]) -> Design:
        """Build from what a study keeps in its storage.

        Raises:
            InputError: A name is unknown.
        """
        budget = about["budget"]
        return cls(
            budget=None if budget is None else Budget.parse(budget),
            profile=profile(about["profile"]),
            sampler=Sampler(about["sampler"], about["seed"]),
            knobs=Knobs.from_dict(about["knobs"]),
        )
