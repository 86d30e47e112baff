"""adopt: what is kept of a public checkpoint, that its policy is the same, and what is refused."""

import hashlib
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from stages import adopt
from tests.vla_opd import public
from vla_opd.artifacts.manifest import open_artifact
from vla_opd.data.trajectory import Observations
from vla_opd.machine.host import Host
from vla_opd.params.run import Params
from vla_opd.params.stages import AdoptParams, EnvironmentParams, RunParams
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import build_policy, load_policy
from vla_opd.policies.openvla_oft.model import from_public

ENVIRONMENT = EnvironmentParams(
    tasks=("libero_object/0",),
    cameras=("agentview",),
    image_size=256,
    render="exact",
    wording="benchmark",
)
HOST = Host(device="cpu", workers=1, tracking="none", metrics=Path("unused"))
SEEN = Observations(
    np.random.default_rng(0).integers(0, 256, (2, 1, 256, 256, 3), np.uint8),
    np.zeros((2, 8), np.float32),
    ("pick up the bowl",) * 2,
)


def params(folder: Path, environment: EnvironmentParams = ENVIRONMENT, **its: object) -> Params:
    return Params(
        run=RunParams(name="test"),
        environment=environment,
        adopt={
            name: AdoptParams.model_validate({"folder": str(folder), "dtype": "float32", **its})
            for name in ("student", "teacher")
        },
        iterations={},
        evaluations={},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return public.make(tmp_path / "public")


def test_an_adopted_policy_is_the_public_one(folder: Path, tmp_path: Path) -> None:
    adopt.run(
        params(folder, crop=1.0, unnorm_key="libero_spatial_no_noops"),
        "student",
        tmp_path / "student",
        HOST,
    )
    found, theirs = (
        load_policy(open_checkpoint(tmp_path / "student")),
        from_public(folder, crop=1.0),
    )
    with torch.inference_mode():
        assert torch.equal(found.logits(SEEN), theirs.logits(SEEN))
        assert not torch.equal(
            found.logits(SEEN), from_public(folder).logits(SEEN)
        )  # a crop that it wasn't told of is another policy
    tokens = np.arange(56)[None]
    np.testing.assert_array_equal(found.decode(tokens), theirs.decode(tokens))


def test_the_manifest_says_what_it_was_made_of_and_not_where_that_lay(
    folder: Path, tmp_path: Path
) -> None:
    made = adopt.run(params(folder), "student", tmp_path / "student", HOST)
    read = (
        "config.json",
        "preprocessor_config.json",
        "dataset_statistics.json",
        "tokenizer.json",
        "model.safetensors",
    )
    assert made.params["sources"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in read
    }
    assert (made.parents, set(made.files)) == ({}, {"model.safetensors", "tokenizer.json"})
    assert str(folder) not in made.text()
    elsewhere = public.make(tmp_path / "elsewhere")
    assert adopt.run(params(elsewhere), "student", tmp_path / "again", HOST).digest == made.digest
    other = EnvironmentParams(
        tasks=("libero_object/0",),
        cameras=("agentview",),
        image_size=256,
        render="exact",
        wording="benchmark",
        settle=11,
    )
    assert (
        adopt.run(params(folder, other), "student", tmp_path / "other", HOST).digest != made.digest
    )


def test_a_policy_computes_in_what_its_weights_are_stored_in(folder: Path, tmp_path: Path) -> None:
    adopt.run(params(folder, dtype="bfloat16"), "student", tmp_path / "student", HOST)
    policy, exact = load_policy(open_checkpoint(tmp_path / "student")), from_public(folder)
    assert {one.dtype for one in policy.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        found, wanted = policy.logits(SEEN), exact.logits(SEEN)
    assert found.dtype == torch.float32
    assert 1e-4 < (found - wanted).abs().mean() < 0.1 * wanted.std()


def test_what_no_student_can_be_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    elsewhere = {
        "render": "fast",
        "cameras": ("robot0_eye_in_hand",),
        "image_size": 128,
        "wording": "bddl",
    }
    for field, value in elsewhere.items():
        other, expected = (
            ENVIRONMENT.model_copy(update={field: value}),
            re.escape(repr(getattr(ENVIRONMENT, field))),
        )
        with pytest.raises(
            ValueError,
            match=rf"environment\.{field} is {re.escape(repr(value))}; expected {expected}, with which public checkpoints",
        ):
            adopt.run(params(folder, other), "student", out, HOST)
    two = ENVIRONMENT.model_copy(update={"family": "package:other", "cameras": ("front", "wrist")})
    with pytest.raises(
        ValueError, match=r"environment\.cameras is \['front', 'wrist'\]; expected one"
    ):
        adopt.run(params(folder, two), "student", out, HOST)
    with pytest.raises(
        ValueError, match=r"unnorm_key is 'bridge'; expected one of \['libero_spatial_no_noops'\]"
    ):
        adopt.run(params(folder, unnorm_key="bridge"), "student", out, HOST)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"public: has no tokenizer\.json; expected the checkpoint's own"
    ):
        adopt.run(params(folder), "student", out, HOST)
    assert not out.exists()


def test_what_was_begun_from_other_files_is_begun_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after the weights were written, and started again with another folder: nothing of the first is in the second."""
    other = public.make(tmp_path / "other")
    weights = safetensors.torch.load_file(other / "model.safetensors")
    weights["projector.fc1.bias"] += 1
    safetensors.torch.save_file(weights, other / "model.safetensors")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(
            "stages.adopt.shutil.copyfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        adopt.run(params(folder), "student", tmp_path / "student", HOST)
    assert (tmp_path / ".student.draft/model.safetensors").is_file()
    made = adopt.run(params(other), "student", tmp_path / "student", HOST)
    assert made.digest == adopt.run(params(other), "student", tmp_path / "again", HOST).digest
    assert load_policy(open_checkpoint(tmp_path / "student")).projector.fc1.bias.mean() > 0.9


def test_weights_that_are_no_numbers_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["projector.fc1.bias"][3] = torch.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"model\.safetensors: projector\.fc1\.bias is not finite everywhere; expected finite numbers",
    ):
        adopt.run(params(folder), "student", tmp_path / "student", HOST)


class Hostile:
    """Leaves a mark wherever it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_nothing_that_comes_with_a_checkpoint_is_run(folder: Path, tmp_path: Path) -> None:
    """Remote code that the config names, pickles under the usual names, and one in the weights' place."""
    mark = tmp_path / "run"
    (folder / "modeling_prismatic.py").write_text(f"open({str(mark)!r}, 'w')")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Hostile(mark)))
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    adopt.run(params(folder), "student", tmp_path / "student", HOST)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(ValueError, match="not safetensors"):
        adopt.run(params(folder), "student", tmp_path / "other", HOST)
    assert not mark.exists()


def test_what_is_adopted_cannot_be_trained_from_nothing(folder: Path, tmp_path: Path) -> None:
    adopt.run(params(folder), "student", tmp_path / "student", HOST)
    open_artifact(tmp_path / "student", "checkpoint")
    facts = open_checkpoint(tmp_path / "student").facts
    fresh = facts.model_copy(
        update={"policy": params(folder).policy.model_copy(update={"family": "openvla_oft"})}
    )
    with pytest.raises(
        ValueError,
        match=r"policy\.family is 'openvla_oft'; expected one that is trained from nothing: this one comes by `adopt`",
    ):
        build_policy(fresh)
