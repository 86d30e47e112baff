"""Resuming recorded episodes at exactly their states, by an expert or a teacher."""

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
    by_job,
    some_jobs,
)
from vla_opd.data.trajectory import Episode
from vla_opd.envs import make_env
from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.resume import (
    EpisodeRecord,
    QueryExpert,
    Recovery,
    Resume,
    find_recoverable_states,
    query_expert,
)
from vla_opd.simulation.rollout import Job, PoolSettings, RolloutSettings, SimulationStats, rollout

HORIZON = 30


@pytest.fixture(scope="module")
def episodes() -> dict[Job, Episode]:
    """Roll out a student that often fails."""
    jobs = some_jobs()
    student = Steering(sharpness=0.3)
    episode_of = by_job(list(rollout(student, jobs, ENVIRONMENT, SETTINGS)))
    return {job: episode_of[job.placement, job.member] for job in jobs}


@pytest.fixture(scope="module")
def recorded(episodes: dict[Job, Episode]) -> dict[Job, EpisodeRecord]:
    return {
        job: EpisodeRecord(
            episode.placement, episode.success, episode.actions, episode.step, episode.proprio
        )
        for job, episode in episodes.items()
    }


def test_every_kept_state_is_restored(
    episodes: dict[Job, Episode], recorded: dict[Job, EpisodeRecord]
) -> None:
    env = make_env(ENVIRONMENT)
    for job, episode in episodes.items():
        for row in range(len(episode.step)):
            outcome = Resume(recorded[job], row)(env)
            assert (outcome.steps, outcome.observed.tolist(), outcome.success) == (0, [0], False)
            assert outcome.frames[0].tobytes() == episode.frames[row].tobytes()
            assert outcome.proprio[0].tobytes() == episode.proprio[row].tobytes()


def test_another_state_than_the_recorded_one_is_refused(recorded: dict[Job, EpisodeRecord]) -> None:
    record = next(iter(recorded.values()))
    elsewhere = replace(record, proprio=record.proprio + np.float32(0.01))
    message = (
        r"environment\.family: .*was replayed for 4 control steps, "
        "and proprioception was .*, recorded is"
    )
    with pytest.raises(ValueError, match=message):
        Resume(elsewhere, 2)(make_env(ENVIRONMENT))


def test_an_episode_that_ends_on_the_way_is_refused(recorded: dict[Job, EpisodeRecord]) -> None:
    job = next(iter(recorded))
    env = PointMass(ENVIRONMENT)
    env.reset(job.placement)
    ahead = env.goal - env.position
    straight = np.append(ahead / np.abs(ahead).max(), 0)[None].repeat(60, 0).astype(np.float32)
    record = EpisodeRecord(
        job.placement,
        False,
        straight,
        np.arange(0, 60, 2, dtype=np.int32),
        np.zeros((30, 6), np.float32),
    )
    with pytest.raises(ValueError, match="was replayed for 58 control steps, and it ended after "):
        Resume(record, 29)(env)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_expert_acts_from_every_state(recorded: dict[Job, EpisodeRecord], workers: int) -> None:
    answers = dict(
        query_expert(
            recorded, ENVIRONMENT, EXPERT, CHUNK, PoolSettings(workers=workers), SimulationStats()
        )
    )
    assert answers.keys() == recorded.keys()
    for job, record in recorded.items():
        actions, executed = answers[job].actions, answers[job].executed
        assert actions.shape == (len(record.step), CHUNK, DIMS)
        ahead = record.proprio[:, 3:] - record.proprio[:, :3]
        np.testing.assert_allclose(
            actions[:, 0, :3], ahead / np.linalg.norm(ahead, axis=1, keepdims=True), atol=1e-5
        )
        # Closed loop: the second action starts where the first led.
        followed = ahead - SPEED * actions[:, 0, :3]
        on = executed[:, 1]
        np.testing.assert_allclose(
            actions[on, 1, :3],
            followed[on] / np.linalg.norm(followed[on], axis=1, keepdims=True),
            atol=1e-5,
        )
        assert (actions[..., 3] == 1).all()


def test_after_success_the_experts_last_action_stays(recorded: dict[Job, EpisodeRecord]) -> None:
    job = next(iter(recorded))
    env = PointMass(ENVIRONMENT)
    env.reset(job.placement)
    ahead = env.goal - env.position
    straight = ahead / np.linalg.norm(ahead)
    steps = 0
    while np.linalg.norm(env.goal - env.position) - SPEED >= 0.15:
        env.advance(np.append(straight, 0)[None].astype(np.float32), 0)
        steps += 1
    actions = np.append(straight, 0)[None].repeat(steps, 0).astype(np.float32)
    proprio = np.concatenate([env.position, env.goal]).astype(np.float32)[None]
    record = EpisodeRecord(job.placement, False, actions, np.array([steps], np.int32), proprio)
    answer = QueryExpert(record, EXPERT, CHUNK)(env)
    assert answer.actions.shape == (CHUNK, DIMS)
    assert (answer.actions == answer.actions[0]).all()
    assert answer.clean.tolist() == [True, False, False, False]  # it succeeds after one step


@pytest.mark.parametrize("workers", [1, 2])
def test_a_state_is_recoverable_if_the_teacher_succeeds_from_there(
    recorded: dict[Job, EpisodeRecord], workers: int
) -> None:
    teacher = Steering(sharpness=50.0)
    settings = RolloutSettings(12, None)
    every = 2
    recoveries = dict(
        find_recoverable_states(
            teacher,
            recorded,
            ENVIRONMENT,
            settings,
            every,
            PoolSettings(workers=workers),
            SimulationStats(),
        )
    )
    assert recoveries.keys() == recorded.keys()
    outcomes = set[bool]()
    for job, record in recorded.items():
        if record.success:
            assert recoveries[job].recoverable.all()
            assert (recoveries[job].env_steps, recoveries[job].decisions) == (0, 0)
            continue
        expected = _recovery_by_hand(teacher, record, settings.horizon, every * CHUNK)
        assert recoveries[job].recoverable.tolist() == expected.recoverable.tolist()
        assert (recoveries[job].env_steps, recoveries[job].decisions) == (
            expected.env_steps,
            expected.decisions,
        )
        outcomes |= set(expected.recoverable.tolist())
    assert outcomes == {True, False}, "the fixture should show both"


def _recovery_by_hand(
    teacher: Steering, record: EpisodeRecord, horizon: int, every: int
) -> Recovery:
    params = EnvironmentParams.model_validate(ENVIRONMENT.model_dump())
    env: PointMass = make_env(params)  # pyright: ignore[reportAssignmentType]
    recoverable = np.zeros(len(record.step), np.bool_)
    steps = 0
    decisions = 0
    for start in range(0, len(record.actions), every):
        env.reset(record.placement)
        env.advance(record.actions[:start], 0)
        executed = 0
        success = False
        while executed < horizon and not success:
            ahead = np.concatenate([env.position, env.goal]).astype(np.float32)
            tokens = teacher.logits(_observe(env, ahead)).argmax(-1).numpy()
            advance = env.advance(teacher.decode(tokens)[0][: horizon - executed], 0)
            executed += advance.steps
            success = advance.success
            decisions += 1
        steps += executed
        recoverable[(record.step >= start) & (record.step < start + every)] = success
    return Recovery(recoverable, steps, decisions)


def _observe(env: PointMass, proprio: np.ndarray):
    from vla_opd.policies.policy import Observations

    return Observations(env.observe().frames[None], proprio[None], ("",))
