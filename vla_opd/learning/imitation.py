"""Imitation, eq. (1): supervised learning of demonstrated actions."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from vla_opd.data.action_space import fit_action_space, gaussian_logits
from vla_opd.data.trajectory import States
from vla_opd.learning.objectives import masked_mean, masked_means
from vla_opd.learning.optimizer import Budget, Schedule, StepLoss
from vla_opd.learning.update import select_rows, state_order
from vla_opd.params.stages import (
    EnvironmentParams,
    FinetuneParams,
    PolicyParams,
    PretrainedParams,
)
from vla_opd.policies.checkpoint import Checkpoint, CheckpointFacts, require_environment
from vla_opd.policies.load import build_policy, load_policy
from vla_opd.policies.policy import Policy
from vla_opd.policies.tiny import extend_vocabulary


class ImitationLoss:
    """-sum_v q(v) log p(v) over valid tokens, q the smoothed target of the demonstrated bin.

    bins: the demonstrated bins of all states. seed: of the order of states.
    """

    def __init__(
        self,
        states: States,
        bins: Int16[np.ndarray, "N K"],
        targets: Float[Tensor, "V V"],
        batch_size: int,
        seed: int,
    ) -> None:
        self._states = states
        self._bins = bins
        self._targets = targets
        self._order = state_order(np.arange(len(states)), batch_size, seed)

    def __call__(self, policy: Policy, step: int) -> StepLoss:
        """Return the loss of this step's states, and its accuracy."""
        rows = self._order(step)
        states = self._states
        logits = policy.logits(states.observations.at(rows))
        log_probs = logits.log_softmax(-1)
        mask = select_rows(states.mask, rows, logits.device)
        bins = torch.from_numpy(self._bins[rows])
        target = self._targets[bins.long()]
        target = target.to(logits.device)
        with torch.no_grad():
            predicted = log_probs.argmax(-1)
            demonstrated = target.argmax(-1)
            hits = predicted == demonstrated
            row = masked_means({"accuracy": hits.float()}, mask)
        terms = target * log_probs
        cross_entropy = -terms.sum(-1)
        loss = masked_mean(cross_entropy, mask)
        valid_tokens = states.mask[rows].sum()
        return StepLoss(loss, row, int(valid_tokens))

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Return this step's states with their demonstrated bins, by name."""
        rows = self._order(step)
        states = self._states
        observations = states.observations.at(rows)
        return {
            "states": rows,
            "frames": observations.frames,
            "proprio": observations.proprio,
            "mask": states.mask[rows],
            "bins": self._bins[rows],
        }


def smoothed_targets(bins: int, sigma: float) -> Float[Tensor, "V V"]:
    """Row v: the target distribution for bin v, proportional to exp(-(u - v)^2 / (2 sigma^2)).

    sigma: in bins; the one-hot for 0.
    """
    if sigma == 0:
        return torch.eye(bins)
    logits = torch.from_numpy(gaussian_logits(bins, sigma))
    return torch.softmax(logits, -1)


def plan_budget(settings: FinetuneParams, recipe: PretrainedParams) -> Budget:
    """Return the steps of one checkpoint's training, with a schedule of its own."""
    steps = recipe.steps
    peak = recipe.learning_rate
    final = peak * settings.final_fraction
    warmup = round(steps * settings.warmup_fraction)
    return Budget(
        steps=steps,
        schedule=Schedule(peak, final, warmup, steps),
        gradient_clip=settings.gradient_clip,
        weight_decay=settings.weight_decay,
        save_every=settings.save_every,
    )


def describe_checkpoint(
    states: States, shape: PolicyParams, environment: EnvironmentParams, parent: Checkpoint | None
) -> CheckpointFacts:
    """Return the facts of the checkpoint to be trained.

    With a parent, its facts with the new words added; without, statistics of the demonstrations.
    ValueError if the parent was trained in another environment.
    """
    instructions = states.observations.instructions
    if parent is None:
        return _describe_new(states, shape, environment)
    require_environment(parent.facts, environment, str(parent.folder))
    vocabulary = parent.facts.vocabulary  # empty if the policy has a tokenizer
    if vocabulary:
        vocabulary = extend_vocabulary(vocabulary, instructions)
    return parent.facts.model_copy(update={"vocabulary": vocabulary, "environment": environment})


def _describe_new(
    states: States, shape: PolicyParams, environment: EnvironmentParams
) -> CheckpointFacts:
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if shape.proprio:
        proprio = states.observations.proprio
        means = proprio.mean(0, dtype=np.float64)
        deviations = proprio.std(0, dtype=np.float64) + 1e-3
        mean = tuple(means.tolist())
        std = tuple(deviations.tolist())
    return CheckpointFacts(
        policy=shape,
        action_space=fit_action_space(states.labels[:, 0], shape.chunk, shape.bins),
        environment=environment,
        vocabulary=extend_vocabulary((), states.observations.instructions),
        proprio_mean=mean,
        proprio_std=std,
    )


def initial_policy(
    facts: CheckpointFacts, parent: Checkpoint | None, seed: int, device: str
) -> Policy:
    """Return the policy to train: with the parent's weights or, without a parent, random ones."""
    torch.manual_seed(seed)
    if parent is None:
        policy = build_policy(facts).to(device)
    else:
        policy = load_policy(replace(parent, facts=facts), device)
    return policy.train()
