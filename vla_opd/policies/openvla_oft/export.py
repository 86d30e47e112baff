"""A checkpoint back in OpenVLA-OFT's public layout, for the original's own code and whatever else reads that."""

import shutil
from pathlib import Path
from typing import Any

import safetensors.torch

from vla_opd.policies import lora
from vla_opd.policies.checkpoint import Checkpoint
from vla_opd.policies.load import load_policy
from vla_opd.policies.openvla_oft.layout import (
    Architecture,
    read_public,
    renamed,
    restored,
    weight_files,
)

WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
}  # endings of files that may hold other weights than the new ones


def to_public(checkpoint: Checkpoint, like: Path, out: Path, unnorm_key: str | None = None) -> None:
    """Write the folder `out`: the public checkpoint `like`, which this one came from, with this one's weights, an adapter merged into them.

    W + (alpha / r) B A is rounded to the precision in which W is stored, and that to the public tensor's. What the policy never reads (either tower's
    last block, rows of words in the head, ...) stays as it is there; the other files of `like`, but for folders and other weights, are copied.
    All of `out` is there, or nothing. ValueError if `out` is there, and for a checkpoint of another family, size or action statistics than `like`.
    """
    shape = checkpoint.facts.policy
    if out.exists():
        raise ValueError(f"{out}: is there already; expected a new folder")
    if not isinstance(shape, Architecture):
        raise ValueError(
            f"{checkpoint.folder}: is of the family {shape.family!r}; expected openvla_oft, whose layout it is"
        )
    _require_alike(checkpoint, shape, like, unnorm_key)
    shards = list(weight_files(like))
    policy = load_policy(checkpoint)
    if lora.attached(policy) is not None:
        lora.merge(policy)
    hidden = out.with_name(f".{out.name}.export")
    shutil.rmtree(hidden, ignore_errors=True)  # of one that was killed
    hidden.mkdir(parents=True)
    for path in like.iterdir():
        if path.is_file() and path.suffix not in WEIGHTS:
            shutil.copyfile(path, hidden / path.name)
    ours, bins = policy.state_dict(), checkpoint.facts.action_space.bins
    written = {
        name for path in shards for name in _write(path, hidden / path.name, ours, shape, bins)
    }
    if lost := ours.keys() - written:
        raise ValueError(
            f"{like}: has no tensor for {min(lost)}; expected all that {checkpoint.folder} has"
        )
    hidden.rename(out)


def _write(
    public: Path, new: Path, ours: dict[str, Any], shape: Architecture, bins: int
) -> list[str]:
    """A file of weights with our values; the names, here, of what it holds. ValueError for weights that aren't safetensors, or of another size."""
    try:
        tensors = safetensors.torch.load_file(public)
        names = [one for name in tensors for one in renamed(name, shape)]
        made = {name: restored(name, tensor, ours, shape, bins) for name, tensor in tensors.items()}
    except (OSError, safetensors.SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{public}: {error}; expected the weights of an OpenVLA-OFT of this size"
        ) from error
    safetensors.torch.save_file(made, new, metadata={"format": "pt"})
    return names


def _require_alike(
    checkpoint: Checkpoint, shape: Architecture, like: Path, unnorm_key: str | None
) -> None:
    """ValueError names the first thing that `like` says otherwise."""
    theirs = read_public(like, unnorm_key, shape.crop)
    pairs = ((shape, theirs.architecture), (checkpoint.facts.action_space, theirs.space))
    for ours, there in ((one.model_dump(), other.model_dump()) for one, other in pairs):
        for field, value in ours.items():
            if there[field] != value:
                raise ValueError(
                    f"{like}: {field} is {there[field]!r}; expected {value!r}, that of {checkpoint.folder}"
                )
