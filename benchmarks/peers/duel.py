"""Ours beside a peer: the same work, in turn, so that other load on the machine hits both."""

import statistics
import time
from collections.abc import Callable

Work = Callable[[], object]


def duel(name: str, ours: Work, peer: Work, repeats: int) -> None:
    """Print how often the peer's time is ours: smallest, median and largest of the repeats.

    Both have done the work once before.
    """
    ours()
    peer()
    ratios: list[float] = []
    for repeat in range(repeats):
        first, second = (ours, peer) if repeat % 2 else (peer, ours)
        seconds = {work: _time(work) for work in (first, second)}
        ratios.append(seconds[peer] / seconds[ours])
    median = statistics.median(ratios)
    print(f"{name:<28} {min(ratios):6.2f} {median:6.2f} {max(ratios):6.2f}")


def _time(work: Work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
