"""Peak memory of a command with all processes that it starts, detached ones too.

`python -m benchmarks.memory make run`

Twice a second the proportional set size (a page shared by n processes counts 1/n in each) is summed
over all processes that inherited a mark from the command's environment, such as a server that the
command leaves behind.
"""

import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 0.5


@dataclass(frozen=True)
class Peak:
    """MiB at the worst moment, in total and per process, by its command."""

    total: float
    processes: tuple[tuple[str, float], ...]


def main() -> None:
    """Run the command, and print its peak memory."""
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    mark = f"OPD_MEASURED={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    environment = {**os.environ, name: value}
    child = subprocess.Popen(sys.argv[1:], env=environment)  # noqa: S603 - the command to measure
    peak = Peak(0.0, ())
    while child.poll() is None:
        now = sample(mark)
        if now.total > peak.total:
            peak = now
        time.sleep(EVERY_S)
    print(f"peak: {peak.total:.0f} MiB in {len(peak.processes)} processes")
    for command, size in sorted(peak.processes, key=lambda process: -process[1]):
        print(f"  {size:7.0f} MiB  {command}")
    raise SystemExit(child.returncode)


def sample(mark: str) -> Peak:
    """Return the memory, now, of all processes whose environment holds `mark`."""
    sizes: list[tuple[str, float]] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() not in (process / "environ").read_bytes().split(b"\0"):
                continue
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
            sizes.append((command[:80].decode(errors="replace"), proportional_size(process)))
        except OSError:  # it has ended, or belongs to another user
            continue
    return Peak(sum(size for _, size in sizes), tuple(sizes))


def proportional_size(process: Path) -> float:
    """Return the proportional set size of a process, in MiB."""
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    main()
