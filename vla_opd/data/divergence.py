"""Measured divergence between a student and its teacher."""

from pydantic import BaseModel, ConfigDict


class DivergenceProfile(BaseModel):
    """Means in nats per token, for each action of a chunk or for each action dimension.

    None where no token is valid. forward_kl: empty in measurements by earlier versions.
    """

    model_config = ConfigDict(frozen=True)
    reverse_kl: tuple[float | None, ...]
    forward_kl: tuple[float | None, ...] = ()
    student_entropy: tuple[float | None, ...]
    teacher_entropy: tuple[float | None, ...]


class DivergenceMeans(BaseModel):
    """Means over valid tokens of student and teacher on the same states, both at the objective's
    temperatures.

    reverse_kl, forward_kl: KL(p_S || p_T) and KL(p_T || p_S), in nats per token.
    student_entropy, teacher_entropy: in nats per token.
    teacher_rank: sum_v p_S(v) rank_T(v), where the teacher's most likely bin has rank 0: how far
                  down the teacher's list the student's tokens are.
    top_overlap:  fraction of the student's 5 most likely bins that are among the teacher's.
    """

    model_config = ConfigDict(frozen=True)
    reverse_kl: float
    forward_kl: float
    student_entropy: float
    teacher_entropy: float
    teacher_rank: float
    top_overlap: float


class Divergence(DivergenceMeans):
    """The means, and where in a chunk the divergence lies.

    by_position:  by action of the chunk, in the order of execution.
    by_dimension: by action dimension.
    """

    by_position: DivergenceProfile
    by_dimension: DivergenceProfile

    @property
    def numbers(self) -> dict[str, float]:
        """All numbers, flat: `reverse_kl`, `by_position/reverse_kl/0`; None is left out."""
        nested = self.model_dump()
        numbers: dict[str, float] = {}
        for name in DivergenceMeans.model_fields:
            numbers[name] = nested[name]
        for axis in ("by_position", "by_dimension"):
            profile = nested[axis]
            for name, values in profile.items():
                _add_numbers(numbers, f"{axis}/{name}", values)
        return numbers


def _add_numbers(numbers: dict[str, float], prefix: str, values: tuple[float | None, ...]) -> None:
    for position, value in enumerate(values):
        if value is not None:
            numbers[f"{prefix}/{position}"] = value
