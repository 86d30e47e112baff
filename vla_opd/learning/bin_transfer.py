"""A teacher's distribution over its own bins, as one over the student's, where their action statistics differ.

A bin is an interval of actions. Bin v of the teacher gives its probability to the student's bins u in proportion to how much of it lies in each:

    M[v, u] = |I_T(v) & I_S(u)| / |I_T(v)|,    q(u) = (1 - eps) sum_v p_T(v) M[v, u] + eps / V

one matrix an action dimension, its rows sum to 1. Intervals are those of the environment's units. What lies beyond the student's statistics is in its
outermost bins, as `ActionSpace.encode` has it; the last bin of either holds one action alone, the largest. eps = `FLOOR` keeps log q finite where
no bin of the teacher reaches: a reverse KL would be infinite there.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64

from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.action_space import RANGE_FLOOR, ActionSpace
from vla_opd.policies.checkpoint import CheckpointFacts, require_same_actions

FLOOR = 1e-6


@dataclass(frozen=True)
class Transfer:
    """From the teacher's bins to the student's: A matrices, one an action dimension."""

    overlaps: Float64[np.ndarray, "A V U"]

    def __call__(self, log_probs: Float[np.ndarray, "N K V"]) -> Float32[np.ndarray, "N K U"]:
        """Log q of log p_T. The dimension of token k is k modulo A."""
        dims, bins, width = self.overlaps.shape
        shares = np.exp(log_probs.astype(np.float64)).reshape(len(log_probs), -1, dims, bins)
        moved = np.einsum("nsav,avu->nsau", shares, self.overlaps, optimize=True)
        floored = (1 - FLOOR) * moved / moved.sum(-1, keepdims=True) + FLOOR / width
        return np.log(floored).reshape(*log_probs.shape[:2], width).astype(np.float32)


def between(teacher: ActionSpace, student: ActionSpace, where: str = "transfer") -> Transfer | None:
    """How to get from the one's bins to the other's; None if they are the same. ValueError where chunks or action dimensions differ."""
    if teacher == student:
        return None
    for field in ("chunk", "action_dim"):
        ours, theirs = getattr(student, field), getattr(teacher, field)
        if ours != theirs:
            raise ValueError(
                f"{where}: action_space.{field} is {theirs} for the teacher; expected the student's {ours}, for only bins can move"
            )
    overlaps = np.stack(
        [overlap(t, s) for t, s in zip(edges(teacher), edges(student), strict=True)]
    )
    overlaps[student.constant] = np.eye(student.bins)[
        (student.bins - 1) // 2
    ]  # all of it in the middle bin, as `encode` has it
    if not np.isfinite(overlaps).all():
        raise ValueError(
            f"{where}: the teacher's bins have no width in float64 (action_space.q01, q99); expected statistics that tell them apart"
        )
    return Transfer(overlaps)


def require_comparable(student: CheckpointFacts, labels: Manifest, where: str) -> None:
    """ValueError unless the labels' tokens mean the student's actions, or are to be transferred to them (`label.transfer`) and can be."""
    teacher = ActionSpace.model_validate(labels.facts["action_space"])
    require_actions(
        student, teacher, where, transfer=labels.params.get("label", {}).get("transfer", False)
    )


def require_actions(
    student: CheckpointFacts, teacher: ActionSpace, where: str, *, transfer: bool
) -> None:
    """ValueError unless the teacher's tokens mean the student's actions or, with `transfer`, can be made to."""
    if transfer:
        between(teacher, student.action_space, where)
    else:
        require_same_actions(student, teacher, where)


def edges(space: ActionSpace) -> Float64[np.ndarray, "A V"]:
    """Where bins begin, in the environment's units, and in the last place the largest action, which the last bin holds alone."""
    low, high, normalised = (
        np.array(one)[:, None] for one in (space.q01, space.q99, space.normalised)
    )
    x = space.edges[None, :]
    return np.where(normalised, 0.5 * (x + 1) * (high - low + RANGE_FLOOR) + low, x)


def overlap(
    teacher: Float64[np.ndarray, " V"], student: Float64[np.ndarray, " U"]
) -> Float64[np.ndarray, "V U"]:
    """The matrix of one action dimension, from the edges of both."""
    low, high = np.concatenate([[-np.inf], student[1:]]), np.concatenate([student[1:], [np.inf]])
    inside = np.minimum(teacher[1:, None], high) - np.maximum(teacher[:-1, None], low)
    rows = inside.clip(min=0) / np.diff(teacher)[:, None]
    last = np.zeros(len(student))
    last[np.clip(np.digitize(teacher[-1], student) - 1, 0, len(student) - 1)] = 1
    return np.vstack([rows / rows.sum(1, keepdims=True), last])
