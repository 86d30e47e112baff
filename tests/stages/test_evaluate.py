"""Evaluation: intervals, and a journal that survives a kill."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from stages.evaluate import Record, _read_journal, success


def records(successes: int, episodes: int) -> list[Record]:
    return [Record("reach-v3", n, n < successes, 7) for n in range(episodes)]


@pytest.mark.parametrize(
    ("successes", "episodes", "confidence", "z"),
    [(0, 10, 0.95, 1.959963984540054), (7, 10, 0.95, 1.959963984540054), (10, 10, 0.95, 1.959963984540054), (30, 50, 0.99, 2.5758293035489004)],
)
def test_intervals_are_wilsons(successes: int, episodes: int, confidence: float, z: float) -> None:
    p = successes / episodes
    centre = (p + z**2 / (2 * episodes)) / (1 + z**2 / episodes)
    half = z / (1 + z**2 / episodes) * np.sqrt(p * (1 - p) / episodes + z**2 / (4 * episodes**2))
    found = success(records(successes, episodes), confidence)
    assert found["success"] == p
    assert found["episodes"] == episodes
    assert found["low"] == pytest.approx(centre - half, abs=1e-9)
    assert found["high"] == pytest.approx(centre + half, abs=1e-9)


def journal(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    return path


def line(record: Record) -> str:
    return json.dumps(asdict(record)) + "\n"


def test_a_journal_returns_its_records(tmp_path: Path) -> None:
    wanted = records(2, 4)
    assert _read_journal(journal(tmp_path, "".join(map(line, wanted)))) == wanted
    assert _read_journal(tmp_path / "none") == []


@pytest.mark.parametrize("cut", [1, 20, 50])
def test_a_line_cut_by_a_kill_is_dropped_and_the_journal_goes_on(tmp_path: Path, cut: int) -> None:
    wanted = records(2, 4)
    path = journal(tmp_path, "".join(map(line, wanted[:3])) + line(wanted[3])[:cut])
    assert _read_journal(path) == wanted[:3]
    with path.open("a") as stream:
        stream.write(line(wanted[3]))
    assert _read_journal(path) == wanted


def test_a_journal_of_one_cut_line_is_empty(tmp_path: Path) -> None:
    path = journal(tmp_path, '{"task": "re')
    assert _read_journal(path) == []
    assert not path.read_text()
