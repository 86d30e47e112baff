"""Rollouts: the same bytes however they are run, and the contents of an episode."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.vla_opd.fake_env import FAMILY, SPEED
from vla_opd.data.trajectory import Episode
from vla_opd.envs.protocol import Placement
from vla_opd.params.stages import EnvironmentParams
from vla_opd.policies.policy import Observations
from vla_opd.simulation.rollout import (
    Job,
    PoolSettings,
    RolloutSettings,
    SimulationStats,
    choose_tokens,
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
    """A policy that prefers bins near the direction of the goal, and also depends on the frames.

    rows: of each forward pass.
    """

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
    episode_of = {(episode.placement, episode.member): episode for episode in episodes}
    assert len(episode_of) == len(episodes)
    return episode_of


def assert_same(actual: Sequence[Episode], expected: Sequence[Episode]) -> None:
    """Compare episodes byte by byte, in any order."""
    actual_of = by_job(actual)
    expected_of = by_job(expected)
    assert actual_of.keys() == expected_of.keys()
    for key, episode in actual_of.items():
        for item in fields(Episode):
            a = getattr(episode, item.name)
            b = getattr(expected_of[key], item.name)
            if isinstance(a, np.ndarray):
                assert (a.dtype, a.shape) == (b.dtype, b.shape), (key, item.name)
                assert a.tobytes() == b.tobytes(), (key, item.name)
            else:
                assert a == b, (key, item.name)


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    """Roll out the reference: one worker, jobs in order."""
    return list(rollout(Steering(), some_jobs(), ENVIRONMENT, SETTINGS))


@pytest.mark.parametrize(("workers", "reverse"), [(1, True), (2, True)])
def test_episodes_depend_neither_on_workers_nor_on_order(
    episodes: list[Episode], workers: int, *, reverse: bool
) -> None:
    jobs = some_jobs()[:: -1 if reverse else 1]
    settings = PoolSettings(workers=workers)
    actual = list(rollout(Steering(), jobs, ENVIRONMENT, SETTINGS, pool_settings=settings))
    assert_same(actual, episodes)


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
    episode_of = by_job(episodes)
    placement = Placement("reach", "training", 1)
    first = episode_of[placement, 0]
    second = episode_of[placement, 1]
    np.testing.assert_array_equal(first.frames[0], second.frames[0])
    assert first.tokens[0].tolist() != second.tokens[0].tolist()


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


def test_greedy_takes_the_first_maximum_and_keeps_no_states_by_default() -> None:
    policy = Steering(sharpness=3.0)
    settings = RolloutSettings(horizon=30, temperature=None)
    jobs = [  # members differ in their seeds
        Job(job.placement, job.member, seed) for seed, job in enumerate(some_jobs(placements=1))
    ]
    greedy = by_job(list(rollout(policy, jobs, ENVIRONMENT, settings)))
    placement = Placement("reach", "training", 0)
    first = greedy[placement, 0]
    np.testing.assert_array_equal(first.tokens, greedy[placement, 1].tokens)
    assert first.frames.shape == (0, 2, 16, 16, 3)
    assert len(first.step) == len(first.proprio) == 0
    keeping = RolloutSettings(horizon=30, temperature=None, observe_every=4)
    kept = next(rollout(policy, jobs[:1], ENVIRONMENT, keeping))
    np.testing.assert_array_equal(kept.tokens, first.tokens)
    logits = policy.logits(
        Observations(kept.frames, kept.proprio, (kept.instruction,) * len(kept.step))
    )
    np.testing.assert_array_equal(kept.tokens, logits.numpy().argmax(axis=-1))
    np.testing.assert_allclose(
        kept.log_probs, logits.log_softmax(-1).max(-1).values.numpy(), atol=1e-6
    )


def test_ties_go_to_the_first_bin() -> None:
    tokens, log_probs = choose_tokens(
        torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]), None, np.random.default_rng(0)
    )
    assert tokens.tolist() == [1, 0]
    assert log_probs[1] == pytest.approx(np.log(1 / 3))


@pytest.mark.parametrize("horizon", [6, 8])
def test_the_last_chunk_is_cut_off_at_the_horizon(horizon: int) -> None:
    settings = RolloutSettings(horizon=horizon, temperature=1.0, observe_every=2)
    episode = next(rollout(Steering(), some_jobs()[:1], ENVIRONMENT, settings))
    assert not episode.success
    assert episode.steps == len(episode.actions) == horizon
    assert len(episode.tokens) == -(-horizon // CHUNK)
    assert episode.step.tolist() == list(range(0, horizon, 2))


def test_observe_every_must_divide_the_chunk() -> None:
    settings = RolloutSettings(horizon=8, temperature=1.0, observe_every=3)
    message = (
        r"sample.observe_every is 3; expected a divisor of the policy's chunk of 4: "
        r"one of \[1, 2, 4\]"
    )
    with pytest.raises(ValueError, match=message):
        rollout(Steering(), some_jobs(), ENVIRONMENT, settings)


@pytest.mark.parametrize(
    "wrong", [{"horizon": 0}, {"temperature": 0.0}, {"observe_every": 0}, {"inference_batch": -1}]
)
def test_rollout_settings_are_checked(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected more than 0"):
        RolloutSettings(**{"horizon": 8, "temperature": 1.0} | wrong)  # type: ignore[arg-type]


def test_a_crash_leaves_no_trace_in_the_episodes(tmp_path: Path) -> None:
    marker = tmp_path / "struck"
    jobs = some_jobs(tasks=(f"kill:1:{marker}", "reach"))
    stats = SimulationStats()
    crashed = list(rollout(Steering(), jobs, ENVIRONMENT, SETTINGS, stats=stats))
    assert marker.exists()
    assert stats.crashes == 1
    undisturbed = SimulationStats()
    expected = list(rollout(Steering(), jobs, ENVIRONMENT, SETTINGS, stats=undisturbed))
    assert_same(crashed, expected)
    assert undisturbed.crashes == 0
    assert min(stats.policy_s, stats.waiting_s, stats.simulator_s) > 0


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
    cold, _ = choose_tokens(logits, 1e-4, np.random.default_rng(0))
    greedy, _ = choose_tokens(logits, None, np.random.default_rng(0))
    np.testing.assert_array_equal(cold, greedy)


def test_kept_states_are_counted() -> None:
    stats = SimulationStats()
    episodes = list(rollout(Steering(), some_jobs(), ENVIRONMENT, SETTINGS, stats=stats))
    assert stats.states == sum(len(episode.step) for episode in episodes)
    assert 0 < stats.as_metrics()["states_per_second"] < 1e6


def test_there_is_no_rate_without_states() -> None:
    assert "states_per_second" not in SimulationStats().as_metrics()
