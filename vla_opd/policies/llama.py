"""A small Llama that reads embeddings, with full attention: every position attends to every other.

The layers, the names of their weights and the initial weights are those of
`transformers.LlamaModel` (RMSNorm, rotary positions, gated MLP; no biases), to the last bit. That
class takes 3 s of processor time to import, at every start of a stage.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

EPSILON = 1e-6
ROTARY_BASE = 10_000.0
INITIAL_STD = 0.02

Rotation = tuple[Float[Tensor, "L D"], Float[Tensor, "L D"]]
"""Cosines and sines of every position's angles."""


class Llama(nn.Module):
    """Blocks of attention and MLP, then a norm."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self._recomputes = False
        self.head_width = width // heads
        # Never read: the row of the vocabulary that `transformers.LlamaModel` can't do without.
        self.embed_tokens = nn.Embedding(1, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = Norm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)

    def forward(self, sequence: Float[Tensor, "B L W"], last: int) -> Float[Tensor, "B K W"]:
        """Return the hidden states of the K = `last` last of L embeddings.

        Only the last block can leave the others out: they are what the K read.
        """
        rotation = self._rotation(sequence)
        *inner, final = self.layers
        for block in inner:
            sequence = self._compute(block, sequence, rotation, sequence.shape[1])
        return self.norm(self._compute(final, sequence, rotation, last))

    def _compute(
        self, block: nn.Module, sequence: Float[Tensor, "B L W"], rotation: Rotation, last: int
    ) -> Float[Tensor, "B K W"]:
        if self._recomputes:
            return checkpoint(block, sequence, rotation, last, use_reentrant=False)
        return block(sequence, rotation, last)

    def activation_checkpointing_enable(self) -> None:
        """Keep only the inputs of blocks, and compute the rest again in the backward pass."""
        self._recomputes = True

    def activation_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs."""
        self._recomputes = False

    def _rotation(self, sequence: Float[Tensor, "B L W"]) -> Rotation:
        device = sequence.device
        exponents = torch.arange(0, self.head_width, 2, device=device).float() / self.head_width
        frequencies = 1.0 / ROTARY_BASE**exponents
        positions = torch.arange(sequence.shape[1], device=device).float()
        angles = positions[:, None] * frequencies
        both_halves = torch.cat([angles, angles], dim=-1)
        return both_halves.cos().to(sequence.dtype), both_halves.sin().to(sequence.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), of the last K of L positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.mlp = Mlp(width, 3 * width)
        self.input_layernorm = Norm(width)
        self.post_attention_layernorm = Norm(width)

    def forward(
        self, x: Float[Tensor, "B L W"], rotation: Rotation, last: int
    ) -> Float[Tensor, "B K W"]:
        """Return the block's output."""
        read = self.self_attn(self.input_layernorm(x), rotation, last)
        x = x[:, -last:] + read
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Multi-head attention with rotary positions: the last K of L positions read from all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Float[Tensor, "B L W"], rotation: Rotation, last: int
    ) -> Float[Tensor, "B K W"]:
        """Return what they read."""
        cos, sin = rotation
        # A copy: of a view, torch's kernel depends on whether the weights are being trained.
        readers = x[:, -last:].contiguous()
        queries = self._split(self.q_proj(readers))
        queries = _rotate(queries, (cos[-last:], sin[-last:]))
        keys = _rotate(self._split(self.k_proj(x)), rotation)
        values = self._split(self.v_proj(x))
        read = scaled_dot_product_attention(queries, keys, values)
        return self.o_proj(read.transpose(1, 2).flatten(2))

    def _split(self, x: Float[Tensor, "B L W"]) -> Float[Tensor, "B H L D"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "B L W"]) -> Float[Tensor, "B L W"]:
        """Return the layer's output."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon), times a weight per dimension: RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "B L W"]) -> Float[Tensor, "B L W"]:
        """Return the normalised vectors; the mean is taken in float32."""
        exact = x.float()
        variance = exact.pow(2).mean(-1, keepdim=True)
        normalised = exact * torch.rsqrt(variance + EPSILON)
        return self.weight * normalised.to(x.dtype)


def _rotate(x: Float[Tensor, "B H L D"], rotation: Rotation) -> Float[Tensor, "B H L D"]:
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos + turned * sin
