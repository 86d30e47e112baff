"""Commands to simulator processes, and their outcomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from vla_opd.envs.protocol import Env, Observation, Placement

Frames = UInt8[np.ndarray, "N C H W 3"]


@dataclass(frozen=True)
class Job:
    """One episode to run.

    member: its number in its group, whose episodes have the same placement.
    seed:   of everything random in it except the placement.
    """

    placement: Placement
    member: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The result of a command: L control steps, N observations.

    success:  the task's predicate held after the last executed step.
    observed: the control step of each observation, counted from the reset (0).
    actions, clean: as in `Episode`, from commands that choose the actions themselves; otherwise
              empty.
    seconds:  wall time of the command in the worker.
    environment: the environment's description of itself.
    """

    steps: int
    success: bool
    instruction: str
    observed: Int32[np.ndarray, " N"]
    frames: Frames
    proprio: Float32[np.ndarray, "N P"]
    actions: Float32[np.ndarray, "M A"]
    clean: Bool[np.ndarray, " M"]
    seconds: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Command(Protocol):
    """A picklable function of a worker's environment, from a module that is quick to import."""

    def __call__(self, env: Env, /) -> Outcome:
        """Run in the worker.

        A ValueError is raised again in the parent; any other exception is a crash.
        """
        ...


@dataclass(frozen=True)
class Reset:
    """Start an episode. Returns one observation, of step 0."""

    placement: Placement

    def __call__(self, env: Env) -> Outcome:
        observation = env.reset(self.placement)
        return observe_start(observation)


@dataclass(frozen=True)
class Forward:
    """Execute S actions from control step `start` on.

    Returns the observations at multiples of `observe_every`.
    """

    start: int
    actions: Float32[np.ndarray, "S A"]
    observe_every: int

    def __call__(self, env: Env) -> Outcome:
        advance = env.advance(self.actions, self.observe_every)
        every = self.observe_every
        first = (self.start // every + 1) * every
        end = self.start + advance.steps + 1
        observed = np.arange(first, end, every, dtype=np.int32)
        return stack_outcome(
            advance.steps,
            advance.observations,
            observed,
            success=advance.success,
        )


def observe_start(observation: Observation) -> Outcome:
    """Return the outcome of a command that starts an episode: one observation, of step 0."""
    observed = np.zeros(1, np.int32)
    return stack_outcome(0, [observation], observed, success=False)


def stack_outcome(
    steps: int,
    observations: Sequence[Observation],
    observed: Int32[np.ndarray, " N"],
    *,
    success: bool,
    actions: Float32[np.ndarray, "M A"] | None = None,
    clean: Bool[np.ndarray, " M"] | None = None,
) -> Outcome:
    """Stack observations into an `Outcome`.

    ValueError if the environment did not return the observations at the steps `observed`.
    FloatingPointError, a crash, if the simulator diverged: proprioception is not finite.
    """
    if len(observations) != len(observed):
        raise ValueError(
            f"environment.family: {len(observations)} observations in {steps} steps; "
            f"expected one at each step of {observed.tolist()}"
        )
    for step, observation in zip(observed, observations, strict=True):
        proprio = observation.proprio
        if not np.isfinite(proprio).all():
            raise FloatingPointError(
                f"the simulator diverged: proprioception at control step {step} is "
                f"{proprio.tolist()}"
            )
    instruction = ""
    frames = np.zeros((0, 0, 0, 0, 3), np.uint8)
    proprios = np.zeros((0, 0), np.float32)
    if observations:
        instruction = observations[-1].instruction
        frames = np.stack([observation.frames for observation in observations])
        proprios = np.stack([observation.proprio for observation in observations])
    if actions is None:
        actions = np.zeros((0, 0), np.float32)
    if clean is None:
        clean = np.zeros(0, np.bool_)
    return Outcome(
        steps=steps,
        success=success,
        instruction=instruction,
        observed=observed,
        frames=frames,
        proprio=proprios,
        actions=actions,
        clean=clean,
    )
