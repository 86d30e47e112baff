"""Demonstrations: the expert's own actions as labels, and the disturbances that are executed."""

import numpy as np
import pytest

from tests.vla_opd.fake_env import EXPERT, SPEED
from tests.vla_opd.simulation.test_rollout import ENVIRONMENT, assert_same, some_jobs
from vla_opd.params.stages import DemonstrateParams
from vla_opd.simulation.demonstrate import BURST_LENGTH, BURST_START, demonstrate, draw_disturbance
from vla_opd.simulation.pool import PoolSettings, SimulationStats

DEMONSTRATE = DemonstrateParams(expert=EXPERT, noise=0.2, burst=0.5, observe_every=2, horizon=60)


def test_demonstrations_hold_the_experts_own_actions() -> None:
    jobs = some_jobs(placements=4)
    stats = SimulationStats()
    episodes = list(demonstrate(jobs, ENVIRONMENT, DEMONSTRATE, stats=stats))
    two_workers = PoolSettings(workers=2)
    reversed_order = list(demonstrate(jobs[::-1], ENVIRONMENT, DEMONSTRATE, two_workers))
    assert_same(episodes, reversed_order)
    assert stats.crashes == 0
    assert sum(episode.success for episode in episodes) >= 15
    assert 0 < sum(not episode.clean.all() for episode in episodes) < len(episodes)
    seeds = {(job.placement, job.member): job.seed for job in jobs}
    for episode in episodes:
        assert episode.step.tolist() == list(range(0, episode.steps, 2))
        assert episode.tokens.shape == episode.log_probs.shape == (0, 0)
        # The expert moves towards the goal from the kept states.
        ahead = episode.proprio[:, 3:] - episode.proprio[:, :3]
        np.testing.assert_allclose(
            episode.actions[episode.step, :3],
            ahead / np.linalg.norm(ahead, axis=1, keepdims=True),
            atol=1e-5,
        )
        disturbance = draw_disturbance(seeds[episode.placement, episode.member], 60, 0.2, 0.5)
        np.testing.assert_array_equal(episode.clean, ~disturbance.burst[: episode.steps])
        executed = np.stack(
            [disturbance.apply(step, action) for step, action in enumerate(episode.actions)]
        )
        moved = np.cumsum(np.concatenate([np.zeros((1, 3)), SPEED * executed[:, :3]]), axis=0)
        np.testing.assert_allclose(
            episode.proprio[:, :3], episode.proprio[0, :3] + moved[episode.step], atol=1e-6
        )


def test_without_noise_and_bursts_the_expert_is_undisturbed() -> None:
    disturbance = draw_disturbance(seed=0, horizon=50, noise=0.0, burst=0.0)
    action = np.array([0.3, -0.2, 0.9, -1.0], np.float32)
    assert not disturbance.burst.any()
    np.testing.assert_array_equal(disturbance.apply(7, action), action)


def test_bursts_have_the_documented_number_length_and_times() -> None:
    with_any = 0
    for seed in range(400):
        disturbance = draw_disturbance(seed, 300, 0.15, 0.5)
        at = np.flatnonzero(disturbance.burst)
        with_any += bool(len(at))
        if len(at):
            assert BURST_LENGTH[0] <= len(at) <= 2 * BURST_LENGTH[1]
            assert at[0] >= BURST_START[0]
            assert at[-1] < BURST_START[1] + BURST_LENGTH[1]
    assert 160 <= with_any <= 240  # 4 standard deviations around a half
    assert draw_disturbance(3, 300, 0.15, 1.0).burst.any()
    assert not draw_disturbance(3, 8, 0.15, 1.0).burst.any()  # too short for any
    assert draw_disturbance(0, 5000, 0.15, 0.0).noise.std() == pytest.approx(0.15, rel=0.05)


def test_bursts_execute_random_xyz_and_leave_the_gripper() -> None:
    disturbance = draw_disturbance(seed=1, horizon=300, noise=0.0, burst=1.0)
    step = int(np.flatnonzero(disturbance.burst)[0])
    executed = disturbance.apply(step, np.array([1.0, 1.0, 1.0, 0.1, -0.1, 0.2, -1.0], np.float32))
    np.testing.assert_array_equal(executed[:3], disturbance.random[step])
    np.testing.assert_array_equal(executed[3:], np.array([0.1, -0.1, 0.2, -1.0], np.float32))


def test_the_demonstrated_states_are_counted() -> None:
    stats = SimulationStats()
    params = DemonstrateParams(expert=EXPERT, horizon=20)
    list(demonstrate(some_jobs(), ENVIRONMENT, params, stats=stats))
    assert stats.as_metrics()["states_per_second"] > 0
