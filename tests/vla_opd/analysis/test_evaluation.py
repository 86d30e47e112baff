"""Scores against Wilson's formula, and records that are read as they were written."""

from pathlib import Path

import numpy as np
import pytest

from vla_opd.analysis.evaluation import EPISODES, Record, read_records, score


@pytest.mark.parametrize(
    ("successes", "episodes", "confidence", "z"),
    [
        (0, 10, 0.95, 1.959963984540054),
        (7, 10, 0.95, 1.959963984540054),
        (10, 10, 0.95, 1.959963984540054),
        (30, 50, 0.99, 2.5758293035489004),
    ],
)
def test_intervals_are_wilsons(successes: int, episodes: int, confidence: float, z: float) -> None:
    p = successes / episodes
    centre = (p + z**2 / (2 * episodes)) / (1 + z**2 / episodes)
    half = z / (1 + z**2 / episodes) * np.sqrt(p * (1 - p) / episodes + z**2 / (4 * episodes**2))
    result = score([True] * successes + [False] * (episodes - successes), confidence)
    assert (result.success, result.episodes) == (p, episodes)
    assert result.low == pytest.approx(centre - half, abs=1e-9)
    assert result.high == pytest.approx(centre + half, abs=1e-9)


def test_no_episodes_have_no_score() -> None:
    with pytest.raises(ValueError, match="expected at least one episode"):
        score([], 0.95)


def test_records_are_read_as_written(tmp_path: Path) -> None:
    records = tuple(
        Record(task="reach-v3", instruction="reach", state=n, success=n == 1, steps=7 + n)
        for n in range(3)
    )
    (tmp_path / EPISODES).write_text("".join(record.model_dump_json() + "\n" for record in records))
    assert read_records(tmp_path) == records
