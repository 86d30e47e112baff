"""What Meta-World's settings buy, as ratios, and how its scripted experts fare: `python -m benchmarks.metaworld_steps [--experts]`."""

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
    """Episodes of one task: how many succeeded, and the steps that those took."""

    successes: int
    steps: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.successes:>2}/10 {median(self.steps or (0,)):>6.0f} {max(self.steps, default=0):>5}"


def main() -> None:
    """Print the ratios; with `--experts` the table of tasks too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--experts",
        action="store_true",
        help="10 evaluation placements of every task, without and with noise",
    )
    wanted = parser.parse_args()
    print_ratios()
    if wanted.experts:
        print_experts()


def print_ratios() -> None:
    """Time of an episode of `STEPS` steps, relative to another setting's."""
    fast, exact = (_environment(render) for render in ("fast", "exact"))
    drawn = _seconds(fast, 1) - _seconds(fast, 0)
    stock = _seconds(exact, 1) - _seconds(exact, 0)
    print(f"a frame, exact : fast                            {stock / drawn:6.1f}")
    print(
        f"an episode, every frame : one in 8 (fast)        {_seconds(fast, 1) / _seconds(fast, 8):6.1f}"
    )
    print(
        f"an episode, every frame : one in 8 (exact)       {_seconds(exact, 1) / _seconds(exact, 8):6.1f}"
    )
    print(
        f"an episode, exact every frame : fast one in 8    {_seconds(exact, 1) / _seconds(fast, 8):6.1f}"
    )
    print(f"a frame (fast) : a control step                  {drawn / _seconds(fast, 0):6.1f}")
    fast.close()
    exact.close()


def print_experts() -> None:
    """Successes, median and greatest number of steps, without and with Gaussian noise on x, y and z."""
    env = _environment("fast")
    print(f"\n{'task':30} {'no noise':>18} {'sigma 0.2':>18}")
    for task in TASKS:
        print(
            f"{task:30} {_expert(env, task, 0.0)!s:>18} {_expert(env, task, 0.2)!s:>18}", flush=True
        )
    env.close()


def _environment(render: Literal["fast", "exact"]) -> MetaworldEnv:
    return make(
        EnvironmentParams(
            family="metaworld", tasks=(TASK,), cameras=("corner4",), image_size=128, render=render
        )
    )


def _seconds(env: MetaworldEnv, observe_every: int) -> float:
    """Seconds that `STEPS` random steps take after the reset: the least of three times, as other load only adds."""
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, 4)).astype(np.float32)
    times: list[float] = []
    for _ in range(3):
        env.reset(Placement(TASK, "evaluation", 0))
        start = time.perf_counter()
        env.advance(actions, observe_every)
        times.append(time.perf_counter() - start)
    return min(times)


def _expert(env: MetaworldEnv, task: str, noise: float) -> Outcome:
    steps = [_solve(env, Placement(task, "evaluation", index), noise) for index in range(10)]
    solved = tuple(count for count in steps if count is not None)
    return Outcome(len(solved), solved)


def _solve(env: MetaworldEnv, placement: Placement, noise: float, horizon: int = 250) -> int | None:
    env.reset(placement)
    expert, generator = make_expert(env), np.random.default_rng(placement.seed)
    expert.reset()
    for step in range(horizon):
        action = expert.act()
        action[:3] += noise * generator.standard_normal(3).astype(np.float32)
        if env.advance(action[None], 0).success:
            return step + 1
    return None


if __name__ == "__main__":
    main()
