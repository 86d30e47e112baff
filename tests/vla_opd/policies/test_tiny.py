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
from vla_opd.policies.load import (
    POLICIES,
    build_policy,
    from_pretrained,
    load_policy,
    save_pretrained,
)
from vla_opd.policies.tiny import FIRST_WORD, VOCABULARY_SIZE, TinyVLA, extend_vocabulary, words


@pytest.fixture(scope="module")
def policy() -> TinyVLA:
    torch.manual_seed(0)
    return build_policy(small.FACTS).eval()


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(policy: TinyVLA, seen: Observations) -> torch.Tensor:
    with torch.inference_mode():
        return policy.logits(seen)


def change(policy: TinyVLA, ours: Observations, theirs: Observations) -> float:
    """Of the first token's logits, row by row the least."""
    return (logits(policy, ours) - logits(policy, theirs))[:, 0].abs().amax(-1).min().item()


def test_one_pass_gives_a_distribution_for_every_token(policy: TinyVLA) -> None:
    found = logits(policy, small.observations(3))
    assert found.shape == (3, small.TOKENS, small.BINS)
    assert found.dtype == torch.float32
    assert (policy.chunk, policy.action_dim) == (small.CHUNK, small.DIMS)
    distributions = found.softmax(-1)
    assert (
        distributions[:, 0] - distributions[:, -1]
    ).abs().max() > 1e-3  # tokens of a chunk differ, and so do rows
    assert (distributions[0] - distributions[1]).abs().max() > 1e-4


def test_decoding_is_the_checkpoints(policy: TinyVLA) -> None:
    tokens = np.random.default_rng(0).integers(0, small.BINS, (2, small.TOKENS))
    np.testing.assert_array_equal(policy.decode(tokens), small.SPACE.decode(tokens))


def test_attention_is_bidirectional(policy: TinyVLA) -> None:
    seen = small.observations(2)
    before = logits(policy, seen)
    kept = policy.placeholder.detach().clone()
    try:
        with torch.no_grad():
            policy.placeholder[-1] += torch.randn(
                policy.placeholder.shape[1], generator=torch.Generator().manual_seed(1)
            )
        assert (logits(policy, seen) - before)[
            :, 0
        ].abs().max() > 1e-4  # the first token sees the last placeholder
    finally:
        with torch.no_grad():
            policy.placeholder.copy_(kept)
    torch.testing.assert_close(logits(policy, seen), before, rtol=0, atol=0)


def test_the_first_token_sees_everything(policy: TinyVLA) -> None:
    seen = small.observations(2)
    assert (
        change(policy, seen, replace(seen, instructions=("pick the red red",) * 2)) > 1e-5
    )  # the last word
    assert (
        change(policy, seen, replace(seen, instructions=("red the pick cube",) * 2)) > 1e-5
    )  # their order
    assert change(policy, seen, replace(seen, proprio=seen.proprio + 1)) > 1e-5
    for camera in range(2):
        frames = seen.frames.copy()
        frames[:, camera, 8:12, 8:12] = 255 - frames[:, camera, 8:12, 8:12]
        assert change(policy, seen, replace(seen, frames=frames)) > 1e-5
    assert (
        change(policy, seen, replace(seen, frames=seen.frames[:, ::-1].copy())) > 1e-5
    )  # which camera is which


def test_what_is_outside_the_crop_is_not_seen(policy: TinyVLA) -> None:
    seen = small.observations(2)
    frames = seen.frames.copy()
    frames[:, :, :2] = frames[:, :, -2:] = 0
    frames[:, :, :, :2] = frames[:, :, :, -2:] = 255
    assert torch.equal(logits(policy, replace(seen, frames=frames)), logits(policy, seen))
    frames[:, :, 2, 2] ^= 255  # the crop's own corner
    assert not torch.equal(logits(policy, replace(seen, frames=frames)), logits(policy, seen))


def test_proprioception_is_scaled_or_left_out() -> None:
    seen = small.observations(2)
    torch.manual_seed(0)
    shape = small.SHAPE.model_copy(update={"proprio": False})
    blind = build_policy(
        small.FACTS.model_copy(update={"policy": shape, "proprio_mean": (), "proprio_std": ()})
    )
    assert torch.equal(logits(blind, seen), logits(blind, replace(seen, proprio=seen.proprio + 1)))
    torch.manual_seed(0)
    scaled = build_policy(
        small.FACTS.model_copy(update={"proprio_mean": (1.1, 1.2), "proprio_std": (1.0, 2.0)})
    )
    torch.manual_seed(0)
    plain = build_policy(small.FACTS)
    torch.testing.assert_close(
        logits(scaled, replace(seen, proprio=seen.proprio + 1)), logits(plain, seen)
    )


def test_unknown_words_are_one_word_and_long_instructions_are_cut(policy: TinyVLA) -> None:
    seen = small.observations(1)
    same = [
        ("grasp it", "hold that"),
        ("Pick, the RED cube!", "pick the red cube"),
        ("pick a red cube or two", "pick a red cube"),
    ]
    for ours, theirs in same:
        assert torch.equal(
            logits(policy, replace(seen, instructions=(ours,))),
            logits(policy, replace(seen, instructions=(theirs,))),
        ), ours
    assert not torch.equal(
        logits(policy, replace(seen, instructions=("pick",))),
        logits(policy, replace(seen, instructions=("grasp",))),
    )
    assert not torch.equal(
        logits(policy, replace(seen, instructions=("pick",))),
        logits(policy, replace(seen, instructions=("pick it",))),
    )


def test_the_prompt_is_the_checkpoints() -> None:
    asked = []
    for prompt in ("{instruction}", "red {instruction}"):
        torch.manual_seed(0)
        asked.append(build_policy(small.FACTS.model_copy(update={"prompt": prompt})))
    plain, prompted = asked
    seen = small.observations(1, instruction="pick cube")
    assert torch.equal(
        logits(prompted, seen), logits(plain, replace(seen, instructions=("red pick cube",)))
    )


@pytest.mark.usefixtures("_one_thread")
def test_a_rows_logits_do_not_depend_on_its_place_or_its_neighbours(policy: TinyVLA) -> None:
    seen = small.observations(8)
    before = logits(policy, seen)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(8)
        assert torch.equal(logits(policy, seen.at(order)), before[torch.from_numpy(order)])
    strangers = small.observations(8, seed=1, instruction="cube")
    mixed = Observations(
        np.concatenate([seen.frames[:1], strangers.frames[1:]]),
        np.concatenate([seen.proprio[:1], strangers.proprio[1:]]),
        seen.instructions[:1] + strangers.instructions[1:],
    )
    assert torch.equal(logits(policy, mixed)[0], before[0])


def test_a_policy_is_the_same_after_saving(tmp_path: Path, policy: TinyVLA) -> None:
    save_pretrained(policy, small.FACTS, tmp_path / "student")
    found = from_pretrained(tmp_path / "student")
    assert open_checkpoint(tmp_path / "student").facts == small.FACTS
    assert not found.training
    assert found.device == torch.device("cpu")
    assert torch.equal(logits(found, small.observations(3)), logits(policy, small.observations(3)))


def test_every_parameter_takes_part(policy: TinyVLA) -> None:
    twin = build_policy(small.FACTS)
    twin.logits(small.observations(2)).square().sum().backward()
    idle = [
        name
        for name, parameter in twin.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert idle == [
        "language_model.embed_tokens.weight"
    ]  # the Llama is given embeddings; words have their own table


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (
            np.zeros((1, 1, 20, 20, 3), np.uint8),
            r"frames: 1 camera\(s\) of 20x20; expected 2 of at least 16x16",
        ),
        (
            np.zeros((1, 3, 20, 20, 3), np.uint8),
            r"frames: 3 camera\(s\) of 20x20; expected 2 of at least 16x16",
        ),
        (
            np.zeros((1, 2, 20, 15, 3), np.uint8),
            r"frames: 2 camera\(s\) of 20x15; expected 2 of at least 16x16",
        ),
    ],
)
def test_other_cameras_and_smaller_pictures_are_refused(
    policy: TinyVLA, frames: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        policy.logits(Observations(frames, np.zeros((1, 2), np.float32), ("pick",)))


def test_words() -> None:
    assert words("Pick-up the RED cube, 2x!") == ["pick", "up", "the", "red", "cube", "2x"]


def test_a_vocabulary_grows_at_its_end() -> None:
    first = extend_vocabulary((), ["pick the red cube", "pick the cup"])
    assert first == ("cube", "cup", "pick", "red", "the")
    assert extend_vocabulary(first, ["open a door", "pick the cup"]) == (
        *first,
        "a",
        "door",
        "open",
    )
    assert extend_vocabulary(first, ["the cup"]) == first


def test_a_vocabulary_that_overflows_is_refused() -> None:
    room = VOCABULARY_SIZE - FIRST_WORD
    full = extend_vocabulary((), [f"w{n}" for n in range(room)])
    assert len(full) == room
    with pytest.raises(ValueError, match=f"vocabulary: {room + 1} words; expected at most {room}"):
        extend_vocabulary(full, ["more"])
    policy = build_policy(small.FACTS.model_copy(update={"vocabulary": full}))
    assert (
        logits(policy, small.observations(1, instruction=full[-1])).isfinite().all()
    )  # the last word has a row


def test_families_are_named_or_found_by_path() -> None:
    assert POLICIES["tiny"] is TinyVLA
    elsewhere = small.FACTS.model_copy(
        update={
            "policy": small.SHAPE.model_copy(update={"family": "vla_opd.policies.tiny:TinyVLA"})
        }
    )
    assert isinstance(build_policy(elsewhere), TinyVLA)
    with pytest.raises(
        ValueError, match=r"policy\.family is 'huge'; expected one of \['openvla_oft', 'tiny'\]"
    ):
        build_policy(
            small.FACTS.model_copy(
                update={"policy": small.SHAPE.model_copy(update={"family": "huge"})}
            )
        )


def test_its_passes_are_not_captured(policy: TinyVLA, tmp_path: Path) -> None:
    save_pretrained(policy, small.FACTS, tmp_path / "checkpoint")
    with pytest.raises(
        ValueError,
        match=r"OPD_GRAPHS, or --graphs: .*checkpoint is of the family tiny; expected openvla_oft",
    ):
        load_policy(open_checkpoint(tmp_path / "checkpoint"), graphs=True)
