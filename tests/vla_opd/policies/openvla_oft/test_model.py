"""OpenVLA-OFT against the original: `tests/data/openvla_oft` is a tiny random checkpoint that the original code wrote, inputs, and its outputs at
every step (openvla-oft 213c5ff, SimpleVLA-RL 7c51662, transformers 4.40.1 with the bidirectional Llama, TensorFlow's pictures).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.vla_opd import public
from tests.vla_opd.public import GOLDEN
from vla_opd.data.trajectory import Observations
from vla_opd.params.training import Lora
from vla_opd.policies import lora
from vla_opd.policies.openvla_oft.layout import Architecture, read_weights, renamed
from vla_opd.policies.openvla_oft.model import OpenVLAOFT, from_public
from vla_opd.policies.openvla_oft.parity import arrays, compare


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy() -> OpenVLAOFT:
    return from_public(GOLDEN / "checkpoint")


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "inputs.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def outputs() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "outputs.npz") as archive:
        return dict(archive)


def prompts(inputs: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """The golden prompts, whose padding is at the left, with it at the right."""
    right = [
        np.roll(ids, -int((mask == 0).sum()))
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    return torch.from_numpy(np.stack(right)), torch.from_numpy(inputs["prompt_lengths"])


def test_what_wrong_ports_answer_is_not_what_we_do(
    policy: OpenVLAOFT, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
) -> None:
    ids = arrays(policy, inputs)["greedy_token_ids"]
    np.testing.assert_array_equal(ids, outputs["greedy_token_ids"])
    assert (ids == outputs["neg_causal_token_ids"]).mean() < 0.2
    assert (ids == outputs["neg_shifted_token_ids"]).mean() < 0.5


@pytest.mark.parametrize(
    ("wrong", "first"),
    [
        (
            {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
            "pixel_values",
        ),  # what `means` and `stds` say
        ({"crop": 1.0}, "center_cropped"),
        ({"rope_theta": 5e5}, "action_hidden_states"),
        ({"rms_epsilon": 1e-5}, "logits_action_columns"),  # Llama 2's
        ({"vocabulary": 31999}, "logits_action_columns"),
    ],
)
def test_a_wrong_constant_is_seen_where_it_first_matters(
    policy: OpenVLAOFT,
    inputs: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    wrong: dict[str, float],
    first: str,
) -> None:
    architecture = policy.architecture.model_copy(update=wrong)
    other = OpenVLAOFT(architecture, policy.space).eval()
    other.load_state_dict(
        {
            name: tensor.float()
            for name, tensor in read_weights(GOLDEN / "checkpoint", architecture, 256).items()
        }
    )
    found = [
        one.name for one in compare(arrays(other, inputs), inputs | outputs, 5e-4) if not one.holds
    ]
    assert found[0] == first
    assert "logits_action_columns" in found


def test_gradients_are_the_originals(
    policy: OpenVLAOFT, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
) -> None:
    told = json.loads((GOLDEN / "gradients.json").read_text(encoding="utf-8"))
    with np.load(GOLDEN / "gradients.npz") as archive:
        whole = dict(archive)
    policy.zero_grad()
    logits = policy(policy.normalised(inputs["center_cropped"]), *prompts(inputs))
    sampled = torch.from_numpy(policy.architecture.vocabulary - 1 - outputs["sampled_token_ids"])
    loss = -(logits / 1.6).log_softmax(-1).gather(-1, sampled.unsqueeze(-1)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(told["loss"], abs=1e-5)
    parameters, silent = dict(policy.named_parameters()), 0
    for name, norm in told["grad_l2_norms"].items():
        ours = renamed(name, policy.architecture)
        if norm is None:
            silent += 1
            assert ours == (), name
            continue
        gradients = [parameters[one].grad for one in ours]
        assert torch.stack(
            [gradient.norm() for gradient in gradients if gradient is not None]
        ).norm().item() == pytest.approx(norm, rel=1e-3), name
        if name in whole:
            (gradient,) = gradients
            assert gradient is not None
            np.testing.assert_allclose(
                gradient.numpy(),
                whole[name],
                rtol=0,
                atol=1e-3 * float(np.abs(whole[name]).max()),
                err_msg=name,
            )
    assert silent > 10
    assert {
        one for name in told["grad_l2_norms"] for one in renamed(name, policy.architecture)
    } == set(parameters)


def test_neither_padding_nor_neighbours_say_anything(
    policy: OpenVLAOFT, inputs: dict[str, np.ndarray]
) -> None:
    patches = torch.randn(3, 256, 64, generator=torch.Generator().manual_seed(0))
    text, lengths = prompts(inputs)
    with torch.inference_mode():
        together = policy.hidden(patches, text, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = policy.hidden(
                patches[row : row + 1], text[row : row + 1, :length], lengths[row : row + 1]
            )
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)
        other = text.clone()
        other[0, lengths[0] :] = 5
        torch.testing.assert_close(policy.hidden(patches, other, lengths), together, rtol=0, atol=0)


def test_rows_of_a_batch_can_change_places_bit_by_bit(
    policy: OpenVLAOFT, inputs: dict[str, np.ndarray]
) -> None:
    pixels, (text, lengths) = policy.normalised(inputs["center_cropped"]), prompts(inputs)
    with torch.inference_mode():
        there = policy(pixels, text, lengths)
        for order in ([2, 0, 1], [1, 0, 2]):
            again = policy(pixels[order], text[order], lengths[order])
            assert torch.equal(again, there[order])


def test_an_open_hand_is_one_in_the_data_and_minus_one_in_the_simulator(policy: OpenVLAOFT) -> None:
    closed, opened = np.zeros((2, policy.chunk, policy.action_dim), np.float32)
    opened[:, -1] = 1
    decoded = policy.decode(policy.space.encode(np.stack([closed, opened])))
    assert decoded[0, :, -1].tolist() == [1] * policy.chunk
    assert decoded[1, :, -1].tolist() == [-1] * policy.chunk
    np.testing.assert_array_equal(
        policy.decode(policy.encode(decoded)), decoded
    )  # a demonstrated action is put into the data's terms, and back


def test_a_simulators_upright_picture_is_mirrored(
    policy: OpenVLAOFT, inputs: dict[str, np.ndarray]
) -> None:
    upright = inputs["raw_image"][:, ::-1]  # the simulator's own is upside down
    np.testing.assert_array_equal(policy.pixels(upright).numpy(), inputs["pixel_values"])


@pytest.fixture
def speaking(tmp_path: Path) -> OpenVLAOFT:
    """The golden policy with a tokenizer."""
    return from_public(public.make(tmp_path / "checkpoint"))


def seen(inputs: dict[str, np.ndarray], *instructions: str) -> Observations:
    """The golden pictures, upright, from the one camera."""
    return Observations(
        inputs["raw_image"][: len(instructions), None, ::-1],
        np.zeros((len(instructions), 8), np.float32),
        instructions,
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_a_forward_pass_can_be_captured(
    speaking: OpenVLAOFT, inputs: dict[str, np.ndarray], adapted: bool
) -> None:
    """It is one graph, whatever the values: nothing in it asks for one. And it needs nothing of the host."""
    if adapted:
        lora.prepare(speaking, Lora(2, 4), 0, "optimize")
    pixels, (text, lengths), graphs = (
        speaking.normalised(inputs["center_cropped"]),
        prompts(inputs),
        list[torch.fx.GraphModule](),
    )

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    with torch.inference_mode():
        expected, compiled = (
            speaking(pixels, text, lengths),
            torch.compile(speaking.forward, backend=backend, fullgraph=True, dynamic=False),
        )
        for rows in (np.array([0, 1, 2]), np.array([2, 0, 1])):
            assert torch.equal(compiled(pixels[rows], text[rows], lengths[rows]), expected[rows])
        assert len(graphs) == 1
        there, arguments = speaking.to("meta"), [one.to("meta") for one in (pixels, text, lengths)]
        with elsewhere("meta") as on_the_host:
            there(*arguments)
    assert on_the_host == []


@pytest.mark.gpu
def test_captured_it_answers_the_same(speaking: OpenVLAOFT, inputs: dict[str, np.ndarray]) -> None:
    observations = seen(inputs, "Pick up the BOWL", "open the top drawer", "close it")
    policy, batches = (
        speaking.to("cuda"),
        [observations.at(np.array(rows)) for rows in ([0, 1, 2], [2, 0, 1], [1])],
    )
    with torch.inference_mode():
        expected = [policy.logits(batch) for batch in batches]
        policy.capture()
        for batch, answer in zip(batches, expected, strict=True):
            torch.testing.assert_close(policy.logits(batch), answer, rtol=0, atol=1e-4)
    assert policy.logits(batches[0]).requires_grad


@pytest.mark.gpu
def test_a_gpu_is_given_the_very_pixels(
    speaking: OpenVLAOFT, inputs: dict[str, np.ndarray]
) -> None:
    here = speaking.normalised(inputs["center_cropped"])
    assert torch.equal(speaking.to("cuda").normalised(inputs["center_cropped"]).cpu(), here)


@contextmanager
def elsewhere(device: str) -> Iterator[list[str]]:
    """The operations, while it lasts, that have to do with a tensor on another device."""
    found = list[str]()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            if any(
                one.device.type != device
                for one in tree_leaves((args, kwargs, made))
                if isinstance(one, torch.Tensor)
            ):
                found.append(str(func))
            return made

    with Watch():
        yield found


def test_an_instruction_is_put_as_in_training(speaking: OpenVLAOFT) -> None:
    ids = speaking.prompt("Pick up the BOWL")
    said = [speaking.tokenizer.id_to_token(one) for one in ids[:-1]] if speaking.tokenizer else []
    assert (
        " ".join(said) == "<s> In : What action should the robot take to pick up the bowl ? Out :"
    )
    assert (ids[0], ids[-1]) == (1, 29871)


def test_observations_are_answered_as_pictures_and_ids_are(
    speaking: OpenVLAOFT, inputs: dict[str, np.ndarray]
) -> None:
    observations = seen(inputs, "pick up the bowl", "take the bowl to the robot")
    with torch.inference_mode():
        found = speaking.logits(observations)
        assert found.shape == (2, 56, 256)
        patches = speaking.projector(
            speaking.features(speaking.normalised(inputs["center_cropped"][:2]))
        )
        for row, instruction in enumerate(observations.instructions):
            ids = torch.tensor([speaking.prompt(instruction)])
            alone = speaking.head(
                speaking.hidden(patches[row : row + 1], ids, torch.tensor([ids.shape[1]]))
            )
            torch.testing.assert_close(found[row], alone[0], rtol=0, atol=2e-4)
        same = speaking.logits(seen(inputs, "pick up the bowl", "pick up the bowl"))
        assert torch.equal(same[0], found[0])  # whatever is asked in the other row
        assert (same[1] - found[1]).abs().max() > 0.1


def test_what_cannot_be_put_is_refused(
    speaking: OpenVLAOFT, policy: OpenVLAOFT, inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"there is no tokenizer; expected tokenizer.json beside the weights"
    ):
        policy.logits(seen(inputs, "pick up the bowl"))
    with pytest.raises(
        ValueError,
        match=r"instruction 'bowl bowl .*: 72 ids, the first of them 1; expected at most 64",
    ):
        speaking.logits(seen(inputs, " ".join(["bowl"] * 58)))
    two = Observations(
        np.zeros((1, 2, 256, 256, 3), np.uint8), np.zeros((1, 8), np.float32), ("pick",)
    )
    with pytest.raises(ValueError, match="frames: 2 cameras; expected 1"):
        speaking.logits(two)
    (tmp_path / "checkpoint/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        from_public(tmp_path / "checkpoint")


def test_the_defaults_are_of_seven_and_a_half_billion(policy: OpenVLAOFT) -> None:
    """With what the policy never reads: both towers' last blocks, their norms, SigLIP's pooling, and the other rows of the head."""
    architecture = Architecture(mean=policy.architecture.mean, std=policy.architecture.std)
    with torch.device("meta"):
        used = sum(one.numel() for one in OpenVLAOFT(architecture, policy.space).parameters())
    assert used == 7_367_871_136

    def block(width: int, hidden: int) -> int:
        return 4 * width * (width + 1) + 2 * width * hidden + width + hidden + 4 * width

    dino = block(1024, 4096) + 2 * 1024 + 2 * 1024  # layer scales, final norm
    siglip = block(1152, 4304) + 2 * 1152
    pooling = (
        4 * 1152 * (1152 + 1) + 2 * 1152 * 4304 + 1152 + 4304 + 3 * 1152
    )  # a norm, and what is asked
    assert used + dino + siglip + pooling + (32064 - 256) * 4096 == 7_541_237_184
