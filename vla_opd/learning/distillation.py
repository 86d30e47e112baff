"""Distillation, eq. (5): student-visited states with the teacher's labels, and their loss."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_opd.artifacts.manifest import Manifest, open_artifact, read_manifest
from vla_opd.data.action_space import ActionSpace
from vla_opd.data.divergence import Divergence
from vla_opd.data.labels import Labels, read_shard
from vla_opd.data.trajectory import Observations, States, read_states, shards, split_batches
from vla_opd.data.trajectory import concatenate as concatenate_states
from vla_opd.learning import fsdp
from vla_opd.learning.bin_transfer import between, require_comparable
from vla_opd.learning.decisions import Decisions, read_decisions
from vla_opd.learning.kl import kl
from vla_opd.learning.measure import measure_divergence
from vla_opd.learning.objectives import (
    OBJECTIVES,
    ON_DECISIONS,
    DecisionBatch,
    SampledTokens,
    TokenBatch,
    at_temperature,
    confidence_weight,
    entropy,
    is_clamped,
    is_clipped,
    masked_mean,
    masked_means,
    recorded_log_probs,
    rewards_to_go,
    sample_tokens,
    select_token,
)
from vla_opd.learning.optimizer import Row, StepLoss
from vla_opd.learning.update import (
    batched_logits,
    probe_states,
    require_own_rollouts,
    select_rows,
    state_order,
)
from vla_opd.params.objective import MixedParams, OptimizeParams, RewardParams, RolloutParams
from vla_opd.plugins import named_function
from vla_opd.policies.checkpoint import Checkpoint, open_checkpoint, require_same_actions
from vla_opd.policies.policy import Policy
from vla_opd.seeds import derive


@dataclass(frozen=True)
class RolloutDecisions:
    """The rollout's decisions, for objectives that learn from them.

    usable:      states at which it decided, with a valid token.
    advantage:   GRPO's, times the state's weight in its mean; zero in groups not learned from.
    temperature: at which tokens were sampled. to_go: see `rewards_to_go`.
    """

    decisions: Decisions
    usable: Bool[np.ndarray, " N"]
    advantage: Float[np.ndarray, " N"]
    temperature: float
    to_go: Float[np.ndarray, " N"]


@dataclass(frozen=True)
class DistillationBatch:
    """N student-visited states with the teacher's log-probabilities.

    selected:  the states to learn from; None for all.
    initial:   log-probabilities of the run's initial student; only for the anchor.
    decisions: only for objectives that learn from the rollout's own tokens.
    """

    observations: Observations
    mask: Bool[np.ndarray, "N K"]
    teacher: Float[np.ndarray, "N K V"]
    selected: Bool[np.ndarray, " N"] | None = None
    initial: Float[np.ndarray, "N K V"] | None = None
    decisions: RolloutDecisions | None = None

    @property
    def usable(self) -> Int[np.ndarray, " U"]:
        """The states to learn from: selected, with a valid token, defined for the objective."""
        if self.decisions is None:
            usable = self.mask.any(1)
        else:
            usable = self.decisions.usable
        if self.selected is not None:
            usable = usable & self.selected
        return np.flatnonzero(usable)

    @property
    def trained_tokens(self) -> Bool[np.ndarray, "N K"]:
        """The valid tokens of the selected states."""
        if self.selected is None:
            return self.mask
        return self.mask & self.selected[:, None]

    def arrays(self, rows: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Return some states, by name, with their indices."""
        observations = self.observations.at(rows)
        return {
            "states": rows,
            "frames": observations.frames,
            "proprio": observations.proprio,
            "mask": self.mask[rows],
            "teacher": self.teacher[rows],
        }


def require_alignment(student: Checkpoint, trajectories: Path, labels: Path) -> dict[str, str]:
    """Return the parents' digests by role. ValueError unless the three belong together.

    Checks that the labels are of these trajectories, that the student sampled them, and that the
    teacher's tokens mean the student's actions.
    """
    visited = open_artifact(trajectories, "trajectories")
    answers = open_artifact(labels, "labels")
    actual = answers.parents["trajectories"]
    expected = visited.digest
    if actual != expected:
        raise ValueError(
            f"{labels}: labels trajectories {actual[:12]}; expected {expected[:12]}, "
            f"those of {trajectories}"
        )
    require_own_rollouts(student, visited, trajectories)
    require_comparable(student.facts, answers, str(labels))
    return {
        "student": student.digest,
        "trajectories": visited.digest,
        "labels": answers.digest,
    }


def open_anchor(student: Checkpoint, initial: Path) -> Checkpoint:
    """Open the run's initial student. ValueError unless its tokens mean the student's actions."""
    anchor = open_checkpoint(initial)
    require_same_actions(student.facts, anchor.facts.action_space, str(initial))
    return anchor


def require_parents(checkpoint: Path, sources: Iterable[tuple[str, Path]]) -> None:
    """ValueError unless the checkpoint was made from these artifacts, each with its kind."""
    parents = read_manifest(checkpoint, "checkpoint").parents
    for kind, folder in sources:
        actual = open_artifact(folder, kind).digest  # pyright: ignore[reportArgumentType]
        if kind not in parents:
            raise ValueError(
                f"{checkpoint}: names no {kind} among its parents {sorted(parents)}; expected a "
                "checkpoint of this version (make it again with `opd run`)"
            )
        expected = parents[kind]
        if actual != expected:
            raise ValueError(
                f"{folder}: is {actual[:12]}; expected {expected[:12]}, "
                f"which {checkpoint} learned from (optimize.earlier)"
            )


def read_action_space(labels: Path) -> ActionSpace:
    """Return the action space of the teacher that labeled."""
    facts = read_manifest(labels, "labels").facts
    return ActionSpace.model_validate(facts["action_space"])


def describe_transfer(labels: Path, space: ActionSpace) -> dict[str, str]:
    """Return the teacher's action space as `transferred_from`, if the student's is another."""
    teacher_space = read_action_space(labels)
    if teacher_space == space:
        return {}
    return {"transferred_from": teacher_space.digest}


def read_batch(
    trajectories: Path, labels: Path, space: ActionSpace, settings: OptimizeParams
) -> DistillationBatch:
    """Read states and labels, these over the bins of `space`.

    ValueError for what the settings need and the artifacts don't have: recoverable states, or the
    student's own tokens.
    """
    paths = shards(trajectories)
    transfer = between(read_action_space(labels), space)
    states: list[States] = []
    stores: list[Labels] = []
    masks: list[np.ndarray] = []
    teacher: list[np.ndarray] = []
    for path in paths:
        visited = read_states([path])
        store = read_shard(labels / path.name, len(visited))
        log_probs = store.log_probs
        if transfer is not None:
            log_probs = transfer(log_probs)
        states.append(visited)
        stores.append(store)
        masks.append(store.restrict(visited.mask))
        teacher.append(log_probs)
    selected = None
    if settings.recoverable:
        selected = _recoverable(stores, labels)
    batch = DistillationBatch(
        observations=concatenate_states(states).observations,
        mask=np.concatenate(masks),
        teacher=np.concatenate(teacher),
        selected=selected,
    )
    if settings.objective.name not in ON_DECISIONS:
        return batch
    manifest = read_manifest(trajectories, "trajectories")
    _require_student_acted(manifest, trajectories, settings)
    decisions = read_decisions(paths, space.chunk)
    temperature = manifest.params["sample"]["temperature"]
    return with_decisions(batch, decisions, settings, temperature)


def read_earlier(
    iterations: Sequence[str],
    trajectories: Path,
    labels: Path,
    out: Path,
    space: ActionSpace,
    settings: OptimizeParams,
) -> list[DistillationBatch]:
    """Read the rollouts and labels of earlier iterations, the latest first.

    ValueError unless they are what those iterations learned from. DVC need not know of them: they
    are behind the checkpoint that this iteration starts from.
    """
    batches: list[DistillationBatch] = []
    for name in iterations:
        folders = trajectories.with_name(name), labels.with_name(name)
        sources = zip(("trajectories", "labels"), folders, strict=True)
        require_parents(out.with_name(name), sources)
        batches.append(read_batch(*folders, space, settings))
    return batches


def _require_student_acted(visited: Manifest, where: Path, settings: OptimizeParams) -> None:
    if "teacher" in visited.parents:
        raise ValueError(
            f"{where}: the teacher acted (sample.visited_by); expected the student, "
            f"whose own tokens {settings.objective.name} learns from"
        )


def _recoverable(stores: Sequence[Labels], where: Path) -> Bool[np.ndarray, " N"]:
    recoverable = [store.recoverable for store in stores if store.recoverable is not None]
    if len(recoverable) < len(stores):
        raise ValueError(
            f"{where}: has no record of the states from which the teacher still succeeds; "
            "expected labels made with label.recover_every"
        )
    return np.concatenate(recoverable)


def concatenate(batches: Sequence[DistillationBatch]) -> DistillationBatch:
    """Join the states of several iterations; a single batch is returned unchanged."""
    if len(batches) == 1:
        return batches[0]
    observations = [batch.observations for batch in batches]
    masks = [batch.mask for batch in batches]
    teacher = [batch.teacher for batch in batches]
    parts = [batch.selected for batch in batches if batch.selected is not None]
    selected = None
    if parts:
        selected = np.concatenate(parts)
    return DistillationBatch(
        observations=Observations.concatenate(observations),
        mask=np.concatenate(masks),
        teacher=np.concatenate(teacher),
        selected=selected,
    )


def select_states(batch: DistillationBatch, states: int | None, seed: int) -> DistillationBatch:
    """Select that many of the usable states at random, or leave all (None); none if none is usable.

    ValueError if there are fewer usable states than that.
    """
    if states is None:
        return batch
    usable = batch.usable
    selected = np.zeros(len(batch.mask), np.bool_)
    if len(usable):
        if states > len(usable):
            raise ValueError(
                f"optimize.states is {states}; expected at most {len(usable)}, the number of "
                "states to learn from (sample.prompts makes more; optimize.recoverable leaves "
                "some out)"
            )
        random = np.random.default_rng(derive(seed, "states"))
        rows = random.choice(usable, states, replace=False)
        selected[rows] = True
    return replace(batch, selected=selected)


def with_decisions(
    batch: DistillationBatch, decisions: Decisions, settings: OptimizeParams, temperature: float
) -> DistillationBatch:
    """Add the rollout's decisions to a batch.

    The teacher counts at every decision, each with the same weight. With `mixed`, the groups that
    GRPO learns from have an advantage, too. GRPO's mean is over the episodes of those groups, the
    teacher's over all tokens: the advantage is scaled to make up for it.
    """
    usable = decisions.decided & batch.mask.any(1)
    advantage = np.zeros(len(batch.mask), np.float32)
    options = settings.objective
    if isinstance(options, MixedParams):
        mask = batch.trained_tokens
        grpo = decisions.advantages(mask, options)
        if not options.distill:
            usable = grpo.usable
        tokens = mask.sum(1)
        usable_tokens = tokens[usable].sum()
        grpo_tokens = tokens[grpo.usable].sum()
        scale = usable_tokens / max(1, grpo_tokens)
        weighted = grpo.advantage * grpo.weight
        advantage = weighted * np.float32(scale)
    to_go = decision_rewards_to_go(batch, decisions, settings)
    rollout = RolloutDecisions(decisions, usable, advantage, temperature, to_go)
    return replace(batch, decisions=rollout)


def decision_rewards_to_go(
    batch: DistillationBatch, decisions: Decisions, settings: OptimizeParams
) -> Float[np.ndarray, " N"]:
    """Return `rewards_to_go` at every decision, of the recorded rewards; zero without discount."""
    to_go = np.zeros(len(batch.mask), np.float32)
    options = settings.objective
    if not isinstance(options, RolloutParams) or not options.discount:
        return to_go
    cpu = torch.device("cpu")
    for episode in np.unique(decisions.episode):
        is_in_episode = decisions.episode == episode
        rows = np.flatnonzero(is_in_episode & decisions.decided)
        tokens = select_rows(decisions.tokens, rows, cpu)
        log_probs = select_rows(decisions.log_probs, rows, cpu)
        mask = select_rows(batch.mask, rows, cpu)
        teacher = _teacher_log_probs(batch, rows, settings, cpu)

        rewards = select_token(teacher, tokens) - log_probs
        limit = options.clamp
        if limit is not None:
            rewards = rewards.clamp(-limit, limit)
        valid = rewards * mask
        decision_rewards = valid.sum(1)
        later = rewards_to_go(decision_rewards, options.discount)
        to_go[rows] = later.numpy()
    return to_go


def _teacher_log_probs(
    batch: DistillationBatch,
    rows: Int[np.ndarray, " B"],
    settings: OptimizeParams,
    device: torch.device,
) -> Float[Tensor, "B K V"]:
    """Return the teacher's log-probabilities at some states, at its temperature."""
    temperature = settings.teacher_temperature or settings.temperature
    recorded = select_rows(batch.teacher, rows, device)
    return at_temperature(recorded.float(), temperature)


def score_states(
    policy: Policy, batch: DistillationBatch, settings: OptimizeParams
) -> Float[np.ndarray, "N K V"]:
    """Return a policy's log-probabilities at all states, at the student's temperature."""
    scores: list[np.ndarray] = []
    states = np.arange(len(batch.mask))
    with torch.inference_mode():
        for rows in split_batches(states, settings.batch_size):
            observations = batch.observations.at(rows)
            logits = policy.logits(observations)
            log_probs = at_temperature(logits, settings.temperature)
            scores.append(log_probs.cpu().numpy())
    return np.concatenate(scores)


def with_anchor(
    batch: DistillationBatch, anchor: Policy, settings: OptimizeParams
) -> DistillationBatch:
    """Add the log-probabilities of the run's first student, which `anchor` keeps this one near."""
    return replace(batch, initial=score_states(anchor, batch, settings))


class DistillationLoss:
    """The objective's mean over the valid tokens of a step's states.

    ValueError for an objective that is neither known nor importable.
    """

    def __init__(self, batch: DistillationBatch, settings: OptimizeParams, seed: int) -> None:
        objectives: dict[str, Callable[[Any], Tensor]] = {**OBJECTIVES, **ON_DECISIONS}
        name = settings.objective.name
        self._objective = named_function(name, objectives, "optimize.objective")
        self._batch = batch
        self._settings = settings
        self._seed = seed
        self._order = state_order(batch.usable, settings.batch_size, seed)

    def __call__(self, policy: Policy, step: int) -> StepLoss:
        """Return the loss of this step's states, and its metrics."""
        rows = self._order(step)
        batch = self._batch
        settings = self._settings
        step_seed = derive(self._seed, step)
        seed = fsdp.process_seed(step_seed)
        tokens, mask = token_batch(policy, batch, rows, settings, seed)
        row = _metrics(tokens, mask, settings)
        values = self._objective(tokens)
        if settings.confidence:
            weight = confidence_weight(tokens.teacher, settings.confidence)
            values = values * weight
        loss = masked_mean(values, mask)
        if batch.initial is not None:
            initial = select_rows(batch.initial, rows, values.device)
            drift = kl(tokens.student, initial)
            anchor_kl = masked_mean(drift, mask)
            loss = loss + settings.anchor * anchor_kl
            row["anchor_kl"] = anchor_kl.item()
        valid_tokens = batch.mask[rows].sum()
        return StepLoss(loss, row, int(valid_tokens))

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Return this step's states, by name."""
        return self._batch.arrays(self._order(step))


def _metrics(batch: TokenBatch, mask: Bool[Tensor, "N K"], settings: OptimizeParams) -> Row:
    """Return a step's entropy and divergence in nats per token, and its options' effects."""
    options = settings.objective
    student = batch.student.detach()
    metrics = {"student_entropy": entropy(student)}
    if options.name != "reverse_kl" or settings.anchor or settings.confidence:
        metrics["reverse_kl"] = kl(student, batch.teacher)
    if isinstance(options, RewardParams) and options.clamp is not None:
        clamped = _clamped_tokens(batch)
        metrics["clamp_fraction"] = clamped.float()
    if isinstance(options, MixedParams) and isinstance(batch, DecisionBatch):
        clipped = is_clipped(batch.sampled, options)
        metrics["clip_fraction"] = clipped.float()
    if settings.confidence:
        metrics["confidence"] = confidence_weight(batch.teacher, settings.confidence)
    return masked_means(metrics, mask)


def _clamped_tokens(batch: TokenBatch) -> Bool[Tensor, "N K"]:
    if isinstance(batch, DecisionBatch):
        return is_clamped(batch, batch.tokens, recorded_log_probs(batch))
    return is_clamped(batch, batch.draw())


def token_batch(
    policy: Policy,
    batch: DistillationBatch,
    rows: Int[np.ndarray, " B"],
    settings: OptimizeParams,
    seed: int,
) -> tuple[TokenBatch, Bool[Tensor, "B K"]]:
    """Score student and teacher at some states. Returns their batch and the valid tokens.

    seed: of the student's sampled tokens.
    """
    logits = batched_logits(policy, batch.observations, rows, settings.batch_size)
    student = at_temperature(logits, settings.temperature)
    tokens = TokenBatch(
        student=student,
        teacher=_teacher_log_probs(batch, rows, settings, logits.device),
        draw=lambda: sample_tokens(student, seed),
        options=settings.objective,
    )
    if batch.decisions is not None:
        tokens = _decision_batch(tokens, logits, batch.decisions, rows)
    mask = select_rows(batch.mask, rows, logits.device)
    return tokens, mask


def _decision_batch(
    batch: TokenBatch,
    logits: Float[Tensor, "B K V"],
    rollout: RolloutDecisions,
    rows: Int[np.ndarray, " B"],
) -> DecisionBatch:
    def select(array: np.ndarray) -> Tensor:
        return select_rows(array, rows, logits.device)

    tokens = select(rollout.decisions.tokens)
    log_probs = at_temperature(logits, rollout.temperature)
    sampled = SampledTokens(
        now=select_token(log_probs, tokens),
        then=select(rollout.decisions.log_probs),
        advantage=select(rollout.advantage),
    )
    return DecisionBatch(
        student=batch.student,
        teacher=batch.teacher,
        draw=batch.draw,
        options=batch.options,
        tokens=tokens,
        sampled=sampled,
        to_go=select(rollout.to_go),
    )


def measure_student(
    policy: Policy, batch: DistillationBatch, settings: OptimizeParams
) -> Divergence:
    """Measure student and teacher on a fixed selection of the states."""
    rows = probe_states(batch.mask)
    with torch.inference_mode():
        tokens, mask = token_batch(policy, batch, rows, settings, seed=0)
        return measure_divergence(tokens, mask, policy.chunk)


def compare(before: Divergence, after: Divergence) -> Row:
    """Return the numbers of both measurements, flat: `before/reverse_kl`, `after/reverse_kl`."""
    metrics: dict[str, float] = {}
    for when, measured in {"before": before, "after": after}.items():
        metrics |= {f"{when}/{name}": value for name, value in measured.numbers.items()}
    return metrics
