"""TinyVLA: a vision-language-action policy of about 0.8 M parameters that trains on a laptop's CPU.

The sequence is that of a VLA: image tokens (a convolutional tower's map and soft-argmax keypoints per camera), instruction tokens (words of the
checkpoint's own vocabulary), optionally proprioception, and one placeholder per action token; a Llama made bidirectional by a full attention
mask; and a head of V bins on the placeholders. It answers OpenVLA-OFT's protocol: K = S * A tokens in one forward pass, `logits[B, K, V]`.
"""

import re
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int16
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from vla_opd.params.stages import PolicyParams
from vla_opd.policies.checkpoint import CheckpointFacts
from vla_opd.policies.policy import Observations

VOCABULARY_SIZE = (
    256  # rows of the word embedding; new words of later fine-tunings take the free ones
)
PAD, UNKNOWN, FIRST_WORD = 0, 1, 2
KEYPOINT_TOKENS, PROPRIO_TOKENS, HEATMAPS = 4, 2, 32


def words(text: str) -> list[str]:
    """The lower-case words of a text."""
    return re.findall(r"[a-z0-9]+", text.lower())


def extend_vocabulary(known: Iterable[str], instructions: Iterable[str]) -> tuple[str, ...]:
    """The known words, then the new ones of some instructions in alphabetical order. ValueError if they are too many for the embedding."""
    old = tuple(known)
    new = sorted({word for text in instructions for word in words(text)} - set(old))
    if len(old) + len(new) > VOCABULARY_SIZE - FIRST_WORD:
        raise ValueError(
            f"vocabulary: {len(old) + len(new)} words; expected at most {VOCABULARY_SIZE - FIRST_WORD}"
        )
    return old + tuple(new)


class TinyVLA(nn.Module):
    """The policy. Built from a checkpoint's facts alone; see `vla_opd.policies.protocol.Policy` for what it promises."""

    def __init__(self, facts: CheckpointFacts) -> None:
        super().__init__()
        shape, self.space = facts.policy, facts.action_space
        assert isinstance(shape, PolicyParams), "another family's description"
        self.chunk, self.action_dim = self.space.chunk, self.space.action_dim
        self.crop, self.prompt, self.length = shape.crop, facts.prompt, facts.instruction_length
        self.word_ids = {word: FIRST_WORD + i for i, word in enumerate(facts.vocabulary)}
        width = shape.width
        self.tower = VisionTower(shape.channels, width)
        self.camera = nn.Parameter(torch.randn(len(facts.environment.cameras), 1, width) * 0.02)
        self.word = nn.Embedding(VOCABULARY_SIZE, width)
        self.placeholder = nn.Parameter(torch.randn(self.space.tokens, width) * 0.02)
        self.proprio = (
            nn.Linear(len(facts.proprio_mean), PROPRIO_TOKENS * width) if shape.proprio else None
        )
        self.proprio_mean = nn.Buffer(torch.tensor(facts.proprio_mean), persistent=False)
        self.proprio_std = nn.Buffer(torch.tensor(facts.proprio_std), persistent=False)
        self.language_model = LlamaModel(
            LlamaConfig(
                vocab_size=1,  # words have their own embedding above; the Llama sees embeddings only
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                max_position_embeddings=1024,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
                attn_implementation="sdpa",  # pyright: ignore[reportCallIssue] - a keyword of the base class
            )
        )
        self.head = nn.Linear(width, self.space.bins)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.placeholder.device

    def logits(self, observations: Observations) -> Float[Tensor, "B K V"]:
        """Logits over the bins of one chunk. ValueError if the frames are smaller than the crop or the cameras are not the checkpoint's."""
        sequence = torch.cat(
            [self._image_tokens(observations), *self._other_tokens(observations)], dim=1
        )
        size = sequence.shape[1]
        everything = sequence.new_zeros(
            len(sequence), 1, size, size
        )  # additive mask: every position sees every other
        hidden = self.language_model(
            inputs_embeds=sequence, attention_mask=everything
        ).last_hidden_state
        return self.head(hidden[:, -self.space.tokens :])

    def decode(self, tokens: Int[np.ndarray, "B K"]) -> Float32[np.ndarray, "B S A"]:
        """Bins -> actions in the environment's units."""
        return self.space.decode(tokens)

    def encode(self, actions: Float32[np.ndarray, "B S A"]) -> Int16[np.ndarray, "B K"]:
        """Actions in the environment's units -> bins."""
        return self.space.encode(actions)

    def _image_tokens(self, observations: Observations) -> Float[Tensor, "B C*I W"]:
        frames = observations.frames
        _, cameras, height, width, _ = frames.shape
        if cameras != len(self.camera) or min(height, width) < self.crop:
            raise ValueError(
                f"frames: {cameras} camera(s) of {height}x{width}; expected {len(self.camera)} of at least {self.crop}x{self.crop}"
            )
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        cropped = np.ascontiguousarray(frames[:, :, top : top + self.crop, left : left + self.crop])
        pixels = (
            torch.from_numpy(cropped).to(self.device).permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0
        )
        tokens = self.tower(pixels.flatten(0, 1)).unflatten(0, (len(frames), cameras))
        return (tokens + self.camera).flatten(1, 2)

    def _other_tokens(self, observations: Observations) -> list[Float[Tensor, "B J W"]]:
        rows = len(observations)
        parts = [
            self.word(
                torch.tensor(
                    [self._ids(text) for text in observations.instructions], device=self.device
                )
            )
        ]
        if self.proprio is not None:
            scaled = (
                torch.from_numpy(observations.proprio).to(self.device) - self.proprio_mean
            ) / self.proprio_std
            parts.append(self.proprio(scaled).unflatten(1, (PROPRIO_TOKENS, -1)))
        return [*parts, self.placeholder.expand(rows, -1, -1)]

    def _ids(self, instruction: str) -> list[int]:
        ids = [
            self.word_ids.get(word, UNKNOWN)
            for word in words(self.prompt.format(instruction=instruction))
        ]
        return (ids + [PAD] * self.length)[: self.length]


class VisionTower(nn.Module):
    """Pixels -> a map at a sixteenth of the resolution as tokens, and the positions of learned keypoints as a few more."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.fine = nn.Sequential(
            nn.Conv2d(5, channels, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            Residual(channels),
        )
        self.coarse = nn.Sequential(
            nn.Conv2d(channels, wide, 3, stride=2, padding=1),
            Residual(wide),
            nn.Conv2d(wide, width, 3, stride=2, padding=1),
        )
        self.heatmaps = nn.Conv2d(channels, HEATMAPS, 1)
        self.keypoints = nn.Linear(2 * HEATMAPS, KEYPOINT_TOKENS * width)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B I W"]:
        """Tokens of one camera's pictures, pixels in [-1, 1]."""
        fine = self.fine(torch.cat([pixels, _coordinates(pixels)], dim=1))
        grid = self.coarse(fine).flatten(2).transpose(1, 2)
        keypoints = self.keypoints(_soft_argmax(self.heatmaps(fine))).unflatten(
            1, (KEYPOINT_TOKENS, -1)
        )
        return torch.cat([grid, keypoints], dim=1)


class Residual(nn.Module):
    """x + conv(gelu(norm(conv(gelu(norm(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The block's output."""
        return x + self.body(x)


def _coordinates(like: Float[Tensor, "B D H W"]) -> Float[Tensor, "B 2 H W"]:
    """Two channels that say where a pixel is: x and y in [-1, 1]."""
    rows, _, height, width = like.shape
    y = (
        torch.linspace(-1, 1, height, device=like.device)
        .view(1, 1, height, 1)
        .expand(rows, 1, height, width)
    )
    x = (
        torch.linspace(-1, 1, width, device=like.device)
        .view(1, 1, 1, width)
        .expand(rows, 1, height, width)
    )
    return torch.cat([x, y], dim=1)


def _soft_argmax(heatmaps: Float[Tensor, "B M H W"]) -> Float[Tensor, "B 2M"]:
    """E[(x, y)] under softmax of each heat map, in [-1, 1]."""
    weights = heatmaps.flatten(2).softmax(-1)
    places = _coordinates(heatmaps)[:1].flatten(2)
    return torch.einsum("bmp,dp->bmd", weights, places[0]).flatten(1)
