"""TinyVLA: a vision-language-action policy of about 0.8 M parameters that trains on a laptop's CPU.

Its sequence is that of a VLA: image tokens (per camera, the map of a convolutional tower and
soft-argmax keypoints), instruction tokens (words of the checkpoint's own vocabulary), optionally
proprioception, and one placeholder per action token. A Llama with a full attention mask, and so
bidirectional, reads it; a head of V bins reads the placeholders. As in OpenVLA-OFT, all K = S * A
action tokens come from one forward pass.
"""

import re
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int16
from torch import Tensor, nn

from vla_opd.params.stages import PolicyParams
from vla_opd.policies.checkpoint import CheckpointFacts
from vla_opd.policies.llama import Llama
from vla_opd.policies.policy import Observations, Policy

VOCABULARY_SIZE = 256  # rows of the word embedding; later fine-tunings fill the free ones
PAD = 0
UNKNOWN = 1
FIRST_WORD = 2
KEYPOINT_TOKENS = 4
PROPRIO_TOKENS = 2
HEATMAPS = 32


def words(text: str) -> list[str]:
    """The lower-case words of a text."""
    return re.findall(r"[a-z0-9]+", text.lower())


def extend_vocabulary(vocabulary: Iterable[str], instructions: Iterable[str]) -> tuple[str, ...]:
    """Return a vocabulary, then the new words of some instructions in alphabetical order.

    ValueError for more words than the embedding has rows.
    """
    old = tuple(vocabulary)
    new = set(words(" ".join(instructions))) - set(old)
    extended = (*old, *sorted(new))
    largest = VOCABULARY_SIZE - FIRST_WORD
    if len(extended) > largest:
        raise ValueError(f"vocabulary: {len(extended)} words; expected at most {largest}")
    return extended


class TinyVLA(Policy):
    """The policy, built from a checkpoint's facts alone."""

    def __init__(self, facts: CheckpointFacts) -> None:
        super().__init__()
        shape = facts.policy
        assert isinstance(shape, PolicyParams), "another family's description"
        self.space = facts.action_space
        self.chunk = self.space.chunk
        self.action_dim = self.space.action_dim
        self.crop = shape.crop
        self.prompt = facts.prompt
        self.instruction_length = facts.instruction_length
        self.word_ids = {word: FIRST_WORD + i for i, word in enumerate(facts.vocabulary)}
        width = shape.width
        # Initial weights depend on the order of these lines.
        self.tower = VisionTower(shape.channels, width)
        self.camera = nn.Parameter(torch.randn(len(facts.environment.cameras), 1, width) * 0.02)
        self.word = nn.Embedding(VOCABULARY_SIZE, width)
        self.placeholder = nn.Parameter(torch.randn(self.space.tokens, width) * 0.02)
        self.proprio = None
        if shape.proprio:
            self.proprio = nn.Linear(len(facts.proprio_mean), PROPRIO_TOKENS * width)
        self.proprio_mean = nn.Buffer(torch.tensor(facts.proprio_mean), persistent=False)
        self.proprio_std = nn.Buffer(torch.tensor(facts.proprio_std), persistent=False)
        self.language_model = Llama(width, shape.layers, shape.heads)
        self.head = nn.Linear(width, self.space.bins)

    def logits(self, observations: Observations) -> Float[Tensor, "B K V"]:
        """Return the logits of the bins of one chunk.

        ValueError for images smaller than the crop, or another number of cameras than trained with.
        """
        parts = [self._image_tokens(observations)]
        parts.append(self._instruction_tokens(observations))
        if self.proprio is not None:
            measured = torch.from_numpy(observations.proprio).to(self.device)
            scaled = (measured - self.proprio_mean) / self.proprio_std
            tokens = self.proprio(scaled)
            parts.append(tokens.unflatten(1, (PROPRIO_TOKENS, -1)))
        parts.append(self.placeholder.expand(len(observations), -1, -1))
        sequence = torch.cat(parts, dim=1)
        return self.head(self.language_model(sequence, last=self.space.tokens))

    def decode(self, tokens: Int[np.ndarray, "B K"]) -> Float32[np.ndarray, "B S A"]:
        """Return the actions of bins, in the environment's units."""
        return self.space.decode(tokens)

    def encode(self, actions: Float32[np.ndarray, "B S A"]) -> Int16[np.ndarray, "B K"]:
        """Return the bins of actions in the environment's units."""
        return self.space.encode(actions)

    def _image_tokens(self, observations: Observations) -> Float[Tensor, "B C*I W"]:
        frames = observations.frames
        rows, cameras, height, width, _ = frames.shape
        if cameras != len(self.camera) or min(height, width) < self.crop:
            raise ValueError(
                f"frames: {cameras} camera(s) of {height}x{width}; "
                f"expected {len(self.camera)} of at least {self.crop}x{self.crop}"
            )
        y = (height - self.crop) // 2
        x = (width - self.crop) // 2
        cropped = np.ascontiguousarray(frames[:, :, y : y + self.crop, x : x + self.crop])
        levels = torch.from_numpy(cropped).to(self.device)
        pixels = levels.permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0
        tokens = self.tower(pixels.flatten(0, 1))
        tokens = tokens.unflatten(0, (rows, cameras)) + self.camera
        return tokens.flatten(1, 2)

    def _instruction_tokens(self, observations: Observations) -> Float[Tensor, "B L W"]:
        ids = [self._ids(instruction) for instruction in observations.instructions]
        return self.word(torch.tensor(ids, device=self.device))

    def _ids(self, instruction: str) -> list[int]:
        prompt = words(self.prompt.format(instruction=instruction))
        ids = [self.word_ids.get(word, UNKNOWN) for word in prompt]
        padding = [PAD] * self.instruction_length
        return (ids + padding)[: self.instruction_length]


class VisionTower(nn.Module):
    """Image tokens: a map at a sixteenth of the resolution, and positions of learned keypoints."""

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
        """Return the I tokens of one camera's images, whose pixels are in [-1, 1]."""
        images = torch.cat([pixels, _coordinates(pixels)], dim=1)
        fine = self.fine(images.contiguous(memory_format=torch.channels_last))  # faster on CPUs
        grid = self.coarse(fine).flatten(2).transpose(1, 2)
        positions = _soft_argmax(self.heatmaps(fine))
        keypoints = self.keypoints(positions)
        keypoints = keypoints.unflatten(1, (KEYPOINT_TOKENS, -1))
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
        """Return the block's output."""
        return x + self.body(x)


def _coordinates(images: Float[Tensor, "B D H W"]) -> Float[Tensor, "B 2 H W"]:
    """Return two channels with the x and y of every pixel, in [-1, 1]."""
    rows, _, height, width = images.shape
    x = torch.linspace(-1, 1, width, device=images.device)
    y = torch.linspace(-1, 1, height, device=images.device)
    coordinates = torch.stack(torch.meshgrid(x, y, indexing="xy"))
    return coordinates.expand(rows, -1, -1, -1)


def _soft_argmax(heatmaps: Float[Tensor, "B M H W"]) -> Float[Tensor, "B 2M"]:
    """Return E[(x, y)] under the softmax of each heat map, in [-1, 1]."""
    weights = heatmaps.flatten(2).softmax(-1)
    coordinates = _coordinates(heatmaps[:1])[0].flatten(1)
    return torch.einsum("bmp,dp->bmd", weights, coordinates).flatten(1)
