"""Memory estimates: sizes counted by hand, real tensors, and seven billion weights in seconds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.vla_opd import public
from tests.vla_opd import small as tiny
from vla_opd.data.trajectory import Observations
from vla_opd.learning.memory_estimate import (
    Described,
    _counting,
    _observations,
    describe,
    device_needs,
    inference,
    iteration_data,
    update,
)
from vla_opd.params.objective import OptimizeParams
from vla_opd.params.run import Params
from vla_opd.params.stages import AdoptParams, EnvironmentParams, RunParams
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import CheckpointFacts
from vla_opd.policies.load import build_policy, save_pretrained
from vla_opd.policies.openvla_oft.layout import Architecture, read_public
from vla_opd.policies.policy import Policy

ENVIRONMENT = EnvironmentParams(
    tasks=("libero_object/0",),
    cameras=("agentview",),
    image_size=256,
    render="exact",
    wording="benchmark",
)
WIDTH = 1024
OUTPUTS = tiny.TOKENS * tiny.BINS
FLOAT32 = 4  # bytes


class Chain(Policy):
    """Three products with a ReLU between: x [B, W] -> [B, W] -> [B, W] -> [B, K V]."""

    def __init__(self, facts: CheckpointFacts) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, OUTPUTS, bias=False)
        self.space = facts.action_space
        self.chunk = self.space.chunk
        self.action_dim = self.space.action_dim

    def logits(self, observations: Observations) -> torch.Tensor:
        x = torch.empty(len(observations), WIDTH, device=self.device)
        logits = self.head(self.second(self.first(x).relu()).relu())
        return logits.unflatten(-1, (tiny.TOKENS, tiny.BINS))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self.space.decode(tokens)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        return self.space.encode(actions)


class Stack(Chain):
    """The same with the two products as blocks."""

    def __init__(self, facts: CheckpointFacts) -> None:
        super().__init__(facts)
        self.blocks = nn.ModuleList([self.first, self.second])


def describe_family(policy: type[Chain]) -> Described:
    shape = tiny.SHAPE.model_copy(update={"family": f"{__name__}:{policy.__name__}"})
    facts = tiny.FACTS.model_copy(update={"policy": shape})
    return Described(facts, torch.float32, Path("nowhere"))


# Counted by hand

WEIGHTS = 2 * WIDTH * WIDTH + WIDTH * OUTPUTS
ROWS = 8
KEPT = FLOAT32 * ROWS * 3 * WIDTH  # for the backward pass: x, and both outputs of a ReLU
TRANSIENT = FLOAT32 * ROWS * (2 * WIDTH + 4 * OUTPUTS)  # at most, besides


def test_inference_holds_the_weights_and_two_activations() -> None:
    need = inference("evaluate", describe_family(Chain), ROWS)
    assert (need.weights, need.gradients, need.moments) == (FLOAT32 * WEIGHTS, 0, 0)
    # x, which its caller holds, and the input and output of an operation.
    assert need.activations == FLOAT32 * ROWS * 3 * WIDTH


def test_an_update_holds_gradients_moments_and_what_the_backward_pass_needs() -> None:
    size = FLOAT32 * WEIGHTS
    need = update("optimize", describe_family(Chain), OptimizeParams(batch_size=ROWS))
    assert (need.weights, need.gradients, need.moments) == (size, size, 2 * size)
    # AdamW's copy is larger than what a few rows keep.
    assert need.activations == size > KEPT + TRANSIENT
    need = update("optimize", describe_family(Chain), OptimizeParams(batch_size=512 * ROWS))
    inputs = FLOAT32 * ROWS * WIDTH
    assert 512 * (KEPT - inputs) <= need.activations <= 512 * (KEPT + TRANSIENT)


def test_an_adapter_is_all_that_has_gradients_and_moments() -> None:
    need = update("optimize", describe_family(Chain), OptimizeParams(batch_size=ROWS, lora_rank=2))
    adapter = 2 * 2 * (WIDTH + WIDTH)
    assert need.weights == FLOAT32 * (WEIGHTS + adapter)
    assert need.gradients == FLOAT32 * adapter
    assert need.moments == 2 * FLOAT32 * adapter


def test_each_of_several_processes_holds_its_share_and_what_is_gathered() -> None:
    block = FLOAT32 * WIDTH * WIDTH
    head = FLOAT32 * WIDTH * OUTPUTS
    checkpoint = describe_family(Stack)
    settings = OptimizeParams(batch_size=64)
    alone, two, four = (update("optimize", checkpoint, settings, count) for count in (1, 2, 4))
    assert alone == update("optimize", describe_family(Chain), settings)
    for need, count in ((two, 2), (four, 4)):
        assert need.weights == alone.weights // count
        assert need.gradients == alone.gradients // count
        assert need.moments == alone.moments // count
    # Both blocks and what is in no block, and the gradients of all of them.
    gathered = 2 * (2 * block + head)
    few_states = settings.model_copy(update={"batch_size": 16})
    of_few_states = update("optimize", describe_family(Chain), few_states)
    assert of_few_states.activations == of_few_states.gradients  # next to nothing is kept
    assert gathered < four.activations < gathered + 0.2 * of_few_states.activations
    # At the end of the forward pass all that it keeps exists, and no gradient yet.
    many_states = OptimizeParams(batch_size=4096)
    for count in (2, 8):
        need = update("optimize", checkpoint, many_states, count)
        kept = FLOAT32 * (4096 // count) * 3 * WIDTH
        assert need.activations >= kept + gathered // 2
    message = r"optimize\.batch_size is 64; expected a multiple of the 3 processes"
    with pytest.raises(ValueError, match=message):
        update("optimize", checkpoint, settings, 3)


# Real policies


@pytest.mark.parametrize("recompute", [False, True])
def test_sizes_without_numbers_are_those_of_real_tensors(recompute: bool) -> None:
    """TinyVLA on the CPU, with its real attention kernel."""
    checkpoint = Described(tiny.FACTS, torch.float32, Path("nowhere"))
    settings = OptimizeParams(batch_size=16, gradient_checkpointing=recompute)
    policy = build_policy(tiny.FACTS).eval()
    with lora.recomputing(policy, enabled=recompute), _counting(policy) as real:
        policy.logits(_observations(tiny.FACTS, 16)).log_softmax(-1).mean().backward()
    need = update("optimize", checkpoint, settings)
    assert need.weights == real.held
    # On the CPU the pixels are on the same device.
    expected = pytest.approx(real.peak - real.held, rel=0.1)
    assert need.activations + need.gradients == expected
    assert need.activations > need.gradients


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return public.make(tmp_path / "public")


def adopting(folder: Path, **optimize: object) -> Params:
    """Return the settings of a run on a public checkpoint."""
    return Params(
        run=RunParams(name="test"),
        environment=ENVIRONMENT,
        adopt={name: AdoptParams(folder=str(folder)) for name in ("student", "teacher")},
        optimize=OptimizeParams.model_validate({"lora_rank": 32, "batch_size": 32, **optimize}),
        iterations={"it001": "student"},
        evaluations={},
    )


def test_seven_billion_are_planned_without_their_weights(folder: Path, tmp_path: Path) -> None:
    """On 80 GB it fits only if blocks are recomputed in the backward pass."""
    config = json.loads((folder / "config.json").read_text())
    del config["golden_timm_overrides"]
    config["text_config"] = {"model_type": "llama", "vocab_size": 32064}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    params = adopting(folder, gradient_checkpointing=True)
    needs = {need.stage: need for need in device_needs(params, tmp_path)}
    assert list(needs) == ["evaluate", "sample", "label", "optimize"]
    label = needs["label"]
    optimize = needs["optimize"]
    assert label.weights == pytest.approx(2 * 7_367_871_136, rel=1e-3)
    assert optimize.weights - label.weights == 4 * 111_286_272
    assert optimize.gradients == 4 * 111_286_272
    assert 20e9 < optimize.total < 40e9
    student = describe(params, tmp_path, "student")
    keeping = update("optimize", student, adopting(folder).optimize)
    assert keeping.total > 100e9
    assert keeping.weights == optimize.weights


def test_a_checkpoint_that_exists_is_described_by_its_manifest(
    folder: Path, tmp_path: Path
) -> None:
    params = adopting(folder)
    save_pretrained(build_policy(tiny.FACTS), tiny.FACTS, tmp_path / "checkpoints/it001")
    checkpoint = describe(params, tmp_path, "it001")
    assert (checkpoint.facts, checkpoint.dtype) == (tiny.FACTS, torch.float32)
    teacher = describe(params, tmp_path, "teacher")
    assert isinstance(teacher.facts.policy, Architecture)
    assert teacher.dtype == torch.bfloat16
    message = r"checkpoints/base: does not exist yet, and its size is not known before"
    with pytest.raises(ValueError, match=message):
        describe(params, tmp_path, "base")


def test_a_checkpoint_with_an_adapter_needs_its_weights_too(tmp_path: Path) -> None:
    save_pretrained(build_policy(tiny.FACTS), tiny.FACTS, tmp_path / "student")
    plain = Described(tiny.FACTS, torch.float32, tmp_path / "student")
    policy = build_policy(tiny.FACTS)
    lora.prepare(policy, OptimizeParams(lora_rank=2).lora, 0, "optimize")
    (tmp_path / "it001").mkdir()
    lora.write(policy, tmp_path / "it001" / lora.ADAPTER, tmp_path / "it001" / lora.CONFIG)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    adapted = replace(plain, source=tmp_path / "it001")
    difference = inference("evaluate", adapted, 2).weights - inference("evaluate", plain, 2).weights
    assert difference == FLOAT32 * sum(parameter.numel() for parameter in trained)


def test_an_iterations_data_is_counted_at_its_longest(folder: Path) -> None:
    params = adopting(folder)
    changes = {"prompts": 2, "group": 3, "horizon": 11, "observe_every": 4}
    sample = params.sample.model_copy(update=changes)
    space = read_public(folder, None).space
    facts = CheckpointFacts(policy=tiny.SHAPE, action_space=space, environment=ENVIRONMENT)
    data = iteration_data(params.model_copy(update={"sample": sample}), facts)
    assert data.states == 2 * 3 * 3
    assert data.frames == 18 * 256 * 256 * 3
    assert data.labels == 18 * 56 * 256 * np.dtype("float16").itemsize
    assert data.held == data.frames + data.labels
    optimize = params.optimize.model_copy(update={"earlier": 2, "anchor": 0.1})
    anchored = params.model_copy(update={"sample": sample, "optimize": optimize})
    scores = 18 * 56 * 256 * FLOAT32
    assert iteration_data(anchored, facts).held == 3 * (data.held + scores)


def test_an_anchor_scores_before_the_student_is_loaded(folder: Path, tmp_path: Path) -> None:
    params = adopting(folder, anchor=0.1)
    (anchor,) = [need for need in device_needs(params, tmp_path) if need.stage == "anchor"]
    alone = inference("evaluate", describe(params, tmp_path, "student"), 32)
    assert (anchor.weights, anchor.activations) == (alone.weights, alone.activations)


def test_params_yaml_comes_before_the_checkpoint_adopted_by_it(
    folder: Path, tmp_path: Path
) -> None:
    params = adopting(folder)
    save_pretrained(build_policy(tiny.FACTS), tiny.FACTS, tmp_path / "checkpoints/student")
    assert describe(params, tmp_path, "student").dtype == torch.bfloat16
    shutil.rmtree(folder)
    assert describe(params, tmp_path, "student").facts == tiny.FACTS
