"""How often LIBERO's scripted expert succeeds, by the benchmark's own predicate, and in how many steps.

`python -m benchmarks.expert_success libero_object --states 10 --workers 2 --noise 0.15 --bursts`
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

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
    """Steps of every successful episode of one task, the initial states of the others, or why the task isn't covered."""

    task: str
    steps: tuple[int, ...] = ()
    failures: tuple[int, ...] = ()
    refusal: str = ""

    def row(self) -> str:
        """One line of the table."""
        if self.refusal:
            return f"{self.task:<18} not covered: {self.refusal}"
        spread = (
            f"median {statistics.median(self.steps):5.1f}  max {max(self.steps)}"
            if self.steps
            else ""
        )
        failed = f"  failed {list(self.failures)}" if self.failures else ""
        return f"{self.task:<18} {len(self.steps):>3}/{len(self.steps) + len(self.failures):<3} {spread}{failed}"


def main() -> None:
    """Run the expert on a suite and print the table."""
    arguments = _parsed()
    work = [
        Work(
            f"{arguments.suite}/{task}",
            arguments.split,
            arguments.states,
            arguments.horizon,
            arguments.noise,
            arguments.bursts,
            arguments.seed,
        )
        for task in arguments.tasks
    ]
    results: list[Result] = []
    with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
        for result in pool.imap(run, work):
            print(result.row(), flush=True)
            results.append(result)
    steps = tuple(step for result in results for step in result.steps)
    print(
        Result(
            arguments.suite, steps, tuple(state for result in results for state in result.failures)
        ).row()
    )


def run(work: Work) -> Result:
    """All episodes of one task, in a process of its own."""
    env = make_env(EnvironmentParams(tasks=(work.task,), stepping="fast"))
    expert = make_expert("libero", env)
    steps: list[int] = []
    failures: list[int] = []
    try:
        for state in range(work.states):
            env.reset(Placement(work.task, work.split, state))
            expert.reset()
            taken = _episode(env, expert, work, np.random.default_rng([work.seed, state]))
            failures.append(state) if taken is None else steps.append(taken)
    except ValueError as refusal:
        return Result(work.task, refusal=str(refusal))
    finally:
        env.close()
    return Result(work.task, tuple(steps), tuple(failures))


def _episode(env: Env, expert: Expert, work: Work, rng: np.random.Generator) -> int | None:
    """Steps to success, or None."""
    disturbed = _bursts(rng) if work.bursts else set[int]()
    for step in range(work.horizon):
        action = expert.act().copy()
        action[:3] += rng.normal(0, work.noise, 3) if work.noise else 0
        if step in disturbed:
            action = rng.uniform(-1, 1, len(action)).astype(np.float32)
        if env.advance(_row(action), observe_every=0).success:
            return step + 1
    return None


def _bursts(rng: np.random.Generator) -> set[int]:
    """The steps of two bursts of 4 to 8 random actions."""
    return {
        step
        for start in rng.integers(5, 80, 2)
        for step in range(start, start + rng.integers(4, 9))
    }


def _row(action: Float32[np.ndarray, "A"]) -> Float32[np.ndarray, "1 A"]:
    return np.clip(action, -1, 1).astype(np.float32)[None]


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite")
    parser.add_argument("--tasks", type=_numbers, default=range(10), help="as in 0-9 or 2,5")
    parser.add_argument("--states", type=int, default=10)
    parser.add_argument("--split", choices=("evaluation", "training"), default="evaluation")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--horizon", type=int, default=300)
    parser.add_argument(
        "--noise", type=float, default=0.0, help="standard deviation added to the translation"
    )
    parser.add_argument(
        "--bursts", action="store_true", help="two bursts of 4 to 8 random actions an episode"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return list(_expanded(text))


def _expanded(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


if __name__ == "__main__":
    main()
