"""Peak memory of a command with everything that it starts, detached processes too.

`python -m benchmarks.memory make run`

Sampled twice a second: the proportional set size (a page shared by n processes counts 1/n in each), summed over all processes that inherited a
mark from the command's environment, so a server that the command leaves behind is counted as well.
"""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 0.5


@dataclass(frozen=True)
class Peak:
    """MiB at the worst moment, in total and of each process then, by what it is."""

    total: float
    processes: tuple[tuple[str, float], ...]


def main() -> None:
    """Run the command, and say what it needed at most."""
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    mark = f"OPD_MEASURED={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    child = subprocess.Popen(sys.argv[1:], env={**os.environ, name: value})  # noqa: S603 - the command to measure
    peak = Peak(0.0, ())
    while child.poll() is None:
        now = sample(mark)
        peak = max(peak, now, key=lambda p: p.total)
        time.sleep(EVERY_S)
    print(f"peak: {peak.total:.0f} MiB in {len(peak.processes)} processes")
    for what, size in sorted(peak.processes, key=lambda p: -p[1]):
        print(f"  {size:7.0f} MiB  {what}")
    raise SystemExit(child.returncode)


def sample(mark: str) -> Peak:
    """The memory, now, of all processes whose environment holds `mark`."""
    sizes = tuple(_sizes(mark.encode()))
    return Peak(sum(size for _, size in sizes), sizes)


def _sizes(mark: bytes) -> Iterator[tuple[str, float]]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark not in (process / "environ").read_bytes().split(b"\0"):
                continue
            command = (
                (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
            rollup = (process / "smaps_rollup").read_text()
        except OSError:  # it has ended, or belongs to somebody else
            continue
        kib = next(
            (int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0
        )
        yield command[:80], kib / 1024


if __name__ == "__main__":
    main()
