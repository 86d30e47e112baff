"""The public layout: what is read of it, and what is refused."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vla_opd.openvla import Architecture, read_public, read_weights, renamed
from vla_opd.policies.openvla_oft import from_public

GOLDEN = Path(__file__).parents[1] / "data/openvla_oft/checkpoint"
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
    little = {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064}
    edit(folder / "config.json", lambda config: (config.pop("golden_timm_overrides"), config.update(text_config=little)))
    found = read_public(folder, None).architecture
    assert found == Architecture(mean=found.mean, std=found.std)
    assert (found.hidden, found.layers, found.rms_epsilon, found.vocabulary, found.rows) == (4096, 32, 1e-6, 32000, 32064)
    assert (found.dino.width, found.dino.depth, found.siglip.width, found.siglip.depth) == (1024, 24, 1152, 27)


def test_statistics_are_those_beside_the_weights_not_those_in_the_config(folder: Path) -> None:
    told = json.loads((folder / "dataset_statistics.json").read_text(encoding="utf-8"))[KEY]["action"]
    space = read_public(folder, KEY).space
    assert (list(space.q01), list(space.q99), list(space.normalised)) == (told["q01"], told["q99"], told["mask"])
    assert (space.chunk, space.action_dim, space.bins) == (8, 7, 256)
    with pytest.raises(ValueError, match=r"dataset_statistics.json: --unnorm-key is 'bridge_orig'; expected one of \['libero_spatial_no_noops'\]"):
        read_public(folder, "bridge_orig")


def test_of_several_statistics_one_has_to_be_named(folder: Path) -> None:
    edit(folder / "dataset_statistics.json", lambda told: told.update(other=told[KEY]))
    assert read_public(folder, "other").space == read_public(folder, KEY).space
    with pytest.raises(ValueError, match=r"--unnorm-key is None; expected one of \['libero_spatial_no_noops', 'other'\]"):
        read_public(folder, None)


def test_shards_are_read_as_one_file_is(folder: Path) -> None:
    whole = safetensors.torch.load_file(folder / "model.safetensors")
    names = sorted(whole)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in parts.items():
        safetensors.torch.save_file({name: whole[name] for name in some}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "model.safetensors").unlink()
    architecture = read_public(folder, None).architecture
    sharded, single = read_weights(folder, architecture, 256), read_weights(GOLDEN, architecture, 256)
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], single[name]) for name in single)


def test_of_the_head_only_the_actions_rows_are_kept_in_the_order_of_their_values() -> None:
    whole = safetensors.torch.load_file(GOLDEN / "model.safetensors")["language_model.lm_head.weight"]
    kept = read_weights(GOLDEN, read_public(GOLDEN, None).architecture, 256)["head.weight"]
    assert kept.shape == (256, 64)
    assert torch.equal(kept[0], whole[31999])
    assert torch.equal(kept[255], whole[31744])


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("action_head--150000_checkpoint.pt", "answers with actions, not with a distribution over action tokens"),
        ("noisy_action_projector--150000_checkpoint.pt", "diffusion"),
        ("proprio_projector--150000_checkpoint.pt", "proprioception"),
        ("vision_backbone--150000_checkpoint.pt", "FiLM"),
    ],
)
def test_parts_that_distillation_cannot_use_are_refused_unopened(folder: Path, file: str, why: str) -> None:
    (folder / file).write_bytes(b"not to be read")
    (folder / file).chmod(0)
    with pytest.raises(ValueError, match=f"has {file}: .*{why}.*expected a checkpoint with discrete action tokens and one camera"):
        from_public(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'; expected 'openvla'"),
        (
            {"timm_model_ids": ["vit_large_patch14_clip_224.openai"]},
            r"timm_model_ids is \['vit_large.*'\]; expected \['vit_large_patch14_reg4_dinov2",
        ),
        ({"use_fused_vision_backbone": False}, "use_fused_vision_backbone is False; expected True"),
        ({"num_images_in_input": 2}, "num_images_in_input is 2; expected 1"),
        ({"use_proprio": True}, "use_proprio is True; expected False"),
        ({"text_config": {"hidden_size": "large"}}, "don't describe an OpenVLA-OFT.*hidden"),
    ],
)
def test_a_config_of_something_else_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
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
    safetensors.torch.save_file({**tensors, "base_model.model.lora_A.weight": torch.zeros(2)}, folder / "model.safetensors")


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (without, r"its tensors are not those that its config.json describes: .*projector\.fc2\.weight"),
    (adapted, r"there is a tensor 'base_model\.model\.lora_A\.weight'; expected those of an OpenVLA-OFT"),
    (lambda folder: edit(folder / "config.json", lambda c: c["text_config"].update(hidden_size=32)), "its tensors are not those .*size mismatch"),
    (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor .*no other kind of weights is read"),
    (lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps({})), "model.safetensors: not safetensors"),
    (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json: isn't there"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: isn't JSON"),
    (lambda folder: edit(folder / "dataset_statistics.json", lambda s: s[KEY]["action"].update(q01=[0.0])), "has 1 action dimensions; expected 7"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_files_that_are_damaged_are_named(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        from_public(folder)


def test_code_that_comes_with_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name in ("configuration_prismatic.py", "modeling_prismatic.py"):
        (folder / name).write_text(f"open({str(trace)!r}, 'w').close()", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.")
    from_public(folder)
    assert not trace.exists()


def test_what_the_policy_never_reads_has_no_name() -> None:
    architecture = read_public(GOLDEN, None).architecture
    assert renamed("vision_backbone.featurizer.blocks.1.norm1.weight", architecture) == ()
    assert renamed("vision_backbone.fused_featurizer.attn_pool.latent", architecture) == ()
    assert renamed("vision_backbone.featurizer.blocks.0.norm1.weight", architecture) == ("dino.encoder.layer.0.norm1.weight",)
