"""adopt: a public checkpoint -> checkpoint: OpenVLA-OFT with discrete action tokens."""

import shutil
from pathlib import Path
from typing import Any

import torch

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest, file_entry
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.stages import AdoptParams, EnvironmentParams
from vla_opd.policies.checkpoint import WEIGHTS, public_facts, save_weights
from vla_opd.policies.openvla_oft.files import CONFIG, STATISTICS, TOKENIZER, read_tokenizer
from vla_opd.policies.openvla_oft.layout import QUESTION, Architecture
from vla_opd.policies.openvla_oft.model import BEGIN, public_weights
from vla_opd.policies.openvla_oft.weights import source_files


def run(
    *,
    run: str,
    settings: AdoptParams,
    environment: EnvironmentParams,
    name: str,
    out: Path,
    host: Host,
) -> Manifest:
    """Make a checkpoint of public files. The manifest has their sha256, as a hub shows them.

    ValueError for files that make no student or teacher, and for an environment that the
    checkpoint cannot have been trained in.
    """
    folder = Path(settings.folder)
    _require_benchmark(environment)
    facts = public_facts(settings, environment)
    assert isinstance(facts.policy, Architecture), "public facts are of an OpenVLA-OFT"
    _require_tokenizer(folder)
    recorded: dict[str, Any] = {
        "name": name,
        "adopt": settings.model_dump(exclude={"folder"}),
        "environment": environment.model_dump(exclude={"tasks"}),
        "sources": {path.name: file_entry(path).sha256 for path in source_files(folder)},
    }
    if STATISTICS not in recorded["sources"]:
        recorded["statistics"] = CONFIG
    dtype = getattr(torch, settings.dtype)
    with (
        draft(out, "checkpoint", {}, recorded) as work,
        track(host, run, "adopt", name, recorded),
    ):
        with work.part(WEIGHTS) as path:
            save_weights(path, public_weights(folder, facts.policy, facts.action_space, dtype))
        with work.part(TOKENIZER) as path:
            shutil.copyfile(folder / TOKENIZER, path)
        return work.publish({"checkpoint": facts.model_dump()})


def _require_tokenizer(folder: Path) -> None:
    """ValueError unless the folder has a tokenizer that begins prompts as the policy expects."""
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder}: has no {TOKENIZER}; expected the checkpoint's own tokenizer")
    first = tokenizer.encode(QUESTION).ids[0]
    if first != BEGIN:
        raise ValueError(
            f"{folder / TOKENIZER}: begins a prompt with id {first}; "
            f"expected {BEGIN}, the beginning of a sequence (BOS)"
        )


def _require_benchmark(environment: EnvironmentParams) -> None:
    """ValueError unless frames and instructions are those of public checkpoints' training."""
    trained_on: dict[str, Any] = {"render": "exact"}
    if environment.family == "libero":
        trained_on |= {"cameras": ("agentview",), "image_size": 256, "wording": "benchmark"}
    for field, expected in trained_on.items():
        value = getattr(environment, field)
        if value != expected:
            raise ValueError(
                f"environment.{field} is {value!r}; expected {expected!r}, "
                "with which public checkpoints were trained"
            )
    if len(environment.cameras) != 1:
        raise ValueError(
            f"environment.cameras is {list(environment.cameras)}; "
            "expected one, the third-person camera"
        )
