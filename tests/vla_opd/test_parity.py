"""The comparison with the original, from files."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from vla_opd.parity import Parity, compare, of_files

GOLDEN = Path(__file__).parents[1] / "data/openvla_oft"


def test_every_array_is_the_originals(tmp_path: Path) -> None:
    found = of_files(GOLDEN / "checkpoint", None, GOLDEN / "inputs.npz", GOLDEN / "outputs.npz", 1e-3, tmp_path / "ours.npz")
    assert [one for one in found.compared if not one.holds] == []
    assert len(found.compared) == 21
    assert {one.name for one in found.compared if one.tolerance == 0} == {
        *("rot180", "jpeg_decoded", "resized224", "center_cropped", "multimodal_attention_mask", "greedy_token_ids"),
    }
    assert {"neg_causal_token_ids", "logits_full_argmax"} < set(found.left)
    with np.load(tmp_path / "ours.npz") as ours:
        assert {one.name for one in found.compared} <= set(ours)
    again = of_files(GOLDEN / "checkpoint", None, GOLDEN / "inputs.npz", tmp_path / "ours.npz", 0.0, None)
    assert all(one.difference == 0 for one in again.compared if "sampled" not in one.name)


def test_one_weight_that_is_off_is_seen_from_there_on(tmp_path: Path) -> None:
    import safetensors.torch

    shutil.copytree(GOLDEN / "checkpoint", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["projector.fc2.bias"][0] += 0.1
    safetensors.torch.save_file(tensors, path)
    found = of_files(tmp_path / "checkpoint", None, GOLDEN / "inputs.npz", GOLDEN / "outputs.npz", 1e-3, None)
    wrong = [one.name for one in found.compared if not one.holds]
    assert wrong[0] == "projected_patch_embeddings"
    assert "vision_features" not in wrong
    assert "logits_action_columns" in wrong


def test_what_is_no_number_does_not_hold() -> None:
    (found,) = compare({"logits": np.array([np.nan])}, {"logits": np.array([0.0])}, 1.0)
    assert not found.holds
    assert Parity("logits", 0.5, 1.0).holds


def test_other_shapes_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logits: is \[2\] here; expected the reference's \[3\]"):
        list(compare({"logits": np.zeros(2)}, {"logits": np.zeros(3)}, 1.0))
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ValueError, match=r"text.npz: not an archive of arrays .*; expected .npz without pickles"):
        of_files(GOLDEN / "checkpoint", None, tmp_path / "text.npz", GOLDEN / "outputs.npz", 1e-3, None)
    np.savez(tmp_path / "objects.npz", raw_image=np.array([print], dtype=object))
    with pytest.raises(ValueError, match=r"objects.npz: not an archive of arrays"):
        of_files(GOLDEN / "checkpoint", None, tmp_path / "objects.npz", GOLDEN / "outputs.npz", 1e-3, None)
    np.savez(tmp_path / "few.npz", raw_image=np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="the inputs have no input_ids; expected raw_image, input_ids, attention_mask"):
        of_files(GOLDEN / "checkpoint", None, tmp_path / "few.npz", GOLDEN / "outputs.npz", 1e-3, None)
    with pytest.raises(ValueError, match=r"gradients.npz: has none of the arrays that can be compared; expected some of rot180"):
        of_files(GOLDEN / "checkpoint", None, inputs_alone(tmp_path), GOLDEN / "gradients.npz", 1e-3, None)


def inputs_alone(folder: Path) -> Path:
    """The golden inputs without the steps of the picture's way."""
    with np.load(GOLDEN / "inputs.npz") as archive:
        np.savez(folder / "alone.npz", **{name: archive[name] for name in ("raw_image", "input_ids", "attention_mask")})
    return folder / "alone.npz"
