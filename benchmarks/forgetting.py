"""What is left of the unseen tasks at equal success on the seen ones, from a study's table alone.

`python -m benchmarks.forgetting artifacts/metaworld-forgetting/studies/forgetting --level 0.9 sft=sft_50,sft_150,sft_400 reverse_kl gentle`

A path is an arm's checkpoints from the start on; of several arms (`name=arm,arm`), as of fine-tuning for longer and longer, one after the other.
Where its success on the seen tasks first comes to the level, by a straight line between two points, its success on the unseen ones is read off.
Intervals of 95 % are those of `vla_opd.curves`: seeds and initial states drawn again, those of the seen tasks apart from those of the unseen.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from vla_opd.artifacts import open_artifact
from vla_opd.curves import RESAMPLES, Study, crossing, read_study
from vla_opd.params import Params
from vla_opd.study import read


def main() -> None:
    """Print a line for every path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("paths", nargs="+", metavar="ARM | NAME=ARM,ARM...")
    parser.add_argument("--level", type=float, default=0.9, help="success on the seen tasks")
    arguments = parser.parse_args()
    names = Params.model_validate(open_artifact(arguments.table, "study").params["parameters"]).report
    rows = read(arguments.table)
    seen, unseen = (read_study(rows, names.start, names.teacher, seen=which) for which in (True, False))
    print(f"| | unseen at {arguments.level:.0%} of the seen | comes so far in |\n|---|---|---|")
    for path in arguments.paths:
        name, _, arms = path.rpartition("=")
        value, low, high, share = at_level(seen, unseen, arms.split(","), arguments.level)
        told = "never" if np.isinf(value) else f"{value:.1%} [{low:.1%}, {high:.1%}]"
        print(f"| {name or arms} | {told} | {share:.0%} of the resamples |")


def at_level(seen: Study, unseen: Study, arms: Sequence[str], level: float) -> tuple[float, float, float, float]:
    """Success on the unseen tasks where that on the seen ones first is `level`: with its interval, and the share of the resamples that come so far.

    Infinite where the means over seeds never do; the interval is that of the resamples that do.
    """
    along = [_path(study, arms) for study in (seen, unseen)]
    (found,) = crossing(*(means[None] for means, _ in along), np.array([level]))
    drawn = crossing(*(resampled for _, resampled in along), np.full(RESAMPLES, level))
    came = drawn[np.isfinite(drawn)]
    low, high = np.quantile(came, [0.025, 0.975]) if len(came) else (np.inf, np.inf)
    return float(found), float(low), float(high), len(came) / RESAMPLES


def _path(study: Study, arms: Sequence[str]) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "R P"]]:
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
