"""Speed of LIBERO's settings, as ratios of medians. Takes some minutes.

`python -m benchmarks.libero_steps [task ...] [--absolute]`

Compared are seconds of processor time, not of the clock, so that other load matters less.
"""

import argparse
import resource
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
    """Print the ratios of every task, and the memory of a process that only ever ran `fast`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=TASKS, metavar="task")
    parser.add_argument("--absolute", action="store_true", help="print steps per second too")
    arguments = parser.parse_args()
    tasks = tuple(arguments.tasks)
    fast = _environment(tasks, "fast", "fast")
    for task in tasks:
        fast.reset(Placement(task, "evaluation", 0))
    fast.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    print(f"peak memory, fast, MB (more where slim models are made) {peak:6d}")
    for task in tasks:
        print_ratios(task, absolute=arguments.absolute)


def print_ratios(task: str, *, absolute: bool) -> None:
    """Print the ratios of one task.

    `a, b : c` is how many times the time of c in setting b is that of a. The last ones are the cost
    of a frame, a reset and another task, in control steps.
    """
    exact = _environment((task,), "exact", "exact")
    mixed = _environment((task,), "exact", "fast")
    fast = _environment((task,), "fast", "fast")
    placement = Placement(task, "evaluation", 0)
    exact_reset = _median(lambda: exact.reset(placement))
    fast_reset = _median(lambda: fast.reset(placement))
    fast_blind = _advance(fast, placement, 0)
    exact_blind = _advance(mixed, placement, 0)
    exact_frame = _median(exact._observe, repeats=5 * REPEATS)  # noqa: SLF001 - not public
    fast_frame = _median(fast._observe, repeats=5 * REPEATS)  # noqa: SLF001
    exact_every_frame = _advance(exact, placement, 1)
    exact_in_8 = _advance(exact, placement, 8)
    fast_in_8 = _advance(fast, placement, 8)
    exact_swap = _median(lambda: _swap(exact, task))
    fast_swap = _median(lambda: _swap(fast, task))
    step = fast_blind / STEPS
    ratios = {
        "stepping without frames, exact : fast": exact_blind / fast_blind,
        "a frame, exact : fast": exact_frame / fast_frame,
        "exact, a frame every step : one in 8": exact_every_frame / exact_in_8,
        "a frame every step, exact : one in 8, fast": exact_every_frame / fast_in_8,
        "reset and settle, exact : fast": exact_reset / fast_reset,
        "another task, exact : fast": exact_swap / fast_swap,
        "fast, in control steps: a frame": fast_frame / step,
        "fast, in control steps: reset and settle": fast_reset / step,
        "fast, in control steps: another task": fast_swap / step,
    }
    print(f"\n{task}")
    for name, ratio in ratios.items():
        print(f"{name:<50} {ratio:6.1f}", flush=True)
    if absolute:
        print(
            f"steps/s {1 / step:.0f}, ms per frame {fast_frame * 1e3:.1f}, "
            f"ms per reset {fast_reset * 1e3:.0f}"
        )
    for env in (exact, mixed, fast):
        env.close()


def _environment(tasks: tuple[str, ...], stepping: Mode, render: Mode) -> LiberoEnv:
    return make(EnvironmentParams(tasks=tasks, stepping=stepping, render=render))


def _swap(env: LiberoEnv, task: str) -> None:
    """Build the task's simulator, as after another task's."""
    env._drop()  # noqa: SLF001 - a second task would take the same time
    env._load(task)  # noqa: SLF001


def _advance(env: LiberoEnv, placement: Placement, observe_every: int) -> float:
    """Return the seconds of `STEPS` small random steps from `placement`."""
    random = np.random.default_rng(0)
    actions = random.uniform(-0.3, 0.3, (STEPS, 7)).astype(np.float32)
    times: list[float] = []
    for _ in range(REPEATS):
        env.reset(placement)
        seconds = _seconds(lambda: env.advance(actions, observe_every))
        times.append(seconds)
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
