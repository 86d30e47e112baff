"""How far a student is from its teacher, and in what: means over valid tokens, of all of them, by chunk position and by action dimension."""

from jaxtyping import Bool, Float
from torch import Tensor

from vla_opd.data.divergence import Distance, Profile
from vla_opd.learning.objectives import TokenBatch, entropy, forward_kl, masked_mean, reverse_kl

TOP = 5


def distance(batch: TokenBatch, mask: Bool[Tensor, "N K"], chunk: int) -> Distance:
    """Measure a batch of chunks of `chunk` actions, whose K tokens are in order of action, then dimension."""
    each = {
        "reverse_kl": reverse_kl(batch),
        "forward_kl": forward_kl(batch),
        "student_entropy": entropy(batch.student),
        "teacher_entropy": entropy(batch.teacher),
    }
    rest = {"teacher_rank": _rank(batch), "top_overlap": _overlap(batch)}
    return Distance(
        **{name: masked_mean(values, mask).item() for name, values in (each | rest).items()},
        by_position=Profile(
            **{name: _along(values, mask, chunk, 1) for name, values in each.items()}
        ),
        by_dimension=Profile(
            **{name: _along(values, mask, chunk, 2) for name, values in each.items()}
        ),
    )


def _along(
    values: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], chunk: int, axis: int
) -> tuple[float | None, ...]:
    """The mean for each action of the chunk (axis 1) or each action dimension (axis 2)."""
    parts = zip(
        *(tensor.unflatten(1, (chunk, -1)).unbind(axis) for tensor in (values, mask)), strict=True
    )
    return tuple(masked_mean(part, valid).item() if valid.any() else None for part, valid in parts)


def _rank(batch: TokenBatch) -> Float[Tensor, "N K"]:
    ranks = batch.teacher.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (batch.student.exp() * ranks).sum(-1)


def _overlap(batch: TokenBatch) -> Float[Tensor, "N K"]:
    size = min(TOP, batch.student.shape[-1])
    ours, theirs = (
        log_probs.topk(size, -1).indices for log_probs in (batch.student, batch.teacher)
    )
    return (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).float().mean(-1)
