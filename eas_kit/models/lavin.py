"""LaVIN (arXiv 2305.15023), from a stock Llama and the vision tower of a stock CLIP: models, processor, loading.

    picture -> CLIP, an adapter before every attention -> class token after every 4th block -> projection: (n, 6, d)
    text    -> [modality] <s> Image: [6 image tokens] ... question ...   or   [modality] <s> Image: N/A ... question ...

Both placeholders are tokens of the tokenizer, so that whatever `generate` does with token ids goes on as ever; their
embeddings are replaced, those of [modality] by one of two learned vectors (with a picture, without). No other position
attends to the modality token, which attends to itself; adapters read it in the mean over the prompt.

What LaVIN adds (adapters in the tower, projection, modality vectors) is part of the model and named in
`eas_modules_to_save`: `eas_kit.attach` adds the adapters of the language model, trains both, and saves both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.masking_utils import create_causal_mask

from eas_kit.config import is_int
from eas_kit.errors import ConfigError, PromptError
from eas_kit.pia import PIA
from eas_kit.prompt import find_cache, name_cache

POSITIONS = ("class", "patches")
IMAGE_TOKEN, MODALITY_TOKEN, PAD_TOKEN = "<image>", "<modality>", "<pad>"
_LLAMA_TAKES = inspect.signature(LlamaForCausalLM.forward).parameters


class LavinConfig(PreTrainedConfig):
    """Sizes of a LaVIN: those of its two parts, and of what stands between them.

    Raises ConfigError for parts of another kind and for sizes that do not go together.
    """

    model_type = "lavin"
    sub_configs_defaults = {"vision_config": CLIPVisionConfig, "text_config": LlamaConfig}  # noqa: RUF012

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    modality_token_id: int = 32001
    vision_step: int = 4
    """What is taken of a picture is taken after every so many blocks of the tower."""
    vision_positions: str = "class"
    """And that is the "class" token, as in LaVIN, or all "patches", of a tower whose class token nobody trained."""
    projector_size: int = 128
    """Width between the two linears from the tower to the language model."""
    vision_rank: int = 8
    """Rank of the adapters in the tower."""
    vision_groups: int = 2
    vision_scale: float = 1.0
    vision_temperature: float = 10.0
    vision_dropout: float = 0.1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        for name, wanted in (("text_config", LlamaConfig), ("vision_config", CLIPVisionConfig)):
            if not isinstance(getattr(self, name), wanted):
                found = type(getattr(self, name)).__name__
                raise ConfigError(f"LavinConfig.{name}: wanted a {wanted.__name__}, got a {found}")
        vision, groups = self.vision_config, self.vision_groups
        blocks, width = vision.num_hidden_layers, vision.hidden_size
        for name, most in (("vision_step", blocks), ("projector_size", None), ("vision_rank", None)):
            value = getattr(self, name)
            if not is_int(value, 1) or (most is not None and value > most):
                among = f"from 1 to {most}, the blocks of the vision tower" if most else "from 1 up"
                raise ConfigError(f"LavinConfig.{name}: wanted a whole number {among}, got {value!r}")
        if self.vision_positions not in POSITIONS:
            raise ConfigError(f"LavinConfig.vision_positions: wanted one of {POSITIONS}, got {self.vision_positions!r}")
        if not is_int(groups, 1) or self.vision_rank % groups or width % groups:
            raise ConfigError(
                f"LavinConfig.vision_groups: wanted a divisor of vision_rank {self.vision_rank} and of the tower's"
                f" width {width}, got {groups!r}"
            )

    @property
    def taps(self) -> tuple[int, ...]:
        """The blocks, counted from 1, after which image tokens are taken."""
        return tuple(range(self.vision_step, self.vision_config.num_hidden_layers + 1, self.vision_step))

    @property
    def image_seq_length(self) -> int:
        """Image tokens of one picture."""
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return len(self.taps) * (1 if self.vision_positions == "class" else patches)


class ImageProjector(nn.Sequential):
    """Linear - SiLU - Linear, from the tower's width to the language model's."""

    def __init__(self, vision_size: int, size: int, text_size: int) -> None:
        super().__init__(nn.Linear(vision_size, size), nn.SiLU(), nn.Linear(size, text_size))


class BeforeVisionAttention:
    """Forward pre-hook of an attention in the tower: adapts its input, routed by the mean over all of its positions."""

    def __init__(self, pia: PIA) -> None:
        self.pia = pia

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        n = kwargs["hidden_states"]
        wide = torch.promote_types(n.dtype, torch.float32)
        return args, {**kwargs, "hidden_states": self.pia(n, route=self.pia.route(n.mean(dim=1, dtype=wide)))}


def _names_the_cache(forward: Callable) -> Callable:
    """To those who look at its signature, a forward takes the KV cache under the name that this transformers has."""
    signature = inspect.signature(forward)
    name = next(name for name in ("cache", "past_key_values") if name in _LLAMA_TAKES)
    *own, keywords = signature.parameters.values()
    cache = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    forward.__signature__ = signature.replace(parameters=[*own, cache, keywords])
    return forward


class LavinForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """LaVIN. Parts: `language_model` (LlamaForCausalLM), `vision_tower` (CLIPVisionModel), and what trains:
    `vision_adapters` (one PIA with one path a block), `projector`, `modality` (2, d): without a picture, with one.
    """

    config: LavinConfig
    config_class = LavinConfig
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("cache", "past_key_values")
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = False  # its kernels take no mask in which one token is hidden
    _can_compile_fullgraph = True

    eas_modules_to_save = ("vision_adapters", "projector", "modality")
    # the steps of an optimiser are too small for half precision
    _keep_in_fp32_modules_strict = eas_modules_to_save

    def __init__(self, config: LavinConfig) -> None:
        super().__init__(config)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.vision_tower = CLIPVisionModel(config.vision_config)
        for name, part in _trained_parts(config).items():
            setattr(self, name, part)
        self._adapt_tower()
        self.generation_config.suppress_tokens = [config.image_token_id, config.modality_token_id]
        self.post_init()

    @classmethod
    def from_parts(
        cls, language_model: LlamaForCausalLM, vision_tower: CLIPVisionModel, *, seed: int = 0, **sizes: Any
    ) -> LavinForConditionalGeneration:
        """The model around a Llama and a tower, which become its parts; what it trains is drawn from `seed`.

        `sizes`: of `LavinConfig`, the two token ids among them.
        """
        attention = language_model.config._attn_implementation
        config = LavinConfig(text_config=language_model.config, vision_config=vision_tower.config, **sizes)
        with torch.device("meta"):  # no second copy of the parts
            model = cls(config)
        config.text_config, config.vision_config = language_model.config, vision_tower.config
        model.language_model, model.vision_tower = language_model, vision_tower
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, part in _trained_parts(config).items():
                part.apply(model._init_weights)
                setattr(model, name, part.to(language_model.device))
        model._adapt_tower()
        model.set_attn_implementation(attention)
        suppressed = model.generation_config.suppress_tokens
        model.generation_config = language_model.generation_config
        model.generation_config.suppress_tokens = suppressed
        return model.train(language_model.training)

    def _adapt_tower(self) -> None:
        for layer, pia in zip(self.vision_tower.encoder.layers, self.vision_adapters, strict=True):
            layer.self_attn.register_forward_pre_hook(BeforeVisionAttention(pia), with_kwargs=True)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PIA):
            module.reset_parameters()
        elif isinstance(module, ImageProjector):
            module[0].reset_parameters()
            module[2].reset_parameters()

    def get_decoder(self) -> nn.Module:
        return self.language_model.model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(n, image tokens, d) from n pictures (n, 3, H, W)."""
        seen = self.vision_tower(pixel_values.to(self.vision_tower.dtype), output_hidden_states=True).hidden_states
        taken = slice(0, 1) if self.config.vision_positions == "class" else slice(1, None)
        features = torch.cat([seen[block][:, taken] for block in self.config.taps], dim=1)
        return self.projector(features.to(self.projector[0].weight.dtype))

    @_names_the_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """LlamaForCausalLM's output, for rows (B, S) that `LavinProcessor` makes: the modality token comes first.

        `pixel_values` (n, 3, H, W): the pictures of the rows that have some, in the order of their placeholders.
        `attention_mask` (B, S so far): 0 where a row is padded, left or right. With `inputs_embeds`, which hold all
        vectors ready, the first attended position is taken for the modality token. Raises PromptError where a row does
        not begin with it, and where pictures and placeholders do not go together.
        """
        if (input_ids is None) == (inputs_embeds is None) or (input_ids is None and pixel_values is not None):
            raise PromptError(
                "LaVIN: wanted input_ids, with pixel_values where there are pictures, or inputs_embeds alone, which"
                " hold everything"
            )
        cache = find_cache(kwargs)
        if input_ids is not None:
            self._check_placeholders(input_ids, pixel_values, attention_mask, cache)
            inputs_embeds = self._embed(input_ids, pixel_values)
        name_cache(kwargs, _LLAMA_TAKES)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=self._attention_mask(inputs_embeds, attention_mask, cache, position_ids),
            position_ids=position_ids,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # generate looks which keywords it takes
    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The stock ones; the pictures also for the prefill of an assistant, which stock models do without."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        pixel_values = kwargs.get("pixel_values")
        if (
            pixel_values is not None
            and "pixel_values" not in inputs
            and _is_prefill(inputs["input_ids"], find_cache(inputs))
        ):
            inputs["pixel_values"] = pixel_values
        return inputs

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        image = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids)
        modality = self.modality(image.any(dim=1).long()).to(embeds.dtype)  # (B, d)
        embeds = torch.where((input_ids == self.config.modality_token_id)[..., None], modality[:, None], embeds)
        if pixel_values is None:
            return embeds
        return embeds.masked_scatter(image[..., None], self.get_image_features(pixel_values).to(embeds))

    def _check_placeholders(self, ids: Tensor, pixel_values: Tensor | None, mask: Tensor | None, cache: Any) -> None:
        """Of a prefill or a training forward; a step of decoding has none."""
        if ids.is_meta or torch.compiler.is_compiling() or not _is_prefill(ids, cache):
            return
        found = ids == self.config.modality_token_id
        first = _first_attended(mask, ids) if mask is None or mask.dim() == 2 else found.int().argmax(dim=1)
        right = (found.sum(dim=1) == 1) & found.gather(1, first[:, None])[:, 0]
        if not right.all():
            raise PromptError(
                f"LaVIN: rows {(~right).nonzero().flatten().tolist()} of the batch do not begin with the modality token"
                f" ({self.config.modality_token_id}), once and nowhere else; LavinProcessor puts it there: make the"
                " inputs with it, processor(text=..., images=...), and not with its tokenizer alone"
            )
        each, pictures = self.config.image_seq_length, 0 if pixel_values is None else len(pixel_values)
        places = int((ids == self.config.image_token_id).sum())
        if places != pictures * each:
            raise PromptError(
                f"LaVIN: {pictures} pictures take {pictures * each} image tokens, {each} each, and input_ids hold"
                f" {places}; make text and pictures into inputs in one call of LavinProcessor, and pass on all that it"
                " returns, pixel_values too"
            )

    def _attention_mask(self, embeds: Tensor, mask: Any, cache: Any, positions: Tensor | None) -> Any:
        """(B, 1, S, all positions so far): causal, without padding, and without the modality token but for itself."""
        if mask is not None and (not torch.is_tensor(mask) or mask.dim() != 2):
            return mask  # made by create_masks_for_generate
        column = _first_attended(mask, embeds)

        def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key != column[row]) | (query == key)

        return create_causal_mask(self.language_model.config, embeds, mask, cache, positions, and_mask_function=visible)

    def create_masks_for_generate(
        self, config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """What `generate` calls for a static cache, whose forwards take a mask that is ready."""
        return self._attention_mask(inputs_embeds, attention_mask, find_cache(kwargs), kwargs.get("position_ids"))


def _trained_parts(config: LavinConfig) -> dict[str, nn.Module]:
    """What LaVIN adds to its parts, new."""
    vision, width = config.vision_config, config.text_config.hidden_size
    settings = {
        name: getattr(config, f"vision_{name}") for name in ("rank", "groups", "scale", "temperature", "dropout")
    }
    adapters = [PIA(vision.hidden_size, **settings, paths=1) for _ in range(vision.num_hidden_layers)]
    return {
        "vision_adapters": nn.ModuleList(adapters),
        "projector": ImageProjector(vision.hidden_size, config.projector_size, width),
        "modality": nn.Embedding(2, width),
    }


def _is_prefill(ids: Tensor, cache: Any) -> bool:
    """True if these are whole rows: they have more than one token, which is looked at first, and nothing is cached."""
    return ids.shape[1] > 1 and (cache is None or int(cache.get_seq_length()) == 0)


def _first_attended(mask: Tensor | None, like: Tensor) -> Tensor:
    """(B,) where each row begins, behind what pads it on the left."""
    if mask is None:
        return torch.zeros(like.shape[0], dtype=torch.long, device=like.device)
    return mask.bool().int().argmax(dim=1)


class LavinProcessor(ProcessorMixin):
    """Texts and pictures to LaVIN's inputs: the tokenizer and CLIP's image processor, and the placeholders.

    A picture is `<image>` in the text, which becomes `image_seq_length` tokens; every row gets the modality token in
    front. The chat template writes "Image: <image>" or "Image: N/A" before the first question.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 6,
        image_token: str = IMAGE_TOKEN,
        modality_token: str = MODALITY_TOKEN,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_seq_length, self.image_token, self.modality_token = image_seq_length, image_token, modality_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.modality_token_id = tokenizer.convert_tokens_to_ids(modality_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.image_seq_length

    def __call__(self, images: Any = None, text: Any = None, return_tensors: str | None = None, **kwargs: Any) -> Any:
        """A BatchFeature: input_ids and attention_mask (B, S), pixel_values (n, 3, H, W) if there are pictures.

        `text`: one, or a list; `images`: pictures in the order of the `<image>` in the texts. Further keywords are
        those of transformers' processors (padding, padding_side, add_special_tokens, truncation ...). Raises
        PromptError for a text that holds the modality token already.
        """
        texts = [text] if isinstance(text, str) else text
        if texts is not None and any(self.modality_token in one for one in texts):
            raise PromptError(
                f"LavinProcessor: a text holds {self.modality_token!r}, which this processor puts in front of every row"
                " itself; take it out of the text"
            )
        batch = super().__call__(images=images, text=texts, **kwargs)
        if texts is not None:
            self._put_modality(batch)
        return BatchFeature(dict(batch), tensor_type=return_tensors)

    def _put_modality(self, batch: BatchFeature) -> None:
        """Before the first token that is no padding: as the tokenizer sees it, the beginning of the text is `<s>`."""
        marks = batch.get("attention_mask") or [
            [token != self.tokenizer.pad_token_id for token in row] for row in batch["input_ids"]
        ]
        starts = [next((place for place, mark in enumerate(row) if mark), len(row)) for row in marks]
        for key, value in (("input_ids", self.modality_token_id), ("attention_mask", 1)):
            for row, start in zip(batch.get(key, ()), starts):
                row.insert(start, value)


# ------------------------------------------------------------------------------------------------------- loading

_SIZES = ("vision_step", "vision_positions", "projector_size", "vision_rank", "vision_groups")
_SIZES = (*_SIZES, "vision_scale", "vision_temperature", "vision_dropout")
_OPTIONS = ("dtype", "torch_dtype", "attn_implementation", "weights_only", "trust_remote_code")
_OPTIONS = (*_OPTIONS, "token", "cache_dir", "local_files_only")


def load(name: str, **kwargs: Any) -> tuple[Any, LavinProcessor]:
    """What `eas_kit.load_model` does for "lavin" and "tiny-lavin": `(model, processor)`.

    Args:
        llama, clip: folders or names on the hub, of "lavin": a Llama with its tokenizer, and a CLIP (or its vision
            tower alone) with its image processor.
        seed: of what LaVIN trains: the adapters of the tower, the projection, the modality vectors.
        kwargs: sizes of `LavinConfig` (vision_step, vision_positions, projector_size, vision_rank, vision_groups,
            vision_scale, vision_temperature, vision_dropout); dtype, attn_implementation, token, cache_dir,
            local_files_only.

    Raises EASError for parts that are missing, of another kind or not fit for each other, and for other keywords.
    """
    parts = ("llama", "clip") if name == "lavin" else ()
    unknown = sorted(set(kwargs) - {*_SIZES, *_OPTIONS, *parts, "seed"})
    if unknown:
        raise ConfigError(
            f"load_model({name!r}): there is no {', '.join(unknown)} here; wanted some of"
            f" {', '.join((*parts, 'seed', *_SIZES, *_OPTIONS))}. For anything else put the model together once,"
            " model.save_pretrained(folder), processor.save_pretrained(folder), and load_model(folder, ...)"
        )
    seed = kwargs.pop("seed", 0)
    if not is_int(seed, 0):
        raise ConfigError(f"load_model({name!r}): seed: wanted a whole number from 0 up, got {seed!r}")
    sizes = {key: kwargs.pop(key) for key in _SIZES if key in kwargs}
    read = _read_parts if parts else _tiny_parts
    llama, tower, tokenizer, pictures, turns = read(kwargs)
    sizes = ({} if parts else TINY_SIZES) | sizes
    tokens = _add_tokens(tokenizer)
    _add_embeddings(llama, len(tokenizer), tokenizer.pad_token_id)
    model = LavinForConditionalGeneration.from_parts(llama, tower, seed=seed, **tokens, **sizes)
    mark = tokenizer.convert_ids_to_tokens(tokens["image_token_id"])
    processor = LavinProcessor(
        pictures,
        tokenizer,
        image_seq_length=model.config.image_seq_length,
        image_token=mark,
        chat_template=chat_template(*turns, mark),
    )
    return model.eval(), processor


# The bundled tower has two blocks, and LLaVA, which trained it, never read its class token: at best half of the numbers
# can be told from that (of 500, after 48,000 pictures with their labels), and nine in ten from the patches.
TINY_SIZES = {"vision_step": 2, "vision_positions": "patches"}


def _tiny_parts(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The bundled LLaVA's Llama, vision tower (a CLIP of two blocks), tokenizer and image processor."""
    from . import load_model

    llava, processor = load_model("tiny", **kwargs)
    with torch.device("meta"):
        llama = LlamaForCausalLM(llava.config.text_config)
    llama.model, llama.lm_head = llava.model.language_model, llava.lm_head
    llama.config = llama.model.config
    llama.generation_config = llava.generation_config
    turns = ("USER: ", "ASSISTANT:")  # what this Llama knows
    return llama.eval(), llava.model.vision_tower, processor.tokenizer, processor.image_processor, turns


def _read_parts(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    from transformers import CLIPConfig

    from . import _load, _read_processor

    llama, clip = (kwargs.pop(name, None) for name in ("llama", "clip"))
    if llama is None or clip is None:
        raise ConfigError(
            "load_model('lavin'): wanted llama= and clip=, folders or names on the hub, as in load_model('lavin',"
            f" llama='huggyllama/llama-7b', clip='openai/clip-vit-large-patch14'); got llama={llama!r}, clip={clip!r}."
            " For a LaVIN that was saved: its folder, as a path ('./lavin')"
        )
    model, tokenizer = _load(llama, None, dict(kwargs), _read_processor, _only("llama", LlamaForCausalLM, LlamaConfig))
    only_clip = _only("clip", CLIPVisionModel, CLIPVisionConfig, CLIPConfig)
    with _quiet():  # a whole CLIP has a text tower too, and each of its weights would be reported
        tower, pictures = _load(clip, None, dict(kwargs), _read_image_processor, only_clip)
    _check_pictures(clip, pictures, tower.config.image_size)
    return model, tower.to(model.dtype), tokenizer, pictures, ("Instruction: ", "Response:")


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _only(part: str, cls: type, *configs: type) -> Callable:
    """What chooses the class that loads a part: `cls`, or ConfigError for a model with another configuration."""

    def choose(name: str, config: Any, options: Any) -> type:
        if isinstance(config, configs):
            return cls
        found = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        wanted = {"llama": "a Llama (LlamaForCausalLM)", "clip": "a CLIP, or its vision tower (CLIPVisionModel)"}
        raise ConfigError(f"load_model('lavin', {part}={name!r}): wanted {wanted[part]}, that is {found}")

    return choose


def _read_image_processor(name: str, source: str, options: dict[str, Any]) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # needs no torchvision

    try:
        return CLIPImageProcessorPil.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"load_model('lavin', clip={name!r}): it has no image processor (preprocessor_config.json); save it beside"
            f" the weights with image_processor.save_pretrained(folder) ({str(error)[:200]})"
        ) from error


def _check_pictures(clip: Any, pictures: Any, size: int) -> None:
    made = pictures.crop_size if pictures.do_center_crop else pictures.size
    if {made.get("height"), made.get("width")} != {size}:
        raise ConfigError(
            f"load_model('lavin', clip={str(clip)!r}): its image processor makes pictures of {dict(made)}, and its"
            f" tower reads {size} x {size}; take the image processor that belongs to it"
        )


def _add_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids of both placeholders; what the tokenizer lacks of them, and a token to pad with, is added to it."""
    image, known = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN, tokenizer.get_vocab()
    new = [token for token in (image, MODALITY_TOKEN) if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    ids = tokenizer.convert_tokens_to_ids([image, MODALITY_TOKEN])
    return dict(zip(("image_token_id", "modality_token_id"), ids, strict=True))


@torch.no_grad()
def _add_embeddings(llama: LlamaForCausalLM, size: int, pad: int) -> None:
    """Rows for new tokens in embeddings and head: the mean of the old ones, so that none of them is likely."""
    old = llama.config.vocab_size
    if size > old:
        means = [part().weight.mean(dim=0) for part in (llama.get_input_embeddings, llama.get_output_embeddings)]
        with torch.random.fork_rng(devices=[]):  # what it draws is replaced
            llama.resize_token_embeddings(size, mean_resizing=False)
        for part, mean in zip((llama.get_input_embeddings, llama.get_output_embeddings), means, strict=True):
            part().weight[old:] = mean
    if llama.config.pad_token_id is None:
        llama.config.pad_token_id = pad
    llama.generation_config.pad_token_id = pad


def chat_template(user: str, assistant: str, mark: str = IMAGE_TOKEN) -> str:
    """Jinja: "Image: <image>" a picture, or "Image: N/A" where the first question has none, then the turn's text."""
    image, line = "{{ 'Image: " + mark + "\n' }}", "{{ '\n' }}"
    return (
        "{% set begun = namespace(value=false) %}{% for message in messages %}"
        "{% set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string"
        " else message['content'] %}"
        "{% if message['role'] == 'user' %}"
        "{% for part in parts %}{% if part['type'] == 'image' %}" + image + "{% endif %}{% endfor %}"
        "{% if not begun.value and not (parts | selectattr('type', 'equalto', 'image') | list) %}"
        "{{ 'Image: N/A\n' }}{% endif %}{% set begun.value = true %}"
        "{{ '" + user + "' }}{% elif message['role'] == 'assistant' %}{{ '" + assistant + " ' }}{% endif %}"
        "{% for part in parts %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}" + line + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + assistant + "{% endif %}"
    )


AutoConfig.register(LavinConfig.model_type, LavinConfig)
AutoModelForImageTextToText.register(LavinConfig, LavinForConditionalGeneration)
AutoProcessor.register(LavinConfig, LavinProcessor)
