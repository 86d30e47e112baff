"""Policies: one file a family. `POLICIES` names the shipped ones; any other is `"package.module:function"`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.initialization import no_init_weights

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.plugins import named_function
from vla_opd.policies import lora, tiny
from vla_opd.policies.checkpoint import Checkpoint, CheckpointFacts, open_checkpoint, write_policy
from vla_opd.policies.openvla_oft import model as openvla_oft
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

POLICIES: dict[str, Callable[[CheckpointFacts], Any]] = {
    "tiny": tiny.TinyVLA,
    "openvla_oft": openvla_oft.of_facts,
}


def build_policy(
    facts: CheckpointFacts,
) -> Any:  # a Policy that is also a torch.nn.Module: Python has no intersection type
    """A policy of this description with freshly initialised weights (from torch's global generator)."""
    return named_function(facts.policy.family, POLICIES, "policy.family")(facts)


def load_policy(
    checkpoint: Checkpoint, device: str = "cpu", *, graphs: bool = False
) -> Any:  # as above
    """The policy with its weights, in the precision that they are stored in, its adapter and its tokenizer, on a device, in evaluation mode.

    graphs: its forward passes are captured, for those who only ask it. ValueError for a family that has no such passes.
    """
    with no_init_weights():  # what nobody writes to takes no memory
        policy = build_policy(checkpoint.facts)
    policy.load_state_dict(
        {name: tensor.clone() for name, tensor in checkpoint.weights().items()}, assign=True
    )  # aligned as torch's own are
    lora.read(policy, checkpoint.folder)
    if (tokenizer := checkpoint.tokenizer()) is not None:
        policy.tokenizer = tokenizer
    if graphs:
        if not hasattr(policy, "capture"):
            raise ValueError(
                f"OPD_GRAPHS, or --graphs: {checkpoint.folder} is of the family {checkpoint.facts.policy.family}; expected openvla_oft"
            )
        policy.capture()
    return policy.to(device).eval()


def from_pretrained(folder: Path, device: str = "cpu") -> Any:  # as above
    """Open, verify and load the checkpoint in `folder`."""
    return load_policy(open_checkpoint(folder), device)


def save_pretrained(policy: Any, facts: CheckpointFacts, folder: Path) -> Manifest:  # as above
    """Publish a policy that was made elsewhere as a checkpoint: its weights as safetensors, and in the manifest all that is needed to use them."""
    with draft(folder, "checkpoint", {}, {}) as work:
        write_policy(work, policy, None)
        return work.publish({"checkpoint": facts.model_dump()})
