"""Checkpoints: weights in safetensors, and a manifest with everything that is needed to use them. Nothing is inferred from a name."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer
from torch import nn

from vla_opd.artifacts.draft import Draft
from vla_opd.artifacts.files import link
from vla_opd.artifacts.manifest import Manifest, open_artifact, read_manifest
from vla_opd.data.action_space import ActionSpace
from vla_opd.params.stages import AdoptParams, EnvironmentParams, PolicyParams
from vla_opd.policies import lora
from vla_opd.policies.openvla_oft.files import TOKENIZER, read_tokenizer
from vla_opd.policies.openvla_oft.layout import QUESTION, Architecture, read_public

WEIGHTS = "model.safetensors"


class CheckpointFacts(BaseModel):
    """How to use a policy's weights.

    policy:       its architecture.
    action_space: what its tokens mean. vocabulary: the words that it knows, in the order of their ids; none, if it has a tokenizer.
    environment:  the simulator settings it was trained under; pictures of other settings are refused unless told.
    proprio_mean, proprio_std: statistics that scale the P proprioceptive numbers (empty if it sees none).
    prompt:       how the instruction is put to it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    policy: PolicyParams | Architecture
    action_space: ActionSpace
    environment: EnvironmentParams
    vocabulary: tuple[str, ...] = ()
    proprio_mean: tuple[float, ...] = ()
    proprio_std: tuple[float, ...] = ()
    prompt: str = "{instruction}"
    instruction_length: int = Field(default=20, ge=1)


DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}  # by their names in safetensors


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its bytes verified."""

    folder: Path
    manifest: Manifest
    facts: CheckpointFacts

    @property
    def digest(self) -> str:
        """The artifact's digest."""
        return self.manifest.digest

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """In which its weights are stored, the first tensor's first; buffers of integers aside. ValueError as `weights`', and if there are none."""
        try:
            with safetensors.safe_open(self.folder / WEIGHTS, "pt") as file:
                stored = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118 - no mapping
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{self.folder / WEIGHTS}: not safetensors ({error}); expected what `save_weights` writes"
            ) from error
        if not (found := tuple(DTYPES[name] for name in dict.fromkeys(stored) if name in DTYPES)):
            raise ValueError(
                f"{self.folder / WEIGHTS}: is in {sorted(set(stored))}; expected some tensors in {sorted(DTYPES)}"
            )
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors by name, on the CPU. ValueError for anything that isn't safetensors: no other kind of file is ever loaded."""
        try:
            return safetensors.torch.load_file(self.folder / WEIGHTS)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{self.folder / WEIGHTS}: not safetensors ({error}); expected what `save_weights` writes"
            ) from error

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer beside the weights, if there is one."""
        return read_tokenizer(self.folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open and verify a checkpoint. ValueError says what is missing or wrong."""
    return _described(folder, open_artifact(folder, "checkpoint"))


def glance(folder: Path) -> Checkpoint:
    """What a checkpoint's manifest says, for who only asks: no byte of the weights is checked. ValueError as `open_checkpoint`'s."""
    return _described(folder, read_manifest(folder, "checkpoint"))


def _described(folder: Path, manifest: Manifest) -> Checkpoint:
    try:
        facts = CheckpointFacts.model_validate(manifest.facts["checkpoint"])
    except (KeyError, ValidationError) as error:
        raise ValueError(
            f"{folder}: the manifest's facts do not describe a checkpoint of this version: {error}"
        ) from error
    return Checkpoint(folder, manifest, facts)


def public_facts(its: AdoptParams, environment: EnvironmentParams) -> CheckpointFacts:
    """How to use a public checkpoint's weights, by its files. ValueError as `read_public`'s."""
    public = read_public(Path(its.folder), *its.variant)
    return CheckpointFacts(
        policy=public.architecture,
        action_space=public.space,
        environment=environment,
        prompt=QUESTION,
    )


def save_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors: deterministic bytes, no pickle."""
    safetensors.torch.save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path
    )


def write_policy(work: Draft, policy: nn.Module, origin: Checkpoint | None) -> None:
    """A policy's weights, or its adapter and those that this was trained on; and the tokenizer of the checkpoint it came from, if that has one."""
    adapted = lora.attached(policy) is not None
    if adapted and origin is None:
        raise ValueError(
            "the policy has an adapter; expected the checkpoint that it was trained on beside it, or a merged policy (adapters.merge)"
        )
    with work.part(WEIGHTS) as path:
        if adapted and origin is not None:
            link(origin.folder / WEIGHTS, path)
        else:
            save_weights(path, policy.state_dict())
    if adapted:
        with work.part(lora.ADAPTER) as adapter, work.part(lora.CONFIG) as config:
            lora.write(policy, adapter, config)
    if origin is not None and (origin.folder / TOKENIZER).is_file():
        with work.part(TOKENIZER) as path:
            shutil.copyfile(origin.folder / TOKENIZER, path)


def require_same_actions(student: CheckpointFacts, teacher: ActionSpace, where: str) -> None:
    """Refuse to compare tokens that mean different actions: ValueError names the first field that differs, and both values."""
    for field, ours in student.action_space.model_dump().items():
        theirs = teacher.model_dump()[field]
        if ours != theirs:
            raise ValueError(
                f"{where}: action_space.{field} is {theirs} for the teacher; expected the student's {ours} (a token must mean one action)"
            )


def require_environment(facts: CheckpointFacts, environment: EnvironmentParams, where: str) -> None:
    """Refuse pictures and dynamics that the policy was not trained on. `tasks` may differ; ValueError names the first field that does."""
    for field in (name for name in EnvironmentParams.model_fields if name != "tasks"):
        ours, theirs = getattr(environment, field), getattr(facts.environment, field)
        if ours != theirs:
            raise ValueError(
                f"environment.{field} is {ours!r}; expected {theirs!r}, which {where} was trained with"
            )
