"""What LIBERO's settings buy, as ratios of medians: `python -m benchmarks.libero_steps [task ...] [--absolute]`. Takes some minutes.

Seconds of processor time are compared, not of the clock, so that other load on the machine matters less.
"""

import resource
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Literal

import numpy as np

from vla_opd.envs.libero.env import LiberoEnv, make
from vla_opd.envs.protocol import Placement
from vla_opd.params.stages import EnvironmentParams

TASKS = ("libero_spatial/0", "libero_object/0")
STEPS = 16
REPEATS = 5

Mode = Literal["exact", "fast"]


def main() -> None:
    """Print the ratios of every task named, and the memory of a process that only ever ran `fast`."""
    tasks = tuple(argument for argument in sys.argv[1:] if not argument.startswith("-")) or TASKS
    fast = _environment(tasks, "fast", "fast")
    for task in tasks:
        fast.reset(Placement(task, "evaluation", 0))
    fast.close()
    print(
        f"peak memory, fast, MB (more where slim models are made) {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000:6d}"
    )
    for task in tasks:
        print_ratios(task)


def print_ratios(task: str) -> None:
    """How many times the left one's time the right one takes; and what a chunk of 8 steps costs besides its steps."""
    exact, mixed, fast = (
        _environment((task,), *modes)
        for modes in (("exact", "exact"), ("exact", "fast"), ("fast", "fast"))
    )
    placement = Placement(task, "evaluation", 0)
    reset = {env: _median(lambda env=env: env.reset(placement)) for env in (exact, mixed, fast)}
    blind, slow_blind = _advance(fast, placement, 0), _advance(mixed, placement, 0)
    frame = {env: _median(env._observe, repeats=5 * REPEATS) for env in (exact, fast)}  # noqa: SLF001 (there is no public way to draw twice)
    print(f"\n{task}")
    print(f"stepping without frames, exact : fast              {slow_blind / blind:6.1f}")
    print(f"a frame, exact : fast                              {frame[exact] / frame[fast]:6.1f}")
    print(
        f"exact, a frame every step : one in 8               {_advance(exact, placement, 1) / _advance(exact, placement, 8):6.1f}"
    )
    print(
        f"a frame every step, exact : one in 8, fast         {_advance(exact, placement, 1) / _advance(fast, placement, 8):6.1f}"
    )
    print(f"reset and settle, exact : fast                     {reset[exact] / reset[fast]:6.1f}")
    print(
        f"another task, exact : fast                         {_median(lambda: _swap(exact, task)) / _median(lambda: _swap(fast, task)):6.1f}"
    )
    print(f"fast, in control steps: a frame                    {frame[fast] / blind * STEPS:6.1f}")
    print(f"fast, in control steps: reset and settle           {reset[fast] / blind * STEPS:6.1f}")
    print(
        f"fast, in control steps: another task               {_median(lambda: _swap(fast, task)) / blind * STEPS:6.1f}",
        flush=True,
    )
    if "--absolute" in sys.argv:
        print(
            f"steps/s {STEPS / blind:.0f}, ms a frame {frame[fast] * 1e3:.1f}, ms a reset {reset[fast] * 1e3:.0f}"
        )
    for env in (exact, mixed, fast):
        env.close()


def _environment(tasks: tuple[str, ...], stepping: Mode, render: Mode) -> LiberoEnv:
    return make(EnvironmentParams(tasks=tasks, stepping=stepping, render=render))


def _swap(env: LiberoEnv, task: str) -> None:
    """Build the task's simulator, as if another task's had been there."""
    env._drop()  # noqa: SLF001 (a second task would do too, but take the same time)
    env._load(task)  # noqa: SLF001


def _advance(env: LiberoEnv, placement: Placement, observe_every: int) -> float:
    """Seconds for `STEPS` gentle random steps from `placement`."""
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (STEPS, 7)).astype(np.float32)
    times: list[float] = []
    for _ in range(REPEATS):
        env.reset(placement)
        times.append(_seconds(lambda: env.advance(actions, observe_every)))
    return median(times)


def _median(action: Callable[[], object], repeats: int = REPEATS) -> float:
    action()  # the first call loads, compiles and warms up
    return median(_seconds(action) for _ in range(repeats))


def _seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


if __name__ == "__main__":
    main()
