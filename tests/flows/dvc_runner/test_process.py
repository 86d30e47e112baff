"""The DVC process: its answers, its death, and the lines of its output."""

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
    """Record the processes that the test starts."""
    processes: list[subprocess.Popen[bytes]] = []
    start = process._start

    def start_and_record() -> "subprocess.Popen[bytes]":
        processes.append(start())
        return processes[-1]

    monkeypatch.setattr(process, "_start", start_and_record)
    return processes


@pytest.fixture
def dvc() -> Iterator[Dvc]:
    dvc = Dvc()
    yield dvc
    dvc.close()


def test_it_answers_with_dvcs_exit_code_after_the_stages_output(toy: Toy, dvc: Dvc) -> None:
    output: list[str] = []

    def record(line: Line) -> None:
        output.append(line.text)

    assert dvc.repro(STAGE, record, {"TOY_FAILS": "demonstrate main"}) == 255, output
    assert "demonstrate main: no luck" in output
    output.clear()
    assert dvc.repro(STAGE, record, {"TOY_FAILS": ""}) == 0
    assert "demonstrate: 2/2" in output
    assert not [text for text in output if text.endswith(" 0")], (
        "the answer was taken for the stage's output"
    )


def test_nested_contexts_share_one_process(
    toy: Toy, started: "list[subprocess.Popen[bytes]]"
) -> None:
    with process.shared_dvc() as outer:
        outer.repro(STAGE, lambda _: None, {})
        with process.shared_dvc() as inner:
            assert inner.repro(STAGE, lambda _: None, {}) == 0
        assert started[0].poll() is None
    assert [process.returncode for process in started] == [0]


def test_a_process_killed_between_stages_is_started_again(
    toy: Toy, dvc: Dvc, started: "list[subprocess.Popen[bytes]]"
) -> None:
    dvc.repro(STAGE, lambda _: None, {})
    started[0].kill()
    started[0].wait()
    assert dvc.repro(STAGE, lambda _: None, {}) == 0
    assert len(started) == 2


def test_its_death_during_a_stage_is_the_answer(
    toy: Toy, dvc: Dvc, started: "list[subprocess.Popen[bytes]]"
) -> None:
    def kill(line: Line) -> None:
        if line.text == "demonstrate main: from 0 inputs":
            started[0].kill()

    assert dvc.repro(STAGE, kill, {"TOY_SLEEPS": "demonstrate main"}) == -signal.SIGKILL


def test_an_interrupted_reader_ends_it_and_its_stage(
    toy: Toy, dvc: Dvc, started: "list[subprocess.Popen[bytes]]"
) -> None:
    """The stage ends with it: tests/vla_opd/machine/test_parent_death.py."""

    def interrupt(line: Line) -> None:
        if line.text == "demonstrate main: from 0 inputs":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dvc.repro(STAGE, interrupt, {"TOY_SLEEPS": "demonstrate main"})
    assert started[0].wait(timeout=3) == -signal.SIGTERM


def test_it_dies_with_the_process_that_started_it(toy: Toy) -> None:
    """After SIGKILL the kernel ends the child, during a stage too."""
    program = (
        "from flows.dvc_runner.process import Dvc; "
        f"Dvc().repro({STAGE!r}, lambda line: print(line.text, flush=True), "
        "{'TOY_SLEEPS': 'demonstrate main'})"
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
        lines = list(process.read_lines(stream))
    assert lines == [
        Line("one", passing=True),
        Line(" 50%", passing=True),
        Line("100%"),
        Line("two"),
        Line("last"),
    ]
