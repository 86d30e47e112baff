"""Descriptions of public checkpoints: what is read, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vla_opd import public
from vla_opd.policies.openvla_oft.layout import Architecture, Tower, read_public
from vla_opd.policies.openvla_oft.model import from_public

KEY = "libero_spatial_no_noops"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return public.make(tmp_path / "checkpoint")


def edit_config(folder: Path, **settings: object) -> None:
    public.edit(folder / "config.json", lambda config: config.update(settings))


def edit_action(folder: Path, **statistics: list[Any]) -> None:
    """Change action statistics."""
    public.edit(
        folder / "dataset_statistics.json",
        lambda datasets: datasets[KEY]["action"].update(statistics),
    )


def edit_normalization(folder: Path, tower: int, **settings: list[float]) -> None:
    public.edit(
        folder / "preprocessor_config.json",
        lambda processor: processor["tvf_normalize_params"][tower].update(settings),
    )


def test_a_config_without_sizes_has_those_of_the_7b_model(folder: Path) -> None:
    text = {
        "model_type": "llama",
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    }
    edit_config(folder, golden_timm_overrides={}, text_config=text)
    architecture = read_public(folder, None).architecture
    assert architecture == Architecture(mean=architecture.mean, std=architecture.std)
    assert architecture.dino == Tower(width=1024, depth=24, heads=16)
    assert architecture.siglip == Tower(width=1152, depth=27, heads=16)
    assert (architecture.hidden, architecture.layers) == (4096, 32)
    assert (architecture.vocabulary, architecture.rows) == (32000, 32064)
    assert architecture.rms_epsilon == 1e-6


def test_statistics_beside_the_weights_take_precedence_over_the_config(folder: Path) -> None:
    datasets = json.loads((folder / "dataset_statistics.json").read_text())
    action = datasets[KEY]["action"]
    space = read_public(folder, KEY).space
    assert list(space.q01) == action["q01"]
    assert list(space.q99) == action["q99"]
    assert list(space.normalised) == action["mask"]
    assert (space.chunk, space.action_dim, space.bins) == (8, 7, 256)
    message = (
        r"dataset_statistics.json: unnorm_key is 'bridge_orig'; "
        r"expected one of \['libero_spatial_no_noops'\]"
    )
    with pytest.raises(ValueError, match=message):
        read_public(folder, "bridge_orig")


def test_without_a_mask_all_dimensions_are_normalized_as_in_the_original(folder: Path) -> None:
    public.edit(
        folder / "dataset_statistics.json", lambda datasets: datasets[KEY]["action"].pop("mask")
    )
    assert read_public(folder, KEY).space.normalised == (True,) * 7


def test_a_data_set_is_named_if_there_are_several(folder: Path) -> None:
    public.edit(
        folder / "dataset_statistics.json", lambda datasets: datasets.update(second=datasets[KEY])
    )
    assert read_public(folder, "second").space == read_public(folder, KEY).space
    message = r"unnorm_key is None; expected one of \['libero_spatial_no_noops', 'second'\]"
    with pytest.raises(ValueError, match=message):
        read_public(folder, None)


def test_the_crop_is_the_users(folder: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    images = from_public(folder).preprocess(frames)
    uncropped = from_public(folder, crop=1.0).preprocess(frames)
    assert not np.array_equal(images.cropped, images.resized)
    assert np.array_equal(uncropped.cropped, uncropped.resized)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("action_head--150000_checkpoint.pt", "no distribution over action tokens"),
        ("noisy_action_projector--150000_checkpoint.pt", "diffusion"),
        ("proprio_projector--150000_checkpoint.pt", "proprioception"),
        ("vision_backbone--150000_checkpoint.pt", "FiLM"),
    ],
)
def test_unsupported_parts_are_refused_unopened(folder: Path, file: str, reason: str) -> None:
    (folder / file).write_bytes(b"not to be read")
    (folder / file).chmod(0)
    message = (
        f"has {file}: .*{reason}.*expected a checkpoint with discrete action tokens and one camera"
    )
    with pytest.raises(ValueError, match=message):
        from_public(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'; expected 'openvla'"),
        (
            {"timm_model_ids": ["vit_large_patch14_clip_224.openai"]},
            r"timm_model_ids\.0 is 'vit_large.*'; expected 'vit_large_patch14_reg4_dinov2",
        ),
        ({"use_fused_vision_backbone": False}, "use_fused_vision_backbone is False; expected True"),
        ({"num_images_in_input": 2}, "num_images_in_input is 2; expected 1"),
        ({"use_proprio": True}, "use_proprio is True; expected False"),
        (
            {"text_config": {"hidden_size": "large"}},
            r"config\.json: text_config\.hidden_size is 'large'; expected a valid integer",
        ),
        (
            {"text_config": {"hidden_size": 4_000_000_000}},
            r"hidden is 4000000000; expected less than or equal to 32768",
        ),
        (
            {"text_config": {"hidden_size": 66, "num_attention_heads": 4}},
            "hidden, heads and key_value_heads are 66, 4, 4; expected hidden to be a multiple of 2",
        ),
        (
            {"pad_to_multiple_of": 0, "text_config": {"vocab_size": 100}},
            "vocabulary is 100; expected greater than or equal to 256",
        ),
        (
            {"text_config": {"rope_scaling": {"type": "linear", "factor": 4}}},
            r"text_config.rope_scaling.type is 'linear'; expected 'default'",
        ),
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act is 'relu'; expected 'silu'"),
        ({"image_sizes": [384, 384]}, "image_sizes.0 is 384; expected 224"),
        (
            {"image_resize_strategy": "letterbox"},
            "image_resize_strategy is 'letterbox'; expected 'resize-naive'",
        ),
        ({"arch_specifier": "gelu-mlp"}, "arch_specifier is 'gelu-mlp'; expected 'no-align"),
        ({"n_action_bins": None}, "n_action_bins is None; expected a valid integer"),
        ({"golden_timm_overrides": None}, "golden_timm_overrides is None"),
    ],
)
def test_a_config_of_another_model_is_refused(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    edit_config(folder, **settings)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        from_public(folder)


def remove_action(folder: Path) -> None:
    public.edit(folder / "dataset_statistics.json", lambda datasets: datasets[KEY].pop("action"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            r"config\.json: the content is \[\]; expected an object",
        ),
        (
            lambda folder: (folder / "config.json").write_text("[" * 100_000),
            r"config\.json: is not JSON .*recursion limit",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: is not JSON"),
        (remove_action, f"{KEY}.action is missing"),
        (lambda folder: edit_action(folder, mask=["no"] * 7), "action.mask.0 is 'no'"),
        (
            lambda folder: edit_action(folder, mask=[True]),
            "action.mask has 1 entries; expected 7, one per action dimension",
        ),
        (
            lambda folder: edit_action(folder, q01=[0.0]),
            rf"dataset_statistics\.json: {KEY}\.action\.q01 has 1 entries; expected 7",
        ),
        (lambda folder: edit_action(folder, q01=[float("nan")] * 7), "q01.0 is nan"),
        (lambda folder: edit_action(folder, q01=[9.0] * 7), "expected q01 to be at most q99"),
        (
            lambda folder: edit_normalization(folder, 0, std=[0.0] * 3),
            r"std is \(0\.0, 0\.0, 0\.0\); expected numbers above 0",
        ),
        (lambda folder: edit_normalization(folder, 1, std=[0.4] * 3), "expected 0.5"),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            "preprocessor_config.json: missing; expected the public layout of OpenVLA-OFT",
        ),
    ],
)
def test_a_damaged_file_is_named(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_public(folder, None)
