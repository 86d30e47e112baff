"""adopt: a public checkpoint -> checkpoint. OpenVLA-OFT with discrete tokens, and with everything that is needed to use it."""

import shutil
from pathlib import Path
from typing import Any

import torch

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest, file_entry
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.run import Params
from vla_opd.params.stages import EnvironmentParams
from vla_opd.policies.checkpoint import WEIGHTS, public_facts, save_weights
from vla_opd.policies.openvla_oft.files import CONFIG, STATISTICS, TOKENIZER, read_tokenizer
from vla_opd.policies.openvla_oft.layout import QUESTION, Architecture, sources
from vla_opd.policies.openvla_oft.model import BEGIN, public_weights


def run(params: Params, name: str, out: Path, host: Host) -> Manifest:
    """Make the checkpoint `name` of public files. The manifest says by which: their sha256 are those that a hub tells of them.

    ValueError for what can't be a student or a teacher, and for an environment that it can't have been trained in.
    """
    its, folder = params.adopt[name], Path(params.adopt[name].folder)
    _require_benchmark(params.environment)
    facts = public_facts(its, params.environment)
    assert isinstance(facts.policy, Architecture), "public facts are of an OpenVLA-OFT"
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(
            f"{folder}: has no {TOKENIZER}; expected the checkpoint's own, by which instructions are put to it"
        )
    first = tokenizer.encode(QUESTION).ids[0]
    if first != BEGIN:
        raise ValueError(
            f"{folder / TOKENIZER}: begins a prompt with id {first}; expected {BEGIN}, the beginning of a sequence (BOS)"
        )
    settings: dict[str, Any] = {
        "name": name,
        "adopt": its.model_dump(exclude={"folder"}),
        "environment": params.environment.model_dump(exclude={"tasks"}),
        "sources": {path.name: file_entry(path).sha256 for path in sources(folder)},
    }
    if STATISTICS not in settings["sources"]:
        settings["statistics"] = CONFIG
    with (
        draft(out, "checkpoint", {}, settings) as work,
        track(host, params.run.name, "adopt", name, settings),
    ):
        with work.part(WEIGHTS) as path:
            save_weights(
                path,
                public_weights(folder, facts.policy, facts.action_space, getattr(torch, its.dtype)),
            )
        with work.part(TOKENIZER) as path:
            shutil.copyfile(folder / TOKENIZER, path)
        return work.publish({"checkpoint": facts.model_dump()})


def _require_benchmark(environment: EnvironmentParams) -> None:
    """ValueError for what public checkpoints weren't trained with: the stock pictures of one camera, and the benchmark's own instructions."""
    wanted = {"render": "exact"}
    if environment.family == "libero":
        wanted |= {"cameras": ("agentview",), "image_size": 256, "wording": "benchmark"}
    for field, expected in wanted.items():
        if (value := getattr(environment, field)) != expected:
            raise ValueError(
                f"environment.{field} is {value!r}; expected {expected!r}, with which public checkpoints were trained"
            )
    if len(environment.cameras) != 1:
        raise ValueError(
            f"environment.cameras is {list(environment.cameras)}; expected one, the third-person camera"
        )
