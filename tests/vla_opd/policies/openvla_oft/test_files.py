"""Public folders as people have them: what a file says is honoured or refused by name, and what isn't there is said in one message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stages.__main__ as command
from tests.vla_opd import public
from tests.vla_opd.policies.openvla_oft.test_layout import edit
from vla_opd.artifacts.manifest import open_artifact
from vla_opd.policies.openvla_oft.files import read_tokenizer
from vla_opd.policies.openvla_oft.layout import read_public
from vla_opd.policies.openvla_oft.model import from_public

KEY = "libero_spatial_no_noops"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
ADOPTING = """
run: {{name: test}}
environment: {{tasks: [libero_object/0], cameras: [agentview], image_size: 256, render: exact, wording: benchmark}}
demonstrations: {{}}
pretrained: {{}}
finetuned: {{}}
adopt: {{student: {{folder: "{folder}", dtype: float32}}, teacher: {{folder: "{folder}", dtype: float32}}}}
sample: {{observe_every: 8}}
iterations: {{}}
evaluations: {{}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return public.make(tmp_path / "public")


@pytest.fixture
def adopted(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """The exit code of `adopt`, and what it says."""
    monkeypatch.chdir(tmp_path)

    def adopt(where: Path | str = folder) -> tuple[int, str]:
        (tmp_path / "params.yaml").write_text(ADOPTING.format(folder=where))
        code = command.main(["adopt", "--name", "student", "--device", "cpu", "--tracking", "none"])
        return code, capsys.readouterr().err

    return adopt


def answers(folder: Path) -> torch.Tensor:
    policy = from_public(folder)
    pixels = policy.normalised(
        np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    )
    with torch.inference_mode():
        return policy(pixels, torch.tensor([[1, 50, 60, 29871]]), torch.tensor([4]))


def test_a_missing_shard_is_one_message(
    folder: Path, adopted: Callable[..., tuple[int, str]]
) -> None:
    public.in_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    code, said = adopted()
    assert code == 2
    assert "model-00002-of-00002.safetensors: missing" in said
    assert "the download isn't complete" in said
    assert said.count("\n") == 1


def a_folder_in_place_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path) -> None:
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
@pytest.mark.parametrize("spoil", [a_folder_in_place_of, a_dangling_link])
def test_a_file_that_cannot_be_read_is_one_message(
    folder: Path, adopted: Callable[..., tuple[int, str]], name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(folder / name)
    code, said = adopted()
    assert code == 2
    assert name in said
    assert said.count("\n") == 1


def test_a_folder_that_is_a_file_or_not_there_is_one_message(
    folder: Path, adopted: Callable[..., tuple[int, str]]
) -> None:
    for where in (folder / "config.json", folder / "nowhere"):
        code, said = adopted(where)
        assert (code, f"{where}: is no folder" in said) == (2, True)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "dataset_statistics.json"]
)
def test_a_git_lfs_pointer_is_called_one(
    folder: Path, adopted: Callable[..., tuple[int, str]], name: str
) -> None:
    (folder / name).write_text(POINTER)
    code, said = adopted()
    assert code == 2
    assert f"{name}: is a git-lfs pointer, not the file" in said


def test_a_pointer_among_shards_is_called_one(
    folder: Path, adopted: Callable[..., tuple[int, str]]
) -> None:
    public.in_shards(folder)
    (folder / "model-00001-of-00002.safetensors").write_text(POINTER)
    assert "model-00001-of-00002.safetensors: is a git-lfs pointer" in adopted()[1]


@pytest.mark.parametrize("where", ["~/ck", "~someone/ck", "$HOME/ck", "${HOME}/ck"])
def test_a_tilde_in_a_folder_is_refused_by_the_schema(
    adopted: Callable[..., tuple[int, str]], where: str
) -> None:
    code, said = adopted(where)
    assert code == 2
    assert (
        f"adopt.student.folder is '{where}': expected a plain path: neither ~ nor $VARIABLE is expanded"
        in said
    )


def test_statistics_in_config_json_alone_are_used_and_named(
    folder: Path, adopted: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (folder / "dataset_statistics.json").unlink()
    code, said = adopted()
    assert code == 0, said
    made = open_artifact(tmp_path / "artifacts/test/checkpoints/student", "checkpoint")
    theirs = json.loads((folder / "config.json").read_text())["norm_stats"]["bridge_orig"]["action"]
    assert made.facts["checkpoint"]["action_space"]["q01"] == theirs["q01"]
    assert made.params["statistics"] == "config.json"


def test_of_several_statistics_in_config_json_one_has_to_be_named(folder: Path) -> None:
    (folder / "dataset_statistics.json").unlink()
    edit(folder / "config.json", lambda config: config["norm_stats"].update(fractal={"action": {}}))
    with pytest.raises(
        ValueError,
        match=r"config\.json: unnorm_key is None; expected one of \['bridge_orig', 'fractal'\]",
    ):
        read_public(folder, None)
    assert read_public(folder, "bridge_orig").space.action_dim == 7


@pytest.mark.parametrize(
    "other", [{"action": {"mean": [0.0]}}, {"num_trajectories": 3}, {}, "nothing", None]
)
def test_another_datasets_entry_is_not_looked_into(folder: Path, other: object) -> None:
    whole = read_public(folder, KEY)
    edit(folder / "dataset_statistics.json", lambda statistics: statistics.update(other=other))
    assert read_public(folder, KEY) == whole
    with pytest.raises(ValueError, match=r"dataset_statistics\.json: other.*"):
        read_public(folder, "other")


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_theta": 500000.0}, "rope_theta": 500000.0},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 500000.0}},
    ],
)
def test_rope_theta_is_honoured_as_either_version_spells_it(
    folder: Path, spelling: dict[str, Any]
) -> None:
    plain = answers(folder)
    edit(folder / "config.json", lambda config: config["text_config"].update(rope_theta=500000.0))
    expected = answers(folder)
    assert not torch.equal(plain, expected)
    edit(
        folder / "config.json",
        lambda config: (
            config["text_config"].pop("rope_theta"),
            config["text_config"].update(spelling),
        ),
    )
    assert torch.equal(answers(folder), expected)


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        ("text_config", "attention_bias", True),
        ("text_config", "mlp_bias", True),
        ("text_config", "pretraining_tp", 2),
        ("text_config", "head_dim", 32),
        ("text_config", "tie_word_embeddings", True),
        ("text_config", "sliding_window", 4096),
        ("text_config", "rope_parameters", {"rope_type": "llama3", "rope_theta": 10000.0}),
        ("text_config", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        (None, "timm_override_act_layers", [None, "quick_gelu"]),
        (None, "quantization_config", {"load_in_4bit": True}),
        (None, "vision_backbone_id", "siglip-vit-so400m"),
    ],
)
def test_a_setting_that_changes_the_numbers_is_refused_by_name(
    folder: Path, part: str | None, setting: str, value: object
) -> None:
    edit(
        folder / "config.json",
        lambda config: (config[part] if part else config).update({setting: value}),
    )
    with pytest.raises(
        ValueError,
        match=rf"config\.json: {f'{part}.' if part else ''}(it.*)?{setting}.* is .*; expected|{setting} is .*; expected",
    ):
        read_public(folder, None)


def test_rope_theta_said_twice_and_differently_is_refused(folder: Path) -> None:
    edit(
        folder / "config.json",
        lambda config: config["text_config"].update(
            rope_theta=1e4, rope_parameters={"rope_theta": 5e5}
        ),
    )
    with pytest.raises(
        ValueError, match=r"rope_theta is \[10000\.0, 500000\.0\] in one file; expected one value"
    ):
        read_public(folder, None)


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
    edit(folder / "preprocessor_config.json", lambda processor: processor.update({setting: value}))
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {setting}"):
        read_public(folder, None)


def test_an_image_processor_in_processor_config_json_is_read(folder: Path) -> None:
    plain = read_public(folder, None)
    own = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": own, "processor_class": "PrismaticProcessor"})
    )
    assert read_public(folder, None) == plain  # both, and the same
    (folder / "preprocessor_config.json").unlink()
    assert read_public(folder, None) == plain
    edit(
        folder / "processor_config.json",
        lambda found: found["image_processor"].update(tvf_do_letterbox=True),
    )
    with pytest.raises(
        ValueError,
        match=r"processor_config\.json: image_processor\.tvf_do_letterbox is True; expected False",
    ):
        read_public(folder, None)


def test_image_processors_that_disagree_are_refused(folder: Path) -> None:
    own = json.loads((folder / "preprocessor_config.json").read_text())
    own["tvf_normalize_params"][0]["mean"] = [0.485, 0.456, 0.406]
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    with pytest.raises(
        ValueError,
        match=r"processor_config\.json: its image_processor says other things than preprocessor_config\.json",
    ):
        read_public(folder, None)


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
    ordinary = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "added_tokens_decoder": {"2": {"content": "</s>", "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(ordinary))
    assert read_tokenizer(folder) is not None
    (folder / "tokenizer_config.json").write_text(json.dumps(ordinary | {setting: value}))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {setting}"):
        read_tokenizer(folder)


def test_a_tokenizer_neither_truncates_nor_pads(folder: Path) -> None:
    plain = read_tokenizer(folder)
    assert plain is not None
    ids = plain.encode("pick up the alphabet soup and place it in the basket").ids
    edit(
        folder / "tokenizer.json",
        lambda found: found.update(
            truncation={
                "direction": "Right",
                "max_length": 4,
                "strategy": "LongestFirst",
                "stride": 0,
            },
            padding={
                "strategy": {"Fixed": 64},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "x",
            },
        ),
    )
    shortened = read_tokenizer(folder)
    assert shortened is not None
    assert shortened.encode("pick up the alphabet soup and place it in the basket").ids == ids


def test_what_was_read_of_the_folder_is_in_the_manifest(
    folder: Path, adopted: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    shutil.move(folder / "preprocessor_config.json", tmp_path / "own.json")
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": json.loads((tmp_path / "own.json").read_text())})
    )
    (folder / "tokenizer_config.json").write_text("{}")
    assert adopted()[0] == 0
    sources = open_artifact(tmp_path / "artifacts/test/checkpoints/student", "checkpoint").params[
        "sources"
    ]
    assert {"processor_config.json", "tokenizer_config.json"} < set(sources)


def test_settings_that_transformers_writes_of_itself_are_no_mistakes(folder: Path) -> None:
    """All that a full dump of either version holds, at its defaults."""
    from transformers import LlamaConfig, PreTrainedConfig

    plain = read_public(folder, None)
    own = json.loads((folder / "config.json").read_text())
    text = json.loads(
        json.dumps(
            LlamaConfig().to_dict() | {"_attn_implementation_autoset": True} | own["text_config"]
        )
    )
    edit(
        folder / "config.json",
        lambda config: config.update(
            {**json.loads(json.dumps(PreTrainedConfig().to_dict())), **own, "text_config": text}
        ),
    )
    edit(
        folder / "config.json",
        lambda config: (
            config["text_config"].pop("head_dim", None),
            config["text_config"].update(rms_norm_eps=1e-6),
        ),
    )
    assert read_public(folder, None) == plain


def test_a_tokenizer_that_does_not_begin_a_sequence_is_refused_before_any_rollout(
    folder: Path, adopted: Callable[..., tuple[int, str]]
) -> None:
    edit(folder / "tokenizer.json", lambda found: found.update(post_processor=None))
    code, said = adopted()
    assert code == 2
    assert "tokenizer.json: begins a prompt with id" in said
