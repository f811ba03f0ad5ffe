"""A model folder and a task for runs that are launched as processes of their own; see test_launch.py."""

from __future__ import annotations

from pathlib import Path

import toys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class LaunchedTask(toys.ToyTask):
    """The toy task as `load_task` wants one: the processor first."""

    def __init__(self, processor, sizes: dict[str, int] | None = None) -> None:
        super().__init__(sizes, images=False)


def save_model(folder: Path) -> Path:
    """A random Llama with a tokenizer beside it, which the task does not use."""
    toys.make_llama().save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({str(number): number for number in range(toys.VOCAB)}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="0").save_pretrained(folder)
    return folder
