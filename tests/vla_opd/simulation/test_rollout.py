"""Rollouts and demonstrations: the same bytes however they are run, and what exactly an episode records."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.vla_opd.fake_env import EXPERT, FAMILY, SPEED
from vla_opd.data.trajectory import Episode
from vla_opd.envs.protocol import Placement
from vla_opd.params.stages import DemonstrateParams, EnvironmentParams
from vla_opd.policies.policy import Observations
from vla_opd.simulation.demonstrate import BURST_LENGTH, BURST_START, demonstrate, draw_disturbance
from vla_opd.simulation.rollout import (
    Job,
    PoolSettings,
    RolloutSettings,
    Tally,
    choose,
    rollout,
    sample_tokens,
)

ENVIRONMENT = EnvironmentParams(
    family=FAMILY, tasks=("reach", "push"), image_size=16, cameras=("front", "side")
)
CHUNK, DIMS, BINS = 4, 4, 5
TOKENS = CHUNK * DIMS
VALUES = np.linspace(-1, 1, BINS, dtype=np.float32)


@dataclass
class Steering:
    """Bins near the direction of the goal are likely; it sees the frames too. Remembers how many rows each forward pass had."""

    sharpness: float = 1.0
    chunk: int = CHUNK
    action_dim: int = DIMS
    rows: list[int] = field(default_factory=list)

    def logits(self, observations: Observations) -> torch.Tensor:
        self.rows.append(len(observations))
        proprio = torch.from_numpy(observations.proprio)
        ahead = torch.cat(
            [
                proprio[:, 3:] - proprio[:, :3],
                torch.from_numpy(observations.frames).float().mean(dim=(1, 2, 3, 4))[:, None] / 255,
            ],
            dim=1,
        )
        logits = -self.sharpness * (torch.from_numpy(VALUES) - 2 * ahead[:, :, None]) ** 2
        return logits.repeat(1, CHUNK, 1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return VALUES[tokens].reshape(len(tokens), CHUNK, DIMS)


SETTINGS = RolloutSettings(horizon=30, temperature=0.8, observe_every=2)


def some_jobs(
    tasks: Sequence[str] = ("reach", "push"), placements: int = 2, group: int = 2
) -> list[Job]:
    return [
        Job(Placement(task, "training", index), member, seed=1000 * index + member)
        for task in tasks
        for index in range(placements)
        for member in range(group)
    ]


def by_job(episodes: Sequence[Episode]) -> dict[tuple[Placement, int], Episode]:
    found = {(e.placement, e.member): e for e in episodes}
    assert len(found) == len(episodes)
    return found


def assert_same(ours: Sequence[Episode], theirs: Sequence[Episode]) -> None:
    """Byte for byte, whatever the order."""
    left, right = by_job(ours), by_job(theirs)
    assert left.keys() == right.keys()
    for key, episode in left.items():
        for item in fields(Episode):
            a, b = getattr(episode, item.name), getattr(right[key], item.name)
            if isinstance(a, np.ndarray):
                assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), (
                    key,
                    item.name,
                )
            else:
                assert a == b, (key, item.name)


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    """The reference: one worker, jobs in order."""
    return list(rollout(Steering(), some_jobs(), ENVIRONMENT, SETTINGS))


@pytest.mark.parametrize(("workers", "reverse"), [(1, True), (2, True)])
def test_episodes_depend_neither_on_workers_nor_on_order(
    episodes: list[Episode], workers: int, *, reverse: bool
) -> None:
    todo = some_jobs()[:: -1 if reverse else 1]
    assert_same(
        list(
            rollout(
                Steering(), todo, ENVIRONMENT, SETTINGS, pool_settings=PoolSettings(workers=workers)
            )
        ),
        episodes,
    )


def test_every_forward_pass_has_exactly_inference_batch_rows(episodes: list[Episode]) -> None:
    policy = Steering()
    settings = RolloutSettings(horizon=30, temperature=0.8, observe_every=2, inference_batch=3)
    batched = list(
        rollout(policy, some_jobs(), ENVIRONMENT, settings, pool_settings=PoolSettings(workers=2))
    )
    assert set(policy.rows) == {3}  # two workers can never fill three rows: padding always
    assert_same(batched, episodes)
    decisions = sum(len(episode.tokens) for episode in batched)
    assert decisions / 2 <= len(policy.rows) < decisions  # and two at once where possible


def test_members_differ_and_the_group_shares_its_start(episodes: list[Episode]) -> None:
    found = by_job(episodes)
    one, two = (found[Placement("reach", "training", 1), member] for member in (0, 1))
    np.testing.assert_array_equal(one.frames[0], two.frames[0])
    assert one.tokens[0].tolist() != two.tokens[0].tolist()


def test_an_episode_is_what_the_policy_saw_and_did(episodes: list[Episode]) -> None:
    outcomes = Counter(episode.success for episode in episodes)
    assert outcomes[True], "the fixture should show successes"
    for episode in episodes:
        decisions = -(-episode.steps // CHUNK)
        assert episode.tokens.shape == episode.log_probs.shape == (decisions, TOKENS)
        assert episode.actions.shape == (episode.steps, DIMS)
        assert episode.clean.all()
        assert episode.step.tolist() == list(range(0, episode.steps, 2))
        assert episode.frames.shape == (len(episode.step), 2, 16, 16, 3)
        assert episode.instruction == f"reach {episode.placement.task}"
        np.testing.assert_array_equal(
            Steering().decode(episode.tokens).reshape(-1, DIMS)[: episode.steps], episode.actions
        )
        moved = np.cumsum(
            np.concatenate([np.zeros((1, 3)), SPEED * episode.actions[:, :3]]), axis=0
        )
        np.testing.assert_allclose(
            episode.proprio[:, :3], episode.proprio[0, :3] + moved[episode.step], atol=1e-6
        )


def test_recorded_log_probs_are_those_of_the_trainer(episodes: list[Episode]) -> None:
    for episode in episodes:
        at = np.isin(episode.step, np.arange(0, episode.steps, CHUNK))
        states = Observations(
            episode.frames[at], episode.proprio[at], (episode.instruction,) * int(at.sum())
        )
        log_probs = (Steering().logits(states) / 0.8).log_softmax(dim=-1)
        expected = log_probs.gather(-1, torch.from_numpy(episode.tokens).long()[..., None])[..., 0]
        np.testing.assert_allclose(episode.log_probs, expected.numpy(), atol=1e-6)


def test_greedy_takes_the_first_maximum_and_keeps_no_states_unless_told() -> None:
    policy = Steering(sharpness=3.0)
    settings = RolloutSettings(horizon=30, temperature=None)
    jobs = [
        Job(job.placement, job.member, seed) for seed, job in enumerate(some_jobs(placements=1))
    ]  # members differ in their seeds
    greedy = by_job(list(rollout(policy, jobs, ENVIRONMENT, settings)))
    one, two = (greedy[Placement("reach", "training", 0), member] for member in (0, 1))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert one.frames.shape == (0, 2, 16, 16, 3)
    assert len(one.step) == len(one.proprio) == 0
    kept = next(
        rollout(
            policy,
            jobs[:1],
            ENVIRONMENT,
            RolloutSettings(horizon=30, temperature=None, observe_every=4),
        )
    )
    np.testing.assert_array_equal(kept.tokens, one.tokens)
    logits = policy.logits(
        Observations(kept.frames, kept.proprio, (kept.instruction,) * len(kept.step))
    )
    np.testing.assert_array_equal(kept.tokens, logits.numpy().argmax(axis=-1))
    np.testing.assert_allclose(
        kept.log_probs, logits.log_softmax(-1).max(-1).values.numpy(), atol=1e-6
    )


def test_ties_go_to_the_first_bin() -> None:
    tokens, log_probs = choose(
        torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]), None, np.random.default_rng(0)
    )
    assert tokens.tolist() == [1, 0]
    assert log_probs[1] == pytest.approx(np.log(1 / 3))


@pytest.mark.parametrize("horizon", [6, 8])
def test_the_last_chunk_is_cut_off_at_the_horizon(horizon: int) -> None:
    job = some_jobs()[0]
    episode = next(
        rollout(
            Steering(),
            [job],
            ENVIRONMENT,
            RolloutSettings(horizon=horizon, temperature=1.0, observe_every=2),
        )
    )
    assert not episode.success
    assert episode.steps == len(episode.actions) == horizon
    assert len(episode.tokens) == -(-horizon // CHUNK)
    assert episode.step.tolist() == list(range(0, horizon, 2))


def test_observe_every_must_divide_the_chunk() -> None:
    with pytest.raises(
        ValueError,
        match=r"sample.observe_every is 3; expected a divisor of the policy's chunk of 4: one of \[1, 2, 4\]",
    ):
        rollout(
            Steering(),
            some_jobs(),
            ENVIRONMENT,
            RolloutSettings(horizon=8, temperature=1.0, observe_every=3),
        )


@pytest.mark.parametrize(
    "wrong", [{"horizon": 0}, {"temperature": 0.0}, {"observe_every": 0}, {"inference_batch": -1}]
)
def test_rollout_settings_are_checked(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected more than 0"):
        RolloutSettings(**{"horizon": 8, "temperature": 1.0} | wrong)  # type: ignore[arg-type]


def test_a_crash_leaves_no_trace_in_the_episodes(tmp_path: Path) -> None:
    marker = tmp_path / "struck"
    todo = some_jobs(tasks=(f"kill:1:{marker}", "reach"))
    tally = Tally()
    crashed = list(rollout(Steering(), todo, ENVIRONMENT, SETTINGS, tally=tally))
    assert marker.exists()
    assert tally.crashes == 1
    undisturbed = Tally()
    assert_same(crashed, list(rollout(Steering(), todo, ENVIRONMENT, SETTINGS, tally=undisturbed)))
    assert undisturbed.crashes == 0
    assert min(tally.policy_s, tally.waiting_s, tally.simulator_s) > 0


def test_the_sampler_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, -1.0, -np.inf, 1.5, 0.3]]).repeat(200_000, 1)
    tokens = sample_tokens(logits, np.random.Generator(np.random.Philox(7)).random(len(logits)))
    expected = logits[0].double().softmax(-1).numpy()
    observed = np.bincount(tokens, minlength=5) / len(tokens)
    spread = np.sqrt(expected * (1 - expected) / len(tokens))
    assert observed[2] == 0
    assert (np.abs(observed - expected) <= 4 * spread).all()


def test_the_sampler_inverts_the_cumulative_distribution() -> None:
    logits = torch.log(torch.tensor([[0.25, 0.25, 0.5]])).repeat(6, 1)
    uniforms = np.array([0.0, 0.2499, 0.2501, 0.4999, 0.5001, np.nextafter(1.0, 0.0)])
    assert sample_tokens(logits, uniforms).tolist() == [0, 0, 1, 1, 2, 2]
    certain = torch.tensor([[-np.inf, 5.0, -np.inf]]).repeat(2, 1)
    assert sample_tokens(certain, np.array([0.0, np.nextafter(1.0, 0.0)])).tolist() == [1, 1]


def test_low_temperature_approaches_greedy() -> None:
    logits = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    cold, _ = choose(logits, 1e-4, np.random.default_rng(0))
    greedy, _ = choose(logits, None, np.random.default_rng(0))
    np.testing.assert_array_equal(cold, greedy)


DEMONSTRATE = DemonstrateParams(expert=EXPERT, noise=0.2, burst=0.5, observe_every=2, horizon=60)


def test_demonstrations_hold_the_experts_own_actions() -> None:
    todo = some_jobs(placements=4)
    tally = Tally()
    one = list(demonstrate(todo, ENVIRONMENT, DEMONSTRATE, tally=tally))
    assert_same(
        one,
        list(
            demonstrate(todo[::-1], ENVIRONMENT, DEMONSTRATE, pool_settings=PoolSettings(workers=2))
        ),
    )
    assert tally.crashes == 0
    assert sum(episode.success for episode in one) >= 15
    assert 0 < sum(not episode.clean.all() for episode in one) < len(one)
    seeds = {(job.placement, job.member): job.seed for job in todo}
    for episode in one:
        assert episode.step.tolist() == list(range(0, episode.steps, 2))
        assert episode.tokens.shape == episode.log_probs.shape == (0, 0)
        ahead = (
            episode.proprio[:, 3:] - episode.proprio[:, :3]
        )  # what the expert did at the kept states
        np.testing.assert_allclose(
            episode.actions[episode.step, :3],
            ahead / np.linalg.norm(ahead, axis=1, keepdims=True),
            atol=1e-5,
        )
        disturbance = draw_disturbance(seeds[episode.placement, episode.member], 60, 0.2, 0.5)
        np.testing.assert_array_equal(episode.clean, ~disturbance.burst[: episode.steps])
        executed = np.stack(
            [disturbance.executed(step, action) for step, action in enumerate(episode.actions)]
        )
        moved = np.cumsum(np.concatenate([np.zeros((1, 3)), SPEED * executed[:, :3]]), axis=0)
        np.testing.assert_allclose(
            episode.proprio[:, :3], episode.proprio[0, :3] + moved[episode.step], atol=1e-6
        )


def test_without_noise_and_bursts_the_expert_is_undisturbed() -> None:
    disturbance = draw_disturbance(seed=0, horizon=50, noise=0.0, burst=0.0)
    action = np.array([0.3, -0.2, 0.9, -1.0], np.float32)
    assert not disturbance.burst.any()
    np.testing.assert_array_equal(disturbance.executed(7, action), action)


def test_bursts_are_as_promised() -> None:
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
    executed = disturbance.executed(
        step, np.array([1.0, 1.0, 1.0, 0.1, -0.1, 0.2, -1.0], np.float32)
    )
    np.testing.assert_array_equal(executed[:3], disturbance.random[step])
    np.testing.assert_array_equal(executed[3:], np.array([0.1, -0.1, 0.2, -1.0], np.float32))


def test_the_states_that_were_kept_are_counted() -> None:
    tally = Tally()
    found = list(rollout(Steering(), some_jobs(), ENVIRONMENT, SETTINGS, tally=tally))
    assert tally.states == sum(len(episode.step) for episode in found)
    assert 0 < tally.as_metrics()["states_per_second"] < 1e6


def test_a_rate_of_nothing_is_not_told() -> None:
    assert "states_per_second" not in Tally().as_metrics()
    tally = Tally()
    list(
        demonstrate(
            some_jobs(), ENVIRONMENT, DemonstrateParams(expert=EXPERT, horizon=20), tally=tally
        )
    )
    assert tally.as_metrics()["states_per_second"] > 0
