"""Adapters: only they are trained, they load here and elsewhere, and merging changes nothing."""

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
from vla_opd.policies.load import Policy, build_policy, load_policy, save_pretrained
from vla_opd.policies.openvla_oft.model import from_public

LORA = Lora(rank=2, alpha=4)
OBSERVATIONS = small.observations(3)


def make_policy() -> Policy:
    """Make a policy, always with the same weights."""
    torch.manual_seed(0)
    return build_policy(small.FACTS).eval()


def adapt(policy: Policy, seed: int = 7) -> Policy:
    """Give a policy a new adapter."""
    lora.prepare(policy, LORA, seed, "optimize")
    return policy


def logits(policy: Policy) -> torch.Tensor:
    with torch.inference_mode():
        return policy.logits(OBSERVATIONS).clone()


class FirstBinLoss:
    """-log p of the first bin."""

    def __call__(self, policy: Policy, step: int) -> StepLoss:
        log_probs = policy.logits(OBSERVATIONS).log_softmax(-1)
        return StepLoss(-log_probs[..., 0].mean(), {}, 1)

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        return {}


def train_for_first_bin(policy: Policy, scratch: Path, steps: int = 3) -> Policy:
    scratch.mkdir(exist_ok=True)
    budget = Budget(steps, Schedule(0.05, 0.05, 0, steps), 1.0, 0.0, save_every=100)
    train(policy, FirstBinLoss(), budget, Session("test", scratch))
    return policy


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    save_pretrained(make_policy(), small.FACTS, tmp_path / "base")
    return open_checkpoint(tmp_path / "base")


def publish(policy: Policy, folder: Path, origin: Checkpoint) -> Checkpoint:
    with draft(folder, "checkpoint", {}, {}) as work:
        write_policy(work, policy, origin)
        work.publish({"checkpoint": origin.facts.model_dump()})
    return open_checkpoint(folder)


def trainable(policy: Policy) -> list[str]:
    return [name for name, parameter in policy.named_parameters() if parameter.requires_grad]


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(tmp_path: Path) -> None:
    policy = make_policy()
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    linear = [module for module in policy.modules() if isinstance(module, nn.Linear)]
    before = logits(policy)
    adapt(policy)
    assert torch.equal(logits(policy), before)
    names = trainable(policy)
    assert len(names) == 2 * (len(linear) - 1)  # A and B of all but the head
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    train_for_first_bin(policy, tmp_path / "scratch")
    assert (logits(policy) - before).abs().max() > 0.01
    frozen: dict[str, torch.Tensor] = {}
    for name, value in policy.state_dict().items():
        if "lora_" not in name:
            frozen[name.replace(".base_layer", "")] = value
    assert frozen.keys() == weights.keys()
    assert all(torch.equal(frozen[name], value) for name, value in weights.items())


def test_it_is_w_plus_alpha_by_r_times_b_a(tmp_path: Path) -> None:
    policy = train_for_first_bin(adapt(make_policy()), tmp_path / "scratch")
    width = small.SHAPE.width
    layer = policy.language_model.layers[0].mlp.up_proj
    a = layer.lora_A["default"].weight
    b = layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((2, width), (3 * width, 2))
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    expected = x @ layer.base_layer.weight.T + 4 / 2 * (x @ a.T) @ b.T
    torch.testing.assert_close(layer(x), expected)


def test_an_adapter_is_drawn_by_its_seed_and_by_nothing_else() -> None:
    def draw(seed: int, draws_before: int) -> torch.Tensor:
        policy = make_policy()
        torch.rand(draws_before)
        state = torch.get_rng_state()
        adapt(policy, seed)
        assert torch.equal(torch.get_rng_state(), state)
        return policy.language_model.layers[0].mlp.up_proj.lora_A["default"].weight

    first = draw(7, 1)
    assert torch.equal(first, draw(7, 2))
    assert not torch.equal(first, draw(8, 3))


def test_a_checkpoint_shares_its_bases_file_and_training_continues_with_its_adapter(
    base: Checkpoint, tmp_path: Path
) -> None:
    policy = train_for_first_bin(adapt(load_policy(base)), tmp_path / "scratch")
    first = publish(policy, tmp_path / "it001", base)
    weights = "model.safetensors"
    assert set(first.manifest.files) == {
        weights,
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    assert first.manifest.files[weights] == base.manifest.files[weights]
    assert (first.folder / weights).samefile(base.folder / weights)
    loaded = load_policy(first)
    assert lora.attached(loaded) == lora.find(first.folder) == LORA
    assert torch.equal(logits(loaded), logits(policy))
    adapt(loaded, seed=9)  # the adapter is not drawn again
    assert torch.equal(logits(loaded), logits(policy))
    train_for_first_bin(loaded, tmp_path / "scratch2")
    second = publish(loaded, tmp_path / "it002", first)
    assert torch.equal(logits(load_policy(second)), logits(loaded))
    assert second.manifest.files[weights] == base.manifest.files[weights]


def test_any_peft_attaches_it(base: Checkpoint, tmp_path: Path) -> None:
    policy = train_for_first_bin(adapt(load_policy(base)), tmp_path / "scratch")
    checkpoint = publish(policy, tmp_path / "it001", base)
    model = PeftModel.from_pretrained(load_policy(base), str(checkpoint.folder))
    assert torch.equal(logits(model.base_model.model), logits(policy))


def test_merging_is_the_same_policy_of_which_all_is_trained(
    base: Checkpoint, tmp_path: Path
) -> None:
    policy = train_for_first_bin(adapt(load_policy(base)), tmp_path / "scratch")
    before = logits(policy)
    lora.prepare(policy, None, 7, "optimize")
    assert lora.attached(policy) is None
    assert policy.state_dict().keys() == make_policy().state_dict().keys()
    assert all(parameter.requires_grad for parameter in policy.parameters())
    torch.testing.assert_close(logits(policy), before, rtol=0, atol=1e-5)
    checkpoint = publish(policy, tmp_path / "merged", base)
    assert set(checkpoint.manifest.files) == {"model.safetensors"}
    assert torch.equal(logits(load_policy(checkpoint)), logits(policy))


def test_another_adapter_than_the_present_one_is_refused() -> None:
    policy = adapt(make_policy())
    message = (
        r"optimize\.lora_rank and lora_alpha are \[3, 4\]; "
        r"expected the checkpoint's \[2, 4\], or null"
    )
    with pytest.raises(ValueError, match=message):
        lora.prepare(policy, Lora(rank=3, alpha=4), 7, "optimize")


def test_an_adapter_of_another_policy_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    folder = publish(adapt(load_policy(base)), tmp_path / "it001", base).folder
    tensors = safetensors.torch.load_file(folder / lora.ADAPTER)
    name, tensor = tensors.popitem()
    (folder / lora.ADAPTER).unlink()
    safetensors.torch.save_file(tensors | {"unknown": tensor}, folder / lora.ADAPTER)
    message = (
        rf"it001/adapter_model\.safetensors: has no \['{name.removeprefix(lora.PREFIX)[:20]}.*"
        r"and unknown tensors \['unknown'\]; expected an adapter of this policy"
    )
    with pytest.raises(ValueError, match=message):
        lora.read(make_policy(), folder)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"r": "2"}, "r"),
        ({"use_rslora": True}, "use_rslora"),
        ({"lora_dropout": 0.5}, "lora_dropout"),
        ({"modules_to_save": ["head"]}, "modules_to"),
    ],
)
def test_a_description_with_other_settings_is_refused(
    tmp_path: Path, change: dict[str, object], key: str
) -> None:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / lora.CONFIG).write_text(json.dumps(settings | change))
    message = (
        r"adapter_config\.json: not the description of an adapter as they are written here: "
        rf"(.|\n)*{key}"
    )
    with pytest.raises(ValueError, match=message):
        lora.read(make_policy(), tmp_path)


def test_an_adapter_of_another_size_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    folder = publish(adapt(load_policy(base)), tmp_path / "it001", base).folder
    settings = json.loads((folder / lora.CONFIG).read_text())
    (folder / lora.CONFIG).write_text(json.dumps(settings | {"r": 3}))
    message = r"it001/adapter_model\.safetensors: (.|\n)*expected an adapter of this policy"
    with pytest.raises(ValueError, match=message):
        lora.read(make_policy(), folder)


def test_an_adapted_policy_without_its_base_is_not_published(tmp_path: Path) -> None:
    policy = adapt(make_policy())
    message = (
        "the policy has an adapter; expected the checkpoint that it was trained on beside it, "
        r"or a merged policy \(lora\.merge\)"
    )
    with pytest.raises(ValueError, match=message):
        save_pretrained(policy, small.FACTS, tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_a_single_coarse_weight_is_not_trained_without_an_adapter() -> None:
    policy = make_policy()
    policy.head.bfloat16()
    message = r"optimize\.lora_rank is null, and the weights are torch\.bfloat16, too coarse"
    with pytest.raises(ValueError, match=message):
        lora.prepare(policy, None, 0, "optimize")


def test_coarse_weights_are_trained_by_an_adapter_only() -> None:
    policy = from_public(GOLDEN / "checkpoint", dtype=torch.bfloat16)
    message = (
        r"optimize\.lora_rank is null, and the weights are torch\.bfloat16, "
        "too coarse for small steps; expected an adapter"
    )
    with pytest.raises(ValueError, match=message):
        lora.prepare(policy, None, 0, "optimize")
    adapt(policy)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    parts = {name.partition(".")[0] for name in trainable(policy)}
    assert parts == {"dino", "siglip", "projector", "language_model"}
    with pytest.raises(ValueError, match="too coarse for small steps"):
        lora.prepare(policy, None, 0, "optimize")  # merged, the weights would be trained


def test_recomputing_keeps_fewer_numbers_for_the_same_gradient() -> None:
    def backpropagate(*, recompute: bool) -> tuple[list[torch.Tensor], int]:
        """Return the gradients, and how many numbers are kept for them."""
        policy = make_policy()
        sizes: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with lora.recomputing(policy, enabled=recompute), hooks:
            loss = policy.logits(OBSERVATIONS).log_softmax(-1)[..., 0].mean()
        with lora.recomputing(policy, enabled=recompute):
            loss.backward()
        assert not any(module.training for module in policy.modules())
        gradients = [parameter.grad for parameter in policy.parameters()]
        return [gradient for gradient in gradients if gradient is not None], sum(sizes)

    kept, size = backpropagate(recompute=False)
    recomputed, smaller_size = backpropagate(recompute=True)
    assert smaller_size < size
    assert len(recomputed) == len(kept)
    for gradient, expected in zip(recomputed, kept, strict=True):
        assert torch.equal(gradient, expected)
