"""Check that a study in a storage is Bitknap's: anybody may write there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitknap.disk.json_shapes import fits

if TYPE_CHECKING:
    import optuna

# Attributes of a study that hold its inputs, and what is measured.
ABOUT, MEASURED = "about", "measured"

_FILE = {"name": str, "path": str, "sha256": str}
_KNOBS = {
    "exponents?": [str],
    **dict.fromkeys(("risk?", "formats?", "floor?", "cap?"), bool),
    "tilts?": [str],
    "width?": float,
    "budget?": ([float, float], None),
}
_STUDY: dict[str, Any] = {
    ABOUT: {
        "table": _FILE,
        "features": [_FILE],
        "budget": (str, None),
        **dict.fromkeys(("profile", "sampler", "model"), str),
        "knobs": _KNOBS,
        "seed": int,
    },
    f"{MEASURED}?": {"tokens?": int, "what?": str, "text?": str, "model?": str},
}
_TRIAL = {"predicted": float, "bytes": int, "bpw": float, "plan": str}
_TEXTS = {"reason?": str, "worker?": str}


def is_ours(study: optuna.Study) -> bool:
    """Return whether a study and all its trials hold exactly what `study.run` writes.

    Incomplete trials may lack values that were not known yet.
    """
    if not fits(dict(study.user_attrs), _STUDY):
        return False
    values = 1 if study.user_attrs[ABOUT]["knobs"].get("budget") is None else 2
    if len(study.directions) != values:
        return False
    partly = {f"{key}?": shape for key, shape in _TRIAL.items()}
    trials = study.get_trials(deepcopy=False)
    if {trial.number for trial in trials} != set(range(len(trials))):
        return False
    for trial in trials:
        complete = trial.state.name == "COMPLETE"
        shape = {**(_TRIAL if complete else partly), **_TEXTS}
        sound = all(isinstance(name, str) for name in trial.params)
        sound = sound and fits(list(trial.params.values()), [(float, bool)])
        if not sound or not fits(dict(trial.user_attrs), shape):
            return False
        losses = list(trial.values or ()) if complete else [0.0] * values
        if len(losses) != values or not fits(losses, [float]):
            return False
    return True
