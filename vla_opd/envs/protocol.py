"""What an environment is: placements, observations, what a chunk of actions led to, and the `Env` protocol."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float32, UInt8

Split = Literal["evaluation", "training"]


@dataclass(frozen=True)
class Placement:
    """One initial state of one task: where an episode starts.

    task:  the family's name of the task, e.g. `libero_object/3` or `window-open-v3`.
    split: `evaluation` are the benchmark's fixed initial states, `training` are seeded resets that never coincide with them.
    index: the number of the fixed initial state, below `vla_opd.params.EVALUATION_STATES`; or the seed of the reset.
    """

    task: str
    split: Split
    index: int

    @property
    def seed(self) -> int:
        """A 32-bit seed from sha256(task, split, index): everything random in a reset follows from it alone."""
        text = f"{self.task}|{self.split}|{self.index}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one control step: C camera frames (upright, RGB), P proprioceptive numbers, the instruction."""

    frames: UInt8[np.ndarray, "C H W 3"]
    proprio: Float32[np.ndarray, "P"]
    instruction: str


@dataclass(frozen=True)
class Advance:
    """What a chunk of actions led to.

    steps:        control steps executed: all of the chunk's, or up to and including the first success.
    success:      the task's own predicate held after the last executed step.
    observations: one after every control step whose number, counted from the reset, is a multiple of `observe_every`.
    """

    steps: int
    success: bool
    observations: tuple[Observation, ...]


class Env(Protocol):
    """One simulator in one process, kept alive over many episodes.

    An episode is a pure function of its placement and its actions: same bytes in any process, after any other episode.
    """

    action_dim: int
    proprio_dim: int

    def reset(self, placement: Placement) -> Observation:
        """Start the episode of `placement`, settled and rendered. ValueError for a task or index that does not exist."""
        ...

    def advance(self, actions: Float32[np.ndarray, "S A"], observe_every: int) -> Advance:
        """Execute up to S control steps of A numbers in the environment's own units and conventions; stop at success.

        `observe_every = 0` renders nothing. Otherwise frames are rendered at those steps only, and are the very frames that
        rendering every step would have given.
        """
        ...

    def describe(self) -> Mapping[str, str]:
        """Facts for the manifest that the parameters do not say: versions, graphics backend, horizon convention."""
        ...

    def close(self) -> None:
        """Release the simulator."""
        ...
