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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 0.5
MARK = "OPD_MEASURED"


@dataclass(frozen=True)
class Peak:
    """MiB at the worst moment, in total and per process with its command, the largest first."""

    total: float
    processes: tuple[tuple[float, str], ...]


def main() -> None:
    """Run the command, and print its peak memory."""
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark}
    child = subprocess.Popen(sys.argv[1:], env=environment)  # noqa: S603 - the command to measure
    peak = Peak(0.0, ())
    while child.poll() is None:
        memory = sample(f"{MARK}={mark}")
        if memory.total > peak.total:
            peak = memory
        time.sleep(EVERY_S)
    print(f"peak: {peak.total:.0f} MiB in {len(peak.processes)} processes")
    for size, command in peak.processes:
        print(f"  {size:7.0f} MiB  {command}")
    raise SystemExit(child.returncode)


def sample(mark: str) -> Peak:
    """Return the memory, now, of all processes whose environment holds `mark`."""
    processes: list[tuple[float, str]] = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another user
            environment = (process / "environ").read_bytes()
            if mark.encode() not in environment.split(b"\0"):
                continue
            words = (process / "cmdline").read_bytes().split(b"\0")
            command = b" ".join(words).decode(errors="replace")
            size = proportional_size(process)
            processes.append((size, command[:80]))
    processes.sort(reverse=True)
    total = sum(size for size, _ in processes)
    return Peak(total, tuple(processes))


def proportional_size(process: Path) -> float:
    """Return the proportional set size of a process, in MiB."""
    lines = (process / "smaps_rollup").read_text().splitlines()
    for line in lines:
        if line.startswith("Pss:"):
            kibibytes = line.split()[1]
            return int(kibibytes) / 1024
    return 0.0


if __name__ == "__main__":
    main()
