"""Records are read as they were written, and journals survive a kill."""

from pathlib import Path

import pytest

from vla_opd.data.records import (
    EPISODES,
    Record,
    new_journal,
    read_journals,
    read_records,
    write_records,
)


def make_records(successes: int, episodes: int) -> list[Record]:
    return [
        Record(task="reach-v3", instruction="reach", state=n, success=n < successes, steps=7)
        for n in range(episodes)
    ]


def test_records_are_read_as_written(tmp_path: Path) -> None:
    records = make_records(1, 3)
    write_records(records, tmp_path / EPISODES)
    assert read_records(tmp_path) == tuple(records)


def test_the_journals_of_all_processes_are_read(tmp_path: Path) -> None:
    records = make_records(2, 4)
    write_records(records[2:], new_journal(tmp_path))
    write_records(records[:2], new_journal(tmp_path))
    (tmp_path / "other.jsonl").write_text("{}")
    assert read_journals(tmp_path) == {("reach-v3", record.state): record for record in records}
    assert read_journals(tmp_path / "none") == {}


@pytest.mark.parametrize("cut", [1, 20, -2])
def test_lines_cut_off_by_a_kill_are_skipped_anywhere_in_the_journal(
    tmp_path: Path, cut: int
) -> None:
    """The journal stays as it is: its writer may still be at work."""
    records = make_records(2, 4)
    complete = "".join(record.to_line() for record in records[:2])
    incomplete = records[2].to_line()[:cut]
    text = f"{complete}{incomplete}\n{records[3].to_line()}{incomplete}"
    path = new_journal(tmp_path)
    path.write_text(text)
    assert list(read_journals(tmp_path).values()) == [*records[:2], records[3]]
    assert path.read_text() == text
