"""The comparison with the original, from files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vla_opd.policies.openvla_oft.model import OpenVLAOFT, from_public
from vla_opd.policies.openvla_oft.parity import Parity, arrays, compare, of_files

GOLDEN = Path(__file__).parents[3] / "data/openvla_oft"


@pytest.fixture(scope="module")
def policy() -> OpenVLAOFT:
    return from_public(GOLDEN / "checkpoint")


def test_every_array_is_the_originals(policy: OpenVLAOFT, tmp_path: Path) -> None:
    found = of_files(
        policy, GOLDEN / "inputs.npz", GOLDEN / "outputs.npz", 5e-4, tmp_path / "ours.npz"
    )
    assert [one for one in found.compared if not one.holds] == []
    assert len(found.compared) == 21
    assert max(one.difference for one in found.compared) < 3e-4
    assert {one.name for one in found.compared if one.tolerance == 0} == {
        *(
            "rot180",
            "jpeg_decoded",
            "resized224",
            "center_cropped",
            "multimodal_attention_mask",
            "greedy_token_ids",
        ),
    }
    assert {"neg_causal_token_ids", "logits_full_argmax"} < set(found.left)
    with np.load(tmp_path / "ours.npz") as ours:
        assert {one.name for one in found.compared} <= set(ours)
    again = of_files(policy, GOLDEN / "inputs.npz", tmp_path / "ours.npz", 0.0, None)
    assert all(one.difference == 0 for one in again.compared if "sampled" not in one.name)


def test_one_weight_that_is_off_is_seen_from_there_on(tmp_path: Path) -> None:
    import safetensors.torch

    shutil.copytree(GOLDEN / "checkpoint", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["projector.fc2.bias"][0] += 0.1
    safetensors.torch.save_file(tensors, path)
    found = of_files(
        from_public(tmp_path / "checkpoint"),
        GOLDEN / "inputs.npz",
        GOLDEN / "outputs.npz",
        5e-4,
        None,
    )
    wrong = [one.name for one in found.compared if not one.holds]
    assert wrong[0] == "projected_patch_embeddings"
    assert "vision_features" not in wrong
    assert "logits_action_columns" in wrong


def test_what_is_no_number_does_not_hold() -> None:
    (found,) = compare({"logits": np.array([np.nan])}, {"logits": np.array([0.0])}, 1.0)
    assert not found.holds
    assert Parity("logits", 0.5, 1.0, 0, 1).holds


def test_other_shapes_and_other_files_are_refused(policy: OpenVLAOFT, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logits: is \[2\] here; expected the reference's \[3\]"):
        list(compare({"logits": np.zeros(2)}, {"logits": np.zeros(3)}, 1.0))
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", raw_image=np.array([print], dtype=object))
    for name in ("text.npz", "empty.npz", "one.npy", "objects.npz"):
        with pytest.raises(
            ValueError,
            match=rf"{name}: not an archive of arrays .*; expected \.npz without pickles",
        ):
            of_files(policy, tmp_path / name, GOLDEN / "outputs.npz", 5e-4, None)


def test_an_archive_that_promises_too_much_is_not_read(
    policy: OpenVLAOFT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vla_opd.policies.openvla_oft.parity.LARGEST", 100)
    with pytest.raises(
        ValueError, match=r"inputs\.npz: .*its arrays would take 0 GB, more than half of the memory"
    ):
        of_files(policy, GOLDEN / "inputs.npz", GOLDEN / "outputs.npz", 5e-4, None)


def test_a_reference_of_something_else_proves_nothing(policy: OpenVLAOFT) -> None:
    with pytest.raises(
        ValueError,
        match=r"gradients\.npz: has none of the arrays that can be compared; expected some of rot180",
    ):
        of_files(policy, GOLDEN / "inputs.npz", GOLDEN / "gradients.npz", 5e-4, None)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (
            "raw_image",
            lambda a: a.astype(np.float32),
            r"raw_image is float32 \[3, 256, 256, 3\]; expected pictures",
        ),
        ("raw_image", lambda a: a[..., 0], r"raw_image is uint8 \[3, 256, 256\]"),
        ("input_ids", lambda a: a + 32064, "input_ids is int64 .*ids below 32064"),
        ("input_ids", lambda a: a[:2], r"input_ids is int64 \[2, 31\]; expected \[3, L\]"),
        ("attention_mask", lambda a: a * 2, "attention_mask is int64 .*; expected 1 for tokens"),
        ("attention_mask", lambda a: a * 0, "attention_mask is int64"),
        ("attention_mask", lambda a: a[:, :-1], r"attention_mask is int64 \[3, 30\]"),
        (
            "sampled_token_ids",
            lambda a: a - 200,
            r"sampled_token_ids is int64 .*; expected \[3, 56\] ids from 31744 to 31999",
        ),
    ],
)
def test_inputs_that_cannot_be_are_named(
    policy: OpenVLAOFT, name: str, change: Callable[[np.ndarray], np.ndarray], expected: str
) -> None:
    with np.load(GOLDEN / "inputs.npz") as inputs, np.load(GOLDEN / "outputs.npz") as outputs:
        given = {**inputs, "sampled_token_ids": outputs["sampled_token_ids"]}
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=expected):
        arrays(policy, given, given["sampled_token_ids"])


def test_an_input_that_is_missing_is_named(policy: OpenVLAOFT) -> None:
    with pytest.raises(
        ValueError,
        match="the inputs have no input_ids; expected raw_image, input_ids, attention_mask",
    ):
        arrays(policy, {"raw_image": np.zeros((1, 8, 8, 3), np.uint8)})


def test_counted_arrays_are_exact_whatever_type_the_reference_has() -> None:
    (found,) = compare(
        {"greedy_token_ids": np.array([5])}, {"greedy_token_ids": np.array([6.0])}, 1.0
    )
    assert not found.holds


def test_next_to_no_value_of_a_picture_may_be_one_level_off() -> None:
    """1 of 451,584 was, on pictures that this code had not been compared on before; nothing after it was."""
    picture = np.full((3, 224, 224, 3), 100, np.uint8)
    off = picture.copy()
    off[0, 0, 0, 0] += 1
    assert [one.holds for one in compare({"resized224": off}, {"resized224": picture}, 0.0)] == [
        True
    ]
    assert [
        one.holds for one in compare({"jpeg_decoded": off}, {"jpeg_decoded": picture}, 0.0)
    ] == [False]
    (told,) = compare({"resized224": off}, {"resized224": picture}, 0.0)
    assert told.verdict == "one level off in 1 of 451,584 values, which is allowed"
    assert [
        one.holds for one in compare({"resized224": off[:1]}, {"resized224": picture[:1]}, 0.0)
    ] == [True]  # of a single picture, too
    two = off.copy()
    two[0, 0, 0, 0] += 1
    assert [one.holds for one in compare({"resized224": two}, {"resized224": picture}, 0.0)] == [
        False
    ]
    several = picture.copy()
    several[0, 0, :3, 0] += 1
    assert [
        one.holds for one in compare({"resized224": several}, {"resized224": picture}, 0.0)
    ] == [False]
