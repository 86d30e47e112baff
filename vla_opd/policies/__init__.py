"""Policies: one file a family. `POLICIES` names the shipped ones; any other is `"package.module:function"`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vla_opd.artifacts import Manifest, draft
from vla_opd.checkpoint import WEIGHTS, Checkpoint, CheckpointFacts, open_checkpoint, save_weights
from vla_opd.params import named_function
from vla_opd.policies import tiny
from vla_opd.policies.protocol import Observations, Policy

__all__ = ["POLICIES", "Observations", "Policy", "build_policy", "from_pretrained", "load_policy", "save_pretrained"]

POLICIES: dict[str, Callable[[CheckpointFacts], Any]] = {"tiny": tiny.TinyVLA}


def build_policy(facts: CheckpointFacts) -> Any:  # a Policy that is also a torch.nn.Module: Python has no intersection type
    """A policy of this description with freshly initialised weights (from torch's global generator)."""
    return named_function(facts.policy.family, POLICIES, "policy.family")(facts)


def load_policy(checkpoint: Checkpoint, device: str = "cpu") -> Any:  # as above
    """The policy with its weights, on a device, in evaluation mode."""
    policy = build_policy(checkpoint.facts)
    policy.load_state_dict(checkpoint.weights())
    return policy.to(device).eval()


def from_pretrained(folder: Path, device: str = "cpu") -> Any:  # as above
    """Open, verify and load the checkpoint in `folder`."""
    return load_policy(open_checkpoint(folder), device)


def save_pretrained(policy: Any, facts: CheckpointFacts, folder: Path) -> Manifest:  # as above
    """Publish a policy that was made elsewhere as a checkpoint: its weights as safetensors, and in the manifest all that is needed to use them."""
    with draft(folder, "checkpoint", {}, {}) as work:
        with work.part(WEIGHTS) as path:
            save_weights(path, policy.state_dict())
        return work.publish({"checkpoint": facts.model_dump()})
