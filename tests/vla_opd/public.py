"""A public checkpoint that can be spoken to: the golden one, which the original code wrote, with a tokenizer of whole words."""

import json
import shutil
from pathlib import Path

import safetensors.torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

GOLDEN = Path(__file__).parents[1] / "data/openvla_oft"
WORDS = "In : What action should the robot take to pick up and place it in bowl alphabet soup basket ? Out"


def make(folder: Path) -> Path:
    """The checkpoint in a new folder; the ids of its tokenizer's special tokens are Llama's."""
    words = {word: 100 + i for i, word in enumerate(dict.fromkeys(WORDS.split()))}
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **words}, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    shutil.copytree(GOLDEN / "checkpoint", folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def in_shards(folder: Path) -> None:
    """The weights as two files and an index."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, some in parts.items():
        safetensors.torch.save_file({name: weights[name] for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
