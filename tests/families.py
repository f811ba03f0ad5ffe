"""One row a family of models: how to make a tiny random one, its inputs, and what eas_kit is to do with it.

`tests/test_conformance.py` runs every property on every row. To add a family, add its row to FAMILIES; a multimodal
one also says what one image adds to its inputs (an `Image`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    LlamaConfig,
)

from eas_kit.models.lavin import LavinConfig, LavinForConditionalGeneration

VOCAB, PAD, BOS, EOS = 97, 0, 1, 2
IMAGE, START, VIDEO = 96, 95, 94  # tokens that stand for a patch of an image, open one, and stand for a video's patch
LAYERS, WIDTH = 4, 36
WINDOW = 5  # of sliding attentions: shorter than the prompts, or it would not matter

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 52,  # experts want multiples of 16 bytes
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 211,
    "initializer_range": 0.2,  # large, so that every part of a random model matters
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
NO_HEAD_DIM = {"head_dim": None}  # families whose heads share out the width
VQ = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 16, "base_channels": 32} | {
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}
WORDS = {str(token): token for token in range(VOCAB - 1)} | {"<image>": VOCAB - 1}
WINDOWS = ["sliding_attention", "full_attention"] * (LAYERS // 2)


@dataclass(frozen=True)
class Image:
    """What one image adds to a row of the batch."""

    tokens: tuple[int, ...]
    """Put in after the row's first token."""
    tensors: Callable[[torch.Generator], dict[str, Tensor]]
    """Further inputs; those of a batch's images are joined along their first axis."""
    types: str | None = None
    """Name of the input (B, S) that is 1 where `tokens` stand for the image."""
    answer_types: str | None = None
    """Name of the input (B, S) that is 1 where the answer is."""
    blank: bool = False
    """True if in a batch with images a row without one needs tensors as well, of zeros."""


@dataclass(frozen=True)
class Family:
    """A row. `expect` is the result that is wanted:

    plain: x + FFN(PIA(LN1 x) g); tail: then the family's own tail; variant: a norm with a bias or without a weight, or
    parallel blocks; hybrid: only some layers are sites; moe: as plain, but the merge is refused where a skipped layer
    has experts; refused: attach raises.
    """

    name: str
    build: Callable[[], nn.Module]
    expect: str = "plain"
    image: Image | None = None
    sites: int = LAYERS
    says: str = ""
    """What the refusal must name: of attach for "refused", else of the merge."""
    unmergeable: tuple[int, ...] = ()
    """The sites that do not merge when they are skipped."""
    first: tuple[int, ...] = ()
    """Tokens that every row begins with."""
    kept_merge: bool = True
    """False if the adapters of kept attentions do not merge either."""
    refuses: dict[str, str] = field(default_factory=dict)
    """Properties that eas_kit may refuse for this family, with what the error must then say."""
    lacks: dict[str, str] = field(default_factory=dict)
    """Properties that transformers' own model of this family does not have, with the reason; the tests check that."""


# ----------------------------------------------------------------------------------------------------- the models


def finish(model: nn.Module, name: str) -> nn.Module:
    """Gains off one and biases off zero, or a test could not see one that is forgotten; eager attention; eval mode.

    No early end by a random end token, and no token for padding or an image in a generated text.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():  # Gemma 3 starts with images that say nothing
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.set_attn_implementation("eager")  # much the fastest at this size
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [PAD, VIDEO, START, IMAGE]
    return model.eval()


def _sizes(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (TEXT | changes).items() if value is not None}


def text(model_type: str, *, auto: type = AutoModelForCausalLM, **changes: Any) -> Callable[[], nn.Module]:
    """A text model: TEXT with changes (None takes a setting out)."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return finish(auto.from_config(AutoConfig.for_model(model_type, **_sizes(changes))), model_type)

    return build


LINEAR = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {"mamba_d_state": 5, "mamba_d_conv": 3, "mamba_expand": 2}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 3,
    "initializer_range": 0.2,
}


def multimodal(
    model_type: str, text_type: str, vision_type: str | None, vision: dict[str, Any], text: dict[str, Any], **top: Any
) -> Callable[[], nn.Module]:
    """A text model (TEXT changed by `text`) behind a vision tower (VISION changed by `vision`)."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        tower = {key: value for key, value in (VISION | vision).items() if value is not None}
        tower |= {"model_type": vision_type} if vision_type else {}
        config = AutoConfig.for_model(
            model_type,
            text_config=_sizes(text) | {"model_type": text_type},
            vision_config=tower,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            **{"tie_word_embeddings": False} | top,
        )
        return finish(AutoModelForImageTextToText.from_config(config), model_type)

    return build


def lavin() -> nn.Module:
    """eas_kit's own LaVIN: a Llama and a CLIP of three blocks, the class token taken after each."""
    torch.manual_seed(0)
    vision = VISION | {"image_size": 9, "num_hidden_layers": 3}
    config = LavinConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        modality_token_id=START,
        vision_step=1,
        projector_size=13,
        vision_rank=6,
        vision_dropout=0.0,
    )
    return finish(LavinForConditionalGeneration(config), "lavin")


# ----------------------------------------------------------------------------------------------------- the inputs


@dataclass(frozen=True)
class Row:
    """One example: its tokens, how many of them are the answer, where its image's patches are, the image's tensors."""

    tokens: list[int]
    answer: int = 0
    patches: tuple[int, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)


def make_rows(family: Family, lengths: tuple[tuple[int, int], ...], images: tuple[bool, ...], seed: int) -> list[Row]:
    """Rows of (prompt, answer) lengths; an image adds its tokens to a prompt. Text-only families have no image."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for (prompt, answer), wanted in zip(lengths, images, strict=True):
        tokens = [*family.first, *torch.randint(3, VIDEO, (prompt + answer,), generator=generator).tolist()]
        if family.image and wanted:
            tokens = [tokens[0], *family.image.tokens, *tokens[1:]]
            patches = tuple(place for place, token in enumerate(tokens) if token == IMAGE)
            rows.append(Row(tokens, answer, patches, family.image.tensors(generator)))
        else:
            rows.append(Row(tokens, answer))
    return rows


def collate(family: Family, rows: list[Row], *, side: str, labels: bool) -> dict[str, Tensor]:
    """A padded batch. With `labels` the answers carry them; without, the rows are prompts for generate."""
    longest = max(len(row.tokens) for row in rows)
    image, columns = family.image, {}
    for row in rows:
        length = len(row.tokens)
        start = length - row.answer
        cells = {"input_ids": (row.tokens, PAD), "attention_mask": ([1] * length, 0)}
        if labels:
            cells["labels"] = ([-100] * start + row.tokens[start:], -100)
        if image and image.types:
            cells[image.types] = ([int(place in row.patches) for place in range(length)], 0)
        if image and image.answer_types:
            cells[image.answer_types] = ([0] * start + [1] * row.answer, 0)
        for key, (values, filler) in cells.items():
            gap = [filler] * (longest - length)
            columns.setdefault(key, []).append(gap + values if side == "left" else values + gap)
    batch = {key: torch.tensor(values) for key, values in columns.items()}
    for key, like in {key: value for row in rows for key, value in row.tensors.items()}.items():
        blank = [torch.zeros_like(like)] if image.blank else []
        batch[key] = torch.cat([part for row in rows for part in ([row.tensors[key]] if row.tensors else blank)])
    return batch


def pixels(*shape: int, **more: list) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """pixel_values of that shape at random, and further tensors that every image has."""
    return lambda generator: {
        "pixel_values": torch.randn(*shape, generator=generator),
        **{key: torch.tensor(value) for key, value in more.items()},
    }


# A picture of 9 x 9 in patches of 3 x 3 is 9 patches; one of 12 x 12 is 16, which some families merge by fours.
QWEN_IMAGE = Image(
    (START, *[IMAGE] * 4), pixels(16, 3 * 2 * 3 * 3, image_grid_thw=[[1, 4, 4]]), types="mm_token_type_ids"
)
QWEN_TOP = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
TILES = [[9, 18], [18, 9]]  # of LLaVA-NeXT: the whole picture and two tiles of it, and a newline token a row
TILED_IMAGE = Image((IMAGE,) * (9 + 18 + 3), pixels(1, 3, 3, 9, 9, image_sizes=[[9, 18]]))
IDEFICS_IMAGE = Image(
    (IMAGE,) * 4,
    lambda generator: {
        "pixel_values": torch.randn(1, 1, 3, 12, 12, generator=generator),
        "pixel_attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.long),
    },
    blank=True,
)

NO_KEYWORDS = {"checkpointing": "passes no keywords on to it"}
PREFIX = "its prompt attends in both directions, and transformers lets it attend to the drafted tokens too"
STATEFUL = "its linear attention keeps a state that cannot go back behind rejected drafts"

FAMILIES: tuple[Family, ...] = (
    # text, sequential blocks
    Family("llama", text("llama")),
    Family("mistral", text("mistral", sliding_window=WINDOW)),
    Family("qwen2", text("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)),
    Family("qwen3", text("qwen3")),
    Family("smollm3", text("smollm3", no_rope_layers=[1, 0, 1, 0])),
    Family("gemma", text("gemma")),
    Family("gemma2", text("gemma2", sliding_window=WINDOW, layer_types=WINDOWS, query_pre_attn_scalar=16), "tail"),
    Family("gemma3_text", text("gemma3_text", sliding_window=WINDOW, layer_types=WINDOWS), "tail"),
    Family("phi3", text("phi3")),
    Family("glm", text("glm")),
    Family("glm4", text("glm4"), "tail"),
    Family("granite", text("granite", residual_multiplier=0.7, embedding_multiplier=1.3, logits_scaling=0.9), "tail"),
    Family("apertus", text("apertus")),
    # multimodal
    Family(
        "llava",
        multimodal("llava", "llama", "clip_vision_model", {"image_size": 9}, {}, image_token_id=IMAGE),
        image=Image((IMAGE,) * 9, pixels(1, 3, 9, 9)),
    ),
    Family("lavin", lavin, image=Image((IMAGE,) * 3, pixels(1, 3, 9, 9)), first=(START,)),
    Family(
        "llava_next",
        multimodal(
            "llava_next",
            "mistral",
            "clip_vision_model",
            {"image_size": 9},
            {"sliding_window": None},
            image_token_id=IMAGE,
            image_grid_pinpoints=TILES,
        ),
        image=TILED_IMAGE,
    ),
    Family(
        "llava_onevision",
        multimodal(
            "llava_onevision",
            "qwen2",
            "siglip_vision_model",
            {"image_size": 9, "vision_use_head": False},
            NO_HEAD_DIM,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=TILES,
        ),
        image=TILED_IMAGE,
    ),
    Family(
        "internvl",
        multimodal(
            "internvl",
            "qwen2",
            "internvl_vision",
            {"image_size": [12, 12], "patch_size": [3, 3]},
            NO_HEAD_DIM,
            image_token_id=IMAGE,
            image_seq_length=4,
        ),
        image=Image((IMAGE,) * 4, pixels(1, 3, 12, 12)),
    ),
    Family(
        "qwen2_vl",
        multimodal(
            "qwen2_vl",
            "qwen2_vl_text",
            None,
            {"depth": 2, "embed_dim": 24, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2},
            NO_HEAD_DIM | {"rope_parameters": QWEN_ROPE},
            **QWEN_TOP,
        ),
        image=QWEN_IMAGE,
    ),
    Family(
        "qwen2_5_vl",
        multimodal(
            "qwen2_5_vl",
            "qwen2_5_vl_text",
            None,
            {"depth": 2, "out_hidden_size": WIDTH, "num_heads": 2, "window_size": 6, "fullatt_block_indexes": [1]},
            NO_HEAD_DIM | {"rope_parameters": QWEN_ROPE},
            **QWEN_TOP,
        ),
        image=QWEN_IMAGE,
    ),
    Family(
        "qwen3_vl",
        multimodal(
            "qwen3_vl",
            "qwen3_vl_text",
            None,
            {
                "depth": 3,
                "out_hidden_size": WIDTH,
                "num_heads": 2,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            {"head_dim": 12, "rope_parameters": QWEN_ROPE},
            **QWEN_TOP,
        ),
        image=QWEN_IMAGE,
    ),
    Family(
        "smolvlm",
        multimodal("smolvlm", "llama", None, {"image_size": 12}, {}, image_token_id=IMAGE, scale_factor=2),
        image=IDEFICS_IMAGE,
    ),
    Family(
        "idefics3",
        multimodal("idefics3", "llama", None, {"image_size": 12}, {}, image_token_id=IMAGE, scale_factor=2),
        image=IDEFICS_IMAGE,
    ),
    Family(
        "paligemma",
        multimodal(
            "paligemma",
            "gemma",
            "siglip_vision_model",
            {"image_size": 9, "vision_use_head": False, "projection_dim": WIDTH},
            {},
            image_token_id=IMAGE,
            projection_dim=WIDTH,
        ),
        image=Image((IMAGE,) * 9, pixels(1, 3, 9, 9), answer_types="token_type_ids"),
        lacks={"drafts": PREFIX},
    ),
    Family(
        "gemma3",
        multimodal(
            "gemma3",
            "gemma3_text",
            "siglip_vision_model",
            {"image_size": 12, "vision_use_head": False},
            {"sliding_window": WINDOW, "layer_types": WINDOWS},
            image_token_id=IMAGE,
            boi_token_id=START,
            mm_tokens_per_image=4,
            initializer_range=0.2,
        ),
        "tail",
        image=Image((START, *[IMAGE] * 4), pixels(1, 3, 12, 12), types="token_type_ids"),
    ),
    # experts: what reads a skipped attention's adapter is a router and all experts, so that cannot be folded
    Family(
        "mixtral",
        text("mixtral", num_local_experts=4, sliding_window=None),
        "moe",
        says="MixtralSparseMoeBlock",
        unmergeable=(0, 1, 2, 3),
    ),
    Family(
        "qwen3_moe",
        text("qwen3_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[1]),
        "moe",
        says="Qwen3MoeSparseMoeBlock",
        unmergeable=(0, 2, 3),
    ),
    Family(
        "gpt_oss",
        text(
            "gpt_oss",
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            layer_types=WINDOWS,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "moe",
        says="GptOssMLP",
        unmergeable=(0, 1, 2, 3),
    ),
    Family(
        "deepseek_v3",
        text(
            "deepseek_v3",
            **NO_HEAD_DIM,
            num_key_value_heads=3,
            q_lora_rank=14,
            kv_lora_rank=10,
            qk_rope_head_dim=6,
            qk_nope_head_dim=8,
            v_head_dim=11,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=12,
            first_k_dense_replace=2,
        ),
        "moe",
        says="DeepseekV3MoE",
        unmergeable=(2, 3),
    ),
    Family(
        "llama4_text",
        text(
            "llama4_text",
            intermediate_size_mlp=53,
            num_local_experts=3,
            interleave_moe_layer_step=2,
            attention_chunk_size=64,
        ),
        "moe",
        says="Llama4TextMoe",
        unmergeable=(1, 3),
    ),
    Family(
        "olmoe",
        text("olmoe", **NO_HEAD_DIM, num_experts=4, num_experts_per_tok=2),
        "moe",
        says="OlmoeSparseMoeBlock",
        unmergeable=(0, 1, 2, 3),
    ),
    Family(
        "phimoe",
        text("phimoe", **NO_HEAD_DIM, num_local_experts=4),
        "moe",
        says="PhimoeSparseMoeBlock",
        unmergeable=(0, 1, 2, 3),
    ),
    # softmax attentions among others
    Family(
        "qwen3_next",
        text(
            "qwen3_next",
            num_hidden_layers=5,
            layer_types=["linear_attention", *["full_attention"] * 2, "linear_attention", "full_attention"],
            mlp_only_layers=[0, 1, 2, 3, 4],
            **LINEAR,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=12,
        ),
        "hybrid",
        sites=3,
        lacks={"drafts": STATEFUL},
    ),
    Family(
        "qwen3_5_text",
        text(
            "qwen3_5_text",
            num_hidden_layers=5,
            layer_types=["linear_attention", *["full_attention"] * 2, "linear_attention", "full_attention"],
            **LINEAR,
        ),
        "hybrid",
        sites=3,
        lacks={"drafts": STATEFUL},
    ),
    Family(
        "jamba",
        text(
            "jamba",
            **NO_HEAD_DIM,
            **MAMBA,
            num_hidden_layers=5,
            attn_layer_period=2,
            attn_layer_offset=0,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            num_experts_per_tok=1,
            mamba_dt_rank=3,
            use_mamba_kernels=False,
        ),
        "hybrid",
        sites=3,
        lacks={"drafts": STATEFUL},
    ),
    Family(
        "bamba",
        text(
            "bamba",
            **NO_HEAD_DIM,
            **MAMBA,
            num_hidden_layers=5,
            attn_layer_indices=[1, 2, 4],
            mamba_n_heads=6,
            mamba_d_head=12,
            mamba_n_groups=1,
            mamba_chunk_size=8,
        ),
        "hybrid",
        sites=3,
        lacks={"drafts": STATEFUL},
    ),
    Family(
        "lfm2",
        text(
            "lfm2",
            **NO_HEAD_DIM,
            num_hidden_layers=5,
            layer_types=["conv", "full_attention", "full_attention", "conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
            conv_L_cache=3,
        ),
        "hybrid",
        sites=3,
    ),
    # a norm with a bias or without a weight; attention and feed-forward side by side
    Family("starcoder2", text("starcoder2", **NO_HEAD_DIM, sliding_window=WINDOW), "variant"),
    Family("stablelm", text("stablelm", **NO_HEAD_DIM, partial_rotary_factor=0.5), "variant", refuses=NO_KEYWORDS),
    Family(
        "gpt2", text("gpt2", **NO_HEAD_DIM, num_key_value_heads=None, intermediate_size=None, n_inner=53), "variant"
    ),
    Family("nemotron", text("nemotron"), "variant", refuses=NO_KEYWORDS),
    Family("olmo", text("olmo"), "variant"),
    Family("phi", text("phi", **NO_HEAD_DIM), "variant"),
    Family("cohere", text("cohere", logit_scale=0.9), "variant"),
    Family("cohere2", text("cohere2", logit_scale=0.9, sliding_window=WINDOW, layer_types=WINDOWS), "variant"),
    Family("gpt_neox", text("gpt_neox", **NO_HEAD_DIM, rotary_pct=0.5), "variant"),
    Family("gpt_neox_sequential", text("gpt_neox", **NO_HEAD_DIM, use_parallel_residual=False), "variant"),
    Family(
        "falcon",
        text("falcon", **NO_HEAD_DIM),
        "variant",
        unmergeable=(0, 1, 2, 3),
        kept_merge=False,
        says="FalconLinear",
        refuses=NO_KEYWORDS,
    ),
    Family("gptj", text("gptj", **NO_HEAD_DIM, rotary_dim=6), "variant", refuses=NO_KEYWORDS),
    Family(
        "codegen", text("codegen", **NO_HEAD_DIM, num_attention_heads=4, rotary_dim=4), "variant", refuses=NO_KEYWORDS
    ),
    # refused, by name
    Family(
        "gemma3n_text",
        text(
            "gemma3n_text",
            layer_types=WINDOWS,
            sliding_window=WINDOW,
            num_kv_shared_layers=0,
            hidden_size_per_layer_input=7,
            vocab_size_per_layer_input=VOCAB,
            laurel_rank=5,
            activation_sparsity_pattern=[0.0] * LAYERS,
        ),
        "refused",
        says="Gemma3n",
    ),
    Family(
        "gemma4_text",
        text(
            "gemma4_text",
            layer_types=WINDOWS,
            sliding_window=WINDOW,
            hidden_size_per_layer_input=7,
            vocab_size_per_layer_input=VOCAB,
        ),
        "refused",
        says="Gemma4",
    ),
    Family("olmo2", text("olmo2"), "refused", says="Olmo2DecoderLayer"),
    Family("olmo3", text("olmo3"), "refused", says="Olmo3DecoderLayer"),
    Family(
        "exaone4", text("exaone4", sliding_window=WINDOW, layer_types=WINDOWS), "refused", says="Exaone4DecoderLayer"
    ),
    Family(
        "falcon_two_norms",
        text("falcon", **NO_HEAD_DIM, new_decoder_architecture=True),
        "refused",
        says="FalconDecoderLayer",
    ),
    Family(
        "mllama",
        multimodal(
            "mllama",
            "mllama_text_model",
            None,
            {
                "num_attention_heads": None,
                "attention_heads": 2,
                "num_global_layers": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 48,
                "image_size": 9,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            NO_HEAD_DIM | {"num_hidden_layers": 5, "cross_attention_layers": [1]},
            image_token_id=IMAGE,
        ),
        "refused",
        says="MllamaCrossAttentionDecoderLayer",
    ),
    Family(
        "chameleon_swin",
        text(
            "chameleon",
            auto=AutoModelForImageTextToText,
            **NO_HEAD_DIM,
            swin_norm=True,
            vq_config=VQ,
            vocabulary_map=WORDS,
        ),
        "refused",
        says="ChameleonSwinDecoderLayer has parts with names that eas_kit knows, but",
    ),
    Family("minimax", text("minimax", num_local_experts=2, block_size=8), "refused", says="MiniMaxDecoderLayer"),
    Family(
        "gpt_neox_japanese",
        text("gpt_neox_japanese", **NO_HEAD_DIM, intermediate_multiple_size=2),
        "refused",
        says="GPTNeoXJapaneseLayer",
    ),
    Family("openai_gpt", text("openai-gpt", **NO_HEAD_DIM), "refused", says="Block"),
    Family("opt", text("opt", **NO_HEAD_DIM, ffn_dim=53, word_embed_proj_dim=WIDTH), "refused", says="OPTDecoderLayer"),
    Family("nemotron_h", text("nemotron_h"), "refused", says="NemotronHBlock"),
    Family("t5", text("t5", auto=AutoModelForSeq2SeqLM, num_layers=2, d_kv=6), "refused", says="T5"),
    Family("mamba", text("mamba", state_size=5), "refused", says="MambaBlock"),
)
