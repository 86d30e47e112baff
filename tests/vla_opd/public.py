"""A public checkpoint with a tokenizer: the golden one, written by the original code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

GOLDEN = Path(__file__).parents[1] / "data/openvla_oft"
WORDS = (
    "In : What action should the robot take to pick up and place it in bowl alphabet soup basket ? "
    "Out"
)


def make(folder: Path) -> Path:
    """Copy the checkpoint to a new folder, with a tokenizer of words and Llama's special tokens."""
    words = {word: 100 + i for i, word in enumerate(dict.fromkeys(WORDS.split()))}
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **words}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    shutil.copytree(GOLDEN / "checkpoint", folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def in_shards(folder: Path) -> None:
    """Split the weights into two files with an index."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    shards = {
        "model-00001-of-00002.safetensors": sorted(weights)[::2],
        "model-00002-of-00002.safetensors": sorted(weights)[1::2],
    }
    weight_map: dict[str, str] = {}
    for file, names in shards.items():
        safetensors.torch.save_file({name: weights[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
