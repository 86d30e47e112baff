"""What a run will need: sizes that can be counted by hand, the same passes on real tensors, and a policy of seven billion in seconds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.vla_opd import public, small
from vla_opd.data.trajectory import Observations
from vla_opd.learning.memory_estimate import (
    Described,
    _counting,
    _observations,
    described,
    device,
    inference,
    stored,
    update,
)
from vla_opd.params.objective import OptimizeParams
from vla_opd.params.run import Params
from vla_opd.params.stages import AdoptParams, EnvironmentParams, RunParams
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import CheckpointFacts
from vla_opd.policies.load import build_policy, save_pretrained
from vla_opd.policies.openvla_oft.layout import Architecture, read_public

ENVIRONMENT = EnvironmentParams(
    tasks=("libero_object/0",),
    cameras=("agentview",),
    image_size=256,
    render="exact",
    wording="benchmark",
)
WIDTH = 1024


class Chain(nn.Module):
    """Three products with a ReLU between: x [B, W] -> [B, W] -> [B, W] -> [B, K V]."""

    def __init__(self, facts: CheckpointFacts) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Linear(WIDTH, WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.head = nn.Linear(WIDTH, small.TOKENS * small.BINS, bias=False)
        self.chunk, self.action_dim = facts.action_space.chunk, facts.action_space.action_dim

    def logits(self, observations: Observations) -> torch.Tensor:
        x = torch.empty(len(observations), WIDTH, device=self.head.weight.device)
        return self.head(self.second(self.first(x).relu()).relu()).unflatten(
            -1, (small.TOKENS, small.BINS)
        )


def chain() -> Described:
    shape = small.SHAPE.model_copy(update={"family": f"{__name__}:Chain"})
    return Described(
        small.FACTS.model_copy(update={"policy": shape}), torch.float32, Path("nowhere")
    )


def test_what_can_be_counted_by_hand_is() -> None:
    rows, answer = 8, small.TOKENS * small.BINS
    weights = 2 * WIDTH * WIDTH + WIDTH * answer
    need = inference("evaluate", chain(), rows)
    assert (need.weights, need.gradients, need.moments) == (4 * weights, 0, 0)
    assert (
        need.activations == 4 * rows * 3 * WIDTH
    )  # x, which its caller holds, what goes into an operation, and what comes out
    need = update("optimize", chain(), OptimizeParams(batch_size=rows))
    assert (need.weights, need.gradients, need.moments) == (4 * weights, 4 * weights, 8 * weights)
    kept = 4 * rows * 3 * WIDTH  # x, and both outputs of a ReLU
    assert (
        need.activations == 4 * weights > kept + 4 * rows * (2 * WIDTH + 4 * answer)
    )  # AdamW's copy is larger than what a few rows keep
    many = update("optimize", chain(), OptimizeParams(batch_size=512 * rows))
    assert (
        512 * (kept - 4 * rows * WIDTH)
        <= many.activations
        <= 512 * (kept + 4 * rows * (2 * WIDTH + 4 * answer))
    )
    adapted = update("optimize", chain(), OptimizeParams(batch_size=rows, lora_rank=2))
    extra = 2 * 2 * (WIDTH + WIDTH)
    assert (adapted.weights, adapted.gradients, adapted.moments) == (
        4 * (weights + extra),
        4 * extra,
        8 * extra,
    )


class Stack(Chain):
    """The same, of which the two products are blocks."""

    def __init__(self, facts: CheckpointFacts) -> None:
        super().__init__(facts)
        self.blocks = nn.ModuleList([self.first, self.second])


def test_of_processes_that_train_together_each_holds_its_share_and_what_is_gathered() -> None:
    block, head = 4 * WIDTH * WIDTH, 4 * WIDTH * small.TOKENS * small.BINS
    shape = small.SHAPE.model_copy(update={"family": f"{__name__}:Stack"})
    described, settings = (
        replace(chain(), facts=small.FACTS.model_copy(update={"policy": shape})),
        OptimizeParams(batch_size=64),
    )
    alone, two, four = (update("optimize", described, settings, count) for count in (1, 2, 4))
    assert alone == update("optimize", chain(), settings)
    for one, count in ((two, 2), (four, 4)):
        assert (one.weights, one.gradients, one.moments) == tuple(
            size // count for size in (alone.weights, alone.gradients, alone.moments)
        )
    gathered = 2 * (2 * block + head)  # both blocks and what is in none, and the gradients of all
    small_share = update("optimize", chain(), settings.model_copy(update={"batch_size": 16}))
    assert (
        small_share.activations == small_share.gradients
    )  # of so few states next to nothing is kept
    assert gathered < four.activations < gathered + 0.2 * small_share.activations
    for count in (
        2,
        8,
    ):  # at the end of the forward pass what it keeps is there, and no gradient yet
        many = OptimizeParams(batch_size=4096)
        planned, rows = update("optimize", described, many, count), 4096 // count
        assert planned.activations >= 4 * rows * 3 * WIDTH + gathered // 2
    with pytest.raises(
        ValueError, match=r"optimize\.batch_size is 64; expected a multiple of the 3 processes"
    ):
        update("optimize", described, settings, 3)


@pytest.mark.parametrize("recompute", [False, True])
def test_sizes_without_numbers_are_those_of_real_tensors(recompute: bool) -> None:
    """TinyVLA on the CPU, with its real attention kernel."""
    checkpoint = Described(small.FACTS, torch.float32, Path("nowhere"))
    settings = OptimizeParams(batch_size=16, gradient_checkpointing=recompute)
    policy = build_policy(small.FACTS).eval()
    with lora.recomputing(policy, wanted=recompute), _counting(policy) as real:
        policy.logits(_observations(small.FACTS, 16)).log_softmax(-1).mean().backward()
    planned = update("optimize", checkpoint, settings)
    assert planned.weights == real.held
    assert planned.activations + planned.gradients == pytest.approx(
        real.peak - real.held, rel=0.1
    )  # pixels lie on the same device there
    assert planned.activations > planned.gradients


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return public.make(tmp_path / "public")


def adopting(folder: Path, **optimize: object) -> Params:
    return Params(
        run=RunParams(name="test"),
        environment=ENVIRONMENT,
        adopt={name: AdoptParams(folder=str(folder)) for name in ("student", "teacher")},
        optimize=OptimizeParams.model_validate({"lora_rank": 32, "batch_size": 32, **optimize}),
        iterations={"it001": "student"},
        evaluations={},
    )


def test_seven_billion_are_planned_without_their_weights(folder: Path, tmp_path: Path) -> None:
    """On 80 GB: not with everything kept for the gradient, but with blocks computed again."""
    config = json.loads((folder / "config.json").read_text())
    del config["golden_timm_overrides"]
    config["text_config"] = {"model_type": "llama", "vocab_size": 32064}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    run = adopting(folder, gradient_checkpointing=True)
    needs = {need.stage: need for need in device(run, tmp_path)}
    assert list(needs) == ["evaluate", "sample", "label", "optimize"]
    assert needs["label"].weights == pytest.approx(2 * 7_367_871_136, rel=1e-3)
    assert needs["optimize"].weights - needs["label"].weights == 4 * 111_286_272
    assert needs["optimize"].gradients == 4 * 111_286_272
    assert 20e9 < needs["optimize"].total < 40e9
    greedy = update("optimize", described(run, tmp_path, "student"), adopting(folder).optimize)
    assert greedy.total > 100e9
    assert greedy.weights == needs["optimize"].weights


def test_what_is_there_is_described_by_its_manifest(folder: Path, tmp_path: Path) -> None:
    run = adopting(folder)
    save_pretrained(build_policy(small.FACTS), small.FACTS, tmp_path / "checkpoints/it001")
    found = described(run, tmp_path, "it001")
    assert (found.facts, found.dtype) == (small.FACTS, torch.float32)
    assert isinstance(described(run, tmp_path, "teacher").facts.policy, Architecture)
    assert described(run, tmp_path, "teacher").dtype == torch.bfloat16
    with pytest.raises(
        ValueError,
        match=r"checkpoints/base: isn't there yet, and what it will need isn't known before",
    ):
        described(run, tmp_path, "base")


def test_a_checkpoint_with_an_adapter_needs_that_too(tmp_path: Path) -> None:
    save_pretrained(build_policy(small.FACTS), small.FACTS, tmp_path / "student")
    plain = Described(small.FACTS, torch.float32, tmp_path / "student")
    adapted = build_policy(small.FACTS)
    lora.prepare(adapted, OptimizeParams(lora_rank=2).lora, 0, "optimize")
    (tmp_path / "it001").mkdir()
    lora.write(adapted, tmp_path / "it001" / lora.ADAPTER, tmp_path / "it001" / lora.CONFIG)
    extra = sum(one.numel() for one in adapted.parameters() if one.requires_grad)
    need, bare = (
        inference("evaluate", replace(plain, source=tmp_path / "it001"), 2),
        inference("evaluate", plain, 2),
    )
    assert need.weights - bare.weights == 4 * extra
    shutil.rmtree(tmp_path / "it001")


def test_what_an_iteration_leaves_is_counted_at_its_longest(folder: Path) -> None:
    run = adopting(folder)
    its = run.sample.model_copy(
        update={"prompts": 2, "group": 3, "horizon": 11, "observe_every": 4}
    )
    space = read_public(folder, None).space
    facts = CheckpointFacts(policy=small.SHAPE, action_space=space, environment=ENVIRONMENT)
    found = stored(run.model_copy(update={"sample": its}), facts)
    assert found.states == 2 * 3 * 3
    assert found.frames == 18 * 256 * 256 * 3
    assert found.labels == 18 * 56 * 256 * np.dtype("float16").itemsize
    assert found.held == found.frames + found.labels
    longer = run.model_copy(
        update={
            "sample": its,
            "optimize": run.optimize.model_copy(update={"earlier": 2, "anchor": 0.1}),
        }
    )
    assert stored(longer, facts).held == 3 * (found.held + 18 * 56 * 256 * 4)


def test_an_anchor_is_asked_before_the_student_is_there(folder: Path, tmp_path: Path) -> None:
    run = adopting(folder, anchor=0.1)
    (anchor,) = [need for need in device(run, tmp_path) if need.stage == "anchor"]
    alone = inference("evaluate", described(run, tmp_path, "student"), 32)
    assert (anchor.weights, anchor.activations) == (alone.weights, alone.activations)


def test_params_yaml_is_believed_before_what_was_adopted_by_it(
    folder: Path, tmp_path: Path
) -> None:
    run = adopting(folder)
    save_pretrained(build_policy(small.FACTS), small.FACTS, tmp_path / "checkpoints/student")
    assert described(run, tmp_path, "student").dtype == torch.bfloat16
    shutil.rmtree(folder)
    assert described(run, tmp_path, "student").facts == small.FACTS
