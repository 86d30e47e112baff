"""The public layout: what is read of it, and what is refused."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.vla_opd import public
from vla_opd.policies.openvla_oft.layout import (
    Architecture,
    read_public,
    read_weights,
    renamed,
    sources,
)
from vla_opd.policies.openvla_oft.model import from_public

GOLDEN = Path(__file__).parents[3] / "data/openvla_oft/checkpoint"
KEY = "libero_spatial_no_noops"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "checkpoint"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in its place."""
    read = json.loads(path.read_text(encoding="utf-8"))
    change(read)
    path.write_text(json.dumps(read), encoding="utf-8")


def test_a_public_config_that_says_little_is_of_seven_billion(folder: Path) -> None:
    little = {
        "model_type": "llama",
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    }
    edit(
        folder / "config.json",
        lambda config: (config.pop("golden_timm_overrides"), config.update(text_config=little)),
    )
    found = read_public(folder, None).architecture
    assert found == Architecture(mean=found.mean, std=found.std)
    assert (found.hidden, found.layers, found.rms_epsilon, found.vocabulary, found.rows) == (
        4096,
        32,
        1e-6,
        32000,
        32064,
    )
    assert (found.dino.width, found.dino.depth, found.siglip.width, found.siglip.depth) == (
        1024,
        24,
        1152,
        27,
    )


def test_what_is_read_is_told_the_index_of_shards_included(folder: Path) -> None:
    whole = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    safetensors.torch.save_file(whole, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(whole, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    beside = [
        "config.json",
        "preprocessor_config.json",
        "dataset_statistics.json",
        "model.safetensors.index.json",
    ]
    assert [path.name for path in sources(folder)] == [*beside, "model-00001-of-00001.safetensors"]


def test_statistics_are_those_beside_the_weights_not_those_in_the_config(folder: Path) -> None:
    told = json.loads((folder / "dataset_statistics.json").read_text(encoding="utf-8"))[KEY][
        "action"
    ]
    space = read_public(folder, KEY).space
    assert (list(space.q01), list(space.q99), list(space.normalised)) == (
        told["q01"],
        told["q99"],
        told["mask"],
    )
    assert (space.chunk, space.action_dim, space.bins) == (8, 7, 256)
    with pytest.raises(
        ValueError,
        match=r"dataset_statistics.json: unnorm_key is 'bridge_orig'; expected one of \['libero_spatial_no_noops'\]",
    ):
        read_public(folder, "bridge_orig")


def test_without_a_mask_all_dimensions_are_normalised_as_in_the_original(folder: Path) -> None:
    edit(folder / "dataset_statistics.json", lambda told: told[KEY]["action"].pop("mask"))
    assert read_public(folder, KEY).space.normalised == (True,) * 7


def test_a_whole_file_goes_before_an_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("stale")
    assert from_public(folder).head.weight.shape == (256, 64)


def test_half_the_digits_give_much_the_same_tokens_and_the_crop_is_the_users(folder: Path) -> None:
    policy, half, whole = (
        from_public(folder),
        from_public(folder, dtype=torch.bfloat16),
        from_public(folder, crop=1.0),
    )
    pixels = policy.normalised(
        np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    )
    prompt, length = torch.tensor([[1, 50, 60, 29871]]), torch.tensor([4])
    with torch.inference_mode():
        ours, theirs = (
            one(pixels.to(one.head.weight.dtype), prompt, length) for one in (policy, half)
        )
    assert half.head.weight.dtype == torch.bfloat16
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.7
    frames = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    assert np.array_equal(whole.pictures(frames).cropped, whole.pictures(frames).resized)
    assert not np.array_equal(policy.pictures(frames).cropped, policy.pictures(frames).resized)


def test_of_several_statistics_one_has_to_be_named(folder: Path) -> None:
    edit(folder / "dataset_statistics.json", lambda told: told.update(other=told[KEY]))
    assert read_public(folder, "other").space == read_public(folder, KEY).space
    with pytest.raises(
        ValueError,
        match=r"unnorm_key is None; expected one of \['libero_spatial_no_noops', 'other'\]",
    ):
        read_public(folder, None)


def test_shards_are_read_as_one_file_is(folder: Path) -> None:
    public.in_shards(folder)
    architecture = read_public(folder, None).architecture
    sharded, single = (
        read_weights(folder, architecture, 256),
        read_weights(GOLDEN, architecture, 256),
    )
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], single[name]) for name in single)


def test_of_the_head_only_the_actions_rows_are_kept_in_the_order_of_their_values() -> None:
    whole = safetensors.torch.load_file(GOLDEN / "model.safetensors")[
        "language_model.lm_head.weight"
    ]
    kept = read_weights(GOLDEN, read_public(GOLDEN, None).architecture, 256)["head.weight"]
    assert kept.shape == (256, 64)
    assert torch.equal(kept[0], whole[31999])
    assert torch.equal(kept[255], whole[31744])


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (
            "action_head--150000_checkpoint.pt",
            "answers with actions, not with a distribution over action tokens",
        ),
        ("noisy_action_projector--150000_checkpoint.pt", "diffusion"),
        ("proprio_projector--150000_checkpoint.pt", "proprioception"),
        ("vision_backbone--150000_checkpoint.pt", "FiLM"),
    ],
)
def test_parts_that_distillation_cannot_use_are_refused_unopened(
    folder: Path, file: str, why: str
) -> None:
    (folder / file).write_bytes(b"not to be read")
    (folder / file).chmod(0)
    with pytest.raises(
        ValueError,
        match=f"has {file}: .*{why}.*expected a checkpoint with discrete action tokens and one camera",
    ):
        from_public(folder)


@pytest.mark.parametrize(
    ("change", "message"),
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
            "hidden, heads and key_value_heads are 66, 4, 4; expected each to divide",
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
def test_a_config_of_something_else_is_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    edit(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        from_public(folder)


def without(folder: Path) -> None:
    """Lose a tensor."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["projector.fc2.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def adapted(folder: Path) -> None:
    """Leave an adapter's tensor in."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(
        {**tensors, "base_model.model.lora_A.weight": torch.zeros(2)}, folder / "model.safetensors"
    )


def integers(folder: Path) -> None:
    """Quantise a tensor."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    bias = "projector.fc2.bias"
    safetensors.torch.save_file(
        {**tensors, bias: tensors[bias].to(torch.int8)}, folder / "model.safetensors"
    )


def sharded(folder: Path, name: str) -> None:
    """Have an index name another file."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": name}}), encoding="utf-8"
    )


def unmerged(folder: Path) -> None:
    """An adapter, and not what it adapts."""
    (folder / "model.safetensors").unlink()
    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter/adapter_config.json").write_text("{}")


def action(folder: Path, **statistics: list[Any]) -> None:
    """Say something else of the actions."""
    edit(folder / "dataset_statistics.json", lambda told: told[KEY]["action"].update(statistics))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (
        without,
        r"the tensor that is projector\.fc2\.weight here is missing; by config\.json, expected \(64, 320\)",
    ),
    (
        adapted,
        r"model\.safetensors: there is a tensor 'base_model\.model\.lora_A\.weight'; expected those of an OpenVLA-OFT",
    ),
    (
        lambda folder: edit(
            folder / "config.json", lambda c: c["text_config"].update(hidden_size=32)
        ),
        r"is of shape \[\d+.*\]; by config\.json, expected",
    ),
    (
        lambda folder: (folder / "model.safetensors").unlink(),
        "has neither model.safetensors nor .*no other kind of weights is read",
    ),
    (
        lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps({})),
        "model.safetensors: not safetensors",
    ),
    (
        lambda folder: (folder / "config.json").write_text("[]"),
        r"config\.json: it is \[\]; expected an object",
    ),
    (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        r"config\.json: isn't JSON .*recursion limit",
    ),
    (
        lambda folder: edit(folder / "dataset_statistics.json", lambda s: s[KEY].pop("action")),
        f"{KEY}.action is missing",
    ),
    (lambda folder: action(folder, mask=["no"] * 7), "action.mask.0 is 'no'"),
    (
        lambda folder: edit(
            folder / "dataset_statistics.json", lambda s: s[KEY]["action"].update(mask=[True])
        ),
        "action.mask has 1 entries; expected 7",
    ),
    (lambda folder: action(folder, q01=[float("nan")] * 7), "q01.0 is nan"),
    (lambda folder: action(folder, q01=[9.0] * 7), "expected q01 to be at most q99"),
    (
        lambda folder: edit(
            folder / "preprocessor_config.json",
            lambda c: c["tvf_normalize_params"][0].update(std=[0.0] * 3),
        ),
        "std above 0",
    ),
    (
        lambda folder: edit(
            folder / "preprocessor_config.json",
            lambda c: c["tvf_normalize_params"][1].update(std=[0.4] * 3),
        ),
        "expected 0.5",
    ),
    (
        integers,
        "model.safetensors: projector.fc2.bias is torch.int8; expected floating-point numbers",
    ),
    (
        lambda folder: sharded(folder, "../outside.safetensors"),
        r"weight_map names '\.\./outside\.safetensors'; expected names of",
    ),
    (lambda folder: sharded(folder, "/etc/passwd"), "weight_map names '/etc/passwd'"),
    (
        lambda folder: sharded(folder, "lost.safetensors"),
        r"lost.safetensors: missing; .*the download isn't complete",
    ),
    (unmerged, "it holds an adapter, to be merged into its base first"),
    (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "preprocessor_config.json: missing",
    ),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: isn't JSON"),
    (
        lambda folder: edit(
            folder / "dataset_statistics.json", lambda s: s[KEY]["action"].update(q01=[0.0])
        ),
        r"dataset_statistics\.json: libero_spatial_no_noops\.action\.q01 has 1 entries; expected 7",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_files_that_are_damaged_are_named(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        from_public(folder)


def test_code_that_comes_with_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name in ("configuration_prismatic.py", "modeling_prismatic.py"):
        (folder / name).write_text(f"open({str(trace)!r}, 'w').close()", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR."
    )
    from_public(folder)
    assert not trace.exists()


def test_what_the_policy_never_reads_has_no_name() -> None:
    architecture = read_public(GOLDEN, None).architecture
    assert renamed("vision_backbone.featurizer.blocks.1.norm1.weight", architecture) == ()
    assert renamed("vision_backbone.fused_featurizer.attn_pool.latent", architecture) == ()
    assert renamed("vision_backbone.featurizer.blocks.0.norm1.weight", architecture) == (
        "dino.encoder.layer.0.norm1.weight",
    )
