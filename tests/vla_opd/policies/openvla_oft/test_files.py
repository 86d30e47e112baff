"""Files of public checkpoints as users have them.

A setting is honored or refused by name, and a file that is missing or damaged is one message.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

import stages.__main__ as command
from tests.vla_opd import public
from vla_opd.artifacts.manifest import open_artifact
from vla_opd.policies.openvla_oft.files import read_tokenizer
from vla_opd.policies.openvla_oft.layout import read_public
from vla_opd.policies.openvla_oft.model import from_public

KEY = "libero_spatial_no_noops"
INSTRUCTION = "pick up the alphabet soup and place it in the basket"
POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""
PARAMS = """
run: {{name: test}}
environment:
  tasks: [libero_object/0]
  cameras: [agentview]
  image_size: 256
  render: exact
  wording: benchmark
demonstrations: {{}}
pretrained: {{}}
finetuned: {{}}
adopt:
  student: {{folder: "{folder}", dtype: float32}}
  teacher: {{folder: "{folder}", dtype: float32}}
sample: {{observe_every: 8}}
iterations: {{}}
evaluations: {{}}
"""


class Outcome(NamedTuple):
    """Of a command: its exit code, and what it printed to stderr."""

    code: int
    message: str


Adopt = Callable[[Path | str], Outcome]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return public.make(tmp_path / "public")


@pytest.fixture
def adopt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Adopt:
    """The stage `adopt`, of a public folder."""
    monkeypatch.chdir(tmp_path)

    def run(folder: Path | str) -> Outcome:
        (tmp_path / "params.yaml").write_text(PARAMS.format(folder=folder))
        code = command.main(["adopt", "--name", "student", "--device", "cpu", "--tracking", "none"])
        return Outcome(code, capsys.readouterr().err)

    return run


def edit_config(folder: Path, **settings: object) -> None:
    public.edit(folder / "config.json", lambda config: config.update(settings))


def edit_text_config(folder: Path, **settings: object) -> None:
    public.edit(folder / "config.json", lambda config: config["text_config"].update(settings))


def read_settings(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def logits(folder: Path) -> Tensor:
    policy = from_public(folder)
    images = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    prompt = torch.tensor([[1, 50, 60, 29871]])
    with torch.inference_mode():
        return policy(policy.normalize(images), prompt, torch.tensor([4]))


# Files


def test_a_missing_shard_is_one_message(folder: Path, adopt: Adopt) -> None:
    public.in_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    code, message = adopt(folder)
    assert code == 2
    assert "model-00002-of-00002.safetensors: missing" in message
    assert "the download is incomplete" in message
    assert message.count("\n") == 1


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("../blobs/gone")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "preprocessor_config.json",
        "dataset_statistics.json",
        "tokenizer.json",
        "model.safetensors",
    ],
)
@pytest.mark.parametrize("damage", [replace_by_folder, replace_by_dangling_link])
def test_a_file_that_cannot_be_read_is_one_message(
    folder: Path, adopt: Adopt, name: str, damage: Callable[[Path], None]
) -> None:
    damage(folder / name)
    code, message = adopt(folder)
    assert code == 2
    assert name in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "nowhere"])
def test_a_folder_that_is_a_file_or_missing_is_one_message(
    folder: Path, adopt: Adopt, name: str
) -> None:
    code, message = adopt(folder / name)
    assert code == 2
    assert f"{folder / name}: is not a folder" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "dataset_statistics.json"]
)
def test_a_git_lfs_pointer_is_named(folder: Path, adopt: Adopt, name: str) -> None:
    (folder / name).write_text(POINTER)
    code, message = adopt(folder)
    assert code == 2
    assert f"{name}: is a git-lfs pointer; expected the file it points to" in message


def test_a_pointer_among_shards_is_named(folder: Path, adopt: Adopt) -> None:
    public.in_shards(folder)
    (folder / "model-00001-of-00002.safetensors").write_text(POINTER)
    assert "model-00001-of-00002.safetensors: is a git-lfs pointer" in adopt(folder).message


@pytest.mark.parametrize("path", ["~/ck", "~someone/ck", "$HOME/ck", "${HOME}/ck"])
def test_a_tilde_in_a_folder_is_refused_by_the_schema(adopt: Adopt, path: str) -> None:
    code, message = adopt(path)
    assert code == 2
    assert (
        f"adopt.student.folder is '{path}': "
        "expected a plain path: neither ~ nor $VARIABLE is expanded"
    ) in message


def test_the_manifest_lists_every_file_that_was_read(
    folder: Path, adopt: Adopt, tmp_path: Path
) -> None:
    settings = read_settings(folder / "preprocessor_config.json")
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    (folder / "tokenizer_config.json").write_text("{}")
    assert adopt(folder).code == 0
    student = open_artifact(tmp_path / "artifacts/test/checkpoints/student", "checkpoint")
    files = {path.name for path in folder.iterdir()}
    assert set(student.params["sources"]) == files - {"generation_config.json"}


# Action statistics


def test_statistics_in_config_json_alone_are_used_and_named(
    folder: Path, adopt: Adopt, tmp_path: Path
) -> None:
    (folder / "dataset_statistics.json").unlink()
    code, message = adopt(folder)
    assert code == 0, message
    student = open_artifact(tmp_path / "artifacts/test/checkpoints/student", "checkpoint")
    datasets = read_settings(folder / "config.json")["norm_stats"]
    q01 = datasets["bridge_orig"]["action"]["q01"]
    assert student.facts["checkpoint"]["action_space"]["q01"] == q01
    assert student.params["statistics"] == "config.json"


def test_a_data_set_of_config_json_is_named_if_there_are_several(folder: Path) -> None:
    (folder / "dataset_statistics.json").unlink()
    public.edit(
        folder / "config.json", lambda config: config["norm_stats"].update(fractal={"action": {}})
    )
    message = r"config\.json: unnorm_key is None; expected one of \['bridge_orig', 'fractal'\]"
    with pytest.raises(ValueError, match=message):
        read_public(folder, None)
    assert read_public(folder, "bridge_orig").space.action_dim == 7


@pytest.mark.parametrize(
    "entry", [{"action": {"mean": [0.0]}}, {"num_trajectories": 3}, {}, "nothing", None]
)
def test_another_datasets_entry_is_not_validated(folder: Path, entry: object) -> None:
    expected = read_public(folder, KEY)
    public.edit(folder / "dataset_statistics.json", lambda datasets: datasets.update(second=entry))
    assert read_public(folder, KEY) == expected
    with pytest.raises(ValueError, match=r"dataset_statistics\.json: second.*"):
        read_public(folder, "second")


# config.json


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_theta": 500000.0}, "rope_theta": 500000.0},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 500000.0}},
    ],
)
def test_rope_theta_is_honored_in_either_versions_spelling(
    folder: Path, spelling: dict[str, Any]
) -> None:
    default = logits(folder)
    text = read_settings(folder / "config.json")["text_config"]
    edit_config(folder, text_config=text | {"rope_theta": 500000.0})
    expected = logits(folder)
    assert not torch.equal(default, expected)
    edit_config(folder, text_config=text | spelling)
    assert torch.equal(logits(folder), expected)


def test_rope_theta_with_two_values_is_refused(folder: Path) -> None:
    edit_text_config(folder, rope_theta=1e4, rope_parameters={"rope_theta": 5e5})
    message = r"rope_theta is \[10000\.0, 500000\.0\] in one file; expected one value"
    with pytest.raises(ValueError, match=message):
        read_public(folder, None)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("pretraining_tp", 2),
        ("head_dim", 32),
        ("tie_word_embeddings", True),
        ("sliding_window", 4096),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 10000.0}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_a_setting_that_changes_the_language_model_is_refused_by_name(
    folder: Path, setting: str, value: object
) -> None:
    edit_text_config(folder, **{setting: value})
    message = rf"config\.json: text_config.*{setting}.* is .*; .*expected"
    with pytest.raises(ValueError, match=message):
        read_public(folder, None)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("timm_override_act_layers", [None, "quick_gelu"]),
        ("quantization_config", {"load_in_4bit": True}),
        ("vision_backbone_id", "siglip-vit-so400m"),
    ],
)
def test_a_setting_that_changes_the_policy_is_refused_by_name(
    folder: Path, setting: str, value: object
) -> None:
    edit_config(folder, **{setting: value})
    message = rf"config\.json: {setting}.* is .*; .*expected"
    with pytest.raises(ValueError, match=message):
        read_public(folder, None)


def test_every_default_that_transformers_writes_is_accepted(folder: Path) -> None:
    """Complete dumps of the configurations, whose `head_dim` is that of other sizes."""
    expected = read_public(folder, None)
    config = read_settings(folder / "config.json")
    llama = LlamaConfig().to_dict() | {"_attn_implementation_autoset": True}
    text = llama | config["text_config"] | {"rms_norm_eps": 1e-6}
    text.pop("head_dim", None)
    complete = PreTrainedConfig().to_dict() | config | {"text_config": text}
    (folder / "config.json").write_text(json.dumps(complete))
    assert read_public(folder, None) == expected


# Image processor


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("tvf_do_letterbox", True),
        ("image_resize_strategy", "letterbox"),
        ("tvf_resize_params", [{"size": [384, 384]}, {"size": [224, 224]}]),
        ("tvf_crop_params", [{"output_size": [200, 200]}] * 2),
        ("do_rescale", False),
    ],
)
def test_a_setting_of_the_image_processor_is_refused_by_name(
    folder: Path, setting: str, value: object
) -> None:
    public.edit(
        folder / "preprocessor_config.json", lambda processor: processor.update({setting: value})
    )
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {setting}"):
        read_public(folder, None)


def test_an_image_processor_in_processor_config_json_is_read(folder: Path) -> None:
    expected = read_public(folder, None)
    old = folder / "preprocessor_config.json"
    new = folder / "processor_config.json"
    settings = read_settings(old)
    content = {"image_processor": settings, "processor_class": "PrismaticProcessor"}
    new.write_text(json.dumps(content))
    assert read_public(folder, None) == expected  # the same settings in both files
    old.unlink()
    assert read_public(folder, None) == expected
    content["image_processor"] = settings | {"tvf_do_letterbox": True}
    new.write_text(json.dumps(content))
    message = r"processor_config\.json: image_processor\.tvf_do_letterbox is True; expected False"
    with pytest.raises(ValueError, match=message):
        read_public(folder, None)


def test_image_processors_that_disagree_are_refused(folder: Path) -> None:
    settings = read_settings(folder / "preprocessor_config.json")
    settings["tvf_normalize_params"][0]["mean"] = [0.485, 0.456, 0.406]
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    message = r"processor_config\.json: image_processor differs from preprocessor_config\.json"
    with pytest.raises(ValueError, match=message):
        read_public(folder, None)


# Tokenizer


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("add_bos_token", False),
        ("add_eos_token", True),
        ("do_lower_case", True),
        ("added_tokens_decoder", {"102": {"content": "bowl"}}),
    ],
)
def test_a_tokenizer_that_transformers_would_change_is_refused(
    folder: Path, setting: str, value: object
) -> None:
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "added_tokens_decoder": {"2": {"content": "</s>", "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_tokenizer(folder) is not None
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {setting: value}))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {setting}"):
        read_tokenizer(folder)


def encode(folder: Path) -> list[int]:
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer.encode(INSTRUCTION).ids


def test_a_tokenizer_neither_truncates_nor_pads(folder: Path) -> None:
    expected = encode(folder)
    truncation = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    public.edit(
        folder / "tokenizer.json",
        lambda tokenizer: tokenizer.update(truncation=truncation, padding=padding),
    )
    assert encode(folder) == expected


def test_a_tokenizer_that_begins_without_bos_is_refused(folder: Path, adopt: Adopt) -> None:
    public.edit(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=None))
    code, message = adopt(folder)
    assert code == 2
    assert "tokenizer.json: begins a prompt with id" in message
