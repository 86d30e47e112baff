"""Whoever takes over does so at the recorded state, and nowhere else; what an expert and a teacher then do there."""

from dataclasses import replace

import numpy as np
import pytest

from tests.vla_opd.fake_env import EXPERT, SPEED, PointMass
from tests.vla_opd.simulation.test_rollout import (
    CHUNK,
    DIMS,
    ENVIRONMENT,
    SETTINGS,
    Steering,
    some_jobs,
)
from vla_opd.data.trajectory import Episode
from vla_opd.envs import make_env
from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.resume import Ask, Recorded, Recovery, Resume, ask, take_over
from vla_opd.simulation.rollout import Job, PoolSettings, RolloutSettings, Tally, rollout

HORIZON = 30


@pytest.fixture(scope="module")
def episodes() -> dict[Job, Episode]:
    """Of a student that often doesn't get there."""
    jobs = some_jobs()
    found = {
        (e.placement, e.member): e
        for e in rollout(Steering(sharpness=0.3), jobs, ENVIRONMENT, SETTINGS)
    }
    return {job: found[job.placement, job.member] for job in jobs}


@pytest.fixture(scope="module")
def recorded(episodes: dict[Job, Episode]) -> dict[Job, Recorded]:
    return {
        job: Recorded(e.placement, e.success, e.actions, e.step, e.proprio)
        for job, e in episodes.items()
    }


def test_every_kept_state_is_come_to_again(
    episodes: dict[Job, Episode], recorded: dict[Job, Recorded]
) -> None:
    env = make_env(ENVIRONMENT)
    for job, episode in episodes.items():
        for row in range(len(episode.step)):
            seen = Resume(recorded[job], row)(env)
            assert (seen.steps, seen.observed.tolist(), seen.success) == (0, [0], False)
            assert seen.frames[0].tobytes() == episode.frames[row].tobytes()
            assert seen.proprio[0].tobytes() == episode.proprio[row].tobytes()


def test_another_state_than_the_recorded_one_is_refused(recorded: dict[Job, Recorded]) -> None:
    one = next(iter(recorded.values()))
    elsewhere = replace(one, proprio=one.proprio + np.float32(0.01))
    with pytest.raises(
        ValueError,
        match=r"environment\.family: .*was replayed for 4 control steps, and proprioception was .*, recorded is",
    ):
        Resume(elsewhere, 2)(make_env(ENVIRONMENT))


def test_an_episode_that_ends_on_the_way_is_refused(recorded: dict[Job, Recorded]) -> None:
    job = next(iter(recorded))
    env = PointMass(ENVIRONMENT)
    env.reset(job.placement)
    ahead = env.goal - env.position
    straight = np.append(ahead / np.abs(ahead).max(), 0)[None].repeat(60, 0).astype(np.float32)
    there = Recorded(
        job.placement,
        False,
        straight,
        np.arange(0, 60, 2, dtype=np.int32),
        np.zeros((30, 6), np.float32),
    )
    with pytest.raises(ValueError, match="was replayed for 58 control steps, and it ended after "):
        Resume(there, 29)(env)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_expert_is_asked_at_every_state(recorded: dict[Job, Recorded], workers: int) -> None:
    answers = dict(
        ask(recorded, ENVIRONMENT, EXPERT, CHUNK, PoolSettings(workers=workers), Tally())
    )
    assert answers.keys() == recorded.keys()
    for job, one in recorded.items():
        actions, executed = answers[job].actions, answers[job].executed
        assert actions.shape == (len(one.step), CHUNK, DIMS)
        ahead = one.proprio[:, 3:] - one.proprio[:, :3]
        np.testing.assert_allclose(
            actions[:, 0, :3], ahead / np.linalg.norm(ahead, axis=1, keepdims=True), atol=1e-5
        )
        followed = (
            ahead - SPEED * actions[:, 0, :3]
        )  # closed loop: the second action is from where the first led
        on = executed[:, 1]
        np.testing.assert_allclose(
            actions[on, 1, :3],
            followed[on] / np.linalg.norm(followed[on], axis=1, keepdims=True),
            atol=1e-5,
        )
        assert (actions[..., 3] == 1).all()


def test_after_success_the_experts_last_action_stays(recorded: dict[Job, Recorded]) -> None:
    job = next(iter(recorded))
    env = PointMass(ENVIRONMENT)
    env.reset(job.placement)
    ahead = env.goal - env.position
    straight, steps = ahead / np.linalg.norm(ahead), 0
    while np.linalg.norm(env.goal - env.position) - SPEED >= 0.15:
        env.advance(np.append(straight, 0)[None].astype(np.float32), 0)
        steps += 1
    actions = np.append(straight, 0)[None].repeat(steps, 0).astype(np.float32)
    proprio = np.concatenate([env.position, env.goal]).astype(np.float32)[None]
    near = Recorded(job.placement, False, actions, np.array([steps], np.int32), proprio)
    answer = Ask(near, EXPERT, CHUNK)(env)
    assert answer.actions.shape == (CHUNK, DIMS)
    assert (answer.actions == answer.actions[0]).all()
    assert answer.clean.tolist() == [True, False, False, False]  # it is there after one step


@pytest.mark.parametrize("workers", [1, 2])
def test_a_state_is_recoverable_if_the_teacher_succeeds_from_there(
    recorded: dict[Job, Recorded], workers: int
) -> None:
    teacher, settings = Steering(sharpness=50.0), RolloutSettings(12, None)
    every = 2
    found = dict(
        take_over(
            teacher, recorded, ENVIRONMENT, settings, every, PoolSettings(workers=workers), Tally()
        )
    )
    assert found.keys() == recorded.keys()
    outcomes = set[bool]()
    for job, one in recorded.items():
        if one.success:
            assert found[job].recoverable.all()
            assert (found[job].env_steps, found[job].decisions) == (0, 0)
            continue
        expected = _by_hand(teacher, one, settings.horizon, every * CHUNK)
        assert found[job].recoverable.tolist() == expected.recoverable.tolist()
        assert (found[job].env_steps, found[job].decisions) == (
            expected.env_steps,
            expected.decisions,
        )
        outcomes |= set(expected.recoverable.tolist())
    assert outcomes == {True, False}, "the fixture should show both"


def _by_hand(teacher: Steering, one: Recorded, horizon: int, every: int) -> Recovery:
    env: PointMass = make_env(EnvironmentParams.model_validate(ENVIRONMENT.model_dump()))  # pyright: ignore[reportAssignmentType]
    recoverable, steps, decisions = np.zeros(len(one.step), np.bool_), 0, 0
    for start in range(0, len(one.actions), every):
        env.reset(one.placement)
        env.advance(one.actions[:start], 0)
        taken, success = 0, False
        while taken < horizon and not success:
            ahead = np.concatenate([env.position, env.goal]).astype(np.float32)
            tokens = teacher.logits(_seen(env, ahead)).argmax(-1).numpy()
            done = env.advance(teacher.decode(tokens)[0][: horizon - taken], 0)
            taken, success, decisions = taken + done.steps, done.success, decisions + 1
        steps += taken
        recoverable[(one.step >= start) & (one.step < start + every)] = success
    return Recovery(recoverable, steps, decisions)


def _seen(env: PointMass, proprio: np.ndarray):
    from vla_opd.policies.policy import Observations

    return Observations(env.look().frames[None], proprio[None], ("",))
