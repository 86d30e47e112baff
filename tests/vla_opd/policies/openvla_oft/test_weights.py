"""Weights of public checkpoints: files, names, values, and what is refused."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.vla_opd import public
from vla_opd.policies.openvla_oft.layout import read_public
from vla_opd.policies.openvla_oft.model import from_public
from vla_opd.policies.openvla_oft.weights import parameter_names, read_weights, source_files

GOLDEN = public.GOLDEN / "checkpoint"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return public.make(tmp_path / "checkpoint")


def read(folder: Path) -> dict[str, Tensor]:
    return read_weights(folder, read_public(GOLDEN, None).architecture, 256)


def test_the_source_files_include_the_index_of_shards(folder: Path) -> None:
    public.in_shards(folder)
    assert [path.name for path in source_files(folder)] == [
        "config.json",
        "preprocessor_config.json",
        "dataset_statistics.json",
        "tokenizer.json",
        INDEX,
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_shards_are_read_like_a_single_file(folder: Path) -> None:
    expected = read(folder)
    public.in_shards(folder)
    weights = read(folder)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor)


def test_a_single_file_takes_precedence_over_an_index(folder: Path) -> None:
    (folder / INDEX).write_text("stale")
    assert from_public(folder).head.weight.shape == (256, 64)


def test_the_head_has_the_rows_of_actions_in_ascending_order() -> None:
    public_head = safetensors.torch.load_file(GOLDEN / WEIGHTS)["language_model.lm_head.weight"]
    head = read(GOLDEN)["head.weight"]
    assert head.shape == (256, 64)
    assert torch.equal(head[0], public_head[31999])
    assert torch.equal(head[255], public_head[31744])


def test_tensors_that_the_policy_never_uses_have_no_parameter() -> None:
    architecture = read_public(GOLDEN, None).architecture
    last_block = "vision_backbone.featurizer.blocks.1.norm1.weight"
    first_block = "vision_backbone.featurizer.blocks.0.norm1.weight"
    pooling = "vision_backbone.fused_featurizer.attn_pool.latent"
    assert parameter_names(last_block, architecture) == ()
    assert parameter_names(pooling, architecture) == ()
    assert parameter_names(first_block, architecture) == ("dino.encoder.layer.0.norm1.weight",)


def test_most_greedy_tokens_are_the_same_in_bfloat16(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    prompt = torch.tensor([[1, 50, 60, 29871]])
    length = torch.tensor([4])
    exact = from_public(folder)
    rounded = from_public(folder, dtype=torch.bfloat16)
    assert rounded.head.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        expected = exact(exact.normalize(images), prompt, length).argmax(-1)
        tokens = rounded(rounded.normalize(images), prompt, length).argmax(-1)
    assert (tokens == expected).float().mean() > 0.7


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def remove_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("projector.fc2.weight"))


def keep_adapter_tensor(folder: Path) -> None:
    adapter = {"base_model.model.lora_A.weight": torch.zeros(2)}
    edit_tensors(folder, lambda tensors: tensors.update(adapter))


def add_layer(folder: Path) -> None:
    layer = {"language_model.model.layers.9.mlp.up_proj.weight": torch.zeros(2)}
    edit_tensors(folder, lambda tensors: tensors.update(layer))


def quantize_tensor(folder: Path) -> None:
    integers = {"projector.fc2.bias": torch.zeros(64, dtype=torch.int8)}
    edit_tensors(folder, lambda tensors: tensors.update(integers))


def index_names(folder: Path, file: str) -> None:
    """Have an index name another file."""
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))


def keep_only_an_adapter(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter/adapter_config.json").write_text("{}")


def shrink_config(folder: Path) -> None:
    public.edit(folder / "config.json", lambda config: config["text_config"].update(hidden_size=32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            remove_tensor,
            (
                r"found no tensor for projector\.fc2\.weight; "
                r"expected shape \[64, 320\], according to config\.json"
            ),
        ),
        (
            keep_adapter_tensor,
            (
                r"model\.safetensors: has a tensor 'base_model\.model\.lora_A\.weight'; "
                "expected those of an OpenVLA-OFT"
            ),
        ),
        (
            add_layer,
            (
                r"found shape \[2\] for language_model\.layers\.9\.mlp\.up_proj\.weight; "
                "expected no tensor"
            ),
        ),
        (
            quantize_tensor,
            (
                r"model\.safetensors: projector\.fc2\.bias is torch\.int8; "
                "expected floating-point numbers"
            ),
        ),
        (
            shrink_config,
            r"found shape \[\d+.*\] for .*; expected shape .*, according to config\.json",
        ),
        (
            lambda folder: (folder / WEIGHTS).unlink(),
            r"has no weights; expected model\.safetensors or model\.safetensors\.index\.json",
        ),
        (keep_only_an_adapter, r"\(it holds an adapter: merge it into its base first\)"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps({})),
            r"model\.safetensors: not safetensors",
        ),
        (
            lambda folder: index_names(folder, "../outside.safetensors"),
            r"weight_map names '\.\./outside\.safetensors'; expected names of",
        ),
        (
            lambda folder: index_names(folder, "/etc/passwd"),
            "weight_map names '/etc/passwd'",
        ),
        (
            lambda folder: index_names(folder, "lost.safetensors"),
            r"lost\.safetensors: missing; .*the download is incomplete",
        ),
    ],
)
def test_damaged_weights_are_named(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        from_public(folder)


def test_code_in_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name in ("configuration_prismatic.py", "modeling_prismatic.py"):
        (folder / name).write_text(f"open({str(trace)!r}, 'w').close()")
    hostile = f"cos\nsystem\n(S'touch {trace}'\ntR."
    (folder / "pytorch_model.bin").write_text(hostile)
    from_public(folder)
    assert not trace.exists()
