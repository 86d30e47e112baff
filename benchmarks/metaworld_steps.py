"""Speed of Meta-World's settings, as ratios, and success of its scripted experts.

`python -m benchmarks.metaworld_steps [--experts]`
"""

import argparse
import time
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from vla_opd.envs.metaworld import TASKS, MetaworldEnv, make
from vla_opd.envs.protocol import Placement
from vla_opd.experts.metaworld import make as make_expert
from vla_opd.params.stages import EnvironmentParams

TASK = "window-open-v3"
STEPS = 48


@dataclass(frozen=True)
class Outcome:
    """Episodes of one task: how many of 10 succeeded, and the steps that those took."""

    successes: int
    steps: tuple[int, ...]

    def __str__(self) -> str:
        middle = median(self.steps or (0,))
        longest = max(self.steps, default=0)
        return f"{self.successes:>2}/10 {middle:>6.0f} {longest:>5}"


def main() -> None:
    """Print the ratios; with `--experts` the table of tasks too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--experts",
        action="store_true",
        help="10 evaluation placements of every task, without and with noise",
    )
    arguments = parser.parse_args()
    print_ratios()
    if arguments.experts:
        print_experts()


def print_ratios() -> None:
    """Print how long an episode of `STEPS` steps takes, relative to another setting."""
    fast = _environment("fast")
    exact = _environment("exact")
    fast_blind = _seconds(fast, 0)
    fast_every = _seconds(fast, 1)
    fast_in_8 = _seconds(fast, 8)
    exact_blind = _seconds(exact, 0)
    exact_every = _seconds(exact, 1)
    exact_in_8 = _seconds(exact, 8)
    fast_frame = fast_every - fast_blind
    exact_frame = exact_every - exact_blind
    ratios = {
        "a frame, exact : fast": exact_frame / fast_frame,
        "an episode, every frame : one in 8 (fast)": fast_every / fast_in_8,
        "an episode, every frame : one in 8 (exact)": exact_every / exact_in_8,
        "an episode, exact every frame : fast one in 8": exact_every / fast_in_8,
        "a frame (fast) : a control step": fast_frame / fast_blind,
    }
    for name, ratio in ratios.items():
        print(f"{name:<48} {ratio:6.1f}")
    fast.close()
    exact.close()


def print_experts() -> None:
    """Print successes, median and maximum of steps, without and with noise on x, y and z.

    The noise is Gaussian.
    """
    env = _environment("fast")
    print(f"\n{'task':30} {'no noise':>18} {'sigma 0.2':>18}")
    for task in TASKS:
        quiet = run_expert(env, task, 0.0)
        noisy = run_expert(env, task, 0.2)
        print(f"{task:30} {quiet!s:>18} {noisy!s:>18}", flush=True)
    env.close()


def _environment(render: Literal["fast", "exact"]) -> MetaworldEnv:
    params = EnvironmentParams(
        family="metaworld", tasks=(TASK,), cameras=("corner4",), image_size=128, render=render
    )
    return make(params)


def _seconds(env: MetaworldEnv, observe_every: int) -> float:
    """Return the seconds of `STEPS` random steps: the least of three times, as load only adds."""
    random = np.random.default_rng(0)
    actions = random.uniform(-1, 1, (STEPS, 4)).astype(np.float32)
    placement = Placement(TASK, "evaluation", 0)
    times: list[float] = []
    for _ in range(3):
        env.reset(placement)
        began = time.perf_counter()
        env.advance(actions, observe_every)
        times.append(time.perf_counter() - began)
    return min(times)


def run_expert(env: MetaworldEnv, task: str, noise: float) -> Outcome:
    """Run the expert on the 10 first evaluation placements of a task."""
    steps: list[int] = []
    for index in range(10):
        placement = Placement(task, "evaluation", index)
        count = _solve(env, placement, noise)
        if count is not None:
            steps.append(count)
    return Outcome(len(steps), tuple(steps))


def _solve(env: MetaworldEnv, placement: Placement, noise: float, horizon: int = 250) -> int | None:
    env.reset(placement)
    expert = make_expert(env)
    generator = np.random.default_rng(placement.seed)
    expert.reset()
    for step in range(horizon):
        action = expert.act()
        action[:3] += noise * generator.standard_normal(3).astype(np.float32)
        advance = env.advance(action[None], 0)
        if advance.success:
            return step + 1
    return None


if __name__ == "__main__":
    main()
