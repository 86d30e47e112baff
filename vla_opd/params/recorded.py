"""The spelling of earlier versions: read in manifests, refused in params.yaml."""

import json
from collections.abc import Mapping
from typing import Any

from vla_opd.params.run import Params

FLAT_OPTIONS = {
    "jsd": ("beta",),
    "reverse_kl_sampled": ("clamp", "centre"),
    "reverse_kl_rollout": ("clamp", "centre", "ratio", "reward", "discount"),
    "mixed": ("distill", "keep_low", "keep_high", "clip_low", "clip_high"),
}
"""Options that were keys of `optimize`, by the objective that has them: now in `objective`."""


def read_recorded(settings: Mapping[str, Any]) -> Params:
    """Read a run's settings from a manifest, also those that an earlier version recorded."""
    optimize = settings["optimize"]
    if isinstance(optimize["objective"], str):
        settings = {**settings, "optimize": _nest_options(optimize)}
    return Params.model_validate(settings)


def _nest_options(optimize: Mapping[str, Any]) -> dict[str, Any]:
    name = optimize["objective"]
    moved = {option for options in FLAT_OPTIONS.values() for option in options}
    nested = {key: value for key, value in optimize.items() if key not in moved}
    objective = {"name": name}
    for option in FLAT_OPTIONS.get(name, ()):
        objective[option] = optimize[option]
    nested["objective"] = objective
    return nested


def show_new_spelling(field: str, value: Any) -> str | None:
    """Return how to write an option that has moved; None for any other field."""
    section, _, option = field.partition(".")
    names = [name for name, options in FLAT_OPTIONS.items() if option in options]
    if section != "optimize" or not names:
        return None
    shown = json.dumps(value, default=str)
    return f"objective: {{name: {' or '.join(names)}, {option}: {shown}}}"
