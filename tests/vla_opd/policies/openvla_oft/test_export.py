"""A checkpoint in the public layout again: what the original would read is what was trained."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.vla_opd import public, small
from vla_opd.artifacts.draft import draft
from vla_opd.params.stages import AdoptParams, EnvironmentParams
from vla_opd.params.training import Lora
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import Checkpoint, open_checkpoint, public_facts, write_policy
from vla_opd.policies.load import build_policy, load_policy, save_pretrained
from vla_opd.policies.openvla_oft.export import to_public
from vla_opd.policies.openvla_oft.layout import Architecture
from vla_opd.policies.openvla_oft.model import from_public

ENVIRONMENT = EnvironmentParams(
    tasks=("libero_object/0",), image_size=256, render="exact", wording="benchmark"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A public checkpoint, with code beside it that nobody runs."""
    made = public.make(tmp_path / "public")
    (made / "modeling_prismatic.py").write_text("raise SystemExit\n")
    return made


def adopted(folder: Path, out: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    facts = public_facts(AdoptParams(folder=str(folder)), ENVIRONMENT)
    save_pretrained(from_public(folder, dtype=dtype), facts, out)
    return open_checkpoint(out)


def trained(origin: Checkpoint, out: Path) -> Checkpoint:
    """The same with an adapter that says something."""
    policy = load_policy(origin)
    lora.prepare(policy, Lora(4, 16), 0, "optimize")
    for name, one in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.02, generator=torch.Generator().manual_seed(0))
    with draft(out, "checkpoint", {}, {}) as work:
        write_policy(work, policy, origin)
        work.publish({"checkpoint": origin.facts.model_dump()})
    return open_checkpoint(out)


def asked(policy: torch.nn.Module) -> torch.Tensor:
    pixels = torch.randn(2, 6, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return policy(
            pixels.to(next(policy.parameters()).dtype),
            torch.tensor([[1, 50, 60, 29871]] * 2),
            torch.tensor([4, 4]),
        )


def test_what_was_only_adopted_comes_out_as_it_was(folder: Path, tmp_path: Path) -> None:
    to_public(adopted(folder, tmp_path / "it"), folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in folder.iterdir()
    }
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
            continue
        before, after = (
            safetensors.torch.load_file(one / path.name) for one in (folder, tmp_path / "out")
        )
        assert before.keys() == after.keys()
        assert all(
            torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
            for name in before
        )


def test_an_adapter_is_merged_into_it(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    safetensors.torch.save_file(
        {name: one.float() for name, one in safetensors.torch.load_file(weights).items()}, weights
    )
    made = trained(adopted(folder, tmp_path / "student"), tmp_path / "it001")
    to_public(made, folder, tmp_path / "deep/out")
    ours, before = asked(load_policy(made)), asked(from_public(folder))
    torch.testing.assert_close(
        asked(from_public(tmp_path / "deep/out")), ours, rtol=0, atol=5e-4
    )  # 1.06e-4 on an AMD EPYC 7003
    assert (ours - before).abs().max() > 0.1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]  # nothing hidden


def test_shards_come_out_as_shards_and_nothing_comes_along(folder: Path, tmp_path: Path) -> None:
    """As a hub's cache has them: links, an index, and folders beside them."""
    whole = safetensors.torch.load_file(folder / "model.safetensors")
    parts = {
        "model-00001-of-00002.safetensors": sorted(whole)[::2],
        "model-00002-of-00002.safetensors": sorted(whole)[1::2],
    }
    (tmp_path / "blobs").mkdir()
    for name, tensors in parts.items():
        safetensors.torch.save_file({one: whole[one] for one in tensors}, tmp_path / "blobs" / name)
        (folder / name).symlink_to(tmp_path / "blobs" / name)
    index = {
        "metadata": {},
        "weight_map": {one: name for name, tensors in parts.items() for one in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    (folder / "lora_adapter").mkdir()
    (folder / "training_state.pt").write_bytes(b"old")
    to_public(adopted(folder, tmp_path / "it"), folder, folder / "out")  # within it, too
    made = {path.name for path in (folder / "out").iterdir()}
    assert made == {path.name for path in folder.iterdir()} - {
        "lora_adapter",
        "training_state.pt",
        "out",
    }
    assert not any(path.is_symlink() for path in (folder / "out").iterdir())
    for name, tensors in parts.items():
        after = safetensors.torch.load_file(folder / "out" / name)
        assert all(torch.equal(after[one], whole[one]) for one in tensors)


def test_of_one_that_lacks_something_nothing_is_made(folder: Path, tmp_path: Path) -> None:
    made, weights = adopted(folder, tmp_path / "it"), folder / "model.safetensors"
    whole = safetensors.torch.load_file(weights)
    safetensors.torch.save_file(
        {name: one for name, one in whole.items() if "lm_head" not in name}, weights
    )
    with pytest.raises(
        ValueError, match=r"public: has no tensor for head\.weight; expected all that .*it has"
    ):
        to_public(made, folder, tmp_path / "out")
    weights.write_bytes(b"no weights")
    with pytest.raises(
        ValueError,
        match=r"model\.safetensors: .*; expected the weights of an OpenVLA-OFT of this size",
    ):
        to_public(made, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    safetensors.torch.save_file(whole, weights)
    to_public(made, folder, tmp_path / "out")  # what the others have left is no hindrance


def test_in_bfloat16_it_is_merged_up_to_rounding(folder: Path, tmp_path: Path) -> None:
    made = trained(adopted(folder, tmp_path / "student", torch.bfloat16), tmp_path / "it001")
    to_public(made, folder, tmp_path / "out")
    ours, theirs = (
        asked(load_policy(made)),
        asked(from_public(tmp_path / "out", dtype=torch.bfloat16)),
    )
    moved = (ours - asked(load_policy(open_checkpoint(tmp_path / "student")))).norm()
    assert (ours - theirs).norm() < 0.2 * moved


def test_what_it_did_not_come_from_is_refused(folder: Path, tmp_path: Path) -> None:
    made = adopted(folder, tmp_path / "it")
    statistics = folder / "dataset_statistics.json"
    told = json.loads(statistics.read_text())
    (key,) = told
    told[key]["action"]["q99"][0] += 1
    statistics.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"public: q99 is .*; expected .*, that of .*it"):
        to_public(made, folder, tmp_path / "out")
    shape = made.facts.policy
    assert isinstance(shape, Architecture)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"public: rms_epsilon is 1e-05; expected {shape.rms_epsilon}"
    ):
        to_public(made, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_written_over_and_other_families_have_no_such_layout(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out: is there already; expected a new folder"):
        to_public(adopted(folder, tmp_path / "it"), folder, tmp_path / "out")
    save_pretrained(build_policy(small.FACTS), small.FACTS, tmp_path / "tiny")
    with pytest.raises(ValueError, match="tiny: is of the family 'tiny'; expected openvla_oft"):
        to_public(open_checkpoint(tmp_path / "tiny"), folder, tmp_path / "new")
