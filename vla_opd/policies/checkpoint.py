"""Checkpoints: weights in safetensors, and a manifest with everything that is needed to use them.

Nothing is inferred from a name.
"""

import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer

from vla_opd.artifacts.draft import Draft
from vla_opd.artifacts.files import link
from vla_opd.artifacts.manifest import Manifest, open_artifact, read_manifest
from vla_opd.data.action_space import ActionSpace
from vla_opd.params.stages import AdoptParams, EnvironmentParams, PolicyParams
from vla_opd.policies import lora
from vla_opd.policies.openvla_oft.files import TOKENIZER, read_tokenizer
from vla_opd.policies.openvla_oft.layout import QUESTION, Architecture, read_public
from vla_opd.policies.policy import Policy

WEIGHTS = "model.safetensors"
DTYPES = {  # by their names in safetensors
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}


class CheckpointFacts(BaseModel):
    """How to use a policy's weights.

    policy: its architecture.
    action_space: the meaning of its tokens.
    environment: the simulator's settings in training; images made under others are refused.
    vocabulary: the words that it knows, in the order of their ids; none, if it has a tokenizer.
    proprio_mean, proprio_std: statistics that scale the P proprioceptive values; empty if it sees
        none.
    prompt: the text around an instruction.
    instruction_length: words of the prompt that it reads, for a policy without a tokenizer.
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


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    folder: Path
    manifest: Manifest
    facts: CheckpointFacts

    @property
    def digest(self) -> str:
        """The artifact's digest."""
        return self.manifest.digest

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The floating-point types of the stored tensors, that of the first tensor first.

        ValueError if there are none, and for anything that is not safetensors.
        """
        path = self.folder / WEIGHTS
        with _refusing_other_formats(path), safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            stored = dict.fromkeys(file.get_slice(name).get_dtype() for name in names)
        dtypes = tuple(DTYPES[name] for name in stored if name in DTYPES)
        if not dtypes:
            raise ValueError(
                f"{path}: is in {sorted(stored)}; expected some tensors in {sorted(DTYPES)}"
            )
        return dtypes

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name, on the CPU.

        ValueError for anything that is not safetensors: no other format is ever loaded.
        """
        path = self.folder / WEIGHTS
        with _refusing_other_formats(path):
            return safetensors.torch.load_file(path)

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer beside the weights, if there is one."""
        return read_tokenizer(self.folder)


@contextmanager
def _refusing_other_formats(path: Path) -> Generator[None]:
    try:
        yield
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not safetensors ({error}); expected what `save_weights` writes"
        ) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint and verify its bytes. ValueError says what is missing or wrong."""
    return _read_facts(folder, open_artifact(folder, "checkpoint"))


def open_unverified(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest without verifying its weights.

    ValueError says what of the manifest is missing or wrong.
    """
    return _read_facts(folder, read_manifest(folder, "checkpoint"))


def _read_facts(folder: Path, manifest: Manifest) -> Checkpoint:
    try:
        facts = CheckpointFacts.model_validate(manifest.facts["checkpoint"])
    except (KeyError, ValidationError) as error:
        raise ValueError(
            f"{folder}: the manifest's facts do not describe a checkpoint of this version: {error}"
        ) from error
    return Checkpoint(folder, manifest, facts)


def public_facts(settings: AdoptParams, environment: EnvironmentParams) -> CheckpointFacts:
    """Return how to use a public checkpoint's weights, by its files.

    ValueError as for `read_public`.
    """
    public = read_public(Path(settings.folder), *settings.variant)
    return CheckpointFacts(
        policy=public.architecture,
        action_space=public.space,
        environment=environment,
        prompt=QUESTION,
    )


def save_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors: deterministic bytes, no pickle."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(stored, path)


def write_policy(work: Draft, policy: Policy, origin: Checkpoint | None) -> None:
    """Write a policy's weights or, of one with an adapter, the adapter and its base's weights.

    origin: the checkpoint that was trained, which has those weights. Its tokenizer is copied.
    ValueError for a policy with an adapter, but without `origin`.
    """
    if lora.attached(policy) is not None:
        _write_adapter(work, policy, origin)
    else:
        with work.part(WEIGHTS) as path:
            save_weights(path, policy.state_dict())
    if origin is not None and (origin.folder / TOKENIZER).is_file():
        with work.part(TOKENIZER) as path:
            shutil.copyfile(origin.folder / TOKENIZER, path)


def _write_adapter(work: Draft, policy: Policy, origin: Checkpoint | None) -> None:
    if origin is None:
        raise ValueError(
            "the policy has an adapter; expected the checkpoint that it was trained on beside it, "
            "or a merged policy (lora.merge)"
        )
    with work.part(WEIGHTS) as path:
        link(origin.folder / WEIGHTS, path)
    with work.part(lora.ADAPTER) as adapter, work.part(lora.CONFIG) as config:
        lora.write(policy, adapter, config)


def require_same_actions(student: CheckpointFacts, teacher: ActionSpace, where: str) -> None:
    """Refuse to compare tokens that mean different actions.

    ValueError names the first field that differs, and both values.
    """
    of_teacher = teacher.model_dump()
    for field, expected in student.action_space.model_dump().items():
        if of_teacher[field] != expected:
            raise ValueError(
                f"{where}: action_space.{field} is {of_teacher[field]} for the teacher; "
                f"expected the student's {expected} (a token must mean one action)"
            )


def require_environment(facts: CheckpointFacts, environment: EnvironmentParams, where: str) -> None:
    """Refuse images and dynamics that the policy was not trained on. `tasks` may differ.

    ValueError names the first field that differs.
    """
    for field in EnvironmentParams.model_fields:
        value = getattr(environment, field)
        expected = getattr(facts.environment, field)
        if field != "tasks" and value != expected:
            raise ValueError(
                f"environment.{field} is {value!r}; expected {expected!r}, "
                f"which {where} was trained with"
            )
