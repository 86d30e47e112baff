r"""Success on unseen tasks at equal success on the seen ones, from a study's table.

`python -m benchmarks.forgetting artifacts/metaworld-forgetting/studies/forgetting --level 0.9 \
    sft=sft_50,sft_150,sft_400 reverse_kl gentle`

A path is an arm's checkpoints from the start on, or those of several arms (`name=arm,arm`), such as
longer and longer fine-tuning. The success on the unseen tasks is read off where that on the seen
ones first reaches the level, on a straight line between two points. The 95 % intervals are those of
`vla_opd.analysis.bootstrap`: seeds and initial states are resampled, those of seen and unseen tasks
apart. Paths of the same seeds share the resamples, so their difference from the first path is
paired; for other seeds it is left out.
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
from vla_opd.params.recorded import read_recorded


def main() -> None:
    """Print a line for every path."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("paths", nargs="+", metavar="ARM | NAME=ARM,ARM...")
    parser.add_argument("--level", type=float, default=0.9, help="success on the seen tasks")
    arguments = parser.parse_args()
    settings = open_artifact(arguments.table, "study").params["parameters"]
    report = read_recorded(settings).report
    rows = read(arguments.table)
    seen = read_study(rows, report.start, report.teacher, seen=True)
    unseen = read_study(rows, report.start, report.teacher, seen=False)
    level = arguments.level
    paths = parse_paths(arguments.paths)
    retained = {name: at_level(seen, unseen, arms, level) for name, arms in paths.items()}
    print(f"| | unseen at {level:.0%} of the seen | against the first | reaches the level in |")
    print("|---|---|---|---|")
    first = next(iter(retained.values()))
    for name, path in retained.items():
        difference = ""
        if path is not first and path.seeds == first.seeds:
            difference = path.minus(first).format("")
        success = path.format("never")
        reached = np.isfinite(path.resampled).mean()
        print(f"| {name} | {success} | {difference} | {reached:.0%} of the resamples |")


def parse_paths(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the arms of each path by its name, of `arm` or `name=arm,arm`."""
    paths: dict[str, list[str]] = {}
    for word in words:
        name, _, arms = word.rpartition("=")
        paths[name or arms] = arms.split(",")
    return paths


@dataclass(frozen=True)
class Retained:
    """Success on the unseen tasks, or a difference of two; infinite where the level isn't reached.

    seeds:     of every arm of the path. Only paths of the same seeds share all resamples.
    value:     the mean over seeds. resampled: that of each resample.
    """

    seeds: tuple[tuple[int, ...], ...]
    value: float
    resampled: Float[np.ndarray, " R"]

    def minus(self, reference: "Retained") -> "Retained":
        """Return the paired difference."""
        with np.errstate(invalid="ignore"):  # neither may reach the level
            resampled = self.resampled - reference.resampled
        return Retained(
            seeds=self.seeds,
            value=self.value - reference.value,
            resampled=resampled,
        )

    def estimate(self) -> Estimate:
        """Return the value with the interval of the resamples that reach the level."""
        finite = np.isfinite(self.resampled)
        return Estimate.from_resamples(self.value, self.resampled[finite])

    def format(self, otherwise: str) -> str:
        """Format in percent; `otherwise` where the level isn't reached."""
        if not np.isfinite(self.value):
            return otherwise
        estimate = self.estimate()
        return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def at_level(seen: Study, unseen: Study, arms: Sequence[str], level: float) -> Retained:
    """Return the success on the unseen tasks where that on the seen ones first is `level`.

    Infinite where it never is.
    """
    seen_means, seen_resampled = success_along(seen, arms)
    unseen_means, unseen_resampled = success_along(unseen, arms)
    levels = np.full(RESAMPLES, level)
    (value,) = crossing(
        seen_means[None],
        unseen_means[None],
        levels[:1],
    )
    seeds = {curve.seeds for curve in seen.curves if curve.arm in arms}
    return Retained(
        seeds=tuple(sorted(seeds)),
        value=float(value),
        resampled=crossing(seen_resampled, unseen_resampled, levels),
    )


def success_along(
    study: Study, arms: Sequence[str]
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "R P"]]:
    """Return the mean success over seeds at the points of a path, and that of each resample."""
    curves = {curve.arm: curve for curve in study.curves}
    start = study.start.mean(keepdims=True)
    resampled_start = study.resampled_start[:, None]
    means = [start]
    resampled = [resampled_start]
    for arm in arms:
        if arm not in curves:
            raise SystemExit(f"the table has no arm {arm!r}; expected some of {sorted(curves)}")
        curve = curves[arm]
        has_start = curve.checkpoints[0] == "start"  # which the path has already
        points = slice(1 if has_start else 0, None)
        curve_means = curve.outcomes.mean((0, 2))
        curve_resampled = study.resampled(curve)
        means.append(curve_means[points])
        resampled.append(curve_resampled[:, points])
    return np.concatenate(means), np.concatenate(resampled, axis=1)


if __name__ == "__main__":
    main()
