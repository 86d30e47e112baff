"""A teacher's distribution over its own bins, as one over the student's bins.

Needed where their action statistics differ. A bin is an interval of actions in the environment's
units. Bin v of the teacher gives its probability to the student's bins u in proportion to the part
of it that lies in each:

    M[v, u] = |I_T(v) & I_S(u)| / |I_T(v)|,    q(u) = (1 - eps) sum_v p_T(v) M[v, u] + eps / V

with one matrix per action dimension, whose rows sum to 1. Actions beyond the student's statistics
are in its outermost bins, as for `ActionSpace.encode`; the last bin of both holds a single action,
the largest. eps = `FLOOR` keeps log q finite in bins that no bin of the teacher reaches, where a
reverse KL would be infinite.
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
    """From the teacher's V bins to the student's U: one matrix per action dimension."""

    overlaps: Float64[np.ndarray, "A V U"]

    def __call__(self, log_probs: Float[np.ndarray, "N K V"]) -> Float32[np.ndarray, "N K U"]:
        """Return log q for log p_T. Token k is of dimension k modulo A."""
        dims, bins, width = self.overlaps.shape
        rows, tokens, _ = log_probs.shape
        probs = np.exp(log_probs.astype(np.float64))
        probs = probs.reshape(rows, -1, dims, bins)
        moved = np.einsum("nsav,avu->nsau", probs, self.overlaps, optimize=True)
        moved = (1 - FLOOR) * moved / moved.sum(-1, keepdims=True)
        log_q = np.log(moved + FLOOR / width)
        return log_q.reshape(rows, tokens, width).astype(np.float32)


def between(teacher: ActionSpace, student: ActionSpace, where: str = "transfer") -> Transfer | None:
    """Return the transfer from the teacher's bins to the student's; None if they are the same.

    ValueError for other chunks or action dimensions, or bins without width in float64.
    """
    if teacher == student:
        return None
    for field in ("chunk", "action_dim"):
        value = getattr(teacher, field)
        expected = getattr(student, field)
        if value != expected:
            raise ValueError(
                f"{where}: action_space.{field} is {value} for the teacher; "
                f"expected the student's {expected}, for only bins can move"
            )
    pairs = zip(edges(teacher), edges(student), strict=True)
    overlaps = np.stack([overlap(*pair) for pair in pairs])
    # `encode` puts all actions of a constant dimension into the middle bin.
    middle = (student.bins - 1) // 2
    overlaps[student.constant] = np.eye(student.bins)[middle]
    if not np.isfinite(overlaps).all():
        raise ValueError(
            f"{where}: the teacher's bins have no width in float64 (action_space.q01, q99); "
            "expected statistics that tell them apart"
        )
    return Transfer(overlaps)


def require_comparable(student: CheckpointFacts, labels: Manifest, where: str) -> None:
    """ValueError for labels whose tokens do not mean the student's actions.

    With `label.transfer` their bins may differ, if they can be transferred to the student's.
    """
    teacher = ActionSpace.model_validate(labels.facts["action_space"])
    transfer = labels.params.get("label", {}).get("transfer", False)
    require_actions(student, teacher, where, transfer=transfer)


def require_actions(
    student: CheckpointFacts, teacher: ActionSpace, where: str, *, transfer: bool
) -> None:
    """ValueError unless the teacher's tokens mean the student's actions.

    With `transfer` their bins may differ, if they can be transferred to the student's.
    """
    if transfer:
        between(teacher, student.action_space, where)
    else:
        require_same_actions(student, teacher, where)


def edges(space: ActionSpace) -> Float64[np.ndarray, "A V"]:
    """Return where bins begin, in the environment's units.

    The last bin begins at the largest action, the only one that it holds.
    """
    low = np.array(space.q01)[:, None]
    high = np.array(space.q99)[:, None]
    normalised = np.array(space.normalised)[:, None]
    x = space.edges[None, :]
    scaled = 0.5 * (x + 1) * (high - low + RANGE_FLOOR) + low
    return np.where(normalised, scaled, x)


def overlap(
    teacher: Float64[np.ndarray, " V"], student: Float64[np.ndarray, " U"]
) -> Float64[np.ndarray, "V U"]:
    """Return the matrix of one action dimension, from the edges of both."""
    bounds = np.concatenate([[-np.inf], student[1:], [np.inf]])
    begin = np.maximum(teacher[:-1, None], bounds[:-1])
    end = np.minimum(teacher[1:, None], bounds[1:])
    lengths = (end - begin).clip(min=0)
    rows = lengths / np.diff(teacher)[:, None]
    rows /= rows.sum(1, keepdims=True)
    largest = np.digitize(teacher[-1], student) - 1
    last = np.zeros(len(student))
    last[np.clip(largest, 0, len(student) - 1)] = 1
    return np.vstack([rows, last])
