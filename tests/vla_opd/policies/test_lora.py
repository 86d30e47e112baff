"""Adapters: a new one changes nothing, only it is trained, what is written loads here and elsewhere, and merging is the same policy."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import nn

from tests.vla_opd import small
from tests.vla_opd.public import GOLDEN
from vla_opd.artifacts.draft import draft
from vla_opd.learning.optimizer import Budget, Schedule, Session, StepLoss, train
from vla_opd.params.training import Lora
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import Checkpoint, open_checkpoint, write_policy
from vla_opd.policies.load import build_policy, load_policy, save_pretrained
from vla_opd.policies.openvla_oft.model import from_public

LORA = Lora(rank=2, alpha=4)
SEEN = small.observations(3)


def policy(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_policy(small.FACTS).eval()


def logits(of: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return of.logits(SEEN).clone()


class FirstBinLoss:
    """-log p of the first bin."""

    def __call__(self, policy: nn.Module, step: int) -> StepLoss:
        return StepLoss(-policy.logits(SEEN).log_softmax(-1)[..., 0].mean(), {}, 1)

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        return {}


def trained(one: nn.Module, scratch: Path, steps: int = 3) -> nn.Module:
    """Towards the first bin everywhere."""
    scratch.mkdir(exist_ok=True)
    budget = Budget(steps, Schedule(0.05, 0.05, 0, steps), 1.0, 0.0, save_every=100)
    train(one, FirstBinLoss(), budget, Session("test", scratch))
    return one


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    save_pretrained(policy(), small.FACTS, tmp_path / "base")
    return open_checkpoint(tmp_path / "base")


def publish(one: nn.Module, folder: Path, origin: Checkpoint) -> Checkpoint:
    with draft(folder, "checkpoint", {}, {}) as work:
        write_policy(work, one, origin)
        work.publish({"checkpoint": origin.facts.model_dump()})
    return open_checkpoint(folder)


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(tmp_path: Path) -> None:
    one = policy()
    before, answers = {name: value.clone() for name, value in one.state_dict().items()}, logits(one)
    lora.prepare(one, LORA, 7, "optimize")
    assert torch.equal(logits(one), answers)
    linear = (
        sum(isinstance(module, nn.Linear) for module in policy().modules()) - 1
    )  # all but the head
    names = [name for name, value in one.named_parameters() if value.requires_grad]
    assert len(names) == 2 * linear
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    trained(one, tmp_path / "scratch")
    assert (logits(one) - answers).abs().max() > 0.01
    after = {
        name.replace(".base_layer", ""): value
        for name, value in one.state_dict().items()
        if "lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_it_is_w_plus_alpha_by_r_times_b_a(tmp_path: Path) -> None:
    one = policy()
    lora.prepare(one, LORA, 7, "optimize")
    trained(one, tmp_path / "scratch")
    layer = one.language_model.layers[0].mlp.up_proj
    x = torch.randn(4, small.SHAPE.width, generator=torch.Generator().manual_seed(0))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (down.shape, up.shape) == ((2, small.SHAPE.width), (3 * small.SHAPE.width, 2))
    torch.testing.assert_close(
        layer(x), x @ layer.base_layer.weight.T + 4 / 2 * (x @ down.T) @ up.T
    )


def test_the_seed_draws_it_and_nothing_else_does() -> None:
    drawn = []
    for seed in (7, 7, 8):
        one = policy()
        torch.rand(1 + len(drawn))
        before = torch.get_rng_state()
        lora.prepare(one, LORA, seed, "optimize")
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(one.language_model.layers[0].mlp.up_proj.lora_A["default"].weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_checkpoint_holds_the_bases_own_file_and_goes_on_with_its_adapter(
    base: Checkpoint, tmp_path: Path
) -> None:
    one = load_policy(base)
    lora.prepare(one, LORA, 7, "optimize")
    made = publish(trained(one, tmp_path / "scratch"), tmp_path / "it001", base)
    assert set(made.manifest.files) == {
        "model.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    assert made.manifest.files["model.safetensors"] == base.manifest.files["model.safetensors"]
    assert (made.folder / "model.safetensors").samefile(base.folder / "model.safetensors")
    again = load_policy(made)
    assert lora.attached(again) == LORA
    assert torch.equal(logits(again), logits(one))
    lora.prepare(
        again, LORA, 9, "optimize"
    )  # another seed: the one that is there is not drawn again
    assert torch.equal(logits(again), logits(one))
    second = publish(trained(again, tmp_path / "scratch2"), tmp_path / "it002", made)
    assert torch.equal(logits(load_policy(second)), logits(again))
    assert second.manifest.files["model.safetensors"] == base.manifest.files["model.safetensors"]


def test_any_peft_attaches_it(base: Checkpoint, tmp_path: Path) -> None:
    one = load_policy(base)
    lora.prepare(one, LORA, 7, "optimize")
    made = publish(trained(one, tmp_path / "scratch"), tmp_path / "it001", base)
    elsewhere = PeftModel.from_pretrained(load_policy(base), str(made.folder))
    assert torch.equal(logits(elsewhere.base_model.model), logits(one))


def test_merging_is_the_same_policy_of_which_all_is_trained(
    base: Checkpoint, tmp_path: Path
) -> None:
    one = load_policy(base)
    lora.prepare(one, LORA, 7, "optimize")
    answers = logits(trained(one, tmp_path / "scratch"))
    lora.prepare(one, None, 7, "optimize")
    assert lora.attached(one) is None
    assert one.state_dict().keys() == policy().state_dict().keys()
    assert all(value.requires_grad for value in one.parameters())
    torch.testing.assert_close(logits(one), answers, rtol=0, atol=1e-5)
    made = publish(one, tmp_path / "merged", base)
    assert set(made.manifest.files) == {"model.safetensors"}
    assert torch.equal(logits(load_policy(made)), logits(one))


def test_another_adapter_than_the_one_that_is_there_is_refused() -> None:
    one = policy()
    lora.prepare(one, LORA, 7, "optimize")
    with pytest.raises(
        ValueError,
        match=r"optimize\.lora_rank and lora_alpha are \[3, 4\]; expected the checkpoint's \[2, 4\], or null",
    ):
        lora.prepare(one, Lora(rank=3, alpha=4), 7, "optimize")


def test_an_adapter_of_another_policy_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    one = load_policy(base)
    lora.prepare(one, LORA, 7, "optimize")
    made = publish(one, tmp_path / "it001", base)
    tensors = safetensors.torch.load_file(made.folder / lora.ADAPTER)
    name = next(iter(tensors))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / lora.CONFIG).write_bytes((made.folder / lora.CONFIG).read_bytes())
    safetensors.torch.save_file(
        {key: value for key, value in tensors.items() if key != name},
        tmp_path / "other" / lora.ADAPTER,
    )
    with pytest.raises(
        ValueError,
        match=r"other/adapter_model\.safetensors: lacks \['.*lora_.*'\], and has \[\] besides; expected an adapter of this",
    ):
        lora.read(policy(), tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"r": "2"}, "r"),
        ({"use_rslora": True}, "use_rslora"),
        ({"lora_dropout": 0.5}, "lora_dropout"),
        ({"modules_to_save": ["head"]}, "modules_to"),
    ],
)
def test_a_description_that_says_more_or_less_is_refused(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / lora.CONFIG).write_text(json.dumps(said | change))
    with pytest.raises(
        ValueError,
        match=rf"adapter_config\.json: not the description of an adapter as they are written here: (.|\n)*{named}",
    ):
        lora.read(policy(), tmp_path)


def test_an_adapter_of_another_size_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    one = load_policy(base)
    lora.prepare(one, LORA, 7, "optimize")
    made = publish(one, tmp_path / "it001", base)
    (tmp_path / "other").mkdir()
    said = json.loads((made.folder / lora.CONFIG).read_text())
    (tmp_path / "other" / lora.CONFIG).write_text(json.dumps(said | {"r": 3}))
    (tmp_path / "other" / lora.ADAPTER).write_bytes((made.folder / lora.ADAPTER).read_bytes())
    with pytest.raises(
        ValueError,
        match=r"other/adapter_model\.safetensors: (.|\n)*expected an adapter of this policy",
    ):
        lora.read(policy(), tmp_path / "other")


def test_an_adapted_policy_without_its_base_is_not_published(tmp_path: Path) -> None:
    one = policy()
    lora.prepare(one, LORA, 7, "optimize")
    with pytest.raises(
        ValueError,
        match=r"the policy has an adapter; expected the checkpoint that it was trained on beside it, or a merged policy",
    ):
        save_pretrained(one, small.FACTS, tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_all_weights_are_looked_at_before_they_are_trained() -> None:
    mixed = policy()
    mixed.head.bfloat16()
    with pytest.raises(
        ValueError,
        match=r"optimize\.lora_rank is null, and the weights are torch\.bfloat16, too coarse",
    ):
        lora.prepare(mixed, None, 0, "optimize")


def test_over_coarse_weights_an_adapter_is_fine_and_they_are_not_trained_without() -> None:
    coarse = from_public(GOLDEN / "checkpoint", dtype=torch.bfloat16)
    with pytest.raises(
        ValueError,
        match=r"optimize\.lora_rank is null, and the weights are torch\.bfloat16, too coarse for small steps; expected an adapter",
    ):
        lora.prepare(coarse, None, 0, "optimize")
    lora.prepare(coarse, LORA, 0, "optimize")
    assert {one.dtype for one in coarse.parameters() if one.requires_grad} == {torch.float32}
    adapted = {
        name.partition(".")[0] for name, one in coarse.named_parameters() if one.requires_grad
    }
    assert adapted == {"dino", "siglip", "projector", "language_model"}
    with pytest.raises(ValueError, match="too coarse for small steps"):
        lora.prepare(coarse, None, 0, "optimize")  # merged, and coarse


def test_computed_again_the_gradient_is_the_same() -> None:
    """And fewer numbers are kept for it."""
    kept, gradients = [], []
    for wanted in (False, True):
        one = policy()
        count = [0]

        def keep(tensor: torch.Tensor, count: list[int] = count) -> torch.Tensor:
            count[0] += tensor.numel()
            return tensor

        with (
            lora.recomputing(one, wanted=wanted),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            value = one.logits(SEEN).log_softmax(-1)[..., 0].mean()
        with lora.recomputing(one, wanted=wanted):
            value.backward()
        kept.append(count[0])
        gradients.append([value.grad for value in one.parameters() if value.grad is not None])
        assert not any(module.training for module in one.modules())
    assert kept[1] < kept[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))
