"""evaluate: the journal survives a kill, and the first episodes in order decide."""

from pathlib import Path

import pytest

from stages.evaluate import _line as line
from stages.evaluate import _read_journals, decide, plan_states
from vla_opd.analysis.comparison import SequentialTest
from vla_opd.analysis.evaluation import Record
from vla_opd.params.stages import EvaluateParams


def make_records(successes: int, episodes: int) -> list[Record]:
    return [
        Record(task="reach-v3", instruction="reach", state=n, success=n < successes, steps=7)
        for n in range(episodes)
    ]


def write_journal(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / f"journal-{name}.jsonl"
    path.write_text(text)
    return path


def read_records(folder: Path) -> list[Record]:
    """Read the journals' records, each of which comes with its state."""
    entries = list(_read_journals(folder))
    assert all(state == (record.task, record.state) for state, record in entries)
    return [record for _, record in entries]


def test_the_journals_of_all_processes_are_read(tmp_path: Path) -> None:
    records = make_records(2, 4)
    write_journal(tmp_path, "b", "".join(map(line, records[2:])))
    write_journal(tmp_path, "a", "".join(map(line, records[:2])))
    (tmp_path / "other.jsonl").write_text("{}")
    assert read_records(tmp_path) == records
    assert read_records(tmp_path / "none") == []


@pytest.mark.parametrize("cut", [1, 20, -2])
def test_lines_cut_off_by_a_kill_are_skipped_anywhere_in_the_journal(
    tmp_path: Path, cut: int
) -> None:
    """The journal stays as it is: its writer may still be at work."""
    records = make_records(2, 4)
    complete = "".join(map(line, records[:2]))
    incomplete = line(records[2])[:cut]
    text = f"{complete}{incomplete}\n{line(records[3])}{incomplete}"
    path = write_journal(tmp_path, "a", text)
    assert read_records(tmp_path) == [*records[:2], records[3]]
    assert path.read_text() == text


def test_the_first_planned_episodes_decide() -> None:
    """Whichever finished first, so the decision does not depend on the number of workers."""
    settings = EvaluateParams(episodes=30, decide=(0.5, 0.95))
    planned = plan_states(settings, ("a", "b"))
    assert planned[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    records = {
        (task, state): Record(task=task, instruction="", state=state, success=True, steps=7)
        for task, state in planned
    }
    _, count = SequentialTest(0.5, 0.95).decide([True] * 60)
    assert count == 5
    too_few = {state: records[state] for state in planned[: count - 1]}
    assert decide(settings, planned, too_few) is None
    without_second = {state: records[state] for state in planned if state != planned[1]}
    assert decide(settings, planned, without_second) is None
    deciding = [records[state] for state in planned[:count]]
    assert decide(settings, planned, records) == (deciding, 0.95)


def test_without_rates_to_decide_between_all_episodes_are_played() -> None:
    settings = EvaluateParams(episodes=3)
    expected = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    assert plan_states(settings, ("a", "b")) == expected
    assert decide(settings, [("a", 0)], {}) is None
