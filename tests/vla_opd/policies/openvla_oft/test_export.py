"""Export to the public layout: the original reads the trained weights."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.vla_opd import public, small
from vla_opd.artifacts.draft import draft
from vla_opd.params.stages import AdoptParams, EnvironmentParams
from vla_opd.params.training import Lora
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import Checkpoint, open_checkpoint, public_facts, write_policy
from vla_opd.policies.load import build_policy, load_policy, save_pretrained
from vla_opd.policies.openvla_oft.export import to_public
from vla_opd.policies.openvla_oft.model import from_public

ENVIRONMENT = EnvironmentParams(
    tasks=("libero_object/0",), image_size=256, render="exact", wording="benchmark"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A public checkpoint, with code in its folder that must not be run."""
    folder = public.make(tmp_path / "public")
    (folder / "modeling_prismatic.py").write_text("raise SystemExit\n")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the exported checkpoint goes."""
    return tmp_path / "out"


def adopt(folder: Path, out: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    facts = public_facts(AdoptParams(folder=str(folder)), ENVIRONMENT)
    save_pretrained(from_public(folder, dtype=dtype), facts, out)
    return open_checkpoint(out)


def adapt(origin: Checkpoint, out: Path) -> Checkpoint:
    """Publish the checkpoint with an adapter that changes its logits."""
    policy = load_policy(origin)
    lora.prepare(policy, Lora(4, 16), 0, "optimize")
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(0)
            nn.init.normal_(parameter, std=0.02, generator=generator)
    with draft(out, "checkpoint", {}, {}) as work:
        write_policy(work, policy, origin)
        work.publish({"checkpoint": origin.facts.model_dump()})
    return open_checkpoint(out)


def logits(policy: nn.Module) -> Tensor:
    pixels = torch.randn(2, 6, 224, 224, generator=torch.Generator().manual_seed(1))
    pixels = pixels.to(next(policy.parameters()).dtype)
    prompts = torch.tensor([[1, 50, 60, 29871]] * 2)
    with torch.inference_mode():
        return policy(pixels, prompts, torch.tensor([4, 4]))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_untrained_checkpoint_is_exported_unchanged(
    folder: Path, out: Path, tmp_path: Path
) -> None:
    to_public(adopt(folder, tmp_path / "student"), folder, out)
    assert names(out) == names(folder)
    for name in names(folder) - {"model.safetensors"}:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    before = safetensors.torch.load_file(folder / "model.safetensors")
    after = safetensors.torch.load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)


def test_an_adapter_is_merged(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    in_float32 = {name: tensor.float() for name, tensor in tensors.items()}
    safetensors.torch.save_file(in_float32, weights)
    adapted = adapt(adopt(folder, tmp_path / "student"), tmp_path / "it001")
    out = tmp_path / "deep/out"
    to_public(adapted, folder, out)
    expected = logits(load_policy(adapted))
    # 1.06e-4 on an AMD EPYC 7003.
    torch.testing.assert_close(logits(from_public(out)), expected, rtol=0, atol=5e-4)
    assert (expected - logits(from_public(folder))).abs().max() > 0.1
    assert names(tmp_path / "deep") == {"out"}  # no draft is left behind


def test_shards_are_exported_as_shards_and_other_files_stay_behind(
    folder: Path, tmp_path: Path
) -> None:
    """The layout of a hub's cache: links, an index, and folders beside the files."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    public.in_shards(folder)
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) == 2
    (tmp_path / "blobs").mkdir()
    for shard in shards:
        blob = shard.rename(tmp_path / "blobs" / shard.name)
        shard.symlink_to(blob)
    expected = names(folder)
    (folder / "lora_adapter").mkdir()
    (folder / "training_state.pt").write_bytes(b"old")

    out = folder / "out"  # inside the public checkpoint is fine
    to_public(adopt(folder, tmp_path / "student"), folder, out)
    assert names(out) == expected
    assert not any(path.is_symlink() for path in out.iterdir())
    for shard in shards:
        before = safetensors.torch.load_file(shard)
        after = safetensors.torch.load_file(out / shard.name)
        assert before.keys() == after.keys()
        for name, tensor in after.items():
            assert torch.equal(tensor, tensors[name])


def test_a_failed_export_leaves_nothing_in_the_way(folder: Path, out: Path, tmp_path: Path) -> None:
    student = adopt(folder, tmp_path / "student")
    weights = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    headless = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    safetensors.torch.save_file(headless, weights)
    message = r"public: has no tensor for head\.weight; expected all the weights that .*student has"
    with pytest.raises(ValueError, match=message):
        to_public(student, folder, out)

    smaller = tensors | {"projector.fc1.bias": tensors["projector.fc1.bias"][1:]}
    safetensors.torch.save_file(smaller, weights)
    message = r"model\.safetensors: .*; expected the weights of an OpenVLA-OFT of this size"
    with pytest.raises(ValueError, match=message):
        to_public(student, folder, out)

    weights.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model\.safetensors: not safetensors"):
        to_public(student, folder, out)

    assert not out.exists()
    safetensors.torch.save_file(tensors, weights)
    to_public(student, folder, out)


def test_in_bfloat16_merging_is_exact_up_to_rounding(
    folder: Path, out: Path, tmp_path: Path
) -> None:
    student = adopt(folder, tmp_path / "student", torch.bfloat16)
    adapted = adapt(student, tmp_path / "it001")
    to_public(adapted, folder, out)
    expected = logits(load_policy(adapted))
    exported = logits(from_public(out, dtype=torch.bfloat16))
    change = expected - logits(load_policy(student))
    assert (exported - expected).norm() < 0.2 * change.norm()


def test_a_public_checkpoint_with_other_statistics_or_sizes_is_refused(
    folder: Path, out: Path, tmp_path: Path
) -> None:
    student = adopt(folder, tmp_path / "student")

    def shift(statistics: dict[str, Any]) -> None:
        (dataset,) = statistics.values()
        dataset["action"]["q99"][0] += 1

    public.edit(folder / "dataset_statistics.json", shift)
    with pytest.raises(ValueError, match=r"public: q99 is .*; expected .*, as in .*student"):
        to_public(student, folder, out)
    public.edit(
        folder / "config.json", lambda config: config["text_config"].update(rms_norm_eps=1e-5)
    )
    with pytest.raises(ValueError, match=r"public: rms_epsilon is 1e-05; expected 1e-06"):
        to_public(student, folder, out)
    assert not out.exists()


def test_an_existing_folder_and_another_family_are_refused(
    folder: Path, out: Path, tmp_path: Path
) -> None:
    out.mkdir()
    with pytest.raises(ValueError, match="out: exists; expected a new folder"):
        to_public(adopt(folder, tmp_path / "student"), folder, out)
    save_pretrained(build_policy(small.FACTS), small.FACTS, tmp_path / "tiny")
    message = "tiny: policy.family is 'tiny'; expected openvla_oft"
    with pytest.raises(ValueError, match=message):
        to_public(open_checkpoint(tmp_path / "tiny"), folder, tmp_path / "new")
