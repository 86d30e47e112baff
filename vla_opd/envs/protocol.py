"""The `Env` protocol and its types: placements, observations, results of a chunk of actions."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float32, UInt8

Split = Literal["evaluation", "training"]


@dataclass(frozen=True)
class Placement:
    """One initial state of one task: the start of an episode.

    task:  the name of the task within its family, e.g. `libero_object/3` or `window-open-v3`.
    split: `evaluation` has the benchmark's fixed initial states, `training` has seeded resets
           that never coincide with them.
    index: the number of the fixed initial state, below `vla_opd.params.section.EVALUATION_STATES`;
           or the seed of the reset.
    """

    task: str
    split: Split
    index: int

    @property
    def seed(self) -> int:
        """32-bit seed from sha256(task, split, index): the only source of randomness in a reset."""
        text = f"{self.task}|{self.split}|{self.index}"
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:4], "little")


@dataclass(frozen=True)
class Observation:
    """The policy's input at one control step.

    C camera frames (upright, RGB), P proprioceptive numbers, and the instruction.
    """

    frames: UInt8[np.ndarray, "C H W 3"]
    proprio: Float32[np.ndarray, "P"]
    instruction: str


@dataclass(frozen=True)
class Advance:
    """The result of executing a chunk of actions.

    steps:        control steps executed: the whole chunk, or up to and including the first success.
    success:      the task's own predicate held after the last executed step.
    observations: one after every control step whose number, counted from the reset, is a multiple
                  of `observe_every`.
    """

    steps: int
    success: bool
    observations: tuple[Observation, ...]


class Env(Protocol):
    """One simulator in one process, kept alive over many episodes.

    An episode is a pure function of its placement and its actions: it gives the same bytes in any
    process and after any other episode.
    """

    action_dim: int
    proprio_dim: int

    def reset(self, placement: Placement) -> Observation:
        """Start the episode of `placement`, settled and rendered.

        Raises:
            ValueError: the task or the index of the placement does not exist.
        """
        ...

    def advance(self, actions: Float32[np.ndarray, "S A"], observe_every: int) -> Advance:
        """Execute up to S control steps of A numbers each; stop at the first success.

        Actions are in the environment's own units and conventions. `observe_every = 0` renders
        nothing. Otherwise only the observed steps are rendered, and their frames are identical to
        those of a run that renders every step.
        """
        ...

    def describe(self) -> Mapping[str, str]:
        """Return facts for the manifest that the parameters do not contain.

        Examples are versions, the graphics backend, and the convention for the horizon.
        """
        ...

    def close(self) -> None:
        """Release the simulator."""
        ...
