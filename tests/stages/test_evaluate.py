"""Evaluation: a journal that survives a kill."""

from pathlib import Path

import pytest

from stages.evaluate import _decision, _read_journals, _wanted
from stages.evaluate import _line as line
from vla_opd.analysis.comparison import SequentialTest
from vla_opd.analysis.evaluation import Record
from vla_opd.params.stages import EvaluateParams


def records(successes: int, episodes: int) -> list[Record]:
    return [
        Record(task="reach-v3", instruction="reach", state=n, success=n < successes, steps=7)
        for n in range(episodes)
    ]


def journal(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / f"journal-{name}.jsonl"
    path.write_text(text)
    return path


def test_the_journals_of_all_processes_are_read(tmp_path: Path) -> None:
    wanted = records(2, 4)
    journal(tmp_path, "b", "".join(map(line, wanted[2:])))
    journal(tmp_path, "a", "".join(map(line, wanted[:2])))
    (tmp_path / "other.jsonl").write_text("{}")
    assert list(_read_journals(tmp_path)) == wanted
    assert list(_read_journals(tmp_path / "none")) == []


@pytest.mark.parametrize("cut", [1, 20, -2])
def test_a_line_cut_by_a_kill_is_passed_over_wherever_it_stands(tmp_path: Path, cut: int) -> None:
    """The journal itself stays as it is: whoever wrote it may still be at work."""
    wanted = records(2, 4)
    text = (
        "".join(map(line, wanted[:2]))
        + line(wanted[2])[:cut]
        + "\n"
        + line(wanted[3])
        + line(wanted[2])[:cut]
    )
    path = journal(tmp_path, "a", text)
    assert list(_read_journals(tmp_path)) == [*wanted[:2], wanted[3]]
    assert path.read_text() == text


def test_a_decision_is_made_by_the_first_episodes_that_are_wanted() -> None:
    """Whichever finished first: so it is the same however many workers there are."""
    how = EvaluateParams(episodes=30, decide=(0.5, 0.95))
    wanted = _wanted(how, ("a", "b"))
    assert wanted[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    every = {
        (task, state): Record(task=task, instruction="", state=state, success=True, steps=7)
        for task, state in wanted
    }
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
