"""`opd plan --memory`: the table, and what doesn't fit."""

from pathlib import Path

import pytest

from flows import cli
from flows.cli.capacity import plan
from tests.vla_opd import public
from vla_opd.params.load import load

PARAMS = """
run: {name: public}
environment:
  {family: libero, tasks: [libero_object/0], cameras: [agentview], image_size: 256, render: exact,
   wording: benchmark}
adopt: {student: {folder: public}, teacher: {folder: public}}
label: {batch_size: 2}
optimize: {lora_rank: 4, batch_size: 4}
iterations: {it001: student}
reinforcements: {rl001: it001}
reinforce: {lora_rank: 4, batch_size: 2}
evaluations: {}
"""


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public.make(tmp_path / "public")
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)


def test_every_stage_that_runs_a_policy_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--memory", "--capacity", "80"]) == 0
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines() if " MB " in line][:6] == [
        "evaluate",
        "sample",
        "label",
        "optimize",
        "explore",
        "reinforce",
    ]
    assert "of 80.00 GB at most 90% can be used" in output
    assert (
        "of an iteration, 450 states at most" in output
    )  # a task, a placement, six episodes, 150 / 2 states each


def test_on_several_devices_each_holds_less_of_what_is_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients() -> str:
        assert cli.main(["plan", "--memory", "--capacity", "80"]) == 0
        output = capsys.readouterr().out
        return next(
            line.split()[3] for line in output.splitlines() if line.strip().startswith("optimize")
        )

    alone = float(gradients())
    monkeypatch.setenv("OPD_PROCESSES", "2")
    assert float(gradients()) == pytest.approx(alone / 2, abs=0.1)
    # reinforce.batch_size is two states
    assert cli.main(["plan", "--memory", "--capacity", "80", "--processes", "4"]) == 1
    message = "reinforce.batch_size is 2; expected a multiple of the 4 processes"
    assert message in capsys.readouterr().err


def test_what_does_not_fit_is_named_with_what_would_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", "--memory", "--capacity", "0.02"]) == 1
    output = capsys.readouterr()
    assert "optimize needs " in output.err
    assert (
        "expected at most 18.0 MB (optimize.gradient_checkpointing, "
        "a smaller optimize.batch_size, an adapter (optimize.lora_rank))" in output.err
    )
    assert "evaluate needs" not in output.err
    assert "on the device" in output.out


def test_options_without_an_effect_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["plan", "--capacity", "80"], ["plan", "evaluate@final", "--memory"]):
        assert cli.main(words) == 1
        assert (
            "expected --memory without stages, and --capacity with it only"
            in capsys.readouterr().err
        )


def test_more_states_than_the_host_can_hold_are_too_many() -> None:
    text, excesses = plan(load(overrides=["sample.prompts=100000"]), 80)
    assert "45000000 states at most" in text
    assert len(excesses) == 1
    assert excesses[0].startswith("optimize needs ")
    assert "of the host's memory" in excesses[0]
