"""Compare this OpenVLA-OFT with the original: the same arrays from the same inputs, step by step.

`INPUTS.npz` holds `raw_image` [B, H, W, 3] as the simulator renders it (upside down), and prompts:
`input_ids` [B, L] with `attention_mask`. `REFERENCE.npz` holds any of the arrays that
`compute_arrays` returns; preprocessed images may be in the inputs instead. Token ids count down
(id = vocabulary - 1 - bin), and so do the columns of `logits_action_columns`.
"""

import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn
from zipfile import ZipFile

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_opd.data.zarr_zip import DAMAGED, LARGEST
from vla_opd.policies.openvla_oft.model import PAD, OpenVLAOFT

TEMPERATURES = (1.0, 1.6)
SAMPLED = "sampled_token_ids"
INPUTS = ("raw_image", "input_ids", "attention_mask")
STEPS = ("rot180", "jpeg_decoded", "resized224", "center_cropped", "pixel_values")
OUTPUTS = (
    "vision_features",
    "projected_patch_embeddings",
    "multimodal_attention_mask",
    "action_hidden_states",
    "logits_action_columns",
    "greedy_token_ids",
    "greedy_margin",
    "normalized_actions",
    "unnormalized_actions",
    "env_actions",
    "logp_greedy_T1.0",
    "logp_greedy_T1.6",
    "logp_sampled_T1.0",
    "logp_sampled_T1.6",
    "entropy_T1.0",
    "entropy_T1.6",
)

# Largest difference allowed between actions and between normalized images.
ROUNDING = 1e-6
# One level of 255, as it is and divided by the smallest standard deviation.
ONE_LEVEL = {"resized224": 1.0, "center_cropped": 1.0, "pixel_values": 0.0175}
# Fraction of an image's values, and at least one, that may be a level off: 1 of 451,584 was, on
# images that this code had not been compared on before.
FRACTION = 5e-6

Arrays = Mapping[str, np.ndarray]


class Parity(NamedTuple):
    """How one array compares with the original's.

    difference: largest absolute difference. tolerance: largest one allowed.
    beyond:     number of values, of `size`, whose difference exceeds the tolerance.
    """

    name: str
    difference: float
    tolerance: float
    beyond: int
    size: int

    @property
    def is_excused(self) -> bool:
        """Whether this is an image with very few values off, and by one level only."""
        allowed = max(1, FRACTION * self.size)
        one_level = ONE_LEVEL.get(self.name, 0.0)
        return 0 < self.beyond <= allowed and self.difference <= one_level

    @property
    def holds(self) -> bool:
        """Whether the arrays agree. NaN agrees with nothing."""
        return self.difference <= self.tolerance or self.is_excused

    @property
    def verdict(self) -> str:
        """A remark on the numbers, empty if the array is within its tolerance."""
        if not self.holds:
            return "too far"
        if self.is_excused:
            return f"one level off in {self.beyond} of {self.size:,} values, which is allowed"
        return ""


class Comparison(NamedTuple):
    """The compared arrays, and the names of the reference's arrays that have no counterpart."""

    compared: tuple[Parity, ...]
    unmatched: tuple[str, ...]


def compare_files(
    policy: OpenVLAOFT, inputs: Path, reference: Path, tolerance: float, out: Path | None
) -> Comparison:
    """Compute the policy's arrays for `inputs`, write them to `out`, and compare them.

    tolerance: of features, logits and log-probabilities.
    """
    given, _ = _read_npz(inputs, (*INPUTS, *STEPS))
    originals, unmatched = _read_npz(reference, (*STEPS, *OUTPUTS, SAMPLED))
    if not originals.keys() - {SAMPLED}:
        raise ValueError(
            f"{reference}: has no array that can be compared; "
            f"expected some of {', '.join((*STEPS, *OUTPUTS))}"
        )
    sampled = originals.get(SAMPLED)
    computed = compute_arrays(policy, given, sampled)
    if out is not None:
        np.savez(out, allow_pickle=False, **computed)
    for name in STEPS:
        if name in given:
            originals.setdefault(name, given[name])
    compared = tuple(compare(computed, originals, tolerance))
    return Comparison(compared, unmatched)


def _read_npz(path: Path, names: Collection[str]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Read the arrays of these names, and return the names of the others.

    ValueError for another format, for pickles, and for more than half of the memory.
    """
    try:
        with ZipFile(path) as archive:
            members = archive.infolist()
        sizes = {member.filename.removesuffix(".npy"): member.file_size for member in members}
        total = sum(size for name, size in sizes.items() if name in names)
        if total > LARGEST:
            raise ValueError(
                f"its arrays would take {total // 10**9} GB, more than half of the memory"
            )
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names if name in sizes}
    except (*DAMAGED, MemoryError, zlib.error) as error:
        raise ValueError(
            f"{path}: not an archive of arrays ({error}); expected .npz without pickles"
        ) from error
    return arrays, tuple(name for name in sizes if name not in names)


def compute_arrays(
    policy: OpenVLAOFT, inputs: Arrays, sampled: Int[np.ndarray, "B K"] | None = None
) -> dict[str, np.ndarray]:
    """Compute all arrays that can be compared.

    sampled: token ids whose log-probabilities are computed too.
    ValueError names an invalid input.
    """
    _require_inputs(policy, inputs)
    raw_image = inputs["raw_image"]
    if sampled is not None:
        _require_sampled(policy, sampled, len(raw_image))
    upright = raw_image[:, ::-1]
    images = policy.preprocess(upright)
    prompts, lengths = _pad_right(inputs["input_ids"], inputs["attention_mask"])
    prompts = prompts.to(policy.device)
    lengths = lengths.to(policy.device)
    with torch.inference_mode():
        pixels = policy.normalize(images.cropped)
        features = policy.features(pixels)
        patches = policy.projector(features)
        _, mask = policy.sequence(patches, prompts, lengths)
        hidden = policy.hidden(patches, prompts, lengths)
        logits = policy.head(hidden)
    columns = _to_numpy(logits)
    arrays = {
        "rot180": images.flipped,
        "jpeg_decoded": images.decoded,
        "resized224": images.resized,
        "center_cropped": images.cropped,
        "pixel_values": _to_numpy(pixels),
        "vision_features": _to_numpy(features),
        "projected_patch_embeddings": _to_numpy(patches),
        "multimodal_attention_mask": _to_numpy(mask),
        "action_hidden_states": _to_numpy(hidden),
        "logits_action_columns": columns[..., ::-1],
    }
    return arrays | _action_arrays(policy, logits.float().cpu(), sampled)


def _action_arrays(
    policy: OpenVLAOFT, logits: Float[Tensor, "B K V"], sampled: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Compute tokens, actions and log-probabilities, from logits in float32 on the CPU."""
    greedy = logits.argmax(-1)
    bins = {"greedy": greedy}
    if sampled is not None:
        highest = policy.architecture.vocabulary - 1
        bins["sampled"] = torch.from_numpy(highest - sampled)
    arrays = _greedy_arrays(policy, logits, greedy.numpy())
    return arrays | _log_prob_arrays(logits, bins)


def _require_inputs(policy: OpenVLAOFT, inputs: Arrays) -> None:
    for name in INPUTS:
        if name not in inputs:
            raise ValueError(f"the inputs have no {name}; expected {', '.join(INPUTS)}")
    images, ids, mask = (inputs[name] for name in INPUTS)
    if not _are_images(images):
        _refuse("raw_image", images, "images [B, H, W, 3] of uint8")
    batch = len(images)
    rows = policy.architecture.rows
    has_batch = ids.ndim == 2 and len(ids) == batch
    if not has_batch or not _are_integers(ids, 0, rows):
        _refuse("input_ids", ids, f"[{batch}, L] ids below {rows}")
    has_zeros_and_ones = _are_integers(mask, 0, 2)
    if not has_zeros_and_ones or mask.shape != ids.shape or not mask.any(1).all():
        _refuse("attention_mask", mask, "1 for tokens of a prompt, 0 for padding")


def _require_sampled(policy: OpenVLAOFT, sampled: np.ndarray, batch: int) -> None:
    space = policy.space
    shape = (batch, space.tokens)
    end = policy.architecture.vocabulary
    start = end - space.bins
    if sampled.shape != shape or not _are_integers(sampled, start, end):
        expected = f"{list(shape)} ids from {start} to {end - 1}, those of action tokens"
        _refuse(SAMPLED, sampled, expected)


def _are_images(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3


def _refuse(name: str, array: np.ndarray, expected: str) -> NoReturn:
    shape = list(array.shape)
    raise ValueError(f"{name} is {array.dtype} {shape}; expected {expected}")


def _are_integers(array: np.ndarray, start: int, end: int) -> bool:
    """Whether there are values, all of them integers (or booleans) in [start, end)."""
    if array.dtype.kind not in "biu" or array.size == 0:
        return False
    lowest = int(array.min())
    highest = int(array.max())
    return start <= lowest and highest < end


def compare(computed: Arrays, originals: Arrays, tolerance: float) -> Iterator[Parity]:
    """Compare every array that both have. ValueError for different shapes."""
    for name, array in computed.items():
        if name not in originals:
            continue
        original = originals[name]
        if array.shape != original.shape:
            raise ValueError(
                f"{name}: is {list(array.shape)} here; "
                f"expected the reference's {list(original.shape)}"
            )
        # float64, because differences of unsigned integers wrap around.
        difference = np.abs(array.astype(np.float64) - original.astype(np.float64))
        allowed = _allowed_difference(name, array, tolerance)
        beyond = int(np.sum(~(difference <= allowed)))  # NaN is beyond
        yield Parity(name, float(difference.max()), allowed, beyond, difference.size)


def _allowed_difference(name: str, array: np.ndarray, tolerance: float) -> float:
    if array.dtype.kind in "biu":
        return 0.0
    if name.endswith("_actions") or name == "pixel_values":
        return ROUNDING
    return tolerance


def _pad_right(
    ids: Int[np.ndarray, "B L"], mask: Int[np.ndarray, "B L"]
) -> tuple[Int[Tensor, "B L"], Int[Tensor, " B"]]:
    """Move the padding of prompts to the right, and return their lengths."""
    is_token = mask.astype(bool)
    lengths = mask.sum(1)
    padded = np.full_like(ids, PAD)
    for row, length in enumerate(lengths):
        padded[row, :length] = ids[row, is_token[row]]
    return torch.from_numpy(padded), torch.from_numpy(lengths)


def _greedy_arrays(
    policy: OpenVLAOFT, logits: Float[Tensor, "B K V"], bins: Int[np.ndarray, "B K"]
) -> dict[str, np.ndarray]:
    """Compute the greedy tokens, their lead over the second best, and their actions."""
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    unscaled = (False,) * policy.action_dim
    normalized_space = policy.space.model_copy(update={"normalised": unscaled})
    return {
        "greedy_token_ids": policy.architecture.vocabulary - 1 - bins,
        "greedy_margin": (best - second).numpy(),
        "normalized_actions": normalized_space.decode(bins),
        "unnormalized_actions": policy.space.decode(bins),
        "env_actions": policy.decode(bins),
    }


def _log_prob_arrays(
    logits: Float[Tensor, "B K V"], bins: Mapping[str, Int[Tensor, "B K"]]
) -> dict[str, np.ndarray]:
    """Compute entropies, and the log-probabilities of some bins, at every temperature (nats)."""
    arrays: dict[str, np.ndarray] = {}
    for temperature in TEMPERATURES:
        scaled = logits / temperature
        log_probs = scaled.log_softmax(-1)
        terms = log_probs.exp() * log_probs
        entropy = -terms.sum(-1)
        arrays[f"entropy_T{temperature}"] = entropy.numpy()
        for name, chosen in bins.items():
            index = chosen.unsqueeze(-1)
            log_prob = log_probs.gather(-1, index).squeeze(-1)
            arrays[f"logp_{name}_T{temperature}"] = log_prob.numpy()
    return arrays


def _to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype != torch.bool:
        tensor = tensor.float()
    return tensor.cpu().numpy()
