"""The divergence of student and teacher: means over valid tokens, overall and along a chunk."""

from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from vla_opd.data.divergence import Divergence, DivergenceProfile
from vla_opd.learning.objectives import (
    TokenBatch,
    entropy,
    forward_kl,
    masked_mean,
    masked_means,
    reverse_kl,
)

TOP = 5  # bins
Profile = tuple[float | None, ...]


def measure_divergence(batch: TokenBatch, mask: Bool[Tensor, "N K"], chunk: int) -> Divergence:
    """Measure N chunks of `chunk` actions, whose K tokens are ordered by action, then dimension."""
    profiled = {
        "reverse_kl": reverse_kl(batch),
        "forward_kl": forward_kl(batch),
        "student_entropy": entropy(batch.student),
        "teacher_entropy": entropy(batch.teacher),
    }
    values = {
        **profiled,
        "teacher_rank": _rank(batch),
        "top_overlap": _overlap(batch),
    }
    by_position: dict[str, Profile] = {}
    by_dimension: dict[str, Profile] = {}
    for name, value in profiled.items():
        by_position[name] = _profile(value, mask, chunk, axis=1)
        by_dimension[name] = _profile(value, mask, chunk, axis=2)
    return Divergence(
        **masked_means(values, mask),
        by_position=DivergenceProfile(**by_position),
        by_dimension=DivergenceProfile(**by_dimension),
    )


def _profile(
    values: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], chunk: int, axis: int
) -> Profile:
    """Return the mean per action of the chunk (axis 1) or per action dimension (axis 2).

    None where no token is valid.
    """
    parts = _split_actions(values, chunk).unbind(axis)
    masks = _split_actions(mask, chunk).unbind(axis)
    profile: list[float | None] = []
    for part, valid in zip(parts, masks, strict=True):
        mean = None
        if valid.any():
            mean = masked_mean(part, valid).item()
        profile.append(mean)
    return tuple(profile)


def _split_actions(values: Shaped[Tensor, "N K"], chunk: int) -> Shaped[Tensor, "N H D"]:
    return values.unflatten(1, (chunk, -1))


def _rank(batch: TokenBatch) -> Float[Tensor, "N K"]:
    order = batch.teacher.argsort(dim=-1, descending=True, stable=True)
    ranks = order.argsort(-1)
    terms = batch.student.exp() * ranks
    return terms.sum(-1)


def _overlap(batch: TokenBatch) -> Float[Tensor, "N K"]:
    bins = batch.student.shape[-1]
    size = min(TOP, bins)
    student = batch.student.topk(size, -1).indices
    teacher = batch.teacher.topk(size, -1).indices
    student = student.unsqueeze(-1)
    teacher = teacher.unsqueeze(-2)
    is_equal = student == teacher
    is_shared = is_equal.any(-1)
    return is_shared.float().mean(-1)
