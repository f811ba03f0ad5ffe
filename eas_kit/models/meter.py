"""METER (Dou et al. 2022, arXiv 2111.02387), of stock parts: RoBERTa, CLIP's vision tower, BERT's attentions.

    text  (B, S) --> RoBERTa ----------------> Linear + type 0 --> 6 x co-attention --> tanh pooler --+
                                                                       |   ^                          +--> head
    image (B, 3, H, W) --> CLIP's blocks --> Linear + type 1 -----> 6 x co-attention --> tanh pooler --+
                           but the last, ln_post

Each co-attention layer is BERT's, its norms behind the sums: self-attention, cross-attention to what the other stream
brings *into* the same layer, feed-forward. That makes 24 attentions that can be skipped (`post_norm.py`), in the order
text self 0-5, text cross 6-11, image self 12-17, image cross 18-23.

Heads, on the two poolers side by side (2 d): answers of a closed list (VQA), true or false of two pictures (NLVR2:
the fusion runs once a picture, and the head reads 4 d), and whether text and picture belong together (retrieval).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BertConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertOutput
from transformers.utils import ModelOutput

from eas_kit.errors import ConfigError
from eas_kit.post_norm import PostNormSite, post_norm_layers, post_norm_sites

TASKS = ("vqa", "nlvr2", "retrieval")
LABELS = {"vqa": 3129, "nlvr2": 2, "retrieval": 1}
IMAGE_SIZES = {"vqa": 384, "nlvr2": 288, "retrieval": 384}  # of the paper's settings
FALSE_TEXTS = 15  # beside the true one, in the training of the retrieval head
LANES = (("text", "self"), ("text", "cross"), ("image", "self"), ("image", "cross"))
SLOTS = {"self": "attention", "cross": "crossattention"}


class MeterConfig(PreTrainedConfig):
    """Sizes of METER. The defaults are the published model's, at 288 pixels.

    `task`: the head, of TASKS. `num_labels` of "vqa" is the number of answers, named in `id2label`.
    `vision_config.num_hidden_layers` counts the blocks that run: CLIP ViT-B/16 has 12, and METER leaves out the last.
    """

    model_type = "eas_meter"
    eas_names_its_sites = True  # of the model: there is no decoder to be surveyed
    sub_configs_defaults = {  # noqa: RUF012, the form of transformers' own
        "text_config": RobertaConfig,
        "vision_config": CLIPVisionConfig,
        "cross_modal_config": BertConfig,
    }

    text_config: dict | RobertaConfig | None = None
    vision_config: dict | CLIPVisionConfig | None = None
    cross_modal_config: dict | BertConfig | None = None
    task: str = "vqa"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"MeterConfig.task: wanted one of {TASKS}, got {self.task!r}")
        if self.text_config is None:  # roberta-base
            self.text_config = RobertaConfig(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
        if self.vision_config is None:  # CLIP ViT-B/16
            self.vision_config = CLIPVisionConfig(patch_size=16, image_size=288, num_hidden_layers=11)
        if self.cross_modal_config is None:
            self.cross_modal_config = BertConfig(num_hidden_layers=6)
        if self.id2label is None and kwargs.get("num_labels") is None:
            kwargs["num_labels"] = LABELS[self.task]
        super().__post_init__(**kwargs)
        if self.id2label == {0: "LABEL_0", 1: "LABEL_1"}:  # which transformers does not write into config.json
            self.id2label = {0: "answer 0", 1: "answer 1"}

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of a text: RoBERTa counts positions from behind its padding token's number."""
        return self.text_config.max_position_embeddings - self.text_config.pad_token_id - 1


def paper_size(task: str, image_size: int | None = None) -> MeterConfig:
    """The published model's sizes, with the head of a task, at `image_size` pixels (None: IMAGE_SIZES)."""
    if task not in TASKS:
        raise ConfigError(f"METER: wanted a task of {TASKS}, got {task!r}")
    side = IMAGE_SIZES[task] if image_size is None else image_size
    if not isinstance(side, int) or side < 16 or side % 16:
        raise ConfigError(f"METER: image_size: wanted a multiple of the 16 pixels of a patch, got {image_size!r}")
    return MeterConfig(task=task, vision_config=CLIPVisionConfig(patch_size=16, image_size=side, num_hidden_layers=11))


class CoAttentionLayer(GradientCheckpointingLayer):
    """One stream's layer: self-attention, cross-attention to the other stream, feed-forward, each post-norm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.crossattention = BertAttention(config, is_cross_attention=True)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(self, x: Tensor, mask: Tensor | None, other: Tensor, other_mask: Tensor | None) -> Tensor:
        """(B, S, d) from x (B, S, d) and the other stream's (B, T, d), both as they come into the layer."""
        x, _ = self.attention(x, mask)
        x, _ = self.crossattention(x, None, encoder_hidden_states=other, encoder_attention_mask=other_mask)
        return self.output(self.intermediate(x), x)


def make_head(task: str, width: int, num_labels: int) -> nn.Module:
    """The head of a task on poolers of `width`: two layers and a LayerNorm, for retrieval one linear."""
    if task == "retrieval":
        return nn.Linear(2 * width, num_labels)
    inputs = 4 * width if task == "nlvr2" else 2 * width
    return nn.Sequential(
        nn.Linear(inputs, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, num_labels)
    )


@dataclass
class MeterOutput(ModelOutput):
    """`logits` (B, labels); of retrieval (B, 1), with N texts an image (B, N)."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class Meter(PreTrainedModel):
    """METER with one head. `eas_kit.load_model("meter", ...)` fills it from the published checkpoint."""

    config: MeterConfig
    config_class = MeterConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("CoAttentionLayer", "CLIPEncoderLayer", "RobertaLayer")
    eas_modules_to_save = ("head",)
    """What trains beside the adapters: the head is new with every data set."""
    eas_layers = ("text.encoder.layer", "text_layers", "image_layers")
    """The lists of layers in whose linears LoRA goes: RoBERTa's, and the fusion's of both streams."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        fusion, width = config.cross_modal_config, config.cross_modal_config.hidden_size
        if fusion._attn_implementation is None:  # no model of its own sets it, and without it masks are left out
            fusion._attn_implementation = config._attn_implementation
        self.text = RobertaModel(config.text_config, add_pooling_layer=False)
        self.vision = CLIPVisionModel(config.vision_config)
        self.text_transform = nn.Linear(config.text_config.hidden_size, width)
        self.image_transform = nn.Linear(config.vision_config.hidden_size, width)
        self.token_type = nn.Embedding(3 if config.task == "nlvr2" else 2, width)
        layers = range(fusion.num_hidden_layers)
        self.text_layers = nn.ModuleList(CoAttentionLayer(fusion) for _ in layers)
        self.image_layers = nn.ModuleList(CoAttentionLayer(fusion) for _ in layers)
        self.text_pooler, self.image_pooler = nn.Linear(width, width), nn.Linear(width, width)
        self.head = make_head(config.task, width, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text.set_input_embeddings(value)

    # ---------------------------------------------------------------------------------------- what eas_kit asks for

    def eas_sites(self, kinds: tuple[str, ...] = ("mha",)) -> list[PostNormSite]:
        """The 24 attentions of the fusion layers, lane after lane; of kind "layer" the 12 layers, text's first."""
        numbers = range(len(self.text_layers))
        if tuple(kinds) == ("layer",):
            layers = [(f"{s} layer {n}", f"{s}_layers.{n}") for s in ("text", "image") for n in numbers]
            return post_norm_layers(self, layers, tuple(SLOTS.values()))
        if tuple(kinds) != ("mha",):
            raise ConfigError(
                f"kinds: wanted ('mha',) or ('layer',), got {tuple(kinds)}: of {type(self).__name__} the attentions of"
                " the fusion layers can be skipped, or those layers whole, their feed-forwards alone cannot"
            )
        named = [
            (f"{stream} {lane} {number}", f"{stream}_layers.{number}", SLOTS[lane])
            for stream, lane in LANES
            for number in numbers
        ]
        return post_norm_sites(self, named)

    def eas_parts(self) -> list[tuple[nn.Module, str]]:
        """Every attention and every feed-forward of text, image and fusion, for counting: (module, part)."""
        parts: list[tuple[nn.Module, str]] = []
        for layer in self.text.encoder.layer:
            parts += [(layer.attention, "attention"), (layer.intermediate, "ffn"), (layer.output, "ffn")]
        for layer in self.vision.encoder.layers:
            parts += [(layer.self_attn, "attention"), (layer.mlp, "ffn")]
        for layer in (*self.text_layers, *self.image_layers):
            parts += [(layer.attention, "attention"), (layer.crossattention, "attention")]
            parts += [(layer.intermediate, "ffn"), (layer.output, "ffn")]
        return parts

    def eas_inputs(self, tokens: int) -> dict[str, Tensor]:
        """Inputs without data, of one text of so many tokens and one picture (NLVR2: two), on the meta device."""
        side = self.config.vision_config.image_size
        shape = (1, 2, 3, side, side) if self.config.task == "nlvr2" else (1, 3, side, side)
        ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
        return {"input_ids": ids, "pixel_values": torch.empty(shape, device="meta")}

    # ---------------------------------------------------------------------------------------------------- forward

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, S, d): RoBERTa's last hidden states, through the text stream's linear."""
        return self.text_transform(self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 1 + patches, d): class and patch tokens of the last block that runs, through ln_post and the linear."""
        tokens = self.vision(pixel_values=pixel_values).last_hidden_state
        return self.image_transform(self.vision.post_layernorm(tokens))

    def streams(
        self, text: Tensor, image: Tensor, attention_mask: Tensor | None, image_type: int | Tensor = 1
    ) -> tuple[Tensor, Tensor]:
        """Both streams behind the last fusion layer, (B, S, d) and (B, T, d), from what the encoders return.

        `image_type`: 1, for the second picture of NLVR2 2; or one a row, (B, 1).
        """
        text, image = text + self.token_type.weight[0], image + self.token_type.weight[image_type]
        masks = {"config": self.config.cross_modal_config, "attention_mask": attention_mask}
        over_text = create_bidirectional_mask(inputs_embeds=text, **masks)
        from_image = create_bidirectional_mask(inputs_embeds=image, encoder_hidden_states=text, **masks)
        for text_layer, image_layer in zip(self.text_layers, self.image_layers, strict=True):
            text, image = text_layer(text, over_text, image, None), image_layer(image, None, text, from_image)
        return text, image

    def pool(self, text: Tensor, image: Tensor) -> Tensor:
        """(B, 2 d): the tanh poolers of both streams, on their first tokens."""
        pooled = (self.text_pooler(text[:, 0]), self.image_pooler(image[:, 0]))
        return torch.cat([torch.tanh(one) for one in pooled], dim=-1)

    def fuse(self, text: Tensor, image: Tensor, attention_mask: Tensor | None, image_type: int = 1) -> Tensor:
        """(B, 2 d): the poolers, from what `encode_text` and `encode_image` return."""
        return self.pool(*self.streams(text, image, attention_mask, image_type))

    def features(self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor) -> Tensor:
        """What the head reads: (B, 2 d), for NLVR2 (B, 4 d), with N texts an image (B N, 2 d)."""
        several = input_ids.dim() == 3  # (B, N, S)
        mask = attention_mask.flatten(0, 1) if several and attention_mask is not None else attention_mask
        text = self.encode_text(input_ids.flatten(0, 1) if several else input_ids, mask)
        if self.config.task == "nlvr2":
            both = [self.encode_image(pixel_values[:, which]) for which in (0, 1)]
            return torch.cat([self.fuse(text, one, mask, 1 + which) for which, one in enumerate(both)], dim=-1)
        image = self.encode_image(pixel_values)
        if several:
            image = image.repeat_interleave(input_ids.shape[1], dim=0)
        return self.fuse(text, image, mask)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MeterOutput:
        """Logits, and with labels the loss, a mean over the examples.

        Args:
            input_ids, attention_mask: (B, S); for retrieval also (B, N, S), N texts for each picture.
            pixel_values: (B, 3, H, W); for NLVR2 (B, 2, 3, H, W).
            labels: (B,) the class (of N texts: which is the picture's own), or (B, labels) soft targets from 0 to 1,
                with the loss of VQA: the sum over the answers of the binary cross-entropies.
            use_cache: of no effect, there is no cache.

        Raises ConfigError for shapes that do not go together, or another argument.
        """
        self._check(input_ids, pixel_values, labels, kwargs)
        logits = self.head(self.features(input_ids, attention_mask, pixel_values))
        if self.config.task == "retrieval" and input_ids.dim() == 3:
            logits = logits.view(input_ids.shape[:2])
        return MeterOutput(None if labels is None else self._loss(logits, labels), logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype)) * logits.shape[1]
        if logits.shape[1] == 1:  # one text a picture: does it belong to it?
            return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)

    def _check(
        self, input_ids: Tensor, pixel_values: Tensor | None, labels: Tensor | None, others: dict[str, Any]
    ) -> None:
        if others:
            raise ConfigError(
                f"{type(self).__name__}(...): there is no argument {sorted(others)[0]!r}; wanted input_ids,"
                " attention_mask, pixel_values, labels, as the task's collate makes them"
            )
        task, side = self.config.task, self.config.vision_config.image_size
        wanted = (2, 3, side, side) if task == "nlvr2" else (3, side, side)
        texts = "(B, S) or (B, N, S)" if task == "retrieval" else "(B, S)"
        if input_ids.dim() != 2 and not (task == "retrieval" and input_ids.dim() == 3):
            raise ConfigError(f"input_ids: wanted {texts} for task {task!r}, got {tuple(input_ids.shape)}")
        if pixel_values is None or tuple(pixel_values.shape) != (len(input_ids), *wanted):
            got = "nothing" if pixel_values is None else tuple(pixel_values.shape)
            raise ConfigError(
                f"pixel_values: wanted {(len(input_ids), *wanted)} for task {task!r} at {side} pixels, got {got}; take"
                " the processor that load_model returned with the model"
            )
        if labels is None:
            return
        soft = labels.is_floating_point()
        if tuple(labels.shape) != ((len(input_ids), self.config.num_labels) if soft else (len(input_ids),)):
            raise ConfigError(
                f"labels: wanted classes ({len(input_ids)},) in whole numbers or soft targets"
                f" {(len(input_ids), self.config.num_labels)} in float, got {tuple(labels.shape)} {labels.dtype}"
            )


AutoConfig.register(MeterConfig.model_type, MeterConfig)
AutoModelForImageTextToText.register(MeterConfig, Meter)  # the class that load_model takes for images and text
