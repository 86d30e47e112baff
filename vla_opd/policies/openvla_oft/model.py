"""OpenVLA-OFT with discrete action tokens (M. J. Kim, C. Finn and P. Liang, 2025).

Built from stock transformers modules: no forked transformers, no remote code.

The patch features of DINOv2 and SigLIP are concatenated and projected into the embedding space of a
Llama. The sequence is BOS, the patches, the rest of the prompt, one zero placeholder per action
token, a stop token; attention is bidirectional. Action token k is read one position before its
placeholder. The head has only the rows of the V action tokens, in the order of ascending actions.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int16, UInt8
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.initialization import no_init_weights

from vla_opd.data.action_space import ActionSpace
from vla_opd.policies.checkpoint import CheckpointFacts
from vla_opd.policies.openvla_oft import images
from vla_opd.policies.openvla_oft.cuda_graphs import Captured
from vla_opd.policies.openvla_oft.files import CONFIG, read_tokenizer
from vla_opd.policies.openvla_oft.layout import QUESTION, Architecture, read_public
from vla_opd.policies.openvla_oft.towers import (
    REGISTERS,
    SIZE,
    Projector,
    build_dino,
    build_siglip,
)
from vla_opd.policies.openvla_oft.weights import read_weights
from vla_opd.policies.policy import Observations, Policy

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Token ids.
BEGIN = 1
PLACEHOLDER = 1
STOP = 2
EMPTY = 29871  # the lone space that every prompt ends with
PAD = 32000

# Ids of every prompt, padding included, so that all forward passes have one shape. LIBERO's longest
# instruction takes about 45.
LONGEST = 64


class Images(NamedTuple):
    """A batch of camera images after each step of preprocessing."""

    flipped: UInt8[np.ndarray, "B H W 3"]
    decoded: UInt8[np.ndarray, "B H W 3"]
    resized: UInt8[np.ndarray, "B S S 3"]
    cropped: UInt8[np.ndarray, "B S S 3"]


class OpenVLAOFT(Policy):
    """The policy.

    architecture: sizes and image preprocessing.
    space:        the meaning of action tokens.
    question:     the prompt, with a field for the instruction.
    tokenizer:    set after construction; without one only methods that take ids can be called.
    """

    def __init__(
        self, architecture: Architecture, space: ActionSpace, question: str = QUESTION
    ) -> None:
        super().__init__()
        self.tokenizer: Tokenizer | None = None
        self.question = question
        self.architecture = architecture
        self.space = space
        self.chunk = space.chunk
        self.action_dim = space.action_dim
        self.dino = build_dino(architecture.dino)
        self.siglip = build_siglip(architecture.siglip)
        features = architecture.dino.width + architecture.siglip.width
        self.projector = Projector(features, architecture.hidden)
        self.language_model = _build_llama(architecture)
        self.head = nn.Linear(architecture.hidden, space.bins, bias=False)
        self._captured: Captured | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.head.weight.device

    def logits(self, observations: Observations) -> Float[Tensor, "B K V"]:
        """Return logits over the bins of one chunk.

        ValueError for several cameras, and for an instruction that is too long.
        """
        cameras = observations.frames.shape[1]
        if cameras != 1:
            raise ValueError(
                f"frames: {cameras} cameras; expected 1, the one the checkpoint was trained with"
            )
        pixels = self.pixels(observations.frames[:, 0])
        return self.logits_of_pixels(pixels, observations.instructions)

    def logits_of_pixels(
        self, pixels: Float[Tensor, "B 6 S S"], instructions: Sequence[str]
    ) -> Float[Tensor, "B K V"]:
        """Return logits for preprocessed images."""
        prompts = [self.prompt(instruction) for instruction in instructions]
        padded = [ids + [PAD] * (LONGEST - len(ids)) for ids in prompts]
        lengths = [len(ids) for ids in prompts]
        forward = self.forward
        if self._captured is not None and not torch.is_grad_enabled():
            forward = self._captured
        return forward(
            pixels,
            self._to_device(torch.tensor(padded)),
            self._to_device(torch.tensor(lengths)),
        )

    def forward(
        self,
        pixels: Float[Tensor, "B 6 S S"],
        prompts: Int[Tensor, "B L"],
        lengths: Int[Tensor, " B"],
    ) -> Float[Tensor, "B K V"]:
        """Compute logits, entirely on the device.

        No value decides what is computed, so a call can be captured as one graph.

        prompts: ids from BOS on, padded on the right. lengths: without padding.
        """
        features = self.features(pixels)
        patches = self.projector(features)
        hidden = self.hidden(patches, prompts, lengths)
        return self.head(hidden).float()

    def capture(self) -> None:
        """Replay forward passes without gradient as CUDA graphs from now on."""
        self._captured = Captured(self.forward)

    def prompt(self, instruction: str) -> list[int]:
        """Return the ids of a prompt, from BOS to the last before the action tokens.

        ValueError without a tokenizer, and for more than `LONGEST` ids.
        """
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer; expected tokenizer.json beside the weights")
        text = self.question.format(instruction=instruction.lower())
        ids = self.tokenizer.encode(text).ids
        if ids[-1] != EMPTY:
            ids = [*ids, EMPTY]
        if ids[0] != BEGIN or len(ids) > LONGEST:
            raise ValueError(
                f"instruction {instruction!r}: {len(ids)} ids, of which the first is {ids[0]}; "
                f"expected at most {LONGEST}, of which the first is {BEGIN}"
            )
        return ids

    def pixels(self, frames: UInt8[np.ndarray, "B H W 3"]) -> Float[Tensor, "B 6 S S"]:
        """Preprocess upright frames: DINOv2's three normalized channels, then SigLIP's three."""
        images = self.preprocess(frames)
        return self.normalize(images.cropped)

    def preprocess(self, frames: UInt8[np.ndarray, "B H W 3"]) -> Images:
        """Preprocess upright frames up to normalization, and return every step.

        The simulator renders upside down, and the training data are that rotated by 180 degrees,
        which is an upright frame mirrored.
        """
        mirrored = frames[:, :, ::-1]
        flipped = np.ascontiguousarray(mirrored)
        cores = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(min(len(flipped), cores)) as pool:
            steps = pool.map(self._decode_resize_crop, flipped)
            decoded, resized, cropped = zip(*steps, strict=True)
        return Images(
            flipped=flipped,
            decoded=np.stack(decoded),
            resized=np.stack(resized),
            cropped=np.stack(cropped),
        )

    def _decode_resize_crop(
        self, flipped: UInt8[np.ndarray, "H W 3"]
    ) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "S S 3"], UInt8[np.ndarray, "S S 3"]]:
        decoded = images.jpeg_round_trip(flipped)
        resized = images.lanczos(decoded, SIZE)
        cropped = images.center_crop(resized, self.architecture.crop)
        return decoded, resized, cropped

    def normalize(self, cropped: UInt8[np.ndarray, "B S S 3"]) -> Float[Tensor, "B 6 S S"]:
        """Compute (x / 255 - mean) / std for each tower, on the device, from one byte per level."""
        levels = self._to_device(torch.from_numpy(cropped)).permute(0, 3, 1, 2)
        levels = levels.repeat(1, 2, 1, 1).float()
        architecture = self.architecture
        half = (0.5, 0.5, 0.5)
        rows = [
            [255.0] * 6,
            architecture.mean + half,
            architecture.std + half,
        ]
        # Divide by tensors: to divide by a number, a GPU multiplies by its inverse, which differs
        # in the last bit.
        constants = self._to_device(torch.tensor(rows))
        scale, mean, std = constants.view(3, 1, 6, 1, 1)
        pixels = (levels / scale - mean) / std
        return pixels.to(self.head.weight.dtype)

    def _to_device(self, values: Tensor) -> Tensor:
        """Copy to the policy's device, without waiting for work that a GPU has queued."""
        device = self.device
        if device.type == "cuda":
            return values.pin_memory().to(device, non_blocking=True)
        return values.to(device)

    def features(self, pixels: Float[Tensor, "B 6 S S"]) -> Float[Tensor, "B P F"]:
        """Concatenate both towers' patch features."""
        dino = self.dino(pixels[:, :3])
        siglip = self.siglip(pixels[:, 3:])
        dino_patches = dino.last_hidden_state[:, 1 + REGISTERS :]
        return torch.cat([dino_patches, siglip.last_hidden_state], dim=-1)

    def hidden(
        self,
        patches: Float[Tensor, "B P H"],
        prompts: Int[Tensor, "B L"],
        lengths: Int[Tensor, " B"],
    ) -> Float[Tensor, "B K H"]:
        """Return the language model's outputs at the positions of the K action tokens.

        prompts: ids from BOS on, padded on the right. lengths: without padding.
        """
        sequence, is_token = self.sequence(patches, prompts, lengths)
        mask = _bidirectional_mask(is_token, sequence.dtype)
        outputs = self.language_model(inputs_embeds=sequence, attention_mask=mask)
        states = outputs.last_hidden_state

        first = patches.shape[1] + lengths - 1
        offsets = torch.arange(self.space.tokens, device=lengths.device)
        positions = first.unsqueeze(1) + offsets
        index = positions.unsqueeze(-1).expand(-1, -1, states.shape[-1])
        return states.gather(1, index)

    def sequence(
        self,
        patches: Float[Tensor, "B P H"],
        prompts: Int[Tensor, "B L"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B N H"], Bool[Tensor, "B N"]]:
        """Return the language model's input embeddings, and which of them are not padding.

        The patches follow BOS; placeholders are zero.
        """
        text = _append_placeholders(prompts, lengths, self.space.tokens)
        words = self.language_model.embed_tokens(text.ids)
        words = words.masked_fill(text.is_placeholder.unsqueeze(-1), 0)
        is_patch = text.is_token.new_ones(patches.shape[:2])
        sequence = _insert_after_first(words, patches)
        is_token = _insert_after_first(text.is_token, is_patch)
        return sequence, is_token

    def decode(self, tokens: Int[np.ndarray, "B K"]) -> Float32[np.ndarray, "B S A"]:
        """Convert bins to actions in the environment's units.

        The training data close the gripper at 0 and open it at 1; the environment at 1 and -1.
        """
        actions = self.space.decode(tokens)
        gripper = actions[..., -1]
        actions[..., -1] = -np.sign(2 * gripper - 1)
        return actions

    def encode(self, actions: Float32[np.ndarray, "B S A"]) -> Int16[np.ndarray, "B K"]:
        """Convert actions in the environment's units to bins, the reverse of `decode`."""
        gripper = actions[..., -1]
        data_actions = actions.copy()
        data_actions[..., -1] = (1 - np.sign(gripper)) / 2
        return self.space.encode(data_actions)


def _build_llama(architecture: Architecture) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=architecture.rows,
        hidden_size=architecture.hidden,
        intermediate_size=architecture.intermediate,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.key_value_heads,
        rms_norm_eps=architecture.rms_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_theta},
        max_position_embeddings=2048,
        use_cache=False,
        pad_token_id=None,  # the embedding of padding is trained as any other
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue] - of the base class
    )
    return LlamaModel(config)


def _bidirectional_mask(
    is_token: Bool[Tensor, "B N"], dtype: torch.dtype
) -> Float[Tensor, "B 1 N N"]:
    """Return an additive mask: every position attends to every position but the padding."""
    lowest = torch.finfo(dtype).min
    mask = torch.zeros_like(is_token, dtype=dtype).masked_fill(~is_token, lowest)
    return mask[:, None, None].expand(-1, 1, is_token.shape[1], -1)


def _insert_after_first(text: Tensor, patches: Tensor) -> Tensor:
    """Insert the patches' columns after BOS."""
    begin = text[:, :1]
    rest_of_text = text[:, 1:]
    return torch.cat([begin, patches, rest_of_text], dim=1)


class Text(NamedTuple):
    """Token ids, M = L + K + 1 per row."""

    ids: Int[Tensor, "B M"]
    is_placeholder: Bool[Tensor, "B M"]
    is_token: Bool[Tensor, "B M"]  # not padding


def _append_placeholders(
    prompts: Int[Tensor, "B L"], lengths: Int[Tensor, " B"], tokens: int
) -> Text:
    """Append K placeholders and a stop token to each prompt, before its padding."""
    batch, longest = prompts.shape
    positions = torch.arange(longest + tokens + 1, device=prompts.device)
    positions = positions.expand(batch, -1)
    end = lengths.unsqueeze(1)
    stop = end + tokens
    is_after_prompt = positions >= end
    is_placeholder = is_after_prompt & (positions < stop)

    ids = nn.functional.pad(prompts, (0, tokens + 1), value=PAD)
    ids = torch.where(positions > stop, PAD, ids)
    ids = torch.where(positions == stop, STOP, ids)
    ids = torch.where(is_placeholder, PLACEHOLDER, ids)
    return Text(ids, is_placeholder, positions <= stop)


def of_facts(facts: CheckpointFacts) -> OpenVLAOFT:
    """Build the policy that a checkpoint's metadata describes.

    ValueError for the settings of a policy that is trained from scratch, which this one cannot be.
    """
    if not isinstance(facts.policy, Architecture):
        raise ValueError(
            f"policy.family is {facts.policy.family!r}; expected a family that can be trained from "
            "scratch (for this one, `adopt` a public checkpoint)"
        )
    return OpenVLAOFT(facts.policy, facts.action_space, facts.prompt)


def from_public(
    folder: Path,
    unnorm_key: str | None = None,
    dtype: torch.dtype = torch.float32,
    crop: float = 0.9,
) -> OpenVLAOFT:
    """Load a public checkpoint on the CPU, in evaluation mode.

    crop: fraction of the image area; 1 for a checkpoint trained without random crops.
    ValueError names the file that is damaged or unsupported.
    """
    architecture, space = read_public(folder, unnorm_key, crop)
    with no_init_weights():  # untouched memory of torch.empty is never allocated
        policy = OpenVLAOFT(architecture, space)
    weights = public_weights(folder, architecture, space, dtype)
    policy.load_state_dict(weights, assign=True)
    policy.tokenizer = read_tokenizer(folder)
    return policy.eval()


def public_weights(
    folder: Path, architecture: Architecture, space: ActionSpace, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read a public checkpoint's tensors under the policy's parameter names.

    ValueError names a tensor that is missing, superfluous or of the wrong shape.
    """
    with torch.device("meta"):
        expected = OpenVLAOFT(architecture, space).state_dict()
    weights = read_weights(folder, architecture, space.bins)
    for name in {**expected, **weights}:
        actual_shape = _shape(weights, name)
        expected_shape = _shape(expected, name)
        if actual_shape != expected_shape:
            raise ValueError(
                f"{folder}: found {actual_shape} for {name}; "
                f"expected {expected_shape}, according to {CONFIG}"
            )
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def _shape(tensors: dict[str, Tensor], name: str) -> str:
    if name not in tensors:
        return "no tensor"
    return f"shape {list(tensors[name].shape)}"
