"""TinyVLA: what it sees, what it cannot depend on, and what it refuses."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.vla_opd import small
from vla_opd.data.trajectory import Observations
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import Policy, build_policy, from_pretrained, save_pretrained
from vla_opd.policies.tiny import FIRST_WORD, VOCABULARY_SIZE, extend_vocabulary, words


def make_policy(**facts: object) -> Policy:
    """Make a policy, always with the same weights. facts: changes of its description."""
    torch.manual_seed(0)
    return build_policy(small.FACTS.model_copy(update=facts)).eval()


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy()


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(policy: Policy, observations: Observations) -> torch.Tensor:
    with torch.inference_mode():
        return policy.logits(observations)


def change(policy: Policy, before: Observations, **observed: object) -> float:
    """Return the largest change among the first token's logits, in the row where it is least."""
    after = replace(before, **observed)
    difference = logits(policy, after) - logits(policy, before)
    return difference[:, 0].abs().amax(-1).min().item()


def test_one_pass_gives_a_distribution_for_every_token(policy: Policy) -> None:
    scores = logits(policy, small.observations(3))
    assert scores.shape == (3, small.TOKENS, small.BINS)
    assert scores.dtype == torch.float32
    assert (policy.chunk, policy.action_dim) == (small.CHUNK, small.DIMS)
    # Tokens of a chunk differ, and so do rows.
    probs = scores.softmax(-1)
    assert (probs[:, 0] - probs[:, -1]).abs().max() > 1e-3
    assert (probs[0] - probs[1]).abs().max() > 1e-4


def test_decoding_is_the_checkpoints(policy: Policy) -> None:
    tokens = np.random.default_rng(0).integers(0, small.BINS, (2, small.TOKENS))
    np.testing.assert_array_equal(policy.decode(tokens), small.SPACE.decode(tokens))


def test_attention_is_bidirectional() -> None:
    """The first token sees the last placeholder."""
    policy = make_policy()
    observations = small.observations(2)
    before = logits(policy, observations)
    width = policy.placeholder.shape[1]
    with torch.no_grad():
        policy.placeholder[-1] += torch.randn(width, generator=torch.Generator().manual_seed(1))
    assert (logits(policy, observations) - before)[:, 0].abs().max() > 1e-4


def test_the_first_token_sees_everything(policy: Policy) -> None:
    before = small.observations(2)
    last_word = ("pick the red red",) * 2
    order_of_words = ("red the pick cube",) * 2
    assert change(policy, before, instructions=last_word) > 1e-5
    assert change(policy, before, instructions=order_of_words) > 1e-5
    assert change(policy, before, proprio=before.proprio + 1) > 1e-5
    for camera in range(2):
        frames = before.frames.copy()
        frames[:, camera, 8:12, 8:12] = 255 - frames[:, camera, 8:12, 8:12]
        assert change(policy, before, frames=frames) > 1e-5
    cameras_swapped = before.frames[:, ::-1].copy()
    assert change(policy, before, frames=cameras_swapped) > 1e-5


def test_pixels_outside_the_crop_are_not_seen(policy: Policy) -> None:
    before = small.observations(2)
    frames = before.frames.copy()
    frames[:, :, :2] = 0
    frames[:, :, -2:] = 0
    frames[:, :, :, :2] = 255
    frames[:, :, :, -2:] = 255
    assert change(policy, before, frames=frames) == 0
    frames[:, :, 2, 2] ^= 255  # the crop's own corner
    assert change(policy, before, frames=frames) > 0


def test_proprioception_is_scaled_or_left_out() -> None:
    observations = small.observations(2)
    shifted = replace(observations, proprio=observations.proprio + 1)
    shape = small.SHAPE.model_copy(update={"proprio": False})
    without = make_policy(policy=shape, proprio_mean=(), proprio_std=())
    assert torch.equal(logits(without, observations), logits(without, shifted))
    plain = make_policy()
    scaled = make_policy(proprio_mean=(1.1, 1.2), proprio_std=(1.0, 2.0))
    torch.testing.assert_close(logits(scaled, shifted), logits(plain, observations))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("grasp it", "hold that", True),
        ("Pick, the RED cube!", "pick the red cube", True),
        ("pick a red cube or two", "pick a red cube", True),
        ("pick", "grasp", False),
        ("pick", "pick it", False),
    ],
)
def test_unknown_words_are_one_word_and_long_instructions_are_cut(
    policy: Policy, first: str, second: str, same: bool
) -> None:
    of_first = logits(policy, small.observations(1, instruction=first))
    of_second = logits(policy, small.observations(1, instruction=second))
    assert torch.equal(of_first, of_second) is same


def test_the_prompt_is_the_checkpoints() -> None:
    plain = make_policy()
    prompted = make_policy(prompt="red {instruction}")
    short = small.observations(1, instruction="pick cube")
    full = small.observations(1, instruction="red pick cube")
    assert torch.equal(logits(prompted, short), logits(plain, full))


@pytest.mark.usefixtures("_one_thread")
def test_a_rows_logits_do_not_depend_on_its_place_or_its_neighbours(policy: Policy) -> None:
    observations = small.observations(8)
    before = logits(policy, observations)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(8)
        permuted = logits(policy, observations.at(order))
        assert torch.equal(permuted, before[torch.from_numpy(order)])
    strangers = small.observations(8, seed=1, instruction="cube")
    mixed = Observations(
        np.concatenate([observations.frames[:1], strangers.frames[1:]]),
        np.concatenate([observations.proprio[:1], strangers.proprio[1:]]),
        observations.instructions[:1] + strangers.instructions[1:],
    )
    assert torch.equal(logits(policy, mixed)[0], before[0])


def test_a_policy_is_the_same_after_saving(tmp_path: Path, policy: Policy) -> None:
    save_pretrained(policy, small.FACTS, tmp_path / "student")
    assert open_checkpoint(tmp_path / "student").facts == small.FACTS
    loaded = from_pretrained(tmp_path / "student")
    assert not loaded.training
    assert loaded.device == torch.device("cpu")
    observations = small.observations(3)
    assert torch.equal(logits(loaded, observations), logits(policy, observations))


def test_every_parameter_takes_part() -> None:
    """Except the Llama's own embedding: it is given embeddings."""
    policy = make_policy()
    policy.logits(small.observations(2)).square().sum().backward()
    idle: list[str] = []
    for name, parameter in policy.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            idle.append(name)
    assert idle == ["language_model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("cameras", "height", "width"), [(1, 20, 20), (3, 20, 20), (2, 20, 15), (2, 15, 20)]
)
def test_other_cameras_and_smaller_images_are_refused(
    policy: Policy, cameras: int, height: int, width: int
) -> None:
    frames = np.zeros((1, cameras, height, width, 3), np.uint8)
    message = rf"frames: {cameras} camera\(s\) of {height}x{width}; expected 2 of at least 16x16"
    with pytest.raises(ValueError, match=message):
        policy.logits(Observations(frames, np.zeros((1, 2), np.float32), ("pick",)))


def test_words() -> None:
    assert words("Pick-up the RED cube, 2x!") == ["pick", "up", "the", "red", "cube", "2x"]


def test_a_vocabulary_grows_at_its_end() -> None:
    first = extend_vocabulary((), ["pick the red cube", "pick the cup"])
    assert first == ("cube", "cup", "pick", "red", "the")
    second = extend_vocabulary(first, ["open a door", "pick the cup"])
    assert second == (*first, "a", "door", "open")
    assert extend_vocabulary(first, ["the cup"]) == first


def test_a_vocabulary_that_overflows_is_refused() -> None:
    room = VOCABULARY_SIZE - FIRST_WORD
    full = extend_vocabulary((), [f"w{n}" for n in range(room)])
    assert len(full) == room
    with pytest.raises(ValueError, match=f"vocabulary: {room + 1} words; expected at most {room}"):
        extend_vocabulary(full, ["more"])
    policy = make_policy(vocabulary=full)
    last_word = small.observations(1, instruction=full[-1])
    assert logits(policy, last_word).isfinite().all()
