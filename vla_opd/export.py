"""A checkpoint back in OpenVLA-OFT's public layout, for the original's own code and whatever else reads that."""

import shutil
import tempfile
from pathlib import Path

import safetensors.torch

from vla_opd import adapters
from vla_opd.checkpoint import Checkpoint
from vla_opd.openvla import Architecture, read_public, restored, weight_files
from vla_opd.policies import load_policy


def to_public(checkpoint: Checkpoint, like: Path, out: Path, unnorm_key: str | None = None) -> None:
    """Write the folder `out`: the public checkpoint `like`, which this one came from, with this one's weights, an adapter merged into them.

    W + (alpha / r) B A is rounded to the precision in which W is stored, and that to the public tensor's. What the policy never reads (either tower's
    last block, rows of words in the head, ...) stays as it is there; files that aren't weights are copied. All of `out` is there, or nothing.
    ValueError if `out` is there, and for a checkpoint of another family, size or action statistics than `like`.
    """
    shape = checkpoint.facts.policy
    if out.exists():
        raise ValueError(f"{out}: is there already; expected a new folder")
    if not isinstance(shape, Architecture):
        raise ValueError(f"{checkpoint.folder}: is of the family {shape.family!r}; expected openvla_oft, whose layout it is")
    _require_alike(checkpoint, shape, like, unnorm_key)
    policy = load_policy(checkpoint)
    if adapters.attached(policy) is not None:
        adapters.merge(policy)
    ours = policy.state_dict()
    weights = list(weight_files(like))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as there:
        whole = Path(there) / "whole"
        shutil.copytree(like, whole, ignore=shutil.ignore_patterns(*(path.name for path in weights)))
        for path in weights:
            tensors = safetensors.torch.load_file(path)
            made = {name: restored(name, tensor, ours, shape, checkpoint.facts.action_space.bins) for name, tensor in tensors.items()}
            safetensors.torch.save_file(made, whole / path.name, metadata={"format": "pt"})
        whole.rename(out)


def _require_alike(checkpoint: Checkpoint, shape: Architecture, like: Path, unnorm_key: str | None) -> None:
    """ValueError names the first thing that `like` says otherwise."""
    theirs = read_public(like, unnorm_key, shape.crop)
    pairs = ((shape, theirs.architecture), (checkpoint.facts.action_space, theirs.space))
    for ours, there in ((one.model_dump(), other.model_dump()) for one, other in pairs):
        for field, value in ours.items():
            if there[field] != value:
                raise ValueError(f"{like}: {field} is {there[field]!r}; expected {value!r}, that of {checkpoint.folder}")
