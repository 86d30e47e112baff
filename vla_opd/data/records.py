"""Records of evaluated episodes: the file of an evaluation, and journals of one under way."""

import json
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

EPISODES = "episodes.jsonl"

State = tuple[str, int]  # a task, and the number of one of its initial states


class Record(BaseModel):
    """One episode.

    state: the number of its initial state.
    steps: the control step of the first success, or the horizon; so an evaluation can be scored at
           every shorter horizon too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: str
    instruction: str
    state: int
    success: bool
    steps: int

    def to_line(self) -> str:
        """Return the record as a line of JSON."""
        return json.dumps(self.model_dump(), sort_keys=True) + "\n"


def write_records(records: Iterable[Record], path: Path) -> None:
    """Write one line per record."""
    path.write_text("".join(record.to_line() for record in records))


def read_records(evaluation: Path) -> tuple[Record, ...]:
    """Read the records of an evaluation, in order of task and state."""
    lines = (evaluation / EPISODES).read_text().splitlines()
    return tuple(Record.model_validate_json(line) for line in lines)


# Journals: every process appends to its own.


def new_journal(folder: Path) -> Path:
    """Return a new journal's path."""
    return folder / f"journal-{secrets.token_hex(4)}.jsonl"


def read_journals(folder: Path) -> dict[State, Record]:
    """Read all journals of a folder.

    Lines that a kill cut off are skipped, so their episodes are played again.
    """
    records: dict[State, Record] = {}
    for path in sorted(folder.glob("journal-*.jsonl")):
        for line in path.read_text().splitlines():
            with suppress(ValidationError):
                record = Record.model_validate_json(line)
                records[record.task, record.state] = record
    return records
