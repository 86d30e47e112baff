"""Export a checkpoint to OpenVLA-OFT's public layout, for the original's own code."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from pydantic import BaseModel
from torch import Tensor, nn

from vla_opd.policies import lora
from vla_opd.policies.checkpoint import Checkpoint
from vla_opd.policies.load import load_policy
from vla_opd.policies.openvla_oft.layout import Architecture, read_public
from vla_opd.policies.openvla_oft.weights import (
    parameter_names,
    read_tensors,
    restore,
    weight_files,
)

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}  # files that are not copied


def to_public(
    checkpoint: Checkpoint, template: Path, out: Path, unnorm_key: str | None = None
) -> None:
    """Write a checkpoint to the new folder `out`, in the public layout.

    template: the public checkpoint that it came from. Its small files are copied, and so are the
    weights that the policy never uses (the last block of a tower, the head's rows of words, ...).

    An adapter is merged: W + (alpha / r) B A, rounded to the precision of W here and then to that
    of the public tensor. `out` is complete or absent.

    ValueError if `out` exists, and if the template has another family, architecture or action
    space.
    """
    if out.exists():
        raise ValueError(f"{out}: exists; expected a new folder")
    architecture = _require_same_policy(checkpoint, template, unnorm_key)
    bins = checkpoint.facts.action_space.bins
    shards = list(weight_files(template))
    parameters = _load_merged(checkpoint).state_dict()
    draft = out.with_name(f".{out.name}.export")
    shutil.rmtree(draft, ignore_errors=True)  # of an export that was killed
    draft.mkdir(parents=True)
    _copy_small_files(template, draft)
    written: set[str] = set()
    for path in shards:
        written |= _write_weights(path, draft / path.name, parameters, architecture, bins)
    missing = parameters.keys() - written
    if missing:
        raise ValueError(
            f"{template}: has no tensor for {min(missing)}; "
            f"expected all the weights that {checkpoint.folder} has"
        )
    draft.rename(out)


def _require_same_policy(
    checkpoint: Checkpoint, template: Path, unnorm_key: str | None
) -> Architecture:
    """Return the architecture. ValueError unless it and the action space are the template's."""
    architecture = checkpoint.facts.policy
    if not isinstance(architecture, Architecture):
        raise ValueError(
            f"{checkpoint.folder}: policy.family is {architecture.family!r}; "
            "expected openvla_oft, the only one with this layout"
        )
    public = read_public(template, unnorm_key, architecture.crop)
    _require_equal(public.architecture, architecture, template, checkpoint.folder)
    _require_equal(public.space, checkpoint.facts.action_space, template, checkpoint.folder)
    return architecture


def _require_equal(public: BaseModel, expected: BaseModel, template: Path, folder: Path) -> None:
    actual = public.model_dump()
    for field, value in expected.model_dump().items():
        if actual[field] != value:
            raise ValueError(
                f"{template}: {field} is {actual[field]!r}; expected {value!r}, as in {folder}"
            )


def _load_merged(checkpoint: Checkpoint) -> nn.Module:
    policy = load_policy(checkpoint)
    if lora.attached(policy) is not None:
        lora.merge(policy)
    return policy


def _copy_small_files(template: Path, out: Path) -> None:
    for path in template.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
            shutil.copyfile(path, out / path.name)


def _write_weights(
    public: Path, out: Path, parameters: Mapping[str, Tensor], architecture: Architecture, bins: int
) -> set[str]:
    """Write a file of weights with our values, and return the names of the parameters in it.

    ValueError for another format, and for tensors of another size.
    """
    tensors = read_tensors(public)
    written: set[str] = set()
    try:
        for name, tensor in tensors.items():
            tensors[name] = restore(name, tensor, parameters, architecture, bins)
            written.update(parameter_names(name, architecture))
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{public}: {error}; expected the weights of an OpenVLA-OFT of this size"
        ) from error
    safetensors.torch.save_file(tensors, out, metadata={"format": "pt"})
    return written
