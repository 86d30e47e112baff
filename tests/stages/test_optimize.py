"""The update: where it stands on the schedule, what it refuses to put together, and that it makes the student more like the teacher."""

import json
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

import stages.__main__ as command
from stages.optimize import (
    Labelled,
    _drawn,
    _loss,
    _on_policy,
    _probe,
    _read,
    _require_alignment,
    _scores,
    _to_go,
    _token_batch,
)
from tests.small_run import HOST
from tests.vla_opd import small
from tests.vla_opd.policies.test_checkpoint import publish
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import read_manifest
from vla_opd.learning.decisions import Decisions
from vla_opd.learning.objectives import (
    OBJECTIVES,
    DecisionBatch,
    TokenBatch,
    confidence,
    group_advantage,
    grpo,
    masked_mean,
    of,
    reverse_kl,
    tempered,
)
from vla_opd.learning.optimizer import train
from vla_opd.learning.update import budget
from vla_opd.params.load import load
from vla_opd.params.objective import OptimizeParams
from vla_opd.params.run import Params
from vla_opd.params.stages import DemonstrationSet, PretrainedParams, RunParams
from vla_opd.policies.checkpoint import Checkpoint, open_checkpoint
from vla_opd.policies.load import build_policy, load_policy

RECIPE = PretrainedParams(demonstrations="main", steps=3, learning_rate=1e-3)


def params(optimize: OptimizeParams) -> Params:
    return Params(
        run=RunParams(name="test"),
        environment=small.ENVIRONMENT,
        optimize=optimize,
        demonstrations={"main": DemonstrationSet(episodes=1)},
        pretrained={"teacher": RECIPE, "student": RECIPE},
        iterations={},
        evaluations={},
    )


def labelled(rows: int = 6) -> Labelled:
    random = np.random.default_rng(0)
    mask = random.random((rows, small.TOKENS)) < 0.7
    mask[0], mask[1] = False, True
    logits = torch.from_numpy(random.normal(size=(rows, small.TOKENS, small.BINS)))
    return Labelled(
        small.observations(rows), mask, logits.log_softmax(-1).numpy().astype(np.float16)
    )


def store(folder: Path, kind: str, parents: dict[str, str], facts: dict[str, object]) -> str:
    with draft(folder, kind, parents, {}) as work:
        return work.publish(facts).digest


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, str]:
    """A student, its trajectories, and their labels."""
    publish(tmp_path / "student", {"a": torch.ones(1)}, {"checkpoint": small.FACTS.model_dump()})
    student = open_checkpoint(tmp_path / "student").digest
    trajectories = store(tmp_path / "trajectories", "trajectories", {"student": student}, {})
    logits = store(
        tmp_path / "logits",
        "logits",
        {"trajectories": trajectories},
        {"action_space": small.SPACE.model_dump()},
    )
    return {"student": student, "trajectories": trajectories, "logits": logits}


def align(root: Path) -> dict[str, str]:
    return _require_alignment(
        open_checkpoint(root / "student"), root / "trajectories", root / "logits"
    )


def test_what_belongs_together_is_accepted(tmp_path: Path, stored: dict[str, str]) -> None:
    assert align(tmp_path) == stored


def test_labels_of_other_trajectories_are_refused(tmp_path: Path, stored: dict[str, str]) -> None:
    other = store(
        tmp_path / "trajectories", "trajectories", {"student": stored["student"]}, {"episodes": 3}
    )
    with pytest.raises(
        ValueError,
        match=f"logits: labels trajectories {stored['trajectories'][:12]}; expected {other[:12]}",
    ):
        align(tmp_path)


def test_trajectories_of_another_student_are_refused(
    tmp_path: Path, stored: dict[str, str]
) -> None:
    publish(tmp_path / "student", {"a": torch.zeros(1)}, {"checkpoint": small.FACTS.model_dump()})
    other = open_checkpoint(tmp_path / "student").digest
    with pytest.raises(
        ValueError,
        match=f"trajectories: sampled by {stored['student'][:12]}; expected {other[:12]}",
    ):
        align(tmp_path)


def test_a_teacher_of_other_actions_is_refused(tmp_path: Path, stored: dict[str, str]) -> None:
    space = small.SPACE.model_copy(update={"q99": (0.5, 2.5, 0.0)})
    store(
        tmp_path / "logits",
        "logits",
        {"trajectories": stored["trajectories"]},
        {"action_space": space.model_dump()},
    )
    with pytest.raises(
        ValueError,
        match=r"logits: action_space\.q99 is \(0\.5, 2\.5, 0\.0\) for the teacher; expected the student's \(0\.5, 2\.0, 0\.0\)",
    ):
        align(tmp_path)


def test_both_are_scored_at_one_temperature_on_a_fresh_draw() -> None:
    policy, data, rows = build_policy(small.FACTS).eval(), labelled(), np.array([4, 1, 2])
    with torch.no_grad():
        batch, mask = _token_batch(policy, data, rows, OptimizeParams(temperature=0.7), seed=3)
        expected = tempered(policy.logits(data.observations.at(rows)), 0.7)
        again, _ = _token_batch(policy, data, rows, OptimizeParams(temperature=0.7), seed=3)
        other, _ = _token_batch(policy, data, rows, OptimizeParams(temperature=0.7), seed=4)
    torch.testing.assert_close(batch.student, expected)
    torch.testing.assert_close(
        batch.teacher, tempered(torch.from_numpy(data.teacher[rows]).float(), 0.7)
    )
    np.testing.assert_array_equal(mask.numpy(), data.mask[rows])
    assert torch.equal(batch.draw(), again.draw())
    assert not torch.equal(batch.draw(), other.draw())


def test_draws_follow_the_student() -> None:
    data, logits = (
        labelled(2),
        torch.randn(2, small.TOKENS, small.BINS, generator=torch.Generator().manual_seed(0)),
    )
    policy = cast("torch.nn.Module", SimpleNamespace(logits=lambda _: logits))
    draws = torch.stack(
        [
            _token_batch(policy, data, np.arange(2), OptimizeParams(temperature=0.5), seed)[
                0
            ].draw()
            for seed in range(600)
        ]
    )
    wanted = tempered(logits, 0.5).exp()
    found = torch.nn.functional.one_hot(draws, small.BINS).float().mean(0)
    assert (found - wanted).abs().max() < 5 * (
        0.25 / 600
    ) ** 0.5  # five standard deviations of a frequency


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_the_objectives_mean_over_valid_tokens(name: str) -> None:
    opt = OptimizeParams(objective=name, batch_size=5, temperature=0.8)
    policy, data = build_policy(small.FACTS).eval(), labelled(6)
    found = _loss(data, params(opt), seed=1)(policy, 0)
    with torch.no_grad():
        student = tempered(
            policy.logits(data.observations.at(np.arange(1, 6))), 0.8
        )  # state 0 has no valid token
    teacher = tempered(torch.from_numpy(data.teacher[1:]).float(), 0.8)
    mask = torch.from_numpy(data.mask[1:])
    if name != "reverse_kl_sampled":  # its draws depend on the order of the rows
        expected = masked_mean(
            OBJECTIVES[name](TokenBatch(student, teacher, lambda: torch.zeros_like(mask).long())),
            mask,
        )
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.row["student_entropy"] == pytest.approx(
        masked_mean(-(student.exp() * student).sum(-1), mask).item(), rel=1e-4
    )
    assert ("reverse_kl" in found.row) == (name != "reverse_kl")


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"optimize\.objective is 'mse'; expected one of \['forward_kl', .*'reverse_kl_sampled'\]",
    ):
        _loss(labelled(), params(OptimizeParams(objective="mse")), seed=0)


@pytest.mark.parametrize("name", ["reverse_kl", "reverse_kl_sampled", "forward_kl"])
def test_the_student_becomes_more_like_the_teacher(tmp_path: Path, name: str) -> None:
    opt = OptimizeParams(
        objective=name,
        steps=12,
        batch_size=8,
        learning_rate=5e-3,
        schedule_iterations=1,
        temperature=1.0,
    )
    torch.manual_seed(0)
    policy, data = build_policy(small.FACTS).eval(), labelled(8)
    before = _probe(policy, data, opt)
    train(
        policy,
        _loss(data, params(opt), seed=1),
        budget(opt, 0, len(data.usable)),
        tmp_path,
        None,
        "it001",
    )
    after = _probe(policy, data, opt)
    assert after.reverse_kl < 0.8 * before.reverse_kl
    assert after.teacher_entropy == before.teacher_entropy
    assert _probe(policy, data, opt) == after


# The options of a loss, and what the rollout decided


def on_policy(data: Labelled, **settings: object) -> tuple[Labelled, OptimizeParams]:
    """The states as two groups of three episodes of one state each, decided at all but the last; in the first group one of three succeeded."""
    opt = OptimizeParams.model_validate(
        {"batch_size": 6, "keep_low": 0.1, "keep_high": 0.9, **settings}
    )
    random, rows = np.random.default_rng(1), len(data.mask)
    decisions = Decisions(
        decided=np.arange(rows) < rows - 1,
        tokens=random.integers(0, small.BINS, data.mask.shape),
        log_probs=random.normal(-2, 0.3, data.mask.shape).astype(np.float32),
        episode=np.arange(rows),
        group=np.arange(rows) // 3,
        success=np.array([True, False, False, False, False, False]),
    )
    return replace(data, on_policy=_on_policy(data, decisions, opt, 0.7)), opt


def test_mixed_learns_from_the_teacher_at_every_decision_and_from_the_rewards_of_groups_that_count() -> (
    None
):
    data, opt = on_policy(labelled(), objective="mixed", distill=0.5)
    assert data.on_policy is not None
    assert data.usable.tolist() == [
        1,
        2,
        3,
        4,
    ]  # state 0 has no valid token; the second group, of 3 and 4, has no success
    assert on_policy(labelled(), objective="mixed", distill=0.0)[0].usable.tolist() == [1, 2]
    policy = build_policy(small.FACTS).eval()
    found = _loss(data, params(opt.model_copy(update={"batch_size": 4})), seed=1)(policy, 0)
    rows = data.usable
    with torch.no_grad():
        batch, mask = _token_batch(policy, data, rows, opt, 0)
        assert isinstance(batch, DecisionBatch)
        tokens = torch.from_numpy(data.on_policy.decisions.tokens[rows])
        now = (
            tempered(policy.logits(data.observations.at(rows)), 0.7)
            .gather(-1, tokens.unsqueeze(-1))
            .squeeze(-1)
        )
        torch.testing.assert_close(
            batch.taken.now, now
        )  # at the rollout's temperature, whatever the score's
        assert batch.taken.advantage[2:].tolist() == [0, 0]
        advantage = group_advantage(torch.tensor([True, False, False]))[1:]
        rewarded = grpo(replace(batch.taken, advantage=torch.cat([advantage, torch.zeros(2)])))
        per_episode = torch.stack(
            [rewarded[i][mask[i]].mean() for i in range(2)]
        )  # of one decision each
        expected = per_episode.mean() + 0.5 * masked_mean(reverse_kl(batch), mask)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert set(found.row) == {"student_entropy", "reverse_kl", "clip_fraction"}


def test_the_published_form_learns_from_every_decision() -> None:
    data, opt = on_policy(labelled(), objective="reverse_kl_rollout", discount=0.5)
    assert data.on_policy is not None
    data = replace(
        data,
        on_policy=replace(
            data.on_policy, to_go=np.linspace(1, 2, len(data.mask), dtype=np.float32)
        ),
    )
    assert data.usable.tolist() == [1, 2, 3, 4]
    policy, rows = build_policy(small.FACTS).eval(), data.usable
    found = _loss(data, params(opt.model_copy(update={"batch_size": 4})), seed=1)(policy, 0)
    with torch.no_grad():
        batch, mask = _token_batch(policy, data, rows, opt, 0)
        assert isinstance(batch, DecisionBatch)
        to_go = torch.from_numpy(data.on_policy.to_go[rows]).unsqueeze(-1)
        assert to_go[:-1].abs().min() > 0
        student, teacher = (
            of(log_probs, batch.tokens) for log_probs in (batch.student, batch.teacher)
        )
        expected = masked_mean(-student * (teacher - student + to_go), mask)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert set(found.row) == {"student_entropy", "reverse_kl"}


def test_a_decisions_reward_to_go_is_that_of_its_episode_at_its_valid_tokens() -> None:
    data = labelled(4)
    opt = OptimizeParams(objective="reverse_kl_rollout", discount=0.5, teacher_temperature=0.9)
    random = np.random.default_rng(1)
    decisions = Decisions(
        decided=np.array([True, False, True, True]),
        tokens=random.integers(0, small.BINS, data.mask.shape),
        log_probs=random.normal(-2, 0.3, data.mask.shape).astype(np.float32),
        episode=np.array([0, 0, 0, 1]),
        group=np.zeros(4, np.int64),
        success=np.zeros(4, np.bool_),
    )
    teacher = tempered(torch.from_numpy(data.teacher).float(), 0.9).numpy()
    reward = (
        np.take_along_axis(teacher, decisions.tokens[..., None], -1)[..., 0] - decisions.log_probs
    )
    later = (reward[2] * data.mask[2]).sum()
    assert _to_go(data, decisions, opt) == pytest.approx([0.5 * later, 0, 0, 0], rel=1e-5)
    cut = (np.clip(reward[2], -0.4, 0.4) * data.mask[2]).sum()
    assert _to_go(data, decisions, opt.model_copy(update={"clamp": 0.4})) == pytest.approx(
        [0.5 * cut, 0, 0, 0], rel=1e-5
    )
    assert not _to_go(data, decisions, opt.model_copy(update={"discount": 0.0})).any()


def test_the_anchor_and_the_teachers_confidence_are_in_the_loss_and_in_the_record() -> None:
    opt = OptimizeParams(batch_size=5, anchor=0.3, confidence=1.0, teacher_temperature=0.5)
    policy, data = build_policy(small.FACTS).eval(), labelled()
    torch.manual_seed(1)
    other = build_policy(small.FACTS).eval()
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    data = replace(data, initial=_scores(other, data, opt))
    found = _loss(data, params(opt), seed=1)(policy, 0)
    with torch.no_grad():
        student, first = (
            tempered(p.logits(data.observations.at(np.arange(1, 6))), 1.0) for p in (policy, other)
        )
    teacher, mask = (
        tempered(torch.from_numpy(data.teacher[1:]).float(), 0.5),
        torch.from_numpy(data.mask[1:]),
    )
    weight = confidence(teacher, 1.0)
    away = masked_mean((student.exp() * (student - first)).sum(-1), mask).item()
    plain = masked_mean((student.exp() * (student - teacher)).sum(-1) * weight, mask).item()
    assert found.loss.item() == pytest.approx(plain + 0.3 * away, rel=1e-4)
    assert away > 1e-3
    assert found.row["reverse_kl"] == pytest.approx(
        masked_mean((student.exp() * (student - teacher)).sum(-1), mask).item(), rel=1e-4
    )
    assert found.row["anchor_kl"] == pytest.approx(away, rel=1e-4)
    assert found.row["confidence"] == pytest.approx(masked_mean(weight, mask).item(), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        [
            "optimize.objective=mixed",
            "optimize.distill=0.5",
            "optimize.keep_low=0",
            "optimize.keep_high=1",
        ],
        [
            "optimize.objective=reverse_kl_rollout",
            "optimize.ratio=true",
            "optimize.centre=true",
            "optimize.clamp=0.001",
        ],
    ],
)
def test_the_trainers_log_probabilities_are_the_rollouts_own(
    small: Path, settings: list[str]
) -> None:
    """On a real run: before the first step no ratio is off by more than the arithmetic of another batch size."""
    run = load("params.yaml", settings)
    student = open_checkpoint(small / "checkpoints/student")
    data = _read(
        run.optimize,
        small / "trajectories/it001",
        small / "logits/it001",
        student.facts.action_space,
    )
    assert len(data.usable) > 50
    policy = load_policy(student, "cpu")
    batch, _ = _token_batch(policy, data, data.usable, run.optimize, 0)
    assert isinstance(batch, DecisionBatch)
    torch.testing.assert_close(batch.taken.now, batch.taken.then, rtol=0, atol=1e-4)
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert (
        command.main(
            [
                "optimize",
                "--iteration",
                "it001",
                "--device",
                "cpu",
                "--tracking",
                "none",
                *arguments,
            ]
        )
        == 0
    )
    rows = [
        json.loads(line)
        for line in (small / "checkpoints/it001/metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == run.optimize.steps
    assert (
        rows[0]["clip_fraction"] == 0
        if run.optimize.objective == "mixed"
        else rows[0]["clamp_fraction"] > 0.5
    )


def test_the_teachers_own_rollouts_are_no_students(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("sample", "label"):
        assert (
            command.main(
                [
                    verb,
                    "--iteration",
                    "it001",
                    "--device",
                    "cpu",
                    "--tracking",
                    "none",
                    "--set",
                    "sample.visited_by=teacher",
                ]
            )
            == 0
        )
    capsys.readouterr()
    arguments = ["--set", "optimize.objective=mixed"]
    assert small.is_dir()
    assert (
        command.main(
            [
                "optimize",
                "--iteration",
                "it001",
                "--device",
                "cpu",
                "--tracking",
                "none",
                *arguments,
            ]
        )
        == 2
    )
    assert (
        "the teacher acted (sample.visited_by); expected the student, whose own tokens mixed learns from"
        in capsys.readouterr().err
    )


def test_without_a_group_to_learn_from_the_student_stays_as_it_is(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        f"--set=optimize.{one}"
        for one in ("objective=mixed", "distill=0", "keep_low=0.99", "keep_high=0.995")
    ]
    assert (
        command.main(
            [
                "optimize",
                "--iteration",
                "it001",
                "--device",
                "cpu",
                "--tracking",
                "none",
                *arguments,
            ]
        )
        == 0
    )
    assert (
        "no state to learn from (keep_low, keep_high, recoverable); the student stays as it is"
        in capsys.readouterr().err
    )
    ours, theirs = (
        open_checkpoint(small / "checkpoints" / name).weights() for name in ("it001", "student")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_anchor_is_a_parent_and_gone_before_the_student_comes(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = list[weakref.ref[torch.nn.Module]]()

    def load(checkpoint: Checkpoint, device: str) -> Any:
        assert all(one() is None for one in loaded)
        policy = load_policy(checkpoint, device)
        loaded.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr("stages.optimize.load_policy", load)
    assert (
        command.main(
            [
                "optimize",
                "--iteration",
                "it001",
                "--device",
                "cpu",
                "--tracking",
                "none",
                "--set",
                "optimize.anchor=0.1",
            ]
        )
        == 0
    )
    assert len(loaded) == 2
    assert (
        open_checkpoint(small / "checkpoints/it001").manifest.parents["anchor"]
        == open_checkpoint(small / "checkpoints/student").digest
    )
    rows = [
        json.loads(line)
        for line in (small / "checkpoints/it001/metrics.jsonl").read_text().splitlines()
    ]
    assert rows[0]["anchor_kl"] == pytest.approx(
        0, abs=1e-4
    )  # the student is the one that the run began with
    assert rows[-1]["anchor_kl"] > 1e-3


def test_as_many_states_as_told_are_learnt_from(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def optimize(states: int) -> int:
        return command.main(
            ["optimize", "--iteration", "it001", *HOST, "--set", f"optimize.states={states}"]
        )

    assert optimize(50) == 0
    facts = open_checkpoint(small / "checkpoints/it001").manifest.facts
    assert facts["learnt_from"] == 50 < facts["states"]
    capsys.readouterr()
    assert optimize(100_000) == 2
    assert (
        f"optimize.states is 100000; expected at most the {facts['states']} states that there are to learn from"
        in capsys.readouterr().err
    )


def test_a_drawn_state_is_one_to_learn_from() -> None:
    data = labelled(30)
    kept = _drawn(data, 12, seed=1)
    assert kept.sum() == 12
    assert set(np.flatnonzero(kept)) < set(data.usable)
    assert replace(data, kept=kept).usable.tolist() == np.flatnonzero(kept).tolist()
    assert not (replace(data, kept=kept).learnt & ~kept[:, None]).any()
    assert kept.tolist() != _drawn(data, 12, seed=2).tolist()
    some = replace(data, kept=data.mask[:, 0])
    assert not (_drawn(some, 3, seed=1) & ~data.mask[:, 0]).any()


def test_states_of_earlier_iterations_are_learnt_from_too_if_so_told(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--set", "iterations.it002=it001", "--device", "cpu", "--tracking", "none"]

    def stage(verb: str, *settings: str, iteration: str = "it002") -> int:
        return command.main(
            [
                verb,
                "--iteration",
                iteration,
                *more,
                *(part for setting in settings for part in ("--set", setting)),
            ]
        )

    assert [stage("sample"), stage("label"), stage("optimize")] == [0, 0, 0]
    alone = read_manifest(small / "checkpoints/it002", "checkpoint")
    assert stage("optimize", "optimize.earlier=1") == 0
    both = read_manifest(small / "checkpoints/it002", "checkpoint")
    before = read_manifest(small / "checkpoints/it001", "checkpoint").facts
    assert both.facts["states"] == alone.facts["states"] + before["states"]
    assert both.facts["learnt_from"] == alone.facts["learnt_from"] + before["learnt_from"]
    assert both.facts["before"] == alone.facts["before"]  # of this iteration's states alone
    assert both.facts["failed_share"] == alone.facts["failed_share"]
    assert both.files["model.safetensors"] != alone.files["model.safetensors"]
    assert stage("optimize", "optimize.earlier=5") == 0  # there is only one
    assert (
        read_manifest(small / "checkpoints/it002", "checkpoint").files["model.safetensors"]
        == both.files["model.safetensors"]
    )
    assert (
        stage("optimize", "optimize.earlier=1", f"optimize.states={both.facts['learnt_from']}") == 0
    )
    assert stage("label", "label.dtype=float32", iteration="it001") == 0
    assert stage("optimize", "optimize.earlier=1") == 2
    assert re.search(
        r"logits/it001: is \w{12}; expected \w{12}, which \S+checkpoints/it001 learnt from",
        capsys.readouterr().err,
    )
    shutil.rmtree(small / "trajectories/it001")
    assert stage("optimize", "optimize.earlier=1") == 2
    assert (
        "trajectories/it001: no manifest.json; expected a complete artifact of kind 'trajectories'"
        in capsys.readouterr().err
    )
    assert stage("optimize", "optimize.earlier=1", "optimize.objective=mixed") == 2
    assert (
        "optimize.earlier is 1; expected 0 with optimize.objective mixed" in capsys.readouterr().err
    )
