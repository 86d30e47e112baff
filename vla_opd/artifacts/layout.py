"""Where the artifacts of a run are: `artifacts/<run>/<kind>/<name>`."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path("artifacts")


@dataclass(frozen=True)
class Layout:
    """The folders of a run. root: `artifacts/<run>`."""

    root: Path

    @classmethod
    def of_run(cls, name: str) -> "Layout":
        """Return the layout of the run with that name."""
        return cls(ROOT / name)

    def demonstrations(self, name: str) -> Path:
        """Return the folder of a set of demonstrations."""
        return self.root / "demonstrations" / name

    def checkpoint(self, name: str) -> Path:
        """Return the folder of a checkpoint."""
        return self.root / "checkpoints" / name

    def trajectories(self, iteration: str) -> Path:
        """Return the folder of an iteration's rollouts."""
        return self.root / "trajectories" / iteration

    def labels(self, iteration: str) -> Path:
        """Return the folder of an iteration's labels."""
        return self.root / "labels" / iteration

    def evaluation(self, name: str) -> Path:
        """Return the folder of an evaluation."""
        return self.root / "evaluations" / name

    def report(self) -> Path:
        """Return the folder of the run's report."""
        return self.root / "report" / "page"
