"""The comparison with the original, from files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from tests.vla_opd.public import GOLDEN
from vla_opd.policies.openvla_oft.model import OpenVLAOFT, from_public
from vla_opd.policies.openvla_oft.parity import (
    Comparison,
    Parity,
    compare,
    compare_files,
    compute_arrays,
)

INPUTS = GOLDEN / "inputs.npz"
OUTPUTS = GOLDEN / "outputs.npz"
EXACT = {
    "rot180",
    "jpeg_decoded",
    "resized224",
    "center_cropped",
    "multimodal_attention_mask",
    "greedy_token_ids",
}


@pytest.fixture(scope="module")
def policy() -> OpenVLAOFT:
    return from_public(GOLDEN / "checkpoint")


def compare_golden(
    policy: OpenVLAOFT,
    inputs: Path = INPUTS,
    reference: Path = OUTPUTS,
    tolerance: float = 5e-4,
    out: Path | None = None,
) -> Comparison:
    return compare_files(policy, inputs, reference, tolerance, out)


def compare_one(
    name: str, computed: np.ndarray, original: np.ndarray, tolerance: float = 0.0
) -> Parity:
    (parity,) = compare({name: computed}, {name: original}, tolerance)
    return parity


def test_every_array_is_the_originals(policy: OpenVLAOFT, tmp_path: Path) -> None:
    out = tmp_path / "computed.npz"
    comparison = compare_golden(policy, out=out)
    assert len(comparison.compared) == 21
    assert [parity for parity in comparison.compared if not parity.holds] == []
    assert max(parity.difference for parity in comparison.compared) < 3e-4
    assert {parity.name for parity in comparison.compared if parity.tolerance == 0} == EXACT
    assert set(comparison.unmatched) > {"neg_causal_token_ids", "logits_full_argmax"}
    with np.load(out) as computed:
        assert set(computed) >= {parity.name for parity in comparison.compared}
    for parity in compare_golden(policy, reference=out, tolerance=0.0).compared:
        assert parity.difference == 0 or "sampled" in parity.name


def test_a_changed_weight_shows_in_the_arrays_that_depend_on_it(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "checkpoint", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["projector.fc2.bias"][0] += 0.1
    safetensors.torch.save_file(tensors, path)
    comparison = compare_golden(from_public(tmp_path / "checkpoint"))
    wrong = [parity.name for parity in comparison.compared if not parity.holds]
    assert wrong[0] == "projected_patch_embeddings"
    assert "vision_features" not in wrong
    assert "logits_action_columns" in wrong


def test_nan_never_holds() -> None:
    assert not compare_one("logits", np.array([np.nan]), np.array([0.0]), 1.0).holds
    assert Parity("logits", difference=0.5, tolerance=1.0, beyond=0, size=1).holds


def test_different_shapes_are_refused() -> None:
    message = r"logits: is \[2\] here; expected the reference's \[3\]"
    with pytest.raises(ValueError, match=message):
        compare_one("logits", np.zeros(2), np.zeros(3))


@pytest.mark.parametrize("name", ["text.npz", "empty.npz", "array.npy", "objects.npz"])
def test_other_files_are_refused(policy: OpenVLAOFT, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", raw_image=np.array([print], dtype=object))
    message = rf"{name}: not an archive of arrays .*; expected \.npz without pickles"
    with pytest.raises(ValueError, match=message):
        compare_golden(policy, inputs=tmp_path / name)


def test_an_archive_that_is_larger_than_memory_is_not_read(
    policy: OpenVLAOFT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vla_opd.policies.openvla_oft.parity.LARGEST", 100)
    message = r"inputs\.npz: .*its arrays would take 0 GB, more than half of the memory"
    with pytest.raises(ValueError, match=message):
        compare_golden(policy)


def test_a_reference_without_a_comparable_array_is_refused(policy: OpenVLAOFT) -> None:
    message = (
        r"gradients\.npz: has no array that can be compared; expected some of rot180, jpeg_decoded"
    )
    with pytest.raises(ValueError, match=message):
        compare_golden(policy, reference=GOLDEN / "gradients.npz")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("raw_image", lambda a: a / 1, r"float64 \[3, 256, 256, 3\]; expected images"),
        ("raw_image", lambda a: a[..., 0], r"uint8 \[3, 256, 256\]"),
        ("input_ids", lambda a: a + 32064, "int64 .*ids below 32064"),
        ("input_ids", lambda a: a[:2], r"int64 \[2, 31\]; expected \[3, L\]"),
        ("attention_mask", lambda a: a * 2, "int64 .*; expected 1 for tokens"),
        ("attention_mask", lambda a: a * 0, "int64"),
        ("attention_mask", lambda a: a[:, :-1], r"int64 \[3, 30\]"),
        (
            "sampled_token_ids",
            lambda a: a - 200,
            r"int64 .*; expected \[3, 56\] ids from 31744 to 31999",
        ),
    ],
)
def test_an_invalid_input_is_refused_by_name(
    policy: OpenVLAOFT, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    with np.load(INPUTS) as inputs, np.load(OUTPUTS) as outputs:
        arrays = {**inputs, "sampled_token_ids": outputs["sampled_token_ids"]}
    arrays[name] = change(arrays[name])
    with pytest.raises(ValueError, match=f"{name} is {message}"):
        compute_arrays(policy, arrays, arrays["sampled_token_ids"])


def test_a_missing_input_is_named(policy: OpenVLAOFT) -> None:
    images = np.zeros((1, 8, 8, 3), np.uint8)
    message = "the inputs have no input_ids; expected raw_image, input_ids, attention_mask"
    with pytest.raises(ValueError, match=message):
        compute_arrays(policy, {"raw_image": images})


def test_integers_are_compared_exactly_whatever_type_the_reference_has() -> None:
    assert not compare_one("greedy_token_ids", np.array([5]), np.array([6.0]), 1.0).holds


def test_next_to_no_value_of_an_image_may_be_one_level_off() -> None:
    """In 1 of 451,584 values this happened; nothing after it differed."""
    image = np.full((3, 224, 224, 3), 100, np.uint8)
    changed = image.copy()
    changed[0, 0, 0, 0] += 1
    parity = compare_one("resized224", changed, image)
    assert parity.holds
    assert parity.verdict == "one level off in 1 of 451,584 values, which is allowed"
    assert compare_one("resized224", changed[:1], image[:1]).holds
    assert not compare_one("jpeg_decoded", changed, image).holds

    by_two_levels = changed.copy()
    by_two_levels[0, 0, 0, 0] += 1
    assert not compare_one("resized224", by_two_levels, image).holds

    three_values = image.copy()
    three_values[0, 0, :3, 0] += 1
    assert not compare_one("resized224", three_values, image).holds
