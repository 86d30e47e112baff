"""How far a run is, and what is said of it."""

import json
import os
from pathlib import Path

import pytest

from flows import terminal
from flows.pipeline import Step
from flows.status import read_status
from vla_opd.artifacts.draft import scratch_folder
from vla_opd.artifacts.progress import Progress
from vla_opd.machine.host import METRICS

DONE = Step("sample@it001", stale=False, missing=False, due=False)
AT_WORK = Step("label@it001", at_work=True, outs=("artifacts/toy/labels/it001",))
TO_COME = Step("optimize@it001")
PROGRESS = {"done": 3, "total": 5, "unit": "shard", "seconds_left": 40.0}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def record_execution(stage: str, seconds: int) -> None:
    """Record that an execution of the stage took less than a minute."""
    row = {
        "id": stage,
        "stage": stage,
        "name": "it000",
        "digest": "d",
        "began": "2026-12-01T00:00:00Z",
        "ended": f"2026-12-01T00:00:{seconds:02d}Z",
        "host": "h",
        "user": "u",
        "commit": "",
        "edited": False,
        "device": "cpu",
    }
    path = METRICS / "toy/executions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write_progress(step: Step) -> None:
    scratch = scratch_folder(Path(step.outs[0]))
    scratch.mkdir(parents=True)
    (scratch / f"{os.getpid()}.progress").write_text(json.dumps(PROGRESS))


def test_stages_are_done_at_work_or_to_come() -> None:
    write_progress(AT_WORK)
    status = read_status("toy", (DONE, AT_WORK, TO_COME))
    assert status.done == (DONE,)
    assert status.at_work == {AT_WORK: Progress(3, 5, "shard", 40.0)}
    assert status.to_come == (TO_COME,)


def test_a_stage_that_was_started_by_hand_is_at_work() -> None:
    by_hand = Step("label@it001", outs=AT_WORK.outs)
    write_progress(by_hand)
    assert list(read_status("toy", (by_hand,)).at_work) == [by_hand]


def test_the_time_left_is_that_of_the_last_stages_of_their_kind() -> None:
    record_execution("optimize", 50)
    record_execution("optimize", 20)
    write_progress(AT_WORK)
    status = read_status("toy", (DONE, AT_WORK, TO_COME))
    assert status.seconds_left == 40 + 20
    assert status.unknown == ()
    assert "time left  about 1:00" in terminal.format_status("toy", status)


def test_a_stage_at_work_without_progress_takes_as_long_as_the_last() -> None:
    record_execution("label", 30)
    assert read_status("toy", (AT_WORK,)).seconds_left == 30


def test_what_has_never_run_makes_the_time_left_unknown() -> None:
    record_execution("optimize", 20)
    status = read_status("toy", (Step("sample@it002"), TO_COME))
    assert status.unknown == ("sample",)
    said = terminal.format_status("toy", status)
    assert "time left  over 0:20: how long sample takes here is not known yet" in said


def test_the_status_is_a_few_lines_however_many_stages_there_are() -> None:
    write_progress(AT_WORK)
    waiting = tuple(Step(f"sample@it{number:03d}") for number in range(2, 30))
    said = terminal.format_status("toy", read_status("toy", (DONE, AT_WORK, *waiting))).splitlines()
    assert said[0] == "toy: 1 of 30 stages are up to date"
    assert said[1] == "  at work    label@it001          3 of 5 shards, 0:40 left"
    assert said[2] == "  to come    sample@it002, sample@it003 ... sample@it029 (28 in all)"
    assert len(said) == 4


def test_a_run_that_is_up_to_date_has_no_time_left() -> None:
    said = terminal.format_status("toy", read_status("toy", (DONE,)))
    assert said == "toy: 1 of 1 stages are up to date"
