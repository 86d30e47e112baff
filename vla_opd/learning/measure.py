"""The divergence of student and teacher: means over valid tokens, overall and along a chunk."""

from jaxtyping import Bool, Float
from torch import Tensor

from vla_opd.data.divergence import Divergence, DivergenceProfile
from vla_opd.learning.objectives import TokenBatch, entropy, forward_kl, masked_mean, reverse_kl

TOP = 5  # bins


def measure_divergence(batch: TokenBatch, mask: Bool[Tensor, "N K"], chunk: int) -> Divergence:
    """Measure N chunks of `chunk` actions, whose K tokens are ordered by action, then dimension."""
    profiled = {
        "reverse_kl": reverse_kl(batch),
        "forward_kl": forward_kl(batch),
        "student_entropy": entropy(batch.student),
        "teacher_entropy": entropy(batch.teacher),
    }
    values = {**profiled, "teacher_rank": _rank(batch), "top_overlap": _overlap(batch)}
    means = {name: masked_mean(value, mask).item() for name, value in values.items()}
    by_position = {name: _profile(value, mask, chunk, axis=1) for name, value in profiled.items()}
    by_dimension = {name: _profile(value, mask, chunk, axis=2) for name, value in profiled.items()}
    return Divergence(
        **means,
        by_position=DivergenceProfile(**by_position),
        by_dimension=DivergenceProfile(**by_dimension),
    )


def _profile(
    values: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], chunk: int, axis: int
) -> tuple[float | None, ...]:
    """Return the mean per action of the chunk (axis 1) or per action dimension (axis 2).

    None where no token is valid.
    """
    parts = values.unflatten(1, (chunk, -1)).unbind(axis)
    masks = mask.unflatten(1, (chunk, -1)).unbind(axis)
    profile: list[float | None] = []
    for part, valid in zip(parts, masks, strict=True):
        profile.append(masked_mean(part, valid).item() if valid.any() else None)
    return tuple(profile)


def _rank(batch: TokenBatch) -> Float[Tensor, "N K"]:
    order = batch.teacher.argsort(dim=-1, descending=True, stable=True)
    return (batch.student.exp() * order.argsort(-1)).sum(-1)


def _overlap(batch: TokenBatch) -> Float[Tensor, "N K"]:
    size = min(TOP, batch.student.shape[-1])
    student = batch.student.topk(size, -1).indices
    teacher = batch.teacher.topk(size, -1).indices
    return (student.unsqueeze(-1) == teacher.unsqueeze(-2)).any(-1).float().mean(-1)
