"""Policies by family: `POLICIES` names the shipped ones; others are `"package.module:function"`."""

from collections.abc import Callable
from pathlib import Path

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.plugins import named_function
from vla_opd.policies import lora, tiny
from vla_opd.policies.checkpoint import Checkpoint, CheckpointFacts, open_checkpoint, write_policy
from vla_opd.policies.policy import Observations, Policy

__all__ = [
    "POLICIES",
    "Observations",
    "Policy",
    "build_policy",
    "from_pretrained",
    "load_policy",
    "save_pretrained",
]


def _openvla_oft(facts: CheckpointFacts) -> Policy:
    from vla_opd.policies.openvla_oft.model import of_facts  # brings transformers: 3 s

    return of_facts(facts)


POLICIES: dict[str, Callable[[CheckpointFacts], Policy]] = {
    "tiny": tiny.TinyVLA,
    "openvla_oft": _openvla_oft,
}


def build_policy(facts: CheckpointFacts) -> Policy:
    """Return a policy with freshly initialised weights, drawn from torch's global generator.

    ValueError for a family that is unknown, or whose function does not return a `Policy`.
    """
    family = facts.policy.family
    policy = named_function(family, POLICIES, "policy.family")(facts)
    _require_policy(policy, family)
    return policy


def _require_policy(policy: object, family: str) -> None:
    if not isinstance(policy, Policy):
        raise ValueError(
            f"policy.family is {family!r}, which returned a {type(policy).__name__}; expected an "
            f"instance of a subclass of {Policy.__module__}.{Policy.__name__}"
        )


def load_policy(checkpoint: Checkpoint, device: str = "cpu", *, graphs: bool = False) -> Policy:
    """Return the policy of a checkpoint on a device, in evaluation mode.

    It has its weights, in the precision that they are stored in, its adapter and its tokenizer.
    graphs: run forward passes without gradients as CUDA graphs. ValueError if it has none.
    """
    policy = _build_uninitialized(checkpoint.facts)
    # Clones are aligned in memory as torch's own tensors are.
    weights = {name: tensor.clone() for name, tensor in checkpoint.weights().items()}
    policy.load_state_dict(weights, assign=True)
    lora.read(policy, checkpoint.folder)
    tokenizer = checkpoint.tokenizer()
    if tokenizer is not None:
        policy.tokenizer = tokenizer
    if graphs:
        policy.capture()
    return policy.to(device).eval()


def _build_uninitialized(facts: CheckpointFacts) -> Policy:
    """Return a policy whose weights may have any values: memory never written to costs nothing."""
    if facts.policy.family == "tiny":  # initializing it takes less time than this import
        return build_policy(facts)
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return build_policy(facts)


def from_pretrained(folder: Path, device: str = "cpu") -> Policy:
    """Open, verify and load the checkpoint in `folder`."""
    return load_policy(open_checkpoint(folder), device)


def save_pretrained(policy: Policy, facts: CheckpointFacts, folder: Path) -> Manifest:
    """Publish a policy made elsewhere as a checkpoint: weights, and a manifest with its facts."""
    with draft(folder, "checkpoint", {}, {}) as work:
        write_policy(work, policy, None)
        return work.publish({"checkpoint": facts.model_dump()})
