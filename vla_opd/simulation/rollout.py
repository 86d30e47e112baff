"""Rollouts: policy x environment -> episodes.

An episode's bytes depend on the policy, its job (placement, seed) and the settings, but not on the
number of workers, the order of the jobs or crashes: every forward pass has the same number of
rows, every decision draws its own noise, and a crashed episode is started again.
"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int, Int16, Int32, UInt8

from vla_opd.data.trajectory import Episode
from vla_opd.params.stages import EnvironmentParams
from vla_opd.policies.policy import Observations, Policy
from vla_opd.simulation.jobs import Command, Forward, Job, Outcome, Reset
from vla_opd.simulation.pool import Pool, PoolSettings, SimulationStats

__all__ = [
    "Job",
    "PoolSettings",
    "RolloutSettings",
    "SimulationStats",
    "choose_tokens",
    "rollout",
    "sample_tokens",
    "torch_threads",
]


@dataclass(frozen=True)
class RolloutSettings:
    """How a policy is rolled out.

    horizon:         the maximum number of control steps per episode.
    temperature:     of sampling; None takes the most likely token.
    observe_every:   keep a state every n control steps, from 0 up to but excluding the last. None
                     keeps none, and frames are rendered at decisions only.
    inference_batch: the exact number of rows of every forward pass; copies of the first row fill
                     up the batch. Above 1, a row's logits are assumed to be independent of its
                     position and neighbours, as with fixed-shape kernels; at 1 this is certain.
    """

    horizon: int
    temperature: float | None
    observe_every: int | None = None
    inference_batch: int = 1

    def __post_init__(self) -> None:
        for name in ("horizon", "temperature", "observe_every", "inference_batch"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value!r}; expected more than 0")


def rollout(
    policy: Policy,
    jobs: Iterable[Job],
    environment: EnvironmentParams,
    settings: RolloutSettings,
    pool_settings: PoolSettings | None = None,
    stats: SimulationStats | None = None,
    first: Callable[[Job], Command] = lambda job: Reset(job.placement),
) -> Generator[Episode]:
    """Yield the policy's episodes, in the order in which they finish.

    The policy decides every S = `policy.chunk` control steps. Its actions are executed open loop,
    cut off at success or at the horizon. Closing or exhausting the iterator ends the simulators.

    first: the command that starts a job; it returns one observation, of step 0.
    stats: counts crashes and seconds while the episodes arrive.
    ValueError if `observe_every` does not divide the chunk, and for mistakes that the environment
    reports; RuntimeError after too many crashes of one episode; FloatingPointError for a logit that
    is not finite.
    """
    _check_observe_every(settings.observe_every, policy.chunk)
    return _run_episodes(
        policy,
        list(jobs),
        environment,
        settings,
        pool_settings=pool_settings or PoolSettings(),
        stats=stats or SimulationStats(),
        first=first,
    )


def _check_observe_every(observe_every: int | None, chunk: int) -> None:
    if observe_every is not None and chunk % observe_every:
        numbers = range(1, chunk + 1)
        divisors = [number for number in numbers if chunk % number == 0]
        raise ValueError(
            f"sample.observe_every is {observe_every}; expected a divisor of the policy's chunk of "
            f"{chunk}: one of {divisors}"
        )


@dataclass
class _RunningEpisode:
    """An episode in progress: what was recorded so far, and what the policy sees now."""

    job: Job
    settings: RolloutSettings
    chunk: int
    random: np.random.Generator
    steps: int = 0
    success: bool = False
    instruction: str = ""
    frames: list[UInt8[np.ndarray, "n C H W 3"]] = field(default_factory=list)
    proprio: list[Float32[np.ndarray, "n P"]] = field(default_factory=list)
    observed: list[Int32[np.ndarray, " n"]] = field(default_factory=list)
    actions: list[Float32[np.ndarray, "s A"]] = field(default_factory=list)
    tokens: list[Int16[np.ndarray, " K"]] = field(default_factory=list)
    log_probs: list[Float32[np.ndarray, " K"]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.success or self.steps >= self.settings.horizon

    def add_outcome(self, outcome: Outcome) -> None:
        """Record the simulator's outcome of the reset or of the last actions."""
        self.steps += outcome.steps
        self.success = outcome.success
        if outcome.instruction:
            self.instruction = outcome.instruction
        if self.actions:
            planned = self.actions.pop()
            self.actions.append(planned[: outcome.steps])
        if len(outcome.observed):
            self._add_observations(outcome)
        if not self.done:
            latest = self.observed[-1][-1]
            assert latest == self.steps, "the environment stopped inside a chunk without success"

    def _add_observations(self, outcome: Outcome) -> None:
        if self.settings.observe_every is None:  # only the current state is needed
            self.frames = []
            self.proprio = []
            self.observed = []
        self.frames.append(outcome.frames)
        self.proprio.append(outcome.proprio)
        self.observed.append(outcome.observed)

    def add_decision(
        self,
        tokens: Int16[np.ndarray, " K"],
        log_probs: Float32[np.ndarray, " K"],
        actions: Float32[np.ndarray, "S A"],
    ) -> Command:
        """Record a decision and return the command for its actions before the horizon."""
        remaining = self.settings.horizon - self.steps
        executed = actions[:remaining]
        self.tokens.append(tokens)
        self.log_probs.append(log_probs)
        self.actions.append(executed)
        return Forward(
            start=self.steps,
            actions=executed,
            observe_every=self.settings.observe_every or self.chunk,
        )

    def to_episode(self) -> Episode:
        """Return the finished episode, without the terminal state, at which nothing is decided."""
        step = np.concatenate(self.observed)
        keep = step < self.steps
        if self.settings.observe_every is None:
            keep[:] = False
        return Episode(
            placement=self.job.placement,
            member=self.job.member,
            instruction=self.instruction,
            success=self.success,
            steps=self.steps,
            frames=np.concatenate(self.frames)[keep],
            proprio=np.concatenate(self.proprio)[keep],
            step=step[keep],
            actions=np.concatenate(self.actions),
            clean=np.ones(self.steps, np.bool_),
            tokens=np.stack(self.tokens),
            log_probs=np.stack(self.log_probs),
        )


def _run_episodes(
    policy: Policy,
    jobs: Sequence[Job],
    environment: EnvironmentParams,
    settings: RolloutSettings,
    *,
    pool_settings: PoolSettings,
    stats: SimulationStats,
    first: Callable[[Job], Command],
) -> Generator[Episode]:
    running: dict[Job, _RunningEpisode] = {}
    ready: list[_RunningEpisode] = []
    rows = settings.inference_batch

    def begin(job: Job) -> Command:
        random = np.random.Generator(np.random.Philox(job.seed))
        running[job] = _RunningEpisode(job, settings, policy.chunk, random)
        return first(job)

    observe_every = settings.observe_every or policy.chunk
    pool = Pool(
        environment,
        jobs,
        begin,
        capacity=policy.chunk // observe_every,
        settings=pool_settings,
        stats=stats,
    )
    # One thread: the simulators need the cores, and bits must not depend on how many there are.
    with torch_threads(1), pool:
        while pool.unfinished:
            finished: list[Episode] = []
            for job, outcome in pool.collect():
                state = running[job]
                state.add_outcome(outcome)
                if state.done:
                    del running[job]
                    episode = state.to_episode()
                    stats.states += len(episode.step)
                    finished.append(episode)
                    pool.finish(job)
                else:
                    ready.append(state)
            # Full forward passes while more episodes may become ready; padded ones otherwise.
            while len(ready) >= rows or (ready and not pool.awaiting):
                _decide(policy, ready[:rows], settings, pool, stats)
                del ready[:rows]
            yield from finished


@contextmanager
def torch_threads(count: int) -> Generator[None]:
    """Set the number of torch threads temporarily; the last bits of a logit depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _decide(
    policy: Policy,
    batch: Sequence[_RunningEpisode],
    settings: RolloutSettings,
    pool: Pool,
    stats: SimulationStats,
) -> None:
    """Make one forward pass for the episodes of `batch` and send each worker its actions."""
    began = time.perf_counter()
    logits = _forward(policy, batch, settings.inference_batch)
    stats.policy_s += time.perf_counter() - began
    for episode, row in zip(batch, logits, strict=True):
        tokens, log_probs = choose_tokens(
            row,
            settings.temperature,
            episode.random,
        )
        actions = policy.decode(tokens[None])
        command = episode.add_decision(tokens, log_probs, actions[0])
        pool.send(episode.job, command)


def _forward(
    policy: Policy, batch: Sequence[_RunningEpisode], rows: int
) -> Float32[torch.Tensor, "B K V"]:
    """Return logits of B <= `rows` observations, in float32 on the CPU.

    The forward pass has exactly `rows` rows. FloatingPointError if a logit is not finite.
    """
    count = len(batch)
    padding = [batch[0]] * (rows - count)
    frames: list[UInt8[np.ndarray, "C H W 3"]] = []
    proprio: list[Float32[np.ndarray, " P"]] = []
    instructions: list[str] = []
    for episode in (*batch, *padding):
        frames.append(episode.frames[-1][-1])
        proprio.append(episode.proprio[-1][-1])
        instructions.append(episode.instruction)
    observations = Observations(
        frames=np.stack(frames),
        proprio=np.stack(proprio),
        instructions=tuple(instructions),
    )
    with torch.inference_mode():
        logits = policy.logits(observations)
        logits = logits[:count].float().cpu()
    for episode, row in zip(batch, logits, strict=True):
        if not row.isfinite().all():
            job = episode.job
            raise FloatingPointError(
                f"{job.placement}, member {job.member}: the policy's logits after "
                f"{episode.steps} control steps are not finite"
            )
    return logits


def choose_tokens(
    logits: Float32[torch.Tensor, "K V"], temperature: float | None, random: np.random.Generator
) -> tuple[Int16[np.ndarray, " K"], Float32[np.ndarray, " K"]]:
    """Return K tokens and log softmax(logits / temperature)[token], in nats.

    K uniforms are drawn at any temperature. temperature None: the first maximum of each row, scored
    at temperature 1.
    """
    uniforms = random.random(len(logits))
    if temperature is None:
        scaled = logits
        tokens = scaled.numpy().argmax(axis=-1)
    else:
        scaled = logits / temperature
        tokens = sample_tokens(scaled, uniforms)
    log_probs = scaled.log_softmax(dim=-1).numpy()
    chosen = np.take_along_axis(
        log_probs,
        tokens[:, None],
        axis=-1,
    )
    return tokens.astype(np.int16), chosen[:, 0]


def sample_tokens(
    logits: Float32[torch.Tensor, "K V"], uniforms: Float64[np.ndarray, " K"]
) -> Int[np.ndarray, " K"]:
    """Sample one token per row from softmax(logits) by inverse CDF, in float64.

    The token is the first v with p(0) + ... + p(v) > u, where u ~ U[0, 1).
    """
    logits_64 = logits.double().numpy()
    maxima = logits_64.max(axis=-1, keepdims=True)
    weights = np.exp(logits_64 - maxima)
    cumulative = weights.cumsum(axis=-1)
    totals = cumulative[:, -1:]
    # u times the total, instead of a division by it: a token of zero weight is then never taken,
    # and the last index is never exceeded.
    thresholds = uniforms[:, None] * totals
    passed = cumulative <= thresholds
    return passed.sum(axis=-1)
