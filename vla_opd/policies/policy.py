"""What a policy is: a batch of observations in, logits over the bins of one chunk of actions out."""

from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int16

from vla_opd.data.trajectory import Observations

__all__ = ["Observations", "Policy"]


class Policy(Protocol):
    """A VLA under OpenVLA-OFT's protocol: all K = S * A tokens of a chunk in one bidirectional forward pass.

    Tokens are numbered row-major, [step][dimension]; given the observation they are independent, so the distribution over chunks is the
    product of K categoricals over V bins, and its KL the sum of theirs.
    """

    chunk: int  # S: actions predicted at once and executed open loop
    action_dim: int  # A

    def logits(self, observations: Observations) -> Float[torch.Tensor, "B K V"]:
        """Unnormalised log-probabilities over the bins, which ascend in action value. On the policy's device, with gradients if enabled."""
        ...

    def decode(self, tokens: Int[np.ndarray, "B K"]) -> Float32[np.ndarray, "B S A"]:
        """Bins -> actions in the environment's units, by the checkpoint's own statistics."""
        ...

    def encode(self, actions: Float32[np.ndarray, "B S A"]) -> Int16[np.ndarray, "B K"]:
        """Actions in the environment's units -> the bins that stand for them."""
        ...
