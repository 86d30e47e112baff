"""How a policy is trained: adapter, optimizer steps and learning rate schedule."""

from typing import NamedTuple

from pydantic import Field

from vla_opd.params.section import Fraction, Section, is_default


class Lora(NamedTuple):
    """A low-rank adapter: W x becomes W x + (alpha / rank) B A x."""

    rank: int
    alpha: int


class TrainedParams(Section):
    """Which weights are trained, and how their gradient is computed.

    lora_rank, lora_alpha: of a low-rank adapter on every linear layer except the head; see `Lora`.
        A null rank trains all weights. A checkpoint that already has an adapter continues training
        it; with a null rank the adapter is merged into the weights first. `pretrained` checkpoints
        start from random weights and never have an adapter. OpenVLA-OFT's recipe: 32 and 16.
    gradient_checkpointing: recompute the activations of transformer blocks in the backward pass.
        Saves memory; a step takes about a third longer.
    """

    lora_rank: int | None = Field(default=None, ge=1, exclude_if=is_default(None))
    lora_alpha: int = Field(default=16, ge=1, exclude_if=is_default(16))
    gradient_checkpointing: bool = Field(default=False, exclude_if=is_default(False))

    @property
    def lora(self) -> Lora | None:
        """The adapter to train, or None to train all weights."""
        return None if self.lora_rank is None else Lora(self.lora_rank, self.lora_alpha)


class UpdateParams(TrainedParams):
    """The update of one iteration: AdamW with a schedule that spans several iterations.

    steps: AdamW steps per iteration.
    batch_size: states per step, over all processes.
    learning_rate: at the peak, after the warm-up.
    schedule_iterations: length of the schedule, in iterations: linear warm-up, then cosine decay.
        Later iterations keep the final learning rate.
    final_fraction: final learning rate as a fraction of the peak.
    warmup_fraction: fraction of the schedule's steps that warm up.
    weight_decay: AdamW's: every step shrinks the weights by learning rate * weight_decay.
    gradient_clip: maximum L2 norm of the gradient.
    save_every: steps between resumable saves.
    threads: CPU threads of the optimizer; the last bits of the weights depend on it.
    """

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
