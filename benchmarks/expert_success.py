"""Success rate and steps of LIBERO's scripted expert, by the benchmark's own success predicate.

`python -m benchmarks.expert_success libero_object --states 10 --workers 2 --noise 0.15 --bursts`
"""

import argparse
import multiprocessing
import statistics
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vla_opd.envs import Env, Placement, make_env
from vla_opd.experts import Expert, make_expert
from vla_opd.params.stages import EnvironmentParams


@dataclass(frozen=True)
class Work:
    """The episodes of one task."""

    task: str
    split: Literal["evaluation", "training"]
    states: int
    horizon: int
    noise: float
    bursts: bool
    seed: int


@dataclass(frozen=True)
class Result:
    """Outcomes of one task.

    steps: of every successful episode. failures: the initial states of the others.
    refusal: why the expert does not cover the task.
    """

    task: str
    steps: tuple[int, ...] = ()
    failures: tuple[int, ...] = ()
    refusal: str = ""

    def row(self) -> str:
        """Format one line of the table."""
        if self.refusal:
            return f"{self.task:<18} not covered: {self.refusal}"
        successes = len(self.steps)
        episodes = successes + len(self.failures)
        cells = f"{self.task:<18} {successes:>3}/{episodes:<3} "
        if self.steps:
            cells += f"median {statistics.median(self.steps):5.1f}  max {max(self.steps)}"
        if self.failures:
            cells += f"  failed {list(self.failures)}"
        return cells


def main() -> None:
    """Run the expert on a suite and print the table."""
    arguments = parse_arguments()
    jobs = [
        Work(
            task=f"{arguments.suite}/{task}",
            split=arguments.split,
            states=arguments.states,
            horizon=arguments.horizon,
            noise=arguments.noise,
            bursts=arguments.bursts,
            seed=arguments.seed,
        )
        for task in arguments.tasks
    ]
    steps: list[int] = []
    failures: list[int] = []
    with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
        for result in pool.imap(run, jobs):
            print(result.row(), flush=True)
            steps.extend(result.steps)
            failures.extend(result.failures)
    print(Result(arguments.suite, tuple(steps), tuple(failures)).row())


def run(work: Work) -> Result:
    """Run all episodes of one task, in a process of its own."""
    env = make_env(EnvironmentParams(tasks=(work.task,), stepping="fast"))
    expert = make_expert("libero", env)
    steps: list[int] = []
    failures: list[int] = []
    try:
        for state in range(work.states):
            env.reset(Placement(work.task, work.split, state))
            expert.reset()
            random = np.random.default_rng([work.seed, state])
            count = run_episode(env, expert, work, random)
            if count is None:
                failures.append(state)
            else:
                steps.append(count)
    except ValueError as refusal:
        return Result(work.task, refusal=str(refusal))
    finally:
        env.close()
    return Result(work.task, tuple(steps), tuple(failures))


def run_episode(env: Env, expert: Expert, work: Work, random: np.random.Generator) -> int | None:
    """Return the steps to success, or None."""
    disturbed = draw_bursts(random) if work.bursts else set[int]()
    for step in range(work.horizon):
        action = expert.act().copy()
        if work.noise:
            action[:3] += random.normal(0, work.noise, 3)
        if step in disturbed:
            action = random.uniform(-1, 1, len(action)).astype(np.float32)
        clipped = np.clip(action, -1, 1).astype(np.float32)
        advance = env.advance(clipped[None], observe_every=0)
        if advance.success:
            return step + 1
    return None


def draw_bursts(random: np.random.Generator) -> set[int]:
    """Draw the steps of two bursts of 4 to 8 random actions."""
    steps: set[int] = set()
    for start in random.integers(5, 80, 2):
        length = random.integers(4, 9)
        steps.update(range(start, start + length))
    return steps


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite")
    parser.add_argument("--tasks", type=parse_numbers, default=range(10), help="as in 0-9 or 2,5")
    parser.add_argument("--states", type=int, default=10)
    parser.add_argument("--split", choices=("evaluation", "training"), default="evaluation")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--horizon", type=int, default=300)
    parser.add_argument(
        "--noise", type=float, default=0.0, help="standard deviation added to the translation"
    )
    parser.add_argument(
        "--bursts", action="store_true", help="two bursts of 4 to 8 random actions per episode"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def parse_numbers(text: str) -> list[int]:
    """Return the numbers of `0-9` or `2,5`."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        stop = int(last or first) + 1
        numbers.extend(range(int(first), stop))
    return numbers


if __name__ == "__main__":
    main()
