"""What is said of how far a student is from its teacher."""

from pydantic import BaseModel, ConfigDict


class Profile(BaseModel):
    """Means in nats a token, of the tokens of each action of a chunk or of each action dimension; None where no token is valid.

    forward_kl: empty in what was measured before it was.
    """

    model_config = ConfigDict(frozen=True)
    reverse_kl: tuple[float | None, ...]
    forward_kl: tuple[float | None, ...] = ()
    student_entropy: tuple[float | None, ...]
    teacher_entropy: tuple[float | None, ...]


class Means(BaseModel):
    """Student and teacher on the same states, both at the objective's temperatures: means over valid tokens.

    reverse_kl, forward_kl: KL(p_S || p_T) and KL(p_T || p_S), in nats a token; student_entropy, teacher_entropy: in nats a token.
    teacher_rank: sum_v p_S(v) rank_T(v), where the teacher's most likely bin has rank 0: how far down the teacher's list the student's tokens are.
    top_overlap:  the share of the student's 5 most likely bins that are among the teacher's.
    """

    model_config = ConfigDict(frozen=True)
    reverse_kl: float
    forward_kl: float
    student_entropy: float
    teacher_entropy: float
    teacher_rank: float
    top_overlap: float


class Distance(Means):
    """The same, and where it lies. by_position: by action of the chunk, the first to be executed first. by_dimension: by action dimension."""

    by_position: Profile
    by_dimension: Profile

    @property
    def numbers(self) -> dict[str, float]:
        """All of it, flat: `reverse_kl`, `by_position/reverse_kl/0`; without what no valid token says."""
        along = {
            f"{where}/{name}/{place}": value
            for where in ("by_position", "by_dimension")
            for name, values in getattr(self, where)
            for place, value in enumerate(values)
        }
        own = {name: getattr(self, name) for name in Means.model_fields}
        return {name: value for name, value in (own | along).items() if value is not None}
