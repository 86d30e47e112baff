"""The DVC process that stays: its answers, its death in every way, and what it reads."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.dvc_runner import process
from flows.dvc_runner.process import Dvc, Line
from tests.flows.toy import Toy
from tests.processes import dies

STAGE = "demonstrate@main"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> "list[subprocess.Popen[bytes]]":
    """The processes that were started in the test."""
    all_of_them: list[subprocess.Popen[bytes]] = []
    start = process._started

    def noted() -> "subprocess.Popen[bytes]":
        all_of_them.append(start())
        return all_of_them[-1]

    monkeypatch.setattr(process, "_started", noted)
    return all_of_them


@pytest.fixture
def dvc() -> Iterator[Dvc]:
    made = Dvc()
    yield made
    made.close()


def test_it_answers_with_dvcs_exit_code_after_all_that_the_stage_said(toy: Toy, dvc: Dvc) -> None:
    heard: list[str] = []
    assert (
        dvc.repro(STAGE, lambda line: heard.append(line.text), {"TOY_FAILS": "demonstrate main"})
        == 255
    ), heard
    assert "demonstrate main: no luck" in heard
    heard.clear()
    assert dvc.repro(STAGE, lambda line: heard.append(line.text), {"TOY_FAILS": ""}) == 0
    assert "demonstrate: 2/2" in heard
    assert not [text for text in heard if text.endswith(" 0")], (
        "the answer was taken for something that the stage said"
    )


def test_one_process_serves_a_context_and_what_is_inside_it(
    toy: Toy, started: "list[subprocess.Popen[bytes]]"
) -> None:
    with process.staying() as outer:
        outer.repro(STAGE, lambda _: None, {})
        with process.staying() as inner:
            assert inner.repro(STAGE, lambda _: None, {}) == 0
        assert started[0].poll() is None
    assert [one.returncode for one in started] == [0]


def test_one_that_was_killed_between_stages_is_started_again(
    toy: Toy, dvc: Dvc, started: "list[subprocess.Popen[bytes]]"
) -> None:
    dvc.repro(STAGE, lambda _: None, {})
    started[0].kill()
    started[0].wait()
    assert dvc.repro(STAGE, lambda _: None, {}) == 0
    assert len(started) == 2


def test_its_death_in_the_middle_of_a_stage_is_the_answer(
    toy: Toy, dvc: Dvc, started: "list[subprocess.Popen[bytes]]"
) -> None:
    def kill(line: Line) -> None:
        if line.text == "demonstrate main: from 0 inputs":
            started[0].kill()

    assert dvc.repro(STAGE, kill, {"TOY_SLEEPS": "demonstrate main"}) == -signal.SIGKILL


def test_an_interrupted_reader_ends_it_and_with_it_the_stage(
    toy: Toy, dvc: Dvc, started: "list[subprocess.Popen[bytes]]"
) -> None:
    """Of the stage: tests/test_lifeline.py."""

    def interrupt(line: Line) -> None:
        if line.text == "demonstrate main: from 0 inputs":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dvc.repro(STAGE, interrupt, {"TOY_SLEEPS": "demonstrate main"})
    assert started[0].wait(timeout=3) == -signal.SIGTERM


def test_it_dies_with_the_process_that_started_it(toy: Toy) -> None:
    """SIGKILL leaves no chance to clean up: the kernel ends the child, in the middle of a stage too."""
    program = (
        "from flows.dvc_runner.process import Dvc; "
        f"Dvc().repro({STAGE!r}, lambda line: print(line.text, flush=True), {{'TOY_SLEEPS': 'demonstrate main'}})"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(process.__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        assert any(line == "demonstrate main: from 0 inputs\n" for line in parent.stdout)
        (child,) = psutil.Process(parent.pid).children()
        parent.kill()
    assert dies(child.pid, within_s=3)


def test_carriage_returns_end_passing_lines() -> None:
    read, write = os.pipe()
    os.write(write, b"one\r 50%\r100%\r\ntwo\nlast")
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        heard = list(process.lines(stream))
    assert heard == [
        Line("one", passing=True),
        Line(" 50%", passing=True),
        Line("100%"),
        Line("two"),
        Line("last"),
    ]
