"""What is left of the unseen tasks at equal success on the seen ones, from a study's table alone.

`python -m benchmarks.forgetting artifacts/metaworld-forgetting/studies/forgetting --level 0.9 sft=sft_50,sft_150,sft_400 reverse_kl gentle`

A path is an arm's checkpoints from the start on; of several arms (`name=arm,arm`), as of fine-tuning for longer and longer, one after the other.
Where its success on the seen tasks first comes to the level, by a straight line between two points, its success on the unseen ones is read off.
Intervals of 95 % are those of `vla_opd.analysis.bootstrap`:
seeds and initial states drawn again, those of the seen tasks apart from those of the unseen.
Paths of the same seeds share the draws, so the difference of such from the first one is paired; of others it isn't told.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from vla_opd.analysis.bootstrap import RESAMPLES, Estimate, Study, crossing, read_study
from vla_opd.analysis.study_table import read
from vla_opd.artifacts.manifest import open_artifact
from vla_opd.params.run import Params


def main() -> None:
    """Print a line for every path."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("paths", nargs="+", metavar="ARM | NAME=ARM,ARM...")
    parser.add_argument("--level", type=float, default=0.9, help="success on the seen tasks")
    arguments = parser.parse_args()
    names = Params.model_validate(
        open_artifact(arguments.table, "study").params["parameters"]
    ).report
    rows = read(arguments.table)
    seen, unseen = (
        read_study(rows, names.start, names.teacher, seen=which) for which in (True, False)
    )
    print(
        f"| | unseen at {arguments.level:.0%} of the seen | against the first | comes so far in |\n|---|---|---|---|"
    )
    paths = {
        name or arms: arms.split(",")
        for name, _, arms in (path.rpartition("=") for path in arguments.paths)
    }
    lefts = {name: at_level(seen, unseen, arms, arguments.level) for name, arms in paths.items()}
    first = next(iter(lefts.values()))
    for name, left in lefts.items():
        further = (
            left.minus(first).told("") if left is not first and left.seeds == first.seeds else ""
        )
        print(
            f"| {name} | {left.told('never')} | {further} | {np.isfinite(left.resampled).mean():.0%} of the resamples |"
        )


@dataclass(frozen=True)
class Left:
    """Success on the unseen tasks, or a difference of two: the mean's over seeds, and each resample's. Not finite where the level isn't reached.

    seeds: of every arm along the path. Only paths of the same seeds share all draws.
    """

    seeds: tuple[tuple[int, ...], ...]
    value: float
    resampled: Float[np.ndarray, " R"]

    def minus(self, other: "Left") -> "Left":
        """The paired difference."""
        with np.errstate(invalid="ignore"):  # neither comes so far
            return Left(self.seeds, self.value - other.value, self.resampled - other.resampled)

    def estimate(self) -> Estimate:
        """The interval is that of the resamples that come so far."""
        return Estimate.of(self.value, self.resampled[np.isfinite(self.resampled)])

    def told(self, otherwise: str) -> str:
        """In percent; `otherwise` where the level isn't reached."""
        if not np.isfinite(self.value):
            return otherwise
        its = self.estimate()
        return f"{its.value:.1%} [{its.low:.1%}, {its.high:.1%}]"


def at_level(seen: Study, unseen: Study, arms: Sequence[str], level: float) -> Left:
    """Success on the unseen tasks where that on the seen ones first is `level`; infinite where it never is."""
    along = [_path(study, arms) for study in (seen, unseen)]
    (found,) = crossing(*(means[None] for means, _ in along), np.array([level]))
    seeds = {curve.seeds for curve in seen.curves if curve.arm in arms}
    return Left(
        tuple(sorted(seeds)),
        float(found),
        crossing(*(resampled for _, resampled in along), np.full(RESAMPLES, level)),
    )


def _path(
    study: Study, arms: Sequence[str]
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "R P"]]:
    """Success along a path, the mean over seeds: as it was, and in each resample."""
    by_name = {curve.arm: curve for curve in study.curves}
    if missing := [arm for arm in arms if arm not in by_name]:
        raise SystemExit(f"the table has no arm {missing[0]!r}; expected some of {sorted(by_name)}")
    means, resampled = [study.start.mean(keepdims=True)], [study.resampled_start[:, None]]
    for curve in map(by_name.__getitem__, arms):
        own = slice(int(curve.checkpoints[0] == "start"), None)  # the start is there already
        means.append(curve.outcomes.mean((0, 2))[own])
        resampled.append(study.resampled(curve)[:, own])
    return np.concatenate(means), np.concatenate(resampled, axis=1)


if __name__ == "__main__":
    main()
