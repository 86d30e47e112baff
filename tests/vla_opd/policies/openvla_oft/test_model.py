"""OpenVLA-OFT compared with the original.

`tests/data/openvla_oft` has a tiny random checkpoint that the original code wrote, inputs, and its
outputs at every step (openvla-oft 213c5ff, SimpleVLA-RL 7c51662, transformers 4.40.1 with the
bidirectional Llama, images from TensorFlow).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.vla_opd import public
from tests.vla_opd.public import GOLDEN
from vla_opd.data.trajectory import Observations
from vla_opd.params.training import Lora
from vla_opd.policies import lora
from vla_opd.policies.openvla_oft.layout import Architecture
from vla_opd.policies.openvla_oft.model import OpenVLAOFT, from_public
from vla_opd.policies.openvla_oft.parity import compare, compute_arrays
from vla_opd.policies.openvla_oft.weights import parameter_names, read_weights

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy() -> OpenVLAOFT:
    return from_public(GOLDEN / "checkpoint")


@pytest.fixture
def policy_with_tokenizer(tmp_path: Path) -> OpenVLAOFT:
    return from_public(public.make(tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def inputs() -> Arrays:
    with np.load(GOLDEN / "inputs.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def outputs() -> Arrays:
    with np.load(GOLDEN / "outputs.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def prompts(inputs: Arrays) -> Tensor:
    """The golden prompts, with their padding moved from left to right."""
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        padding = int((mask == 0).sum())
        rows.append(np.roll(ids, -padding))
    return torch.from_numpy(np.stack(rows))


@pytest.fixture(scope="module")
def lengths(inputs: Arrays) -> Tensor:
    """The number of ids of each golden prompt."""
    return torch.from_numpy(inputs["prompt_lengths"])


def observe(inputs: Arrays, *instructions: str) -> Observations:
    """The golden images, upright, from one camera."""
    frames = inputs["raw_image"][: len(instructions), None, ::-1]
    proprio = np.zeros((len(instructions), 8), np.float32)
    return Observations(frames, proprio, instructions)


# The original


def test_wrong_ports_predict_other_tokens(
    policy: OpenVLAOFT, inputs: Arrays, outputs: Arrays
) -> None:
    ids = compute_arrays(policy, inputs)["greedy_token_ids"]
    np.testing.assert_array_equal(ids, outputs["greedy_token_ids"])
    assert (ids == outputs["neg_causal_token_ids"]).mean() < 0.2
    assert (ids == outputs["neg_shifted_token_ids"]).mean() < 0.5


# What `means` and `stds` say.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(
    ("constant", "first"),
    [
        (IMAGENET, "pixel_values"),
        ({"crop": 1.0}, "center_cropped"),
        ({"rope_theta": 5e5}, "action_hidden_states"),
        ({"rms_epsilon": 1e-5}, "logits_action_columns"),  # Llama 2's
        ({"vocabulary": 31999}, "logits_action_columns"),
    ],
)
def test_a_wrong_constant_shows_in_the_first_array_that_depends_on_it(
    policy: OpenVLAOFT, inputs: Arrays, outputs: Arrays, constant: dict[str, Any], first: str
) -> None:
    architecture = policy.architecture.model_copy(update=constant)
    wrong = OpenVLAOFT(architecture, policy.space).eval()
    wrong.load_state_dict(read_weights(GOLDEN / "checkpoint", architecture, 256))
    comparison = compare(compute_arrays(wrong, inputs), inputs | outputs, 5e-4)
    names = [parity.name for parity in comparison if not parity.holds]
    assert names[0] == first
    assert "logits_action_columns" in names


@pytest.fixture(scope="module")
def gradients(
    policy: OpenVLAOFT, inputs: Arrays, outputs: Arrays, prompts: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """Gradients of the sampled tokens' mean log-probability at temperature 1.6, by parameter."""
    reference = json.loads((GOLDEN / "gradients.json").read_text())
    policy.zero_grad()
    logits = policy(policy.normalize(inputs["center_cropped"]), prompts, lengths)
    bins = torch.from_numpy(policy.architecture.vocabulary - 1 - outputs["sampled_token_ids"])
    loss = -(logits / 1.6).log_softmax(-1).gather(-1, bins.unsqueeze(-1)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(reference["loss"], abs=1e-5)
    return {name: parameter.grad for name, parameter in policy.named_parameters()}


def test_the_norm_of_every_gradient_is_the_originals(
    policy: OpenVLAOFT, gradients: dict[str, Tensor]
) -> None:
    reference = json.loads((GOLDEN / "gradients.json").read_text())["grad_l2_norms"]
    unused = 0
    seen: set[str] = set()
    for name, norm in reference.items():
        parameters = parameter_names(name, policy.architecture)
        seen.update(parameters)
        if norm is None:
            unused += 1
            assert parameters == (), name
        else:
            norms = torch.stack([gradients[parameter].norm() for parameter in parameters])
            assert norms.norm().item() == pytest.approx(norm, rel=1e-3), name
    assert unused > 10
    assert seen == set(gradients)


def test_some_gradients_are_the_originals_in_every_element(
    policy: OpenVLAOFT, gradients: dict[str, Tensor]
) -> None:
    with np.load(GOLDEN / "gradients.npz") as archive:
        reference = dict(archive)
    assert reference
    for name, expected in reference.items():
        (parameter,) = parameter_names(name, policy.architecture)
        atol = 1e-3 * float(np.abs(expected).max())
        gradient = gradients[parameter].numpy()
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=atol, err_msg=name)


# Batches


def test_neither_padding_nor_batch_size_changes_a_row(
    policy: OpenVLAOFT, prompts: Tensor, lengths: Tensor
) -> None:
    patches = torch.randn(3, 256, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        batch = policy.hidden(patches, prompts, lengths)
        for row, length in enumerate(lengths.tolist()):
            rows = slice(row, row + 1)
            alone = policy.hidden(patches[rows], prompts[rows, :length], lengths[rows])
            torch.testing.assert_close(alone[0], batch[row], rtol=0, atol=1e-4)
        repadded = prompts.clone()
        repadded[0, lengths[0] :] = 5
        assert torch.equal(policy.hidden(patches, repadded, lengths), batch)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
def test_the_order_of_rows_changes_no_bit(
    policy: OpenVLAOFT, inputs: Arrays, prompts: Tensor, lengths: Tensor, order: list[int]
) -> None:
    pixels = policy.normalize(inputs["center_cropped"])
    with torch.inference_mode():
        expected = policy(pixels, prompts, lengths)[order]
        logits = policy(pixels[order], prompts[order], lengths[order])
    assert torch.equal(logits, expected)


# Actions and observations


def test_an_open_gripper_is_1_in_the_data_and_minus_1_in_the_environment(
    policy: OpenVLAOFT,
) -> None:
    closed_and_open = np.zeros((2, policy.chunk, policy.action_dim), np.float32)
    closed_and_open[1, :, -1] = 1
    actions = policy.decode(policy.space.encode(closed_and_open))
    assert actions[0, :, -1].tolist() == [1] * policy.chunk
    assert actions[1, :, -1].tolist() == [-1] * policy.chunk
    np.testing.assert_array_equal(policy.decode(policy.encode(actions)), actions)


def test_an_upright_frame_is_mirrored(policy: OpenVLAOFT, inputs: Arrays) -> None:
    upright = inputs["raw_image"][:, ::-1]
    np.testing.assert_array_equal(policy.pixels(upright).numpy(), inputs["pixel_values"])


def test_a_prompt_is_the_one_of_training(policy_with_tokenizer: OpenVLAOFT) -> None:
    ids = policy_with_tokenizer.prompt("Pick up the BOWL")
    tokenizer = policy_with_tokenizer.tokenizer
    assert tokenizer is not None
    words = " ".join(tokenizer.id_to_token(token_id) for token_id in ids[:-1])
    assert words == "<s> In : What action should the robot take to pick up the bowl ? Out :"
    assert ids[0] == 1
    assert ids[-1] == 29871


def test_logits_of_observations_are_those_of_images_and_ids(
    policy_with_tokenizer: OpenVLAOFT, inputs: Arrays
) -> None:
    policy = policy_with_tokenizer
    observations = observe(inputs, "pick up the bowl", "take the bowl to the robot")
    with torch.inference_mode():
        logits = policy.logits(observations)
        assert logits.shape == (2, 56, 256)
        pixels = policy.normalize(inputs["center_cropped"])
        for row, instruction in enumerate(observations.instructions):
            ids = torch.tensor([policy.prompt(instruction)])
            alone = policy(pixels[row : row + 1], ids, torch.tensor([ids.shape[1]]))
            torch.testing.assert_close(logits[row], alone[0], rtol=0, atol=2e-4)


def test_an_instruction_changes_the_logits_of_its_own_row(
    policy_with_tokenizer: OpenVLAOFT, inputs: Arrays
) -> None:
    policy = policy_with_tokenizer
    with torch.inference_mode():
        different = policy.logits(observe(inputs, "pick up the bowl", "take the bowl to the robot"))
        equal = policy.logits(observe(inputs, "pick up the bowl", "pick up the bowl"))
    assert torch.equal(equal[0], different[0])
    assert (equal[1] - different[1]).abs().max() > 0.1


def test_a_policy_without_a_tokenizer_is_refused(policy: OpenVLAOFT, inputs: Arrays) -> None:
    message = r"there is no tokenizer; expected tokenizer\.json beside the weights"
    with pytest.raises(ValueError, match=message):
        policy.logits(observe(inputs, "pick up the bowl"))


def test_a_long_instruction_and_a_second_camera_are_refused(
    policy_with_tokenizer: OpenVLAOFT, inputs: Arrays
) -> None:
    message = "instruction 'bowl bowl .*: 72 ids, of which the first is 1; expected at most 64"
    with pytest.raises(ValueError, match=message):
        policy_with_tokenizer.logits(observe(inputs, " ".join(["bowl"] * 58)))
    frames = np.zeros((1, 2, 256, 256, 3), np.uint8)
    two_cameras = Observations(frames, np.zeros((1, 8), np.float32), ("pick",))
    with pytest.raises(ValueError, match="frames: 2 cameras; expected 1"):
        policy_with_tokenizer.logits(two_cameras)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = public.make(tmp_path / "checkpoint")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        from_public(folder)


# Sizes


def test_the_defaults_are_those_of_7_541_237_184_parameters(policy: OpenVLAOFT) -> None:
    """Count those that the policy never uses, too.

    They are the last block and norm of both towers, SigLIP's pooling, and the head's other rows.
    """
    architecture = Architecture(mean=policy.architecture.mean, std=policy.architecture.std)
    with torch.device("meta"):
        model = OpenVLAOFT(architecture, policy.space)
    used = sum(parameter.numel() for parameter in model.parameters())
    assert used == 7_367_871_136

    def attention_and_mlp(width: int, hidden: int) -> int:
        attention = 4 * width * (width + 1)
        return attention + 2 * width * hidden + hidden + width

    norm = 2  # parameters per unit of width
    scales = 2 * 1024
    dino = attention_and_mlp(1024, 4096) + 3 * norm * 1024 + scales
    siglip = attention_and_mlp(1152, 4304) + 3 * norm * 1152
    probe = 1152
    pooling = attention_and_mlp(1152, 4304) + norm * 1152 + probe
    head = (32064 - 256) * 4096
    assert used + dino + siglip + pooling + head == 7_541_237_184


# Captured forward passes


@contextmanager
def record_operations_off(device: str) -> Iterator[list[str]]:
    """Collect the operations that involve a tensor on another device."""
    operations: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            values = tree_leaves((args, kwargs, result))
            tensors = [value for value in values if isinstance(value, Tensor)]
            if any(tensor.device.type != device for tensor in tensors):
                operations.append(str(func))
            return result

    with Recorder():
        yield operations


@pytest.mark.parametrize("adapted", [False, True])
def test_a_forward_pass_is_one_graph_that_depends_on_no_value(
    policy_with_tokenizer: OpenVLAOFT,
    inputs: Arrays,
    prompts: Tensor,
    lengths: Tensor,
    adapted: bool,
) -> None:
    policy = policy_with_tokenizer
    if adapted:
        lora.prepare(policy, Lora(2, 4), 0, "optimize")
    pixels = policy.normalize(inputs["center_cropped"])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(policy.forward, backend=backend, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        expected = policy(pixels, prompts, lengths)
        for rows in ([0, 1, 2], [2, 0, 1]):
            logits = compiled(pixels[rows], prompts[rows], lengths[rows])
            assert torch.equal(logits, expected[rows])
    assert len(graphs) == 1


@pytest.mark.parametrize("adapted", [False, True])
def test_a_forward_pass_never_uses_the_host(
    policy_with_tokenizer: OpenVLAOFT,
    inputs: Arrays,
    prompts: Tensor,
    lengths: Tensor,
    adapted: bool,
) -> None:
    policy = policy_with_tokenizer
    if adapted:
        lora.prepare(policy, Lora(2, 4), 0, "optimize")
    pixels = policy.normalize(inputs["center_cropped"])
    arguments = [tensor.to("meta") for tensor in (pixels, prompts, lengths)]
    policy.to("meta")
    with torch.inference_mode(), record_operations_off("meta") as operations:
        policy(*arguments)
    assert operations == []


@pytest.mark.gpu
def test_a_captured_forward_pass_has_the_same_logits(
    policy_with_tokenizer: OpenVLAOFT, inputs: Arrays
) -> None:
    policy = policy_with_tokenizer.to("cuda")
    observations = observe(inputs, "Pick up the BOWL", "open the top drawer", "close it")
    batches = [observations.at(np.array(rows)) for rows in ([0, 1, 2], [2, 0, 1], [1])]
    with torch.inference_mode():
        expected = [policy.logits(batch) for batch in batches]
        policy.capture()
        for batch, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(policy.logits(batch), logits, rtol=0, atol=1e-4)
    assert policy.logits(batches[0]).requires_grad


@pytest.mark.gpu
def test_pixels_on_a_gpu_are_equal_bit_by_bit(
    policy_with_tokenizer: OpenVLAOFT, inputs: Arrays
) -> None:
    images = inputs["center_cropped"]
    expected = policy_with_tokenizer.normalize(images)
    pixels = policy_with_tokenizer.to("cuda").normalize(images)
    assert torch.equal(pixels.cpu(), expected)
