"""A point mass that has to reach a goal: instant, numpy only, and faulty on demand.

A task is a plain name, or `"<fault>:<index>:<marker file>"`. The fault strikes in the middle of the
episode of that index, unless the marker file exists. It writes the file first, so it strikes once;
with an empty marker it strikes every time.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_opd.envs.protocol import Advance, Env, Observation, Placement
from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.jobs import Outcome, stack_outcome

FAMILY = "tests.vla_opd.fake_env:make"
EXPERT = "tests.vla_opd.fake_env:make_expert"
SPEED = 0.05  # of a unit action, in units per step
TOLERANCE = 0.15
STRIKE = 3  # the control step in which a fault strikes


class PointMass:
    """A point in [-1, 1]^3; actions are xyz and an idle gripper.

    Success: the distance to the goal is below TOLERANCE.
    """

    action_dim = 4
    proprio_dim = 6

    def __init__(self, params: EnvironmentParams) -> None:
        self.params = params
        self.placement: Placement | None = None
        self.position = self.goal = np.zeros(3)
        self.steps = 0

    def reset(self, placement: Placement) -> Observation:
        if placement.task == "mistake":
            raise ValueError("environment.tasks has 'mistake'; expected another")
        generator = np.random.default_rng(placement.seed)
        self.placement = placement
        self.steps = 0
        self.position = generator.uniform(-1, 1, 3)
        self.goal = generator.uniform(-1, 1, 3)
        return self.observe()

    def advance(self, actions: np.ndarray, observe_every: int) -> Advance:
        observations = []
        for executed, action in enumerate(actions, start=1):
            self.position = self.position + SPEED * np.clip(action[:3], -1, 1)
            self.steps += 1
            if self.steps == STRIKE:
                self.strike()
            if observe_every and self.steps % observe_every == 0:
                observations.append(self.observe())
            if self.success:
                return Advance(executed, success=True, observations=tuple(observations))
        return Advance(len(actions), success=False, observations=tuple(observations))

    @property
    def success(self) -> bool:
        return bool(np.linalg.norm(self.goal - self.position) < TOLERANCE)

    def observe(self) -> Observation:
        size = self.params.image_size
        pixels = np.resize(self.position, (size, size, 3)) * 1e4
        image = pixels.astype(np.int64) % 256
        frames = [(image + camera) % 256 for camera in range(len(self.params.cameras))]
        return Observation(
            frames=np.stack(frames).astype(np.uint8),
            proprio=np.concatenate([self.position, self.goal]).astype(np.float32),
            instruction=f"reach {self.placement.task}",
        )

    def strike(self) -> None:
        """Trigger the fault of the task's name, if this is its episode."""
        fault, _, address = self.placement.task.partition(":")
        if fault not in FAULTS:
            return
        index, _, marker = address.partition(":")
        if int(index) != self.placement.index:
            return
        if marker:
            if Path(marker).exists():
                return
            Path(marker).touch()
        FAULTS[fault](self)

    def describe(self) -> Mapping[str, str]:
        return {}

    def close(self) -> None:
        pass


def _raise(_env: PointMass) -> None:
    raise RuntimeError("the solver diverged")


def _diverge(env: PointMass) -> None:
    env.position = env.position * np.nan


FAULTS = {
    "exit": lambda _: os._exit(3),
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda _: time.sleep(3600),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": _raise,
    "nan": _diverge,
}


class GoStraight:
    """The expert that moves straight to the goal."""

    def __init__(self, env: PointMass) -> None:
        self.env = env

    def reset(self) -> None:
        self.gripper = 1.0

    def act(self) -> np.ndarray:
        offset = self.env.goal - self.env.position
        direction = offset / np.linalg.norm(offset)
        return np.append(direction, self.gripper).astype(np.float32)


@dataclass(frozen=True)
class Inspect:
    """A command whose instruction is the worker's process id and a fact about the worker."""

    topic: str

    def __call__(self, env: Env) -> Outcome:
        facts = {
            "modules": lambda: " ".join(sorted(sys.modules)),
            "threads": lambda: os.environ["OMP_NUM_THREADS"],
            "interrupt": lambda: signal.getsignal(signal.SIGINT).name,
        }
        observation = Observation(
            frames=np.zeros((1, 16, 16, 3), np.uint8),
            proprio=np.zeros(1, np.float32),
            instruction=f"{os.getpid()} {facts[self.topic]()}",
        )
        return stack_outcome(0, [observation], np.zeros(1, np.int32), success=False)


def make(params: EnvironmentParams) -> PointMass:
    return PointMass(params)


def make_expert(env: PointMass) -> GoStraight:
    return GoStraight(env)
