"""GRPO's update: on a real run's own decisions, towards what succeeded, and on its own schedule."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import stages.__main__ as command
from stages.reinforce import Rolled, _loss, _read
from tests.small_run import HOST
from vla_opd.artifacts.manifest import open_artifact
from vla_opd.learning.objectives import of, tempered
from vla_opd.learning.optimizer import train
from vla_opd.learning.update import MOMENTS, budget
from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import Policy, load_policy


@pytest.fixture
def rolled(small: Path) -> tuple[Params, Policy, Rolled]:
    params, student = load("params.yaml"), open_checkpoint(small / "checkpoints/it001")
    explored = open_artifact(small / "trajectories/rl001", "trajectories").params["explore"]
    return (
        params,
        load_policy(student, "cpu"),
        _read(explored, small / "trajectories/rl001", student.facts.action_space.chunk),
    )


def log_probs(policy: Policy, data: Rolled) -> torch.Tensor:
    """Of the rollout's tokens at the states to learn from, at the rollout's temperature."""
    with torch.no_grad():
        now = tempered(policy.logits(data.observations.at(data.usable)), data.temperature)
        return of(now, torch.from_numpy(data.decisions.tokens[data.usable]))


def test_before_the_first_step_no_ratio_is_off(rolled: tuple[Params, Policy, Rolled]) -> None:
    params, policy, data = rolled
    assert len(data.usable) > 20
    then = torch.from_numpy(data.decisions.log_probs[data.usable])
    torch.testing.assert_close(log_probs(policy, data), then, rtol=0, atol=1e-4)
    found = _loss(
        data, params.reinforce.model_copy(update={"batch_size": len(data.usable)}), seed=1
    )(policy, 0)
    assert found.row["clip_fraction"] == 0
    mask, advantage, weight = (
        array[data.usable] for array in (data.mask, data.graded.advantage, data.graded.weight)
    )
    assert found.loss.item() == pytest.approx(
        -(mask * (advantage * weight)[:, None]).sum() / mask.sum(), abs=1e-4
    )


def test_what_succeeded_becomes_likelier_and_what_failed_less(
    rolled: tuple[Params, Policy, Rolled], tmp_path: Path
) -> None:
    params, policy, data = rolled
    its = params.reinforce.model_copy(
        update={"learning_rate": 1e-3, "steps": 30, "batch_size": len(data.usable)}
    )
    before = log_probs(policy, data)
    rows, _ = train(
        policy, _loss(data, its, seed=1), budget(its, 0, len(data.usable)), tmp_path, None, "rl001"
    )
    change = ((log_probs(policy, data) - before).numpy() * data.mask[data.usable]).mean(1)
    won = data.graded.advantage[data.usable] > 0
    assert change[won].mean() > 0.02
    assert change[~won].mean() < -0.02
    assert rows[-1]["clip_fraction"] > 0


def test_which_groups_count_is_what_was_said_when_they_were_rolled_out(small: Path) -> None:
    before = (small / "checkpoints/rl001/manifest.json").read_bytes()
    (small / "checkpoints/rl001").rename(small / "aside")
    assert (
        command.main(
            [
                "reinforce",
                "--iteration",
                "rl001",
                *HOST,
                "--set",
                "explore.keep_low=0",
                "--set",
                "explore.keep_high=1",
            ]
        )
        == 0
    )
    assert (small / "checkpoints/rl001/manifest.json").read_bytes() == before


def test_trajectories_of_another_student_are_refused(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        command.main(
            ["reinforce", "--iteration", "rl001", *HOST, "--set", "reinforcements.rl001=student"]
        )
        == 2
    )
    ours, theirs = (
        open_checkpoint(small / "checkpoints" / name).digest[:12] for name in ("it001", "student")
    )
    assert (
        f"trajectories/rl001: sampled by {ours}; expected {theirs}, the student in"
        in capsys.readouterr().err
    )


def test_moments_go_on_from_an_iteration_of_the_same_kind_only(small: Path) -> None:
    assert (small / "checkpoints/it001" / MOMENTS).is_file()
    first = [
        json.loads(line)
        for line in (small / "checkpoints/rl001/metrics.jsonl").read_text().splitlines()
    ]
    assert first[0]["learning_rate"] == pytest.approx(1e-4)  # the beginning of its own schedule
    assert steps_in(small / "checkpoints/rl001" / MOMENTS) == {12.0}
    for verb in ("explore", "reinforce"):
        assert (
            command.main(
                [verb, "--iteration", "rl002", *HOST, "--set", "reinforcements.rl002=rl001"]
            )
            == 0
        )
    assert steps_in(small / "checkpoints/rl002" / MOMENTS) == {24.0}


def steps_in(path: Path) -> set[float]:
    """How many steps the moments have seen."""
    import safetensors.numpy

    return {
        float(value)
        for name, value in safetensors.numpy.load_file(path).items()
        if name.endswith("/step")
    }


def test_without_a_group_to_learn_from_the_student_stays_as_it_is(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "--set",
        "explore.keep_low=0.99",
        "--set",
        "explore.keep_high=0.995",
        "--set",
        "explore.rounds=1",
    ]
    for verb in ("explore", "reinforce"):
        assert command.main([verb, "--iteration", "rl001", *HOST, *settings]) == 0
    assert (
        "reinforce rl001: no state to learn from (keep_low, keep_high, recoverable); the student stays as it is"
        in capsys.readouterr().err
    )
    ours, theirs = (
        open_checkpoint(small / "checkpoints" / name).weights() for name in ("rl001", "it001")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (
        json.loads((small / "checkpoints/rl001/manifest.json").read_text())["facts"]["states"] == 0
    )


def test_a_loss_that_is_not_finite_keeps_its_batch(rolled: tuple[Params, Policy, Rolled]) -> None:
    _, _, data = rolled
    kept = data.at(data.usable[:2])
    assert set(kept) == {"states", "frames", "proprio", "mask", "tokens", "log_probs", "advantage"}
    np.testing.assert_array_equal(kept["tokens"], data.decisions.tokens[data.usable[:2]])
