"""How far a draft is: a progress bar whose numbers other processes can read."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from vla_opd.artifacts.draft import scratch_folder

SUFFIX = ".progress"
INTERVAL_S = 5.0  # between two updates


@dataclass(frozen=True)
class Progress:
    """Work that is under way.

    done, total:  in units, e.g. episodes.
    seconds_left: at the present rate; None before the first unit is done.
    """

    done: int
    total: int
    unit: str
    seconds_left: float | None


class ProgressBar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
    """A bar on the terminal, with its numbers in the scratch folder of a draft.

    Each process writes a file of its own: a draft may be made by several.
    """

    def __init__(
        self, items: Iterable[Any] | None, label: str, *, scratch: Path, **options: Any
    ) -> None:
        self._file = scratch / f"{os.getpid()}{SUFFIX}"
        super().__init__(items, label, mininterval=INTERVAL_S, **options)

    def display(self, *arguments: Any, **options: Any) -> None:
        """Show the bar, and write its numbers."""
        super().display(*arguments, **options)
        left = self._seconds_left()
        numbers = {"done": self.n, "total": self.total, "unit": self.unit, "seconds_left": left}
        temporary = self._file.with_suffix(".tmp")
        with suppress(FileNotFoundError):  # the draft has been published
            temporary.write_text(json.dumps(numbers))
            temporary.rename(self._file)

    def _seconds_left(self) -> float | None:
        done_here = self.n - self.initial
        if done_here == 0:
            return None
        elapsed = self.format_dict["elapsed"]
        return elapsed / done_here * (self.total - self.n)


def read_progress(target: Path) -> Progress | None:
    """Return how far the processes of this machine are that make an artifact; None without any."""
    parts: list[Progress] = []
    for path in sorted(scratch_folder(target).glob(f"*{SUFFIX}")):
        if psutil.pid_exists(int(path.stem)):
            with suppress(FileNotFoundError):  # it is being published
                parts.append(Progress(**json.loads(path.read_text())))
    if not parts:
        return None
    times = [part.seconds_left for part in parts if part.seconds_left is not None]
    return Progress(
        done=sum(part.done for part in parts),
        total=sum(part.total for part in parts),
        unit=parts[0].unit,
        seconds_left=max(times) if len(times) == len(parts) else None,
    )
