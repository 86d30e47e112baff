"""Evaluation: a journal that survives a kill."""

from pathlib import Path

import pytest

from stages.evaluate import _decision, _read_journal, _wanted
from stages.evaluate import _line as line
from vla_opd.comparison import SequentialTest
from vla_opd.evaluation import Record
from vla_opd.params import EvaluateParams


def records(successes: int, episodes: int) -> list[Record]:
    return [Record(task="reach-v3", instruction="reach", state=n, success=n < successes, steps=7) for n in range(episodes)]


def journal(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    return path


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


def test_a_decision_is_made_by_the_first_episodes_that_are_wanted() -> None:
    """Whichever finished first: so it is the same however many workers there are."""
    how = EvaluateParams(episodes=30, decide=(0.5, 0.95))
    wanted = _wanted(how, ("a", "b"))
    assert wanted[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    every = {(task, state): Record(task=task, instruction="", state=state, success=True, steps=7) for task, state in wanted}
    needed = SequentialTest(0.5, 0.95).decide([True] * 60)[1]
    assert needed == 5
    assert _decision(how, wanted, {key: every[key] for key in wanted[: needed - 1]}) is None
    late = {key: every[key] for key in wanted if key != wanted[1]}
    assert _decision(how, wanted, late) is None
    assert _decision(how, wanted, every) == ([every[key] for key in wanted[:needed]], 0.95)


def test_without_a_question_nothing_is_decided() -> None:
    how = EvaluateParams(episodes=3)
    assert _wanted(how, ("a", "b")) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    assert _decision(how, [("a", 0)], {}) is None
