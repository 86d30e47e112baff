"""How far a student is from its teacher, and in what: means over valid tokens, of all of them, by chunk position and by action dimension."""

from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vla_opd.objectives import TokenBatch, entropy, forward_kl, masked_mean, reverse_kl

TOP = 5


class Profile(BaseModel):
    """Means in nats a token, of the tokens of each action of a chunk or of each action dimension; None where no token is valid."""

    model_config = ConfigDict(frozen=True)
    reverse_kl: tuple[float | None, ...]
    student_entropy: tuple[float | None, ...]
    teacher_entropy: tuple[float | None, ...]


class Distance(BaseModel):
    """Student and teacher on the same states, both at the objective's temperatures.

    reverse_kl, forward_kl: KL(p_S || p_T) and KL(p_T || p_S), in nats a token; student_entropy, teacher_entropy: in nats a token.
    teacher_rank: sum_v p_S(v) rank_T(v), where the teacher's most likely bin has rank 0: how far down the teacher's list the student's tokens are.
    top_overlap:  the share of the student's 5 most likely bins that are among the teacher's.
    by_position:  by action of the chunk, the first to be executed first. by_dimension: by action dimension.
    """

    model_config = ConfigDict(frozen=True)
    reverse_kl: float
    forward_kl: float
    student_entropy: float
    teacher_entropy: float
    teacher_rank: float
    top_overlap: float
    by_position: Profile
    by_dimension: Profile


def distance(batch: TokenBatch, mask: Bool[Tensor, "N K"], chunk: int) -> Distance:
    """Measure a batch of chunks of `chunk` actions, whose K tokens are in order of action, then dimension."""
    each = {
        "reverse_kl": reverse_kl(batch),
        "student_entropy": entropy(batch.student),
        "teacher_entropy": entropy(batch.teacher),
    }
    rest = {"forward_kl": forward_kl(batch), "teacher_rank": _rank(batch), "top_overlap": _overlap(batch)}
    return Distance(
        **{name: masked_mean(values, mask).item() for name, values in (each | rest).items()},
        by_position=Profile(**{name: _along(values, mask, chunk, 1) for name, values in each.items()}),
        by_dimension=Profile(**{name: _along(values, mask, chunk, 2) for name, values in each.items()}),
    )


def _along(values: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], chunk: int, axis: int) -> tuple[float | None, ...]:
    """The mean for each action of the chunk (axis 1) or each action dimension (axis 2)."""
    parts = zip(*(tensor.unflatten(1, (chunk, -1)).unbind(axis) for tensor in (values, mask)), strict=True)
    return tuple(masked_mean(part, valid).item() if valid.any() else None for part, valid in parts)


def _rank(batch: TokenBatch) -> Float[Tensor, "N K"]:
    ranks = batch.teacher.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (batch.student.exp() * ranks).sum(-1)


def _overlap(batch: TokenBatch) -> Float[Tensor, "N K"]:
    size = min(TOP, batch.student.shape[-1])
    ours, theirs = (log_probs.topk(size, -1).indices for log_probs in (batch.student, batch.teacher))
    return (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).float().mean(-1)
