"""What simulator processes are asked, and what they answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from vla_opd.envs.protocol import Env, Observation, Placement

Frames = UInt8[np.ndarray, "N C H W 3"]


@dataclass(frozen=True)
class Job:
    """One episode to run: where it starts, which member of its group it is, and the seed of everything random in it but the placement."""

    placement: Placement
    member: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a command led to: L control steps, N observations.

    success:  the task's predicate held after the last executed step.
    observed: the control step, counted from the reset (0), of each observation.
    actions, clean: as in `Episode`, from commands that choose the actions themselves; otherwise empty.
    seconds:  wall time of the command, in the worker.
    environment: what the environment says of itself.
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
    """Something for a worker to do: a picklable function of its environment, from a module that is quick to import."""

    def __call__(self, env: Env, /) -> Outcome:
        """Run in the worker. A ValueError is raised again in the parent; any other exception is a crash."""
        ...


@dataclass(frozen=True)
class Reset:
    """Start an episode; one observation, of step 0."""

    placement: Placement

    def __call__(self, env: Env) -> Outcome:
        return outcome(0, [env.reset(self.placement)], np.zeros(1, np.int32), success=False)


@dataclass(frozen=True)
class Forward:
    """Execute S actions from control step `start` on; observations at the multiples of `observe_every` that are reached."""

    start: int
    actions: Float32[np.ndarray, "S A"]
    observe_every: int

    def __call__(self, env: Env) -> Outcome:
        advance = env.advance(self.actions, self.observe_every)
        first = (self.start // self.observe_every + 1) * self.observe_every
        observed = np.arange(
            first, self.start + advance.steps + 1, self.observe_every, dtype=np.int32
        )
        return outcome(advance.steps, advance.observations, observed, success=advance.success)


def outcome(
    steps: int,
    observations: Sequence[Observation],
    observed: Int32[np.ndarray, " N"],
    *,
    success: bool,
    actions: Float32[np.ndarray, "M A"] | None = None,
    clean: Bool[np.ndarray, " M"] | None = None,
) -> Outcome:
    """An `Outcome` of stacked observations. ValueError if the environment did not return the observations that it was asked for.

    FloatingPointError, a crash, if the simulator has diverged: proprioception that is not finite.
    """
    if len(observations) != len(observed):
        raise ValueError(
            f"environment.family: {len(observations)} observations in {steps} steps; expected one at each step of {observed.tolist()}"
        )
    for step, seen in zip(observed, observations, strict=True):
        if not np.isfinite(seen.proprio).all():
            raise FloatingPointError(
                f"the simulator diverged: proprioception at control step {step} is {seen.proprio.tolist()}"
            )
    return Outcome(
        steps=steps,
        success=success,
        instruction=observations[-1].instruction if observations else "",
        observed=observed,
        frames=np.stack([o.frames for o in observations])
        if observations
        else np.zeros((0, 0, 0, 0, 3), np.uint8),
        proprio=np.stack([o.proprio for o in observations])
        if observations
        else np.zeros((0, 0), np.float32),
        actions=np.zeros((0, 0), np.float32) if actions is None else actions,
        clean=np.zeros(0, np.bool_) if clean is None else clean,
    )
