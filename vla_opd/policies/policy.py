"""The policy interface: observations in, logits over the bins of one chunk of actions out."""

import abc

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int16
from tokenizers import Tokenizer
from torch import nn

from vla_opd.data.trajectory import Observations

__all__ = ["Observations", "Policy"]


class Policy(nn.Module, abc.ABC):
    """A vision-language-action policy (VLA) that predicts a chunk of actions in one forward pass.

    The K = S * A action tokens of a chunk are numbered row-major, [step][dimension]. Given the
    observation they are independent, as in OpenVLA-OFT: the distribution over chunks is the product
    of K categorical distributions over V bins, and a KL divergence is the sum of theirs.

    chunk:      S, actions predicted at once and executed open loop.
    action_dim: A, dimensions of an action.
    tokenizer:  of instructions. `load_policy` sets it if the checkpoint has one.
    """

    chunk: int
    action_dim: int
    tokenizer: Tokenizer | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @abc.abstractmethod
    def logits(self, observations: Observations) -> Float[torch.Tensor, "B K V"]:
        """Return unnormalised log-probabilities of the bins, which ascend in action value.

        They are on the policy's device, with gradients where those are enabled.
        """

    @abc.abstractmethod
    def decode(self, tokens: Int[np.ndarray, "B K"]) -> Float32[np.ndarray, "B S A"]:
        """Return the actions of bins by the checkpoint's statistics, in environment units."""

    @abc.abstractmethod
    def encode(self, actions: Float32[np.ndarray, "B S A"]) -> Int16[np.ndarray, "B K"]:
        """Return the bins of actions in the environment's units."""

    def capture(self) -> None:
        """Run forward passes without gradients as CUDA graphs from now on.

        ValueError for a policy that does not support them.
        """
        raise ValueError(
            f"OPD_GRAPHS, or --graphs, is set for {type(self).__name__}, which has no CUDA graphs; "
            "expected a policy of the family openvla_oft, or 0"
        )
