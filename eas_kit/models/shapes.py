"""Configurations of the models of the papers, by name: sizes alone, no weights, nothing downloaded.

The numbers are those of the published checkpoints; `tests/test_paper_sizes.py` holds the parameters they give against
the published counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from eas_kit.errors import ConfigError

LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
VICUNA_7B = LLAMA_7B | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}  # v1.5, tuned from Llama 2
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_LARGE_336 = CLIP_LARGE | {"image_size": 336}


def _llama_7b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**LLAMA_7B, dtype="float16")


def _vicuna_7b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**VICUNA_7B, dtype="float16")


def _llava_7b() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = VICUNA_7B | {"vocab_size": 32064}  # an image token, a padding token, and filled up to a multiple of 64
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_LARGE_336),
        text_config=LlamaConfig(**text),
        image_token_id=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        dtype="float16",
    )


def _lavin_7b() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig

    from .lavin import LavinConfig

    text = LLAMA_7B | {"vocab_size": 32003}  # an image, a modality and a padding token
    return LavinConfig(
        vision_config=CLIPVisionConfig(**CLIP_LARGE),
        text_config=LlamaConfig(**text),
        image_token_id=32000,
        modality_token_id=32001,
        dtype="float16",
    )


def _qwen_7b() -> Any:
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, dtype="bfloat16")


def _meter(task: str) -> Any:
    from .meter import paper_size

    return paper_size(task)


PAPER_SIZES: dict[str, Callable[[], Any]] = {
    "llama-7b": _llama_7b,
    "vicuna-7b": _vicuna_7b,
    "llava-1.5-7b": _llava_7b,
    "lavin-7b": _lavin_7b,
    "qwen2.5-vl-7b": _qwen_7b,
}
# no decoders: sites, parameters and operations can be told, the memory of a KV cache cannot
METER_SIZES: dict[str, Callable[[], Any]] = {
    f"meter-{task}": partial(_meter, task) for task in ("vqa", "nlvr2", "retrieval")
}


def paper_config(name: str) -> Any:
    """A new transformers config: "llama-7b", "vicuna-7b" (v1.5), "llava-1.5-7b", "lavin-7b", "qwen2.5-vl-7b", or METER
    with the head and the picture size of a task, "meter-vqa", "meter-nlvr2", "meter-retrieval".

    For `eas_kit.describe`, `eas_kit.measure` and `eas_kit.estimate_memory`, which need no weights. Raises ConfigError
    for another name.
    """
    every = PAPER_SIZES | METER_SIZES
    if name not in every:
        raise ConfigError(f"paper_config: wanted one of {list(every)}, got {name!r}")
    return every[name]()
