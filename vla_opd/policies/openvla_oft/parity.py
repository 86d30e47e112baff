"""Is a port of OpenVLA-OFT the original? The same arrays from the same inputs, every step of the way, and how far they are from the original's.

`INPUTS.npz` holds `raw_image` [B, H, W, 3] as the simulator gives it (upside down), and prompts: `input_ids` [B, L] with `attention_mask`.
`REFERENCE.npz` holds any of the arrays that `arrays` gives; steps of the picture's way may lie in the inputs too. Token ids count downwards
(id = vocabulary - 1 - bin), and so do the columns of `logits_action_columns`.
"""

import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_opd.data.zarr_zip import DAMAGED, LARGEST
from vla_opd.policies.openvla_oft.model import PAD, OpenVLAOFT

TEMPERATURES = (1.0, 1.6)
INPUTS = ("raw_image", "input_ids", "attention_mask")
STEPS = ("rot180", "jpeg_decoded", "resized224", "center_cropped", "pixel_values")
OUTPUTS = (
    *(
        "vision_features",
        "projected_patch_embeddings",
        "multimodal_attention_mask",
        "action_hidden_states",
        "logits_action_columns",
    ),
    *(
        "greedy_token_ids",
        "greedy_margin",
        "normalized_actions",
        "unnormalized_actions",
        "env_actions",
    ),
    *(
        f"{name}_T{temperature}"
        for name in ("logp_greedy", "logp_sampled", "entropy")
        for temperature in TEMPERATURES
    ),
)
ONE_LEVEL = {
    "resized224": 1.0,
    "center_cropped": 1.0,
    "pixel_values": 0.0175,
}  # of 255, as it is and divided by the smallest deviation
# Of pictures' values, but always one, that may be a level off: 1 of 451,584 was, on pictures
# that this code had not been compared on before.
SHARE = 5e-6
NEARLY = 1e-6  # the largest difference allowed of actions and normalised pictures; what is counted is to be equal
Arrays = Mapping[str, np.ndarray]


class Parity(NamedTuple):
    """An array: the largest absolute difference from the original's, how large it may be, and how many of its `size` values are farther off."""

    name: str
    difference: float
    tolerance: float
    beyond: int
    size: int

    @property
    def excused(self) -> bool:
        """Whether it is a picture of which next to no value is one level off, and none more."""
        return 0 < self.beyond <= max(1, SHARE * self.size) and self.difference <= ONE_LEVEL.get(
            self.name, 0.0
        )

    @property
    def holds(self) -> bool:
        """Whether it is near enough. Not if it isn't a number."""
        return self.difference <= self.tolerance or self.excused

    @property
    def verdict(self) -> str:
        """What is said of it beside its numbers."""
        if not self.holds:
            return "too far"
        return (
            f"one level off in {self.beyond} of {self.size:,} values, which is allowed"
            if self.excused
            else ""
        )


class Found(NamedTuple):
    """What was compared, and which of the reference's arrays have no counterpart."""

    compared: tuple[Parity, ...]
    left: tuple[str, ...]


def of_files(
    policy: OpenVLAOFT, inputs: Path, reference: Path, tolerance: float, out: Path | None
) -> Found:
    """The comparison for a policy, from files; our arrays are written to `out` first."""
    given, (theirs, left) = (
        _npz(inputs, (*INPUTS, *STEPS))[0],
        _npz(reference, (*STEPS, *OUTPUTS, "sampled_token_ids")),
    )
    if not theirs.keys() - {"sampled_token_ids"}:
        raise ValueError(
            f"{reference}: has none of the arrays that can be compared; expected some of {', '.join((*STEPS, *OUTPUTS))}"
        )
    ours = arrays(policy, given, theirs.get("sampled_token_ids"))
    if out is not None:
        np.savez(out, allow_pickle=False, **ours)
    steps = {name: given[name] for name in STEPS if name in given}
    return Found(tuple(compare(ours, steps | theirs, tolerance)), left)


def _npz(path: Path, names: Collection[str]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The arrays of these names, and what others there are, which aren't read. ValueError for what is no archive of arrays, or too large a one."""
    try:
        with ZipFile(path) as archive:
            sizes = {
                member.filename.removesuffix(".npy"): member.file_size
                for member in archive.infolist()
            }
        if (wanted := sum(size for name, size in sizes.items() if name in names)) > LARGEST:
            raise ValueError(
                f"its arrays would take {wanted // 10**9} GB, more than half of the memory"
            )
        with np.load(path, allow_pickle=False) as arrays_there:
            return {name: arrays_there[name] for name in names if name in sizes}, tuple(
                name for name in sizes if name not in names
            )
    except (*DAMAGED, MemoryError, zlib.error) as error:
        raise ValueError(
            f"{path}: not an archive of arrays ({error}); expected .npz without pickles"
        ) from error


def arrays(
    policy: OpenVLAOFT, inputs: Arrays, sampled: Int[np.ndarray, "B K"] | None = None
) -> dict[str, np.ndarray]:
    """All arrays that can be compared. sampled: ids of which the log-probability is wanted too. ValueError names an input that can't be one."""
    _require(policy, inputs, sampled)
    seen = policy.pictures(inputs["raw_image"][:, ::-1])
    with torch.inference_mode():
        pixels = policy.normalised(seen.cropped)
        features = policy.features(pixels)
        patches = policy.projector(features)
        prompts, lengths = (
            one.to(policy.device) for one in _prompts(inputs["input_ids"], inputs["attention_mask"])
        )
        _, there = policy.sequence(patches, prompts, lengths)
        hidden = policy.hidden(patches, prompts, lengths)
        logits = policy.head(hidden)
    found = dict(zip(STEPS, (*seen, _numpy(pixels)), strict=True))
    found |= {
        "vision_features": _numpy(features),
        "projected_patch_embeddings": _numpy(patches),
        "multimodal_attention_mask": _numpy(there),
    }
    found |= {
        "action_hidden_states": _numpy(hidden),
        "logits_action_columns": _numpy(logits)[..., ::-1],
    }
    return found | _answers(policy, logits.float().cpu(), sampled)


def _require(policy: OpenVLAOFT, inputs: Arrays, sampled: np.ndarray | None) -> None:
    if lost := [name for name in INPUTS if name not in inputs]:
        raise ValueError(f"the inputs have no {lost[0]}; expected {', '.join(INPUTS)}")
    pictures, ids, mask = (inputs[name] for name in INPUTS)
    size, rows, highest = (
        policy.space.tokens,
        policy.architecture.rows,
        policy.architecture.vocabulary,
    )
    batch = len(pictures)
    inputs_are = {
        "raw_image": (
            pictures,
            "pictures [B, H, W, 3] of uint8",
            pictures.dtype == np.uint8 and pictures.ndim == 4 and pictures.shape[-1] == 3,
        ),
        "input_ids": (
            ids,
            f"[{batch}, L] ids below {rows}",
            _ids(ids, 0, rows) and ids.ndim == 2 and len(ids) == batch,
        ),
        "attention_mask": (
            mask,
            "1 for tokens of a prompt, 0 for padding",
            _ids(mask, 0, 2) and mask.shape == ids.shape and _none_empty(mask),
        ),
    }
    if sampled is not None:
        lowest = highest - policy.space.bins
        fits = sampled.shape == (batch, size) and _ids(sampled, lowest, highest)
        inputs_are["sampled_token_ids"] = (
            sampled,
            f"[{batch}, {size}] ids from {lowest} to {highest - 1}, those of action tokens",
            fits,
        )
    for name, (array, expected, fits) in inputs_are.items():
        if not fits:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}; expected {expected}")


def _none_empty(mask: np.ndarray) -> bool:
    return mask.ndim == 2 and bool(mask.any(1).all())


def _ids(array: np.ndarray, low: int, high: int) -> bool:
    return (
        array.dtype.kind in "biu"
        and array.size > 0
        and low <= int(array.min())
        and int(array.max()) < high
    )


def compare(ours: Arrays, theirs: Arrays, tolerance: float) -> Iterator[Parity]:
    """Every array that both have. ValueError where they are of different shapes."""
    for name in (name for name in ours if name in theirs):
        if ours[name].shape != theirs[name].shape:
            raise ValueError(
                f"{name}: is {list(ours[name].shape)} here; expected the reference's {list(theirs[name].shape)}"
            )
        exact = ours[name].dtype.kind in "biu"
        allowed = (
            0.0
            if exact
            else NEARLY
            if name.endswith("_actions") or name == "pixel_values"
            else tolerance
        )
        difference = np.abs(ours[name].astype(np.float64) - theirs[name].astype(np.float64))
        yield Parity(
            name,
            float(difference.max()),
            allowed,
            int(np.sum(~(difference <= allowed))),
            difference.size,
        )


def _prompts(
    ids: Int[np.ndarray, "B L"], mask: Int[np.ndarray, "B L"]
) -> tuple[Int[Tensor, "B L"], Int[Tensor, " B"]]:
    """Prompts with their padding at the right, wherever it was; and their lengths."""
    padded = np.full_like(ids, PAD)
    for row, (prompt, there) in enumerate(zip(ids, mask.astype(bool), strict=True)):
        padded[row, : there.sum()] = prompt[there]
    return torch.from_numpy(padded), torch.from_numpy(mask.sum(1))


def _answers(
    policy: OpenVLAOFT, logits: Float[Tensor, "B K V"], sampled: np.ndarray | None
) -> dict[str, np.ndarray]:
    bins, highest = logits.argmax(-1), policy.architecture.vocabulary - 1
    two = logits.topk(2, dim=-1).values
    found = {
        "greedy_token_ids": highest - bins.numpy(),
        "greedy_margin": (two[..., 0] - two[..., 1]).numpy(),
    }
    plain = policy.space.model_copy(update={"normalised": (False,) * policy.action_dim})
    found |= {"normalized_actions": plain.decode(bins.numpy())}
    found |= {
        "unnormalized_actions": policy.space.decode(bins.numpy()),
        "env_actions": policy.decode(bins.numpy()),
    }
    asked = {"greedy": bins} | (
        {} if sampled is None else {"sampled": torch.from_numpy(highest - sampled)}
    )
    for temperature in TEMPERATURES:
        log_probs = (logits / temperature).log_softmax(-1)
        found[f"entropy_T{temperature}"] = -(log_probs.exp() * log_probs).sum(-1).numpy()
        found |= {
            f"logp_{name}_T{temperature}": log_probs.gather(-1, ids.unsqueeze(-1))
            .squeeze(-1)
            .numpy()
            for name, ids in asked.items()
        }
    return found


def _numpy(tensor: Tensor) -> np.ndarray:
    return (tensor if tensor.dtype == torch.bool else tensor.float()).cpu().numpy()
