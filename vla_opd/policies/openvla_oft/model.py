"""OpenVLA-OFT with discrete action tokens (M. J. Kim, C. Finn and P. Liang, 2025), from stock parts: no forked transformers, no remote code.

DINOv2's and SigLIP's patches, side by side, go through a projector into a Llama. The sequence is BOS, the patches, the rest of the prompt, one empty
placeholder per action token, a stop token; every position sees every other. Action token k is read one position before its placeholder. Of the head
there are only the rows of the V action tokens, turned so that bins ascend in action value.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int16, UInt8
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.initialization import no_init_weights
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersEmbeddings,
)

from vla_opd.data.action_space import ActionSpace
from vla_opd.policies.checkpoint import CheckpointFacts
from vla_opd.policies.openvla_oft import images
from vla_opd.policies.openvla_oft.files import read_tokenizer
from vla_opd.policies.openvla_oft.layout import (
    QUESTION,
    Architecture,
    Tower,
    read_public,
    read_weights,
)
from vla_opd.policies.policy import Observations

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SIZE, PATCH, REGISTERS = 224, 14, 4
PATCHES = (SIZE // PATCH) ** 2
BEGIN, PLACEHOLDER, STOP, LAST, PAD = 1, 1, 2, 29871, 32000
LONGEST = 64  # ids of every prompt, padding included: forward passes have one shape. LIBERO's longest instruction takes some 45
SIGLIP_MLP = 3.7362  # hidden units per unit of width


class Pictures(NamedTuple):
    """The camera's pictures on their way to the policy: as the training data have them, after JPEG, at the towers' size, cropped."""

    turned: UInt8[np.ndarray, "B H W 3"]
    decoded: UInt8[np.ndarray, "B H W 3"]
    resized: UInt8[np.ndarray, "B S S 3"]
    cropped: UInt8[np.ndarray, "B S S 3"]


class OpenVLAOFT(nn.Module):
    """The policy. `architecture` says how large it is and how pictures are put; `space` what its tokens mean; `question` how an instruction is put.

    tokenizer: of questions. Without one there are no prompts, and only what takes ids can be asked.
    """

    def __init__(
        self, architecture: Architecture, space: ActionSpace, question: str = QUESTION
    ) -> None:
        super().__init__()
        self.tokenizer: Tokenizer | None = None
        self.question = question
        self.architecture, self.space = architecture, space
        self.chunk, self.action_dim = space.chunk, space.action_dim
        self.dino, self.siglip = _dino(architecture.dino), _siglip(architecture.siglip)
        self.projector = Projector(
            architecture.dino.width + architecture.siglip.width, architecture.hidden
        )
        self.language_model = LlamaModel(
            LlamaConfig(
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
                pad_token_id=None,  # the padding's row is a row as any other
                bos_token_id=None,
                eos_token_id=None,
                attn_implementation="sdpa",  # pyright: ignore[reportCallIssue] - a keyword of the base class
            )
        )
        self.head = nn.Linear(architecture.hidden, space.bins, bias=False)
        self._captured: Captured | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def logits(self, observations: Observations) -> Float[Tensor, "B K V"]:
        """Logits over the bins of one chunk. ValueError unless there is one camera, and room for every instruction."""
        if observations.frames.shape[1] != 1:
            raise ValueError(
                f"frames: {observations.frames.shape[1]} cameras; expected 1, the one that the checkpoint was trained with"
            )
        return self.answers(self.pixels(observations.frames[:, 0]), observations.instructions)

    def answers(
        self, pixels: Float[Tensor, "B 6 S S"], instructions: Sequence[str]
    ) -> Float[Tensor, "B K V"]:
        """Logits for pictures that are ready."""
        prompts = [self.prompt(instruction) for instruction in instructions]
        padded = self._sent(torch.tensor([ids + [PAD] * (LONGEST - len(ids)) for ids in prompts]))
        ask = self.forward if self._captured is None or torch.is_grad_enabled() else self._captured
        return ask(pixels, padded, self._sent(torch.tensor([len(ids) for ids in prompts])))

    def forward(
        self,
        pixels: Float[Tensor, "B 6 S S"],
        prompts: Int[Tensor, "B L"],
        lengths: Int[Tensor, " B"],
    ) -> Float[Tensor, "B K V"]:
        """All that the device does for logits. Shapes are those of the batch, and no value decides what is computed: it can be captured as one graph.

        prompts: ids, from BOS on, padded at the right.
        """
        return self.head(
            self.hidden(self.projector(self.features(pixels)), prompts, lengths)
        ).float()

    def capture(self) -> None:
        """From now on forward passes without gradient are CUDA graphs: nothing waits for Python to start the next kernel."""
        self._captured = Captured(self.forward)

    def prompt(self, instruction: str) -> list[int]:
        """The ids that put an instruction, from BOS to the last one before the action tokens. ValueError if they are more than `LONGEST`."""
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer; expected tokenizer.json beside the weights")
        ids = self.tokenizer.encode(self.question.format(instruction=instruction.lower())).ids
        ids = ids if ids[-1] == LAST else [*ids, LAST]
        if ids[0] != BEGIN or len(ids) > LONGEST:
            raise ValueError(
                f"instruction {instruction!r}: {len(ids)} ids, the first of them {ids[0]}; expected at most {LONGEST}, from {BEGIN} on"
            )
        return ids

    def pixels(self, frames: UInt8[np.ndarray, "B H W 3"]) -> Float[Tensor, "B 6 S S"]:
        """Upright frames -> DINOv2's and SigLIP's normalised pictures, one above the other on the channels.

        The simulator's own picture is upside down, and the training data are that turned by half a circle: an upright one, mirrored.
        """
        return self.normalised(self.pictures(frames).cropped)

    def pictures(self, frames: UInt8[np.ndarray, "B H W 3"]) -> Pictures:
        """Upright frames, step by step to what is normalised."""
        turned = np.ascontiguousarray(frames[:, :, ::-1])
        with ThreadPoolExecutor(min(len(turned), len(os.sched_getaffinity(0)))) as side_by_side:
            return Pictures(
                *map(np.stack, zip(*side_by_side.map(self._picture, turned), strict=True))
            )

    def _picture(
        self, turned: UInt8[np.ndarray, "H W 3"]
    ) -> tuple[UInt8[np.ndarray, "_ _ 3"], ...]:
        decoded = images.jpeg_round_trip(turned)
        resized = images.lanczos(decoded, SIZE)
        return turned, decoded, resized, images.centre_crop(resized, self.architecture.crop)

    def normalised(self, cropped: UInt8[np.ndarray, "B S S 3"]) -> Float[Tensor, "B 6 S S"]:
        """Both towers' normalisation of pictures of the right size, (x / 255 - mean) / std, on the device: a byte goes there for every level."""
        levels = (
            self._sent(torch.from_numpy(cropped)).permute(0, 3, 1, 2).repeat(1, 2, 1, 1).float()
        )
        # All by tensors: to divide by a number, a GPU multiplies by its inverse, which differs in the last bit.
        halves = (0.5,) * 3
        most, mean, std = self._sent(
            torch.tensor(
                [[255.0] * 6, self.architecture.mean + halves, self.architecture.std + halves]
            )
        ).view(3, 1, 6, 1, 1)
        return ((levels / most - mean) / std).to(self.head.weight.dtype)

    def _sent(self, values: Tensor) -> Tensor:
        """On the policy's device; under way there, if that is a GPU, which may be at work on something else."""
        return (
            values.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else values.to(self.device)
        )

    def features(self, pixels: Float[Tensor, "B 6 S S"]) -> Float[Tensor, "B P F"]:
        """Both towers' patch features, of the last block but one, without a final norm."""
        dino = self.dino(pixels[:, :3]).last_hidden_state[:, 1 + REGISTERS :]
        return torch.cat([dino, self.siglip(pixels[:, 3:]).last_hidden_state], dim=-1)

    def hidden(
        self,
        patches: Float[Tensor, "B P H"],
        prompts: Int[Tensor, "B L"],
        lengths: Int[Tensor, " B"],
    ) -> Float[Tensor, "B K H"]:
        """The language model's outputs at which the K action tokens are read. prompts: ids, from BOS on, padded at the right."""
        sequence, seen = self.sequence(patches, prompts, lengths)
        away = torch.zeros_like(seen, dtype=sequence.dtype).masked_fill(
            ~seen, torch.finfo(sequence.dtype).min
        )
        mask = away[:, None, None].expand(
            -1, 1, sequence.shape[1], -1
        )  # additive: every position sees every other but the padding
        outputs = self.language_model(inputs_embeds=sequence, attention_mask=mask).last_hidden_state
        places = (patches.shape[1] + lengths - 1).unsqueeze(1) + torch.arange(
            self.space.tokens, device=lengths.device
        )
        return outputs.gather(1, places.unsqueeze(-1).expand(-1, -1, outputs.shape[-1]))

    def sequence(
        self,
        patches: Float[Tensor, "B P H"],
        prompts: Int[Tensor, "B L"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B N H"], Bool[Tensor, "B N"]]:
        """What the language model is given: the patches after BOS, zeros where the placeholders are; and which of it isn't padding."""
        tokens, empty, there = _text(prompts, lengths, self.space.tokens)
        words = self.language_model.embed_tokens(tokens).masked_fill(empty.unsqueeze(-1), 0)
        seen = torch.cat([there[:, :1], there.new_ones(patches.shape[:2]), there[:, 1:]], dim=1)
        return torch.cat([words[:, :1], patches, words[:, 1:]], dim=1), seen

    def decode(self, tokens: Int[np.ndarray, "B K"]) -> Float32[np.ndarray, "B S A"]:
        """Bins -> actions in the environment's units. Its data close the gripper at 0 and open it at 1; the environment at 1 and -1."""
        actions = self.space.decode(tokens)
        actions[..., -1] = -np.sign(2 * actions[..., -1] - 1)
        return actions

    def encode(self, actions: Float32[np.ndarray, "B S A"]) -> Int16[np.ndarray, "B K"]:
        """Actions in the environment's units -> bins; of the gripper's, as `decode` has it."""
        theirs = actions.copy()
        theirs[..., -1] = (1 - np.sign(actions[..., -1])) / 2
        return self.space.encode(theirs)


def of_facts(facts: CheckpointFacts) -> OpenVLAOFT:
    """The policy of a checkpoint's description. ValueError if that is of a policy that is trained here from nothing, which this one isn't."""
    if not isinstance(facts.policy, Architecture):
        raise ValueError(
            f"policy.family is {facts.policy.family!r}; expected one that is trained from nothing: this one comes by `adopt`"
        )
    return OpenVLAOFT(facts.policy, facts.action_space, facts.prompt)


def from_public(
    folder: Path,
    unnorm_key: str | None = None,
    dtype: torch.dtype = torch.float32,
    crop: float = 0.9,
) -> OpenVLAOFT:
    """A public checkpoint's policy, on the CPU, in evaluation mode. ValueError says which of its files is not what it is to be.

    crop: 1 for a checkpoint that was trained without random crops.
    """
    architecture, space = read_public(folder, unnorm_key, crop)
    with no_init_weights():  # torch.empty takes no memory until it is written to, which it never is
        policy = OpenVLAOFT(architecture, space)
    policy.load_state_dict(public_weights(folder, architecture, space, dtype), assign=True)
    policy.tokenizer = read_tokenizer(folder)
    return policy.eval()


def public_weights(
    folder: Path, architecture: Architecture, space: ActionSpace, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A public checkpoint's tensors under the policy's names. ValueError names one that is missing, superfluous, or of another shape."""
    with torch.device("meta"):
        expected = {
            name: tuple(tensor.shape)
            for name, tensor in OpenVLAOFT(architecture, space).state_dict().items()
        }
    weights = read_weights(folder, architecture, space.bins)
    for name in (*expected, *weights):
        found, wanted = weights.get(name), expected.get(name)
        if found is None or tuple(found.shape) != wanted:
            shape = "missing" if found is None else f"of shape {list(found.shape)}"
            raise ValueError(
                f"{folder}: the tensor that is {name} here is {shape}; by config.json, expected {wanted or 'none'}"
            )
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


class Captured:
    """A function of tensors on a GPU, captured as one CUDA graph for each number of rows that it is asked for.

    A graph is of the tensors that the function reads beside its arguments as they lie in memory then; their values may change.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, *given: Tensor) -> Tensor:
        """The function's answer, without gradient."""
        rows = len(given[0])
        with torch.cuda.device(given[0].device):
            if rows not in self._graphs:
                self._graphs[rows] = self._capture(tuple(one.clone() for one in given))
            graph, arguments, answer = self._graphs[rows]
            for argument, one in zip(arguments, given, strict=True):
                argument.copy_(one)
            graph.replay()
            return answer.clone()

    def _capture(
        self, arguments: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.no_grad():
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(
                aside
            ):  # libraries set themselves up at their first calls, which can't be captured
                for _ in range(3):
                    self._function(*arguments)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph, stream=aside):
                answer = self._function(*arguments)
        return graph, arguments, answer


class Projector(nn.Module):
    """Three layers, GELU between them: F -> 4 F -> H -> H."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(features, 4 * features),
            nn.Linear(4 * features, hidden),
            nn.Linear(hidden, hidden),
        )

    def forward(self, features: Float[Tensor, "B P F"]) -> Float[Tensor, "B P H"]:
        """Patches as words."""
        gelu = nn.functional.gelu
        return self.fc3(gelu(self.fc2(gelu(self.fc1(features)))))


def _text(
    prompts: Int[Tensor, "B L"], lengths: Int[Tensor, " B"], tokens: int
) -> tuple[Int[Tensor, "B M"], Bool[Tensor, "B M"], Bool[Tensor, "B M"]]:
    """Prompt, K placeholders, stop, padding; where the placeholders are, whose embeddings are zero; and what isn't padding."""
    places = torch.arange(prompts.shape[1] + tokens + 1, device=prompts.device).expand(
        len(prompts), -1
    )
    end = lengths.unsqueeze(1)
    empty = (places >= end) & (places < end + tokens)
    text = nn.functional.pad(prompts, (0, tokens + 1), value=PAD)
    text = torch.where(
        empty,
        PLACEHOLDER,
        torch.where(places == end + tokens, STOP, torch.where(places > end + tokens, PAD, text)),
    )
    return text, empty, places <= end + tokens


def _dino(tower: Tower) -> Dinov2WithRegistersModel:
    """Without the last block and the final norm, which nobody reads."""
    model = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=tower.width,
            num_hidden_layers=tower.depth - 1,
            num_attention_heads=tower.heads,
            num_register_tokens=REGISTERS,
            image_size=SIZE,
            patch_size=PATCH,
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue] - a keyword of the base class
        )
    )
    model.embeddings = PatchPositions(model.config)
    model.layernorm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


class PatchPositions(Dinov2WithRegistersEmbeddings):
    """As in the original, only patches have positions: stock embeddings have one for the class token too, which would learn."""

    def __init__(self, config: Dinov2WithRegistersConfig) -> None:
        super().__init__(config)
        self.mask_token = None
        self.position_embeddings = nn.Parameter(torch.zeros(1, PATCHES, config.hidden_size))

    def interpolate_pos_encoding(
        self,
        embeddings: Float[Tensor, "B N W"],  # noqa: ARG002
        height: int,  # noqa: ARG002
        width: int,  # noqa: ARG002
    ) -> Float[Tensor, "1 N W"]:
        """None to interpolate: pictures have one size."""
        return nn.functional.pad(self.position_embeddings, (0, 0, 1, 0))


def _siglip(tower: Tower) -> SiglipVisionModel:
    """As the original, with the exact GELU. Without the last block, the final norm and pooling, which nobody reads."""
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=tower.width,
            intermediate_size=int(tower.width * SIGLIP_MLP),
            num_hidden_layers=tower.depth - 1,
            num_attention_heads=tower.heads,
            image_size=SIZE,
            patch_size=PATCH,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            vision_use_head=False,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue] - a keyword of the base class
        )
    )
    model.post_layernorm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model
