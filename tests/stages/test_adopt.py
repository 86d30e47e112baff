"""adopt: the adopted policy is the public one; its manifest; and what is refused."""

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
from vla_opd.artifacts.manifest import Manifest, open_artifact
from vla_opd.data.trajectory import Observations
from vla_opd.machine.host import Host
from vla_opd.params.stages import AdoptParams, EnvironmentParams, PolicyParams
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
OBSERVATIONS = Observations(
    np.random.default_rng(0).integers(0, 256, (2, 1, 256, 256, 3), np.uint8),
    np.zeros((2, 8), np.float32),
    ("pick up the bowl",) * 2,
)


def run_adopt(
    folder: Path, out: Path, environment: EnvironmentParams = ENVIRONMENT, **settings: object
) -> Manifest:
    """Adopt a public checkpoint in float32."""
    options = {"folder": str(folder), "dtype": "float32", **settings}
    return adopt.run(
        run="test",
        settings=AdoptParams.model_validate(options),
        environment=environment,
        name="student",
        out=out,
        host=HOST,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return public.make(tmp_path / "public")


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """Where the adopted checkpoint goes."""
    return tmp_path / "student"


def test_an_adopted_policy_is_the_public_one(folder: Path, student: Path) -> None:
    run_adopt(folder, student, crop=1.0, unnorm_key="libero_spatial_no_noops")
    policy = load_policy(open_checkpoint(student))
    original = from_public(folder, crop=1.0)
    with torch.inference_mode():
        logits = policy.logits(OBSERVATIONS)
        assert torch.equal(logits, original.logits(OBSERVATIONS))
        # With another crop it is another policy.
        assert not torch.equal(logits, from_public(folder).logits(OBSERVATIONS))
    tokens = np.arange(56)[None]
    np.testing.assert_array_equal(policy.decode(tokens), original.decode(tokens))


def test_the_manifest_has_the_digests_of_the_files_and_not_their_folder(
    folder: Path, student: Path, tmp_path: Path
) -> None:
    manifest = run_adopt(folder, student)
    sources = (
        "config.json",
        "preprocessor_config.json",
        "dataset_statistics.json",
        "tokenizer.json",
        "model.safetensors",
    )
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sources}
    assert manifest.params["sources"] == digests
    assert manifest.parents == {}
    assert set(manifest.files) == {"model.safetensors", "tokenizer.json"}
    assert str(folder) not in manifest.to_json()
    elsewhere = public.make(tmp_path / "elsewhere")
    assert run_adopt(elsewhere, tmp_path / "second").digest == manifest.digest
    settled = ENVIRONMENT.model_copy(update={"settle": 11})
    assert run_adopt(folder, tmp_path / "third", settled).digest != manifest.digest


def test_a_policy_computes_in_the_precision_of_its_weights(folder: Path, student: Path) -> None:
    run_adopt(folder, student, dtype="bfloat16")
    policy = load_policy(open_checkpoint(student))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        logits = policy.logits(OBSERVATIONS)
        exact = from_public(folder).logits(OBSERVATIONS)
    assert logits.dtype == torch.float32
    assert 1e-4 < (logits - exact).abs().mean() < 0.1 * exact.std()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("render", "fast"),
        ("cameras", ("robot0_eye_in_hand",)),
        ("image_size", 128),
        ("wording", "bddl"),
    ],
)
def test_an_environment_unlike_the_benchmark_is_refused(
    folder: Path, student: Path, field: str, value: object
) -> None:
    environment = ENVIRONMENT.model_copy(update={field: value})
    expected = re.escape(repr(getattr(ENVIRONMENT, field)))
    message = (
        rf"environment\.{field} is {re.escape(repr(value))}; expected {expected}, "
        "with which public checkpoints"
    )
    with pytest.raises(ValueError, match=message):
        run_adopt(folder, student, environment)
    assert not student.exists()


def test_files_that_make_no_student_are_refused(folder: Path, student: Path) -> None:
    two_cameras = {"family": "package:other", "cameras": ("front", "wrist")}
    message = r"environment\.cameras is \['front', 'wrist'\]; expected one"
    with pytest.raises(ValueError, match=message):
        run_adopt(folder, student, ENVIRONMENT.model_copy(update=two_cameras))
    message = r"unnorm_key is 'bridge'; expected one of \['libero_spatial_no_noops'\]"
    with pytest.raises(ValueError, match=message):
        run_adopt(folder, student, unnorm_key="bridge")
    (folder / "tokenizer.json").unlink()
    message = r"public: has no tokenizer\.json; expected the checkpoint's own"
    with pytest.raises(ValueError, match=message):
        run_adopt(folder, student)
    assert not student.exists()


def test_an_interrupted_attempt_with_other_files_is_not_resumed(
    folder: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after the weights were written; the next attempt has another folder."""
    changed = public.make(tmp_path / "changed")
    weights = safetensors.torch.load_file(changed / "model.safetensors")
    weights["projector.fc1.bias"] += 1
    safetensors.torch.save_file(weights, changed / "model.safetensors")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stages.adopt.shutil.copyfile", interrupt)
        run_adopt(folder, student)
    assert (tmp_path / ".student.draft/model.safetensors").is_file()
    manifest = run_adopt(changed, student)
    assert manifest.digest == run_adopt(changed, tmp_path / "second").digest
    assert load_policy(open_checkpoint(student)).projector.fc1.bias.mean() > 0.9


def test_weights_that_are_not_finite_are_refused(folder: Path, student: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["projector.fc1.bias"][3] = torch.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    message = (
        r"model\.safetensors: projector\.fc1\.bias has NaN or infinite values; "
        "expected finite numbers"
    )
    with pytest.raises(ValueError, match=message):
        run_adopt(folder, student)


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_no_code_in_a_public_checkpoint_is_run(folder: Path, student: Path, tmp_path: Path) -> None:
    """Remote code that the config names, pickles under the usual names, a pickle as weights."""
    mark = tmp_path / "run"
    (folder / "modeling_prismatic.py").write_text(f"open({str(mark)!r}, 'w')")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Hostile(mark)))
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    run_adopt(folder, student)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(ValueError, match="not safetensors"):
        run_adopt(folder, tmp_path / "second")
    assert not mark.exists()


def test_an_adopted_family_cannot_be_trained_from_scratch(folder: Path, student: Path) -> None:
    run_adopt(folder, student)
    open_artifact(student, "checkpoint")
    facts = open_checkpoint(student).facts
    untrained = facts.model_copy(update={"policy": PolicyParams(family="openvla_oft")})
    message = (
        r"policy\.family is 'openvla_oft'; expected a family that can be trained from scratch "
        r"\(for this one, `adopt` a public checkpoint\)"
    )
    with pytest.raises(ValueError, match=message):
        build_policy(untrained)
