"""Imitation, eq. (1): supervised learning of demonstrated actions."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from vla_opd.data.action_space import fit_action_space, gaussian_logits
from vla_opd.data.trajectory import States
from vla_opd.learning.objectives import masked_mean
from vla_opd.learning.optimizer import Budget, Schedule, StepLoss
from vla_opd.learning.update import state_order
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
        log_probs = policy.logits(self._states.observations.at(rows)).log_softmax(-1)
        target = self._targets[torch.from_numpy(self._bins[rows]).long()].to(log_probs.device)
        mask = torch.from_numpy(self._states.mask[rows]).to(log_probs.device)
        with torch.no_grad():
            hits = (log_probs.argmax(-1) == target.argmax(-1)).float()
            row = {"accuracy": masked_mean(hits, mask).item()}
        loss = masked_mean(-(target * log_probs).sum(-1), mask)
        return StepLoss(loss, row, int(self._states.mask[rows].sum()))

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Return this step's states with their demonstrated bins, by name."""
        rows = self._order(step)
        observations = self._states.observations.at(rows)
        return {
            "states": rows,
            "frames": observations.frames,
            "proprio": observations.proprio,
            "mask": self._states.mask[rows],
            "bins": self._bins[rows],
        }


def smoothed_targets(bins: int, sigma: float) -> Float[Tensor, "V V"]:
    """Row v: the target distribution for bin v, proportional to exp(-(u - v)^2 / (2 sigma^2)).

    sigma: in bins; the one-hot for 0.
    """
    if sigma == 0:
        return torch.eye(bins)
    return torch.softmax(torch.from_numpy(gaussian_logits(bins, sigma)), -1)


def plan_budget(settings: FinetuneParams, recipe: PretrainedParams) -> Budget:
    """Return the steps of one checkpoint's training, with a schedule of its own."""
    peak = recipe.learning_rate
    warmup = round(recipe.steps * settings.warmup_fraction)
    return Budget(
        steps=recipe.steps,
        schedule=Schedule(peak, peak * settings.final_fraction, warmup, recipe.steps),
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
        mean = tuple(proprio.mean(0, dtype=np.float64).tolist())
        std = tuple((proprio.std(0, dtype=np.float64) + 1e-3).tolist())
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
