"""Policy x environment -> episodes.

An episode's bytes depend on the policy, its job (placement, seed) and the settings, and never on the number of workers, the order of the jobs, or a
crash on the way: every forward pass has the same number of rows, every decision draws its own noise, and a crashed episode is begun again.
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
from vla_opd.simulation.pool import Pool, PoolSettings, Tally

__all__ = [
    "Job",
    "PoolSettings",
    "RolloutSettings",
    "Tally",
    "choose",
    "rollout",
    "sample_tokens",
    "threads",
]


@dataclass(frozen=True)
class RolloutSettings:
    """How a policy is rolled out.

    horizon:         the most control steps an episode has.
    temperature:     of sampling; None takes the most likely token.
    observe_every:   a state is kept every that many control steps, from 0 up to, not including, the last; None keeps none (frames are then
                     rendered at decisions only).
    inference_batch: rows of every forward pass, exactly. Where fewer observations are ready, copies of the first fill up. Above 1, that a row's
                     logits do not depend on its position and its neighbours is assumed of the fixed-shape kernels; at 1 it is certain.
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
    tally: Tally | None = None,
    first: Callable[[Job], Command] = lambda job: Reset(job.placement),
) -> Generator[Episode]:
    """Episodes of `policy`, in the order in which they finish.

    A decision is made every S = `policy.chunk` control steps and executed open loop, cut off at success or at the horizon.
    `first` starts a job: one observation, of step 0.
    `tally` counts crashes and seconds while the episodes come. Close the iterator (or exhaust it) to end the simulators.
    ValueError if `observe_every` does not divide the chunk, and for mistakes that the environment reports; RuntimeError when the simulator crashes
    too often in one episode; FloatingPointError when a logit is not finite.
    """
    _check_observe_every(settings.observe_every, policy.chunk)
    pool_settings, tally = pool_settings or PoolSettings(), tally or Tally()
    return _roll(
        policy,
        list(jobs),
        environment,
        settings,
        pool_settings=pool_settings,
        tally=tally,
        first=first,
    )


def _check_observe_every(observe_every: int | None, chunk: int) -> None:
    if observe_every is not None and chunk % observe_every:
        divisors = [n for n in range(1, chunk + 1) if chunk % n == 0]
        raise ValueError(
            f"sample.observe_every is {observe_every}; expected a divisor of the policy's chunk of {chunk}: one of {divisors}"
        )


@dataclass
class _Playing:
    """One episode under way: everything recorded so far, and what the policy sees now."""

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

    def see(self, outcome: Outcome) -> None:
        """Take in what the simulator did with the reset, or with the last actions."""
        self.steps += outcome.steps
        self.success = outcome.success
        self.instruction = outcome.instruction or self.instruction
        if self.actions:
            self.actions[-1] = self.actions[-1][: outcome.steps]
        if len(outcome.observed):
            self._record(outcome)
        assert self.done or self.observed[-1][-1] == self.steps, (
            "the environment stopped inside a chunk without success"
        )

    def _record(self, outcome: Outcome) -> None:
        if self.settings.observe_every is None:  # only the present state is of use
            self.frames, self.proprio, self.observed = [], [], []
        self.frames.append(outcome.frames)
        self.proprio.append(outcome.proprio)
        self.observed.append(outcome.observed)

    def act(
        self,
        tokens: Int16[np.ndarray, " K"],
        log_probs: Float32[np.ndarray, " K"],
        actions: Float32[np.ndarray, "S A"],
    ) -> Command:
        """Take a decision, and send what of it lies before the horizon."""
        self.tokens.append(tokens)
        self.log_probs.append(log_probs)
        self.actions.append(actions[: self.settings.horizon - self.steps])
        return Forward(self.steps, self.actions[-1], self.settings.observe_every or self.chunk)

    def episode(self) -> Episode:
        """The finished episode. The terminal state is not kept: nothing was decided there."""
        frames, proprio, step = (
            np.concatenate(self.frames),
            np.concatenate(self.proprio),
            np.concatenate(self.observed),
        )
        keep = (step < self.steps) & (self.settings.observe_every is not None)
        return Episode(
            placement=self.job.placement,
            member=self.job.member,
            instruction=self.instruction,
            success=self.success,
            steps=self.steps,
            frames=frames[keep],
            proprio=proprio[keep],
            step=step[keep],
            actions=np.concatenate(self.actions),
            clean=np.ones(self.steps, np.bool_),
            tokens=np.stack(self.tokens),
            log_probs=np.stack(self.log_probs),
        )


def _roll(
    policy: Policy,
    jobs: Sequence[Job],
    environment: EnvironmentParams,
    settings: RolloutSettings,
    *,
    pool_settings: PoolSettings,
    tally: Tally,
    first: Callable[[Job], Command],
) -> Generator[Episode]:
    playing: dict[Job, _Playing] = {}
    ready: list[_Playing] = []

    def begin(job: Job) -> Command:
        playing[job] = _Playing(
            job, settings, policy.chunk, np.random.Generator(np.random.Philox(job.seed))
        )
        return first(job)

    capacity = policy.chunk // (settings.observe_every or policy.chunk)
    # One thread: the simulators have the cores, and bits must not depend on how many there are.
    with (
        threads(1),
        Pool(
            environment, jobs, begin, capacity=capacity, settings=pool_settings, tally=tally
        ) as pool,
    ):
        while pool.unfinished:
            finished: list[Episode] = []
            for job, outcome in pool.collect():
                episode = playing[job]
                episode.see(outcome)
                if episode.done:
                    finished.append(playing.pop(job).episode())
                    tally.states += len(finished[-1].step)
                    pool.finish(job)
                else:
                    ready.append(episode)
            # Full forward passes while anyone else may still become ready; padded ones otherwise.
            while len(ready) >= settings.inference_batch or (ready and not pool.awaiting):
                batch, ready = ready[: settings.inference_batch], ready[settings.inference_batch :]
                _decide(policy, batch, settings, pool, tally)
            yield from finished


@contextmanager
def threads(count: int) -> Generator[None]:
    """So many torch threads for a while: the last bits of a logit depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _decide(
    policy: Policy, batch: Sequence[_Playing], settings: RolloutSettings, pool: Pool, tally: Tally
) -> None:
    """One forward pass for the episodes of `batch`; each one's worker gets its actions."""
    began = time.perf_counter()
    logits = _forward(policy, batch, settings.inference_batch)
    tally.policy_s += time.perf_counter() - began
    for episode, row in zip(batch, logits, strict=True):
        tokens, log_probs = choose(row, settings.temperature, episode.random)
        actions = policy.decode(tokens[None])[0]
        pool.send(episode.job, episode.act(tokens, log_probs, actions))


def _forward(
    policy: Policy, batch: Sequence[_Playing], rows: int
) -> Float32[torch.Tensor, "B K V"]:
    """Logits of B <= `rows` observations, from a forward pass of exactly `rows`; in float32 on the CPU. FloatingPointError if any is not finite."""
    filled = [*batch, *[batch[0]] * (rows - len(batch))]
    observations = Observations(
        frames=np.stack([episode.frames[-1][-1] for episode in filled]),
        proprio=np.stack([episode.proprio[-1][-1] for episode in filled]),
        instructions=tuple(episode.instruction for episode in filled),
    )
    with torch.inference_mode():
        logits = policy.logits(observations)[: len(batch)].float().cpu()
    for episode, row in zip(batch, logits, strict=True):
        if not row.isfinite().all():
            raise FloatingPointError(
                f"{episode.job.placement}, member {episode.job.member}: the policy's logits after {episode.steps} control steps are not finite"
            )
    return logits


def choose(
    logits: Float32[torch.Tensor, "K V"], temperature: float | None, random: np.random.Generator
) -> tuple[Int16[np.ndarray, " K"], Float32[np.ndarray, " K"]]:
    """K tokens and log softmax(logits / temperature)[token], in nats; K uniforms are drawn, whatever the temperature.

    temperature None: the first maximum of each row, scored at temperature 1.
    """
    uniforms = random.random(len(logits))
    scaled = logits / (temperature or 1.0)
    tokens = (
        logits.numpy().argmax(axis=-1) if temperature is None else sample_tokens(scaled, uniforms)
    )
    log_probs = scaled.log_softmax(dim=-1).numpy()
    return tokens.astype(np.int16), np.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]


def sample_tokens(
    logits: Float32[torch.Tensor, "K V"], uniforms: Float64[np.ndarray, " K"]
) -> Int[np.ndarray, " K"]:
    """One token a row from softmax(logits) by inverse CDF: the first v with p(0) + ... + p(v) > u, in float64; u ~ U[0, 1)."""
    shifted = logits.double().numpy()
    weights = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    cumulative = weights.cumsum(axis=-1)
    # Comparing with u times the total, not dividing by it: a token of zero weight is then never taken, and the last index never exceeded.
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(axis=-1)
