"""Evaluation: a journal that survives a kill."""

from pathlib import Path

import pytest

from stages.evaluate import _line as line
from stages.evaluate import _read_journal
from vla_opd.evaluation import Record


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
