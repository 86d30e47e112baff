"""How a policy is trained: adapter, optimiser budget and learning-rate schedule."""

from typing import NamedTuple

from pydantic import Field

from vla_opd.params.section import Fraction, Section, is_default


class Lora(NamedTuple):
    """A low-rank adapter: W x becomes W x + (alpha / rank) B A x."""

    rank: int
    alpha: int


class TrainedParams(Section):
    """What of a policy is trained, and how its gradient is computed.

    lora_rank, lora_alpha:  of an adapter on every linear layer but the head; all weights are trained if the rank is null. A checkpoint that has an
                            adapter goes on with it; with null it is merged first. OpenVLA-OFT's recipe has 32 and 16. `pretrained` checkpoints,
                            of which there are no weights yet, have none.
    gradient_checkpointing: transformer blocks are computed again for the gradient, which takes less memory, and a third more time.
    """

    lora_rank: int | None = Field(default=None, ge=1, exclude_if=is_default(None))
    lora_alpha: int = Field(default=16, ge=1, exclude_if=is_default(16))
    gradient_checkpointing: bool = Field(default=False, exclude_if=is_default(False))

    @property
    def lora(self) -> Lora | None:
        """The adapter, if one is to be trained."""
        return None if self.lora_rank is None else Lora(self.lora_rank, self.lora_alpha)


class UpdateParams(TrainedParams):
    """A fixed budget of AdamW steps per iteration, with a schedule over `schedule_iterations` of them; later ones stay at its end."""

    steps: int = Field(default=80, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1.5e-3, gt=0)
    schedule_iterations: int = Field(default=10, ge=1)
    final_fraction: Fraction = 0.1
    warmup_fraction: Fraction = 0.02
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    save_every: int = Field(default=20, ge=1)
    threads: int = Field(default=2, ge=1)
