"""Is a port of OpenVLA-OFT the original? The same arrays from the same inputs, every step of the way, and how far they are from the original's.

`INPUTS.npz` holds `raw_image` [B, H, W, 3] as the simulator gives it (upside down), and prompts: `input_ids` [B, L] with `attention_mask`.
`REFERENCE.npz` holds any of the arrays that `arrays` gives; steps of the picture's way may lie in the inputs too. Token ids count downwards
(id = vocabulary - 1 - bin), and so do the columns of `logits_action_columns`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_opd import pictures
from vla_opd.policies.openvla_oft import PAD, SIZE, OpenVLAOFT, from_public

INPUTS = ("raw_image", "input_ids", "attention_mask")
TEMPERATURES = (1.0, 1.6)
NEARLY = 1e-6  # the largest difference allowed of actions and normalised pictures; what is counted is to be equal
Arrays = Mapping[str, np.ndarray]


class Parity(NamedTuple):
    """An array: the largest absolute difference from the original's, and how large it may be."""

    name: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether it is small enough. Not if it isn't a number."""
        return self.difference <= self.tolerance


class Found(NamedTuple):
    """What was compared, and which of the reference's arrays have no counterpart."""

    compared: tuple[Parity, ...]
    left: tuple[str, ...]


def of_files(checkpoint: Path, unnorm_key: str | None, inputs: Path, reference: Path, tolerance: float, out: Path | None) -> Found:
    """The comparison for a checkpoint in the public layout, in float32 on the CPU; our arrays are written to `out` first."""
    given, theirs = _npz(inputs), _npz(reference)
    ours = arrays(from_public(checkpoint, unnorm_key), given, theirs.get("sampled_token_ids"))
    if out is not None:
        np.savez(out, allow_pickle=False, **ours)
    steps = {name: array for name, array in given.items() if name in ours}
    compared = tuple(compare(ours, steps | theirs, tolerance))
    if not compared:
        raise ValueError(f"{reference}: has none of the arrays that can be compared; expected some of {', '.join(ours)}")
    return Found(compared, tuple(name for name in theirs if name not in ours))


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path}: not an archive of arrays ({error}); expected .npz without pickles") from error


def arrays(policy: OpenVLAOFT, inputs: Arrays, sampled: Int[np.ndarray, "B K"] | None = None) -> dict[str, np.ndarray]:
    """All arrays that can be compared. sampled: ids of which the log-probability is wanted too. ValueError for an input that isn't there."""
    if lost := [name for name in INPUTS if name not in inputs]:
        raise ValueError(f"the inputs have no {lost[0]}; expected {', '.join(INPUTS)}")
    found = _pictures(policy, inputs["raw_image"])
    with torch.inference_mode():
        features = policy.features(policy.normalised(found["center_cropped"]))
        patches = policy.projector(features)
        prompts, lengths = _prompts(inputs["input_ids"], inputs["attention_mask"])
        _, seen = policy.sequence(patches, prompts.to(policy.device), lengths.to(policy.device))
        hidden = policy.hidden(patches, prompts.to(policy.device), lengths.to(policy.device))
        logits = policy.head(hidden)
    found |= {"vision_features": _numpy(features), "projected_patch_embeddings": _numpy(patches), "multimodal_attention_mask": _numpy(seen)}
    found |= {"action_hidden_states": _numpy(hidden), "logits_action_columns": _numpy(logits)[..., ::-1]}
    return found | _answers(policy, logits.float().cpu(), sampled)


def compare(ours: Arrays, theirs: Arrays, tolerance: float) -> Iterator[Parity]:
    """Every array that both have. ValueError where they are of different shapes."""
    for name in (name for name in ours if name in theirs):
        if ours[name].shape != theirs[name].shape:
            raise ValueError(f"{name}: is {list(ours[name].shape)} here; expected the reference's {list(theirs[name].shape)}")
        exact = theirs[name].dtype.kind in "biu"
        allowed = 0.0 if exact else NEARLY if "actions" in name or name == "pixel_values" else tolerance
        yield Parity(name, float(np.abs(ours[name].astype(np.float64) - theirs[name].astype(np.float64)).max()), allowed)


def _pictures(policy: OpenVLAOFT, raw: np.ndarray) -> dict[str, np.ndarray]:
    turned = raw[:, ::-1, ::-1]
    decoded = np.stack([pictures.jpeg_round_trip(np.ascontiguousarray(one)) for one in turned])
    resized = np.stack([pictures.lanczos(one, SIZE) for one in decoded])
    cropped = np.stack([pictures.centre_crop(one, policy.architecture.crop) for one in resized])
    steps = {"rot180": turned, "jpeg_decoded": decoded, "resized224": resized, "center_cropped": cropped}
    return steps | {"pixel_values": _numpy(policy.normalised(cropped))}


def _prompts(ids: Int[np.ndarray, "B L"], mask: Int[np.ndarray, "B L"]) -> tuple[Int[Tensor, "B L"], Int[Tensor, " B"]]:
    """Prompts with their padding at the right, wherever it was; and their lengths."""
    padded = np.full_like(ids, PAD)
    for row, (prompt, there) in enumerate(zip(ids, mask.astype(bool), strict=True)):
        padded[row, : there.sum()] = prompt[there]
    return torch.from_numpy(padded), torch.from_numpy(mask.sum(1))


def _answers(policy: OpenVLAOFT, logits: Float[Tensor, "B K V"], sampled: np.ndarray | None) -> dict[str, np.ndarray]:
    bins, highest = logits.argmax(-1), policy.architecture.vocabulary - 1
    two = logits.topk(2, dim=-1).values
    found = {"greedy_token_ids": highest - bins.numpy(), "greedy_margin": (two[..., 0] - two[..., 1]).numpy()}
    plain = policy.space.model_copy(update={"normalised": (False,) * policy.action_dim})
    found |= {"normalized_actions": plain.decode(bins.numpy())}
    found |= {"unnormalized_actions": policy.space.decode(bins.numpy()), "env_actions": policy.decode(bins.numpy())}
    asked = {"greedy": bins} | ({} if sampled is None else {"sampled": torch.from_numpy(highest - sampled)})
    for temperature in TEMPERATURES:
        log_probs = (logits / temperature).log_softmax(-1)
        found[f"entropy_T{temperature}"] = -(log_probs.exp() * log_probs).sum(-1).numpy()
        found |= {f"logp_{name}_T{temperature}": log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).numpy() for name, ids in asked.items()}
    return found


def _numpy(tensor: Tensor) -> np.ndarray:
    return (tensor if tensor.dtype == torch.bool else tensor.float()).cpu().numpy()
