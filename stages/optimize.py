"""optimize: student, trajectories, logits -> checkpoint, eq. (5): a fixed budget of AdamW steps towards the teacher on the student's own states."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_opd.artifacts.manifest import Manifest, open_artifact, read_manifest
from vla_opd.data.action_space import ActionSpace
from vla_opd.data.labels import Labels, read_shard
from vla_opd.data.trajectory import Observations, in_batches, joined, read_states, shards
from vla_opd.learning import fsdp
from vla_opd.learning.bin_transfer import between, require_comparable
from vla_opd.learning.decisions import Decisions, failed_share, read_decisions
from vla_opd.learning.measure import Distance, distance
from vla_opd.learning.objectives import (
    OBJECTIVES,
    ON_DECISIONS,
    DecisionBatch,
    Taken,
    TokenBatch,
    clamped,
    clipped,
    confidence,
    drawn,
    entropy,
    masked_mean,
    of,
    reverse_kl,
    rewards_to_go,
    tempered,
)
from vla_opd.learning.optimizer import Evidence, Loss, Means, Row
from vla_opd.learning.update import budget, learn, order, probed, require_own_rollouts
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.objective import OptimizeParams
from vla_opd.params.run import Params
from vla_opd.plugins import named_function
from vla_opd.policies.checkpoint import Checkpoint, open_checkpoint, require_same_actions
from vla_opd.policies.load import Policy, load_policy
from vla_opd.seeds import derive


@dataclass(frozen=True)
class Labelled:
    """Student-visited states, and what the teacher says there.

    kept:    which of the states are to be learnt from, if not all.
    initial: what the student that the run began with says there; only for the anchor.
    on_policy: what the rollout did there; only for objectives that learn from it.
    """

    observations: Observations
    mask: Bool[np.ndarray, "N K"]
    teacher: Float[np.ndarray, "N K V"]
    kept: Bool[np.ndarray, " N"] | None = None
    initial: Float[np.ndarray, "N K V"] | None = None
    on_policy: "OnPolicy | None" = None

    @property
    def usable(self) -> Int[np.ndarray, " U"]:
        """The states to learn from: those kept with a valid token, among those that the objective can be asked at."""
        there = self.mask.any(1) if self.on_policy is None else self.on_policy.there
        return np.flatnonzero(there if self.kept is None else there & self.kept)

    @property
    def learnt(self) -> Bool[np.ndarray, "N K"]:
        """Which tokens count, of the states that are kept."""
        return self.mask if self.kept is None else self.mask & self.kept[:, None]

    def at(self, rows: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Some states, by name, and which they are."""
        seen = self.observations.at(rows)
        return {
            "states": rows,
            "frames": seen.frames,
            "proprio": seen.proprio,
            "mask": self.mask[rows],
            "teacher": self.teacher[rows],
        }


@dataclass(frozen=True)
class OnPolicy:
    """The rollout's decisions. temperature: at which it drew. to_go: see `rewards_to_go`.

    there:     the states at which it decided, with a valid token.
    advantage: GRPO's, with the weight of a state in its mean; zero in groups that it doesn't learn from.
    """

    decisions: Decisions
    there: Bool[np.ndarray, " N"]
    advantage: Float[np.ndarray, " N"]
    temperature: float
    to_go: Float[np.ndarray, " N"]


def run(
    params: Params,
    iteration: str,
    student: Path,
    trajectories: Path,
    logits: Path,
    initial: Path,
    out: Path,
    host: Host,
) -> Manifest:
    """One iteration's update. ValueError unless the logits label these trajectories, the student made these, and tokens mean the same actions.

    initial: the checkpoint that the run began with; it is opened only where `anchor` asks for it.
    """
    checkpoint, opt = open_checkpoint(student), params.optimize
    parents = _require_alignment(checkpoint, trajectories, logits)
    anchor = _anchor(checkpoint, initial) if opt.anchor else None
    parents |= {} if anchor is None else {"anchor": anchor.digest}
    settings = {
        "seed": params.run.learning_seed,
        "iteration": iteration,
        "optimize": opt.model_dump(),
        "device": host.device,
    }
    torch.set_num_threads(opt.threads)
    own, earlier = (
        _read(opt, trajectories, logits, checkpoint.facts.action_space),
        _earlier(params, iteration, trajectories, logits, out),
    )
    data = _together(
        [own, *(_read(opt, *source, checkpoint.facts.action_space) for source in earlier)]
    )
    depth = params.depth(iteration)
    with (
        fsdp.shared_draft(out, "checkpoint", parents, settings) as work,
        track(host, params.run.name, "optimize", iteration, settings) as log,
    ):
        data = (
            data
            if anchor is None
            else replace(data, initial=_scores(load_policy(anchor, host.device), data, opt))
        )
        policy = load_policy(checkpoint, host.device)
        before = _probe(policy, own, opt)
        seed = derive(params.run.learning_seed, "optimize", iteration)
        data = data if opt.states is None else replace(data, kept=_drawn(data, opt.states, seed))
        plan = budget(opt, depth, len(data.usable))
        evidence = Evidence(
            host.not_finite(params.run.name),
            lambda step: data.at(order(data.usable, opt.batch_size, seed)(step)),
        )
        learn(
            policy,
            _loss(data, params, seed),
            opt,
            plan,
            work,
            checkpoint,
            f"optimize {iteration}",
            seed,
            log,
            evidence,
        )
        after, failed = (
            _probe(policy, own, opt),
            failed_share(shards(trajectories), data.learnt[: len(own.mask)]),
        )
        measured = {
            f"{when}/{name}": value
            for when, it in (("before", before), ("after", after))
            for name, value in it.numbers.items()
        }
        log({**measured, "failed_share": failed}, plan.end)
        facts = {
            "checkpoint": checkpoint.facts.model_dump(),
            "before": before.model_dump(),
            "after": after.model_dump(),
            "failed_share": failed,
        }
        labelled_in = _space(logits)
        facts |= (
            {}
            if labelled_in == checkpoint.facts.action_space
            else {"transferred_from": labelled_in.digest}
        )
        return work.publish(
            {**facts, "depth": depth, "states": len(data.mask), "learnt_from": len(data.usable)}
        )


def _require_alignment(student: Checkpoint, trajectories: Path, logits: Path) -> dict[str, str]:
    """The parents' digests, once it is proved that they belong together."""
    visited, labels = open_artifact(trajectories, "trajectories"), open_artifact(logits, "logits")
    if labels.parents["trajectories"] != visited.digest:
        raise ValueError(
            f"{logits}: labels trajectories {labels.parents['trajectories'][:12]}; expected {visited.digest[:12]}, those of {trajectories}"
        )
    require_own_rollouts(student, visited, trajectories)
    require_comparable(student.facts, labels, str(logits))
    return {"student": student.digest, "trajectories": visited.digest, "logits": labels.digest}


def _anchor(student: Checkpoint, initial: Path) -> Checkpoint:
    anchor = open_checkpoint(initial)
    require_same_actions(student.facts, anchor.facts.action_space, str(initial))
    return anchor


def _earlier(
    params: Params, iteration: str, trajectories: Path, logits: Path, out: Path
) -> Iterator[tuple[Path, Path]]:
    """Rollouts and labels of the `earlier` iterations before this one, the latest first. ValueError unless they are what those learnt from.

    DVC needn't be told of them: they are behind the checkpoint that this iteration starts from.
    """
    for name in [one for one in params.chain(iteration)[1:] if one in params.iterations][
        : params.optimize.earlier
    ]:
        made, where = out.with_name(name), (trajectories.with_name(name), logits.with_name(name))
        learnt = read_manifest(made, "checkpoint").parents
        for kind, folder in zip(("trajectories", "logits"), where, strict=True):
            if (found := open_artifact(folder, kind).digest) != learnt[kind]:
                raise ValueError(
                    f"{folder}: is {found[:12]}; expected {learnt[kind][:12]}, which {made} learnt from (optimize.earlier)"
                )
        yield where


def _together(parts: Sequence[Labelled]) -> Labelled:
    """All states of several iterations; of one, as they are."""
    if len(parts) == 1:
        return parts[0]
    kept = [one.kept for one in parts if one.kept is not None]
    return Labelled(
        observations=Observations.joined([one.observations for one in parts]),
        mask=np.concatenate([one.mask for one in parts]),
        teacher=np.concatenate([one.teacher for one in parts]),
        kept=np.concatenate(kept) if kept else None,
    )


def _space(logits: Path) -> ActionSpace:
    return ActionSpace.model_validate(
        read_manifest(logits, "logits").facts["action_space"]
    )  # its files were hashed when the alignment was proved


def _read(opt: OptimizeParams, trajectories: Path, logits: Path, space: ActionSpace) -> Labelled:
    """States and labels, these over the bins of `space`."""
    paths, transfer = shards(trajectories), between(_space(logits), space)
    states = [read_states([path]) for path in paths]
    labels = [read_shard(logits / path.name, len(s)) for path, s in zip(paths, states, strict=True)]
    data = Labelled(
        observations=joined(states).observations,
        mask=np.concatenate([one.labelled(s.mask) for one, s in zip(labels, states, strict=True)]),
        teacher=np.concatenate(
            [one.log_probs if transfer is None else transfer(one.log_probs) for one in labels]
        ),
        kept=_recoverable(labels, logits) if opt.recoverable else None,
    )
    if opt.objective not in ON_DECISIONS:
        return data
    visited = read_manifest(trajectories, "trajectories")
    if "teacher" in visited.parents:
        raise ValueError(
            f"{trajectories}: the teacher acted (sample.visited_by); expected the student, whose own tokens {opt.objective} learns from"
        )
    return replace(
        data,
        on_policy=_on_policy(
            data, read_decisions(paths, space.chunk), opt, visited.params["sample"]["temperature"]
        ),
    )


def _recoverable(labels: Sequence[Labels], logits: Path) -> Bool[np.ndarray, " N"]:
    tried = [one.recoverable for one in labels if one.recoverable is not None]
    if len(tried) < len(labels):
        raise ValueError(
            f"{logits}: doesn't say from which states the teacher still succeeds; expected labels made with label.recover_every"
        )
    return np.concatenate(tried)


def _drawn(data: Labelled, states: int, seed: int) -> Bool[np.ndarray, " N"]:
    """So many of the states to learn from, at random; none of none. ValueError if there are some, but fewer."""
    usable, kept = data.usable, np.zeros(len(data.mask), np.bool_)
    if not len(usable):
        return kept
    if states > len(usable):
        more = "sample.prompts makes more; optimize.recoverable leaves some out"
        raise ValueError(
            f"optimize.states is {states}; expected at most the {len(usable)} states that there are to learn from ({more})"
        )
    kept[np.random.default_rng(derive(seed, "states")).choice(usable, states, replace=False)] = True
    return kept


def _on_policy(
    data: Labelled, decisions: Decisions, opt: OptimizeParams, temperature: float
) -> OnPolicy:
    """The teacher is asked at every decision, each with the same weight. In the groups that GRPO learns from there is an advantage, too.

    GRPO's mean is over the episodes of those groups, the teacher's over all tokens: the advantage makes up for it.
    """
    there = decisions.decided & data.mask.any(1)
    advantage = np.zeros(len(data.mask), np.float32)
    if opt.objective == "mixed":
        graded, tokens = decisions.graded(data.learnt, opt), data.learnt.sum(1)
        there = there if opt.distill else graded.usable
        advantage = (
            graded.advantage
            * graded.weight
            * np.float32(tokens[there].sum() / max(1, tokens[graded.usable].sum()))
        )
    return OnPolicy(decisions, there, advantage, temperature, _to_go(data, decisions, opt))


def _to_go(data: Labelled, decisions: Decisions, opt: OptimizeParams) -> Float[np.ndarray, " N"]:
    """`rewards_to_go` at every decision, of the rewards as the rollout recorded them; zero without a discount."""
    to_go = np.zeros(len(data.mask), np.float32)
    for episode in np.unique(decisions.episode) if opt.discount else ():
        rows = np.flatnonzero((decisions.episode == episode) & decisions.decided)
        teacher = tempered(
            torch.from_numpy(data.teacher[rows]).float(), opt.teacher_temperature or opt.temperature
        )
        rewards = of(teacher, torch.from_numpy(decisions.tokens[rows])) - torch.from_numpy(
            decisions.log_probs[rows]
        )
        rewards = rewards if opt.clamp is None else rewards.clamp(-opt.clamp, opt.clamp)
        to_go[rows] = rewards_to_go(
            (rewards * torch.from_numpy(data.mask[rows])).sum(1), opt.discount
        ).numpy()
    return to_go


def _scores(policy: Policy, data: Labelled, opt: OptimizeParams) -> Float[np.ndarray, "N K V"]:
    """A policy's log-probabilities at all states, at the student's temperature."""
    parts = in_batches(np.arange(len(data.mask)), opt.batch_size)
    with torch.inference_mode():
        return np.concatenate(
            [
                tempered(policy.logits(data.observations.at(rows)), opt.temperature).cpu().numpy()
                for rows in parts
            ]
        )


def _loss(data: Labelled, params: Params, seed: int) -> Loss:
    opt = params.optimize
    objective: Any = named_function(
        opt.objective, {**OBJECTIVES, **ON_DECISIONS}, "optimize.objective"
    )
    states = order(data.usable, opt.batch_size, seed)

    def loss(policy: Policy, step: int) -> Means:
        rows = states(step)
        batch, mask = _token_batch(policy, data, rows, opt, fsdp.own(derive(seed, step)))
        row = _diagnostics(batch, mask)
        values = objective(batch)
        if opt.confidence:
            values = values * confidence(batch.teacher, opt.confidence)
        total = masked_mean(values, mask)
        if data.initial is not None:
            away = masked_mean(
                reverse_kl(
                    replace(batch, teacher=torch.from_numpy(data.initial[rows]).to(values.device))
                ),
                mask,
            )
            total, row = total + opt.anchor * away, row | {"anchor_kl": away.item()}
        return Means(total, row, int(data.mask[rows].sum()))

    return loss


def _diagnostics(batch: TokenBatch, mask: Bool[Tensor, "N K"]) -> Row:
    """What is kept of a step beside its loss: entropy and distance in nats a token, and how much of the loss its options hold back."""
    opt = batch.settings
    row = {"student_entropy": masked_mean(entropy(batch.student.detach()), mask).item()}
    if opt.objective != "reverse_kl" or opt.anchor or opt.confidence:  # the loss is something else
        row["reverse_kl"] = masked_mean(reverse_kl(batch).detach(), mask).item()
    if opt.clamp is not None:
        tokens, stale = (
            (batch.tokens, batch.stale)
            if isinstance(batch, DecisionBatch)
            else (batch.draw(), None)
        )
        row["clamp_fraction"] = masked_mean(clamped(batch, tokens, stale).float(), mask).item()
    if opt.objective == "mixed" and isinstance(batch, DecisionBatch):
        row["clip_fraction"] = masked_mean(clipped(batch.taken).float(), mask).item()
    if opt.confidence:
        row["confidence"] = masked_mean(confidence(batch.teacher, opt.confidence), mask).item()
    return row


def _token_batch(
    policy: Policy, data: Labelled, rows: np.ndarray, opt: OptimizeParams, seed: int
) -> tuple[TokenBatch, Bool[Tensor, "N K"]]:
    """Both distributions at some states, and what the rollout did there where the objective asks for it."""
    logits = torch.cat(
        [policy.logits(data.observations.at(part)) for part in in_batches(rows, opt.batch_size)]
    )
    student = tempered(logits, opt.temperature)
    teacher = tempered(
        torch.from_numpy(data.teacher[rows]).to(logits.device).float(),
        opt.teacher_temperature or opt.temperature,
    )
    mask, batch = (
        torch.from_numpy(data.mask[rows]).to(logits.device),
        TokenBatch(student, teacher, lambda: drawn(student, seed), opt),
    )
    return batch if data.on_policy is None else _decided(batch, logits, data.on_policy, rows), mask


def _decided(
    batch: TokenBatch, logits: Float[Tensor, "N K V"], on_policy: OnPolicy, rows: np.ndarray
) -> DecisionBatch:
    def there(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array[rows]).to(logits.device)

    tokens = there(on_policy.decisions.tokens)
    now, then = (
        of(tempered(logits, on_policy.temperature), tokens),
        there(on_policy.decisions.log_probs),
    )
    taken = Taken(now, then, there(on_policy.advantage), batch.settings)
    return DecisionBatch(
        batch.student,
        batch.teacher,
        batch.draw,
        batch.settings,
        tokens=tokens,
        taken=taken,
        to_go=there(on_policy.to_go),
    )


def _probe(policy: Policy, data: Labelled, opt: OptimizeParams) -> Distance:
    """Student and teacher on a fixed selection of the states."""
    with torch.inference_mode():
        batch, mask = _token_batch(policy, data, probed(data.mask), opt, 0)
        return distance(batch, mask, policy.chunk)
